"""Cost per completed task: the ratio, its interval by hand, by simulation, and in the certificate."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from understudy.evaluate.certify import write
from understudy.evaluate.task import Attempted, figures, ratio, wilson
from understudy.evaluate.verify import verify


def test_the_ratio_by_hand() -> None:
    """Four calls of 1, 2, 3 and 2 dollars, two done: R = 4, residuals -3, 2, -1, 2."""
    got = ratio([("a", 1.0, 1.0), ("b", 2.0, 0.0), ("c", 3.0, 1.0), ("d", 2.0, 0.0)])
    assert got is not None
    half = 1.959963984540054 * math.sqrt((9 + 4 + 1 + 4) * 4 / 3 / 4)
    assert got.value == 4.0
    assert got.high == pytest.approx(4.0 + half)
    assert got.low == pytest.approx(max(0.0, 4.0 - half))


def test_a_conversation_counts_once() -> None:
    """Two conversations: residuals -3 + 2 and -1 + 2 are summed before they are squared."""
    got = ratio([("a", 1.0, 1.0), ("a", 2.0, 0.0), ("c", 3.0, 1.0), ("c", 2.0, 0.0)])
    assert got is not None
    assert got.high == pytest.approx(4.0 + 1.959963984540054 * math.sqrt((1 + 1) * 2 / 4))
    assert ratio([("a", 1.0, 1.0), ("a", 1.0, 1.0)]) == (1.0, None, None)
    assert ratio([("a", 1.0, 0.0)]) is None


def test_the_interval_covers_in_simulation() -> None:
    """Clusters of four calls; long answers are dearer and fail more often. 95% nominal, 400 runs."""
    rng = random.Random(11)
    costs = {True: (1.0, 2.0), False: (2.0, 5.0)}
    truth = (0.7 * 1.5 + 0.3 * 3.5) / 0.7
    covered = 0
    for _ in range(400):
        observed: list[tuple[str, float, float]] = []
        for cluster in range(60):
            lean = rng.uniform(-0.25, 0.25)
            for _ in range(4):
                done = rng.random() < 0.7 + lean
                observed.append((str(cluster), rng.uniform(*costs[done]), float(done)))
        got = ratio(observed)
        assert got is not None
        assert got.low is not None
        assert got.high is not None
        covered += got.low <= truth <= got.high
    assert 0.91 <= covered / 400 <= 0.98


def test_wilson_by_the_textbook() -> None:
    """8 of 10: 0.4902 to 0.9433."""
    assert wilson(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(5, 5)[1] == 1.0


def test_nothing_done_has_no_cost_and_an_unpriced_arm_none_either() -> None:
    assert figures("m", [Attempted("a", 1.0, False)]).usd is None
    unpriced = figures("m", [Attempted("a", None, True), Attempted("b", None, True)])
    assert (unpriced.usd, unpriced.completion) == (None, 1.0)


def test_the_certificate_shows_every_arm(drill: Path) -> None:
    certificate = write(drill)
    verify(drill / "certificate.json")
    assert certificate.tasks is not None
    host, student, small = certificate.tasks
    assert (host.model, student.model, small.model) == ("host/old", "local/student", "local/small")
    tokens = certificate.candidates[0].proof.incumbent_tokens
    assert (host.calls, host.completed) == (tokens.calls, tokens.completed)
    cost = certificate.incumbent.cost
    assert cost is not None
    assert cost.usd_per_completed_task is not None
    assert host.usd == pytest.approx(cost.usd_per_completed_task)
    assert host.usd_low is not None
    assert host.usd is not None
    assert host.usd_low < host.usd
    assert student.completion > small.completion
    assert "What a completed task costs" in (drill / "certificate.html").read_text()
