"""The bets against another implementation, `ville`, where settings coincide: one mean, the same fractions."""

from __future__ import annotations

import random

import pytest

from understudy.evaluate.sequential import LARGEST_LOSS, WEIGHTS, _after_fail, _after_pass, _Draw

ville = pytest.importorskip("ville.means")
np = pytest.importorskip("numpy")


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
            draw = _Draw(score, mean, 0.0, 0.0, 1.0, (bet, bet, bet))
            up, down = _after_pass(up, draw, 0.0), _after_fail(down, draw, 0.0)
        assert sum(up) == pytest.approx(np.exp(theirs._log_up[place]), rel=1e-9)
        assert sum(down) == pytest.approx(np.exp(theirs._log_down[place]), rel=1e-9)


def _plugged(scores: list[float]) -> tuple[object, object]:
    """Number and predictable variance at each step."""
    steps, _, variance = ville._PlugIn().step(np.array(scores))
    return steps, variance
