"""Each guard by itself: what is bad in one respect alone ends the trial, and by that name."""

from __future__ import annotations

import random

import pytest

from understudy.config import Rollout
from understudy.rollout.course import alarm
from understudy.rollout.evidence import Answered, Event, Settled
from understudy.rollout.standing import Standing


def after(tasks: int, bad: str = "", share: float = 0.3) -> Standing:
    """A trial in which the candidate is as good as the incumbent but for one thing."""
    rng, standing = random.Random(5), Standing(Rollout())
    for number in range(tasks):
        at, arm = float(number), rng.random() < share
        wrong = arm and rng.random() < 0.5
        first, total = rng.uniform(0.2, 0.3), rng.uniform(0.8, 1.0)
        events: list[Event] = [
            Answered(
                at,
                arm,
                wrong and bad == "errors",
                wrong and bad == "invalid answers",
                first * (4.0 if wrong and bad == "time to the first byte" else 1.0),
                total * (4.0 if wrong and bad == "total time" else 1.0),
            ),
            Settled(at, arm, None, 0.01 * (4.0 if wrong and bad == "cost per task" else 1.0)),
        ]
        standing.add(events)
    return standing


@pytest.mark.parametrize(
    "bad", ["errors", "invalid answers", "time to the first byte", "total time", "cost per task"]
)
def test_one_thing_that_is_bad_is_enough_and_is_named(bad: str) -> None:
    assert alarm(after(400, bad), Rollout()).startswith(f"{bad}:")


def test_nothing_bad_is_no_alarm() -> None:
    assert alarm(after(2000), Rollout()) == ""
