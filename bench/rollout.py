"""Trials by simulation: how often a candidate is promoted and rolled back, and how soon.

The course, bets and guards are the product's own, with the config's defaults; tasks come as events instead of
through gateway and store, which tests/rollout does with fewer. Times are virtual: a task a second.
"""

from __future__ import annotations

import random
import sys
from statistics import median
from typing import NamedTuple

from understudy.config import Rollout
from understudy.rollout.course import Step, decide
from understudy.rollout.evidence import Answered, Settled
from understudy.rollout.standing import Standing
from understudy.traffic.store import Route

SETTINGS = Rollout(shadow_tasks=0)
LOOK_EVERY = 20
MOST_TASKS = 20_000
"""Then it counts as waiting."""
CASES = (
    # name, migrations, incumbent, candidate
    ("equal", 500, 0.8, 0.8),
    ("worse by the margin", 300, 0.8, 0.8 - SETTINGS.margin),
    ("ten points worse", 150, 0.8, 0.7),
    ("ten points worse, from 90%", 150, 0.9, 0.8),
)


class End(NamedTuple):
    stage: str
    tasks: int
    candidates: int
    """Tasks of the candidate."""


def migrate(incumbent: float, candidate: float, seed: int) -> End:
    """One trial from the first canary step to its end."""
    rng, standing = random.Random(seed), Standing(SETTINGS)
    route = Route("a", 2, "v/old", (), "canary", 0.0, "", "", "", "l/new", SETTINGS.shares[0], 2)
    dealt = 0
    for now in range(1, MOST_TASKS + 1):
        arm = rng.random() < route.share
        dealt += arm
        failed, seconds = rng.random() < 0.005, rng.lognormvariate(0.0, 0.5)
        right = float(rng.random() < (candidate if arm else incumbent))
        standing.add(
            [Answered(now, arm, failed, False, seconds / 3, seconds), Settled(now, arm, right, 0.001)]
        )
        if now % LOOK_EVERY:
            continue
        step: Step | None = decide(route, standing, SETTINGS, now).step
        if step and step.stage != "canary":
            return End(step.stage, now, dealt)
        if step:
            route = route._replace(share=step.share, changed_at=float(now))
    return End("waiting", MOST_TASKS, dealt)


def main() -> None:
    columns = (
        "case",
        "migrations",
        "promoted",
        "rolled back",
        "waiting or held",
        "tasks",
        "of the candidate",
    )
    print(f"| {' | '.join(columns)} |")
    print("|---|---|---|---|---|---|---|")
    for name, runs, incumbent, candidate in CASES:
        ends: list[End] = []
        for seed in range(runs):
            ends.append(migrate(incumbent, candidate, seed))
            print(f"\r{name}: {seed + 1} of {runs}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        shares = [sum(e.stage == stage for e in ends) / runs for stage in ("promoted", "rolled_back")]
        print(
            f"| {name} ({incumbent:.0%} → {candidate:.0%}) | {runs} | {shares[0]:.1%} | {shares[1]:.1%} "
            f"| {1 - sum(shares):.1%} | {median(e.tasks for e in ends):,.0f} "
            f"| {median(e.candidates for e in ends):,.0f} |"
        )
    print()
    print(
        "Required: an equal one promoted ≥ 90% and rolled back ≤ 5%; one worse by the margin promoted ≤ 5%;"
    )
    print("ten points worse rolled back within 300 tasks of the candidate (median).")


if __name__ == "__main__":
    main()
