"""The bets against other implementations where settings coincide: `ville` with, `confseq` without
replacement."""

from __future__ import annotations

import random
from typing import Any

import pytest

from understudy.evaluate.sequential import (
    LARGEST_LOSS,
    WEIGHTS,
    Design,
    Draw,
    SequentialTest,
    Unit,
    after_fail,
    after_pass,
)

ville = pytest.importorskip("ville.means")
np = pytest.importorskip("numpy")
NEVER = 1e-300
"""Error rates that no evidence reaches."""


def confseq() -> Any:
    """`confseq.betting`; not in the lock, for its C++ half wants Boost and the package numpy before 2."""
    np.float_ = np.float64
    return pytest.importorskip("confseq.betting")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.1, 0.5, 0.93])
def test_capital_at_every_mean_is_that_of_villes_betting_sequence(seed: int, share: float) -> None:
    """Waudby-Smith & Ramdas 2024, theorem 3: upward and downward capital at each of 101 means."""
    rng = random.Random(seed)
    scores = [float(rng.random() < share) if seed % 2 else rng.betavariate(2, 3) for _ in range(300)]
    theirs = ville.BettingCS(alpha=0.05, c=LARGEST_LOSS, grid=101, intersect=False)
    bets = ville._plugin_lambda(*_plugged(scores), 0.05)
    theirs.update(np.array(scores))
    for place in range(5, 96, 10):
        mean = place / 100
        up, down = list(WEIGHTS), list(WEIGHTS)
        for score, bet in zip(scores, bets, strict=True):
            draw = Draw(score, mean, 0.0, 0.0, 1.0, (bet, bet, bet))
            up, down = after_pass(up, draw, 0.0), after_fail(down, draw, 0.0)
        assert sum(up) == pytest.approx(np.exp(theirs._log_up[place]), rel=1e-9)
        assert sum(down) == pytest.approx(np.exp(theirs._log_down[place]), rel=1e-9)


def _plugged(scores: list[float]) -> tuple[object, object]:
    """Number and predictable variance at each step."""
    steps, _, variance = ville._PlugIn().step(np.array(scores))
    return steps, variance


def martingale(scores: Any, mean: float, bets: Any, *, of: int, upward: bool) -> Any:
    """Capital after each score by confseq, the average over our three bets."""
    side = "positive" if upward else "negative"
    total = np.zeros(len(scores))
    for place, weight in enumerate(WEIGHTS):

        def bet(_: Any, __: Any, place: int = place) -> Any:
            return bets[:, place]

        fixed: dict[str, Any] = {f"lambdas_fn_{side}": bet, "theta": int(upward)}
        total += weight * confseq().betting_mart(scores, mean, N=of, trunc_scale=LARGEST_LOSS, **fixed)
    return total


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.6, 0.9, 0.99])
def test_evidence_without_replacement_is_that_of_confseqs_betting_martingale(seed: int, share: float) -> None:
    """Waudby-Smith & Ramdas 2024, §5, by their own package: 200 items drawn without replacement, the very
    bets of our test, evidence after every draw.

    With an incumbent that is always right a difference δ is a mean of 1+δ, and truncation coincides too.
    Theirs is infinite also where the mean can only be lower: that says nothing against "worse by d or more".
    """
    confseq()
    rng = random.Random(seed)
    scores = np.array([float(rng.random() < share) if seed else rng.betavariate(4, 2) for _ in range(200)])
    test = SequentialTest([Unit(1.0)] * len(scores), Design(0.3, NEVER, NEVER))
    for score in scores:
        test.observe(Unit(1.0), float(score))
    bets = np.array([draw.bets for draw in test.draws])
    theirs = martingale(scores, 0.7, bets, of=len(scores), upward=True)
    ours = np.array([point.e_pass for point in test.path])
    both = np.isfinite(ours) & np.isfinite(theirs)
    assert both.sum() > 50
    assert ours[both] == pytest.approx(theirs[both], rel=1e-9)
    # ours looks at what is certain after a draw, theirs before the next
    assert np.isinf(theirs[np.isinf(ours)][1:]).all()


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_evidence_against_a_difference_is_confseqs_downward_martingale(share: float) -> None:
    confseq()
    rng = random.Random(share)
    scores = np.array([float(rng.random() < share) for _ in range(120)])
    test = SequentialTest([Unit(0.0)] * 200, Design(0.1, NEVER, NEVER))
    stakes = list(WEIGHTS)
    ours: list[float] = []
    for score in scores:
        test.observe(Unit(0.0), float(score))
        stakes = after_fail(stakes, test.draws[-1], 0.5)
        ours.append(sum(stakes))
    bets = np.array([draw.bets for draw in test.draws])
    theirs = martingale(scores, 0.5, bets, of=200, upward=False)
    possible = np.isfinite(theirs)
    assert possible.sum() > 90
    assert np.array(ours)[possible] == pytest.approx(theirs[possible], rel=1e-9)
