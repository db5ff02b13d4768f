"""Trials: how often a candidate is promoted and rolled back, how soon, and whether anything is lost.

First through a real gateway and store (rollout_live.py): a thousand equal candidates and a thousand that are
worse by the margin, on a short course with a wide margin; regressions of ten points on the default course;
candidates that answer 503. Then the default course by simulation, a thousand of each: course, bets and guards
are the same code, tasks come as events, a task a second.

`--only WORDS` runs the cases whose names contain them, and `--part K/N` the K-th of N parts of each, so that
the whole can be run piece by piece.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from statistics import median
from typing import NamedTuple

from rollout_live import Case, Ended, migrate_all

from understudy.config import Rollout
from understudy.rollout.course import Step, decide
from understudy.rollout.evidence import Answered, Settled
from understudy.rollout.standing import Standing
from understudy.traffic.store import Route

SHORT = "margin = 0.25\nshares = [0.2, 0.4, 1.0]\ntasks = [10, 10, 10]"
LIVE = (
    Case("out of order", 100, 0.8, -1.0, SHORT, 5),
    Case("equal", 1000, 0.8, 0.8, SHORT, 10),
    Case("worse by the margin of 25 points", 1000, 0.8, 0.55, SHORT, 10),
    Case("ten points worse, default course", 24, 0.8, 0.7, "", 50),
)
SETTINGS = Rollout(replay_tasks=0, shadow_tasks=0)
LOOK_EVERY = 20
MOST_TASKS = 20_000
"""Then it counts as waiting."""
SIMULATED = (
    # name, migrations, incumbent, candidate
    ("equal", 1000, 0.8, 0.8),
    ("worse by the margin", 1000, 0.8, 0.8 - SETTINGS.margin),
    ("ten points worse", 300, 0.8, 0.7),
    ("ten points worse, from 90%", 300, 0.9, 0.8),
    ("ten points worse, from 70%", 300, 0.7, 0.6),
)
HEAD = ("case", "migrations", "promoted", "rolled back", "waiting or held", "tasks", "of the candidate")


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


def live(case: Case, folder: Path) -> Ended:
    return migrate_all(case, folder, lambda said: progress(f"{case.name}: {said}"))


def progress(said: str) -> None:
    print(f"\r{said}\033[K", end="", file=sys.stderr, flush=True)


def row(name: str, stages: Counter[str], tasks: list[int], candidates: list[int], *more: str) -> None:
    runs = stages.total()
    shares = [stages[stage] / runs for stage in ("promoted", "rolled_back")]
    cells = (name, f"{runs:,}", *(f"{share:.1%}" for share in shares), f"{1 - sum(shares):.1%}")
    print("|", " | ".join((*cells, f"{median(tasks):,.0f}", f"{median(candidates):,.0f}", *more)), "|")


def head(*more: str) -> None:
    print("|", " | ".join((*HEAD, *more)), "|")
    print("|" + "---|" * (len(HEAD) + len(more)))


def through_the_gateway(only: str, part: int, parts: int) -> None:
    head("at most", "requests", "failed for a client", "records lost", "doubled", "tasks that mixed models")
    used: list[Ended] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(case for case in LIVE if only in f"live {case.name}"):
            size = case.migrations // parts
            ended = live(case._replace(migrations=size, first=part * size), Path(folder) / str(number))
            counted = (
                max(ended.candidates),
                ended.requests,
                ended.failed,
                ended.lost,
                ended.doubled,
                ended.mixed,
            )
            name = f"{case.name} ({case.old:.0%} → {max(case.new, 0):.0%})"
            row(name, ended.stages, ended.tasks, ended.candidates, *(f"{n:,}" for n in counted))
            sys.stdout.flush()
            used.append(ended)
    cpu, wall = sum(e.cpu_s for e in used), sum(e.wall_s for e in used)
    print(
        f"\n{cpu / 60:.1f} minutes of CPU in {wall / 60:.0f} minutes on a machine shared with other work.",
        end=" ",
    )
    print("Where a candidate is out of order another model must answer the tasks that it began.\n")


def by_simulation(only: str, part: int, parts: int) -> None:
    head()
    for name, runs, incumbent, candidate in SIMULATED:
        if only not in f"simulated {name}":
            continue
        ends: list[End] = []
        size = runs // parts
        for seed in range(part * size, (part + 1) * size):
            ends.append(migrate(incumbent, candidate, seed))
            progress(f"{name}: {len(ends)} of {size}")
        stages = Counter(end.stage for end in ends)
        shown = f"{name} ({incumbent:.0%} → {candidate:.0%})"
        row(shown, stages, [e.tasks for e in ends], [e.candidates for e in ends])
        sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description="Trials through a gateway and by simulation.")
    parser.add_argument("--only", default="", help="words of a case's name, after `live` or `simulated`")
    parser.add_argument("--part", default="1/1", help="K/N: the K-th of N parts of the migrations")
    given = parser.parse_args()
    only, (part, parts) = given.only, (int(number) for number in given.part.split("/"))
    print("Through a real gateway and store (“at most”: tasks of the candidate until the end):\n")
    through_the_gateway(only, part - 1, parts)
    print("By simulation, on the default course:\n")
    by_simulation(only, part - 1, parts)
    print()
    print(
        "Required: an equal one promoted ≥ 90% and rolled back ≤ 5%; one worse by the margin promoted ≤ 5%;"
    )
    print("ten points worse rolled back within 300 tasks of it (median); an outage within 20 requests.")


if __name__ == "__main__":
    main()
