"""Trials: how often a candidate is promoted and rolled back, how soon, and whether anything is lost.

First through a real gateway and store (rollout_live.py): a thousand equal candidates and a thousand that are
worse by the margin, on a short course with a wide margin; regressions of ten points on the default course;
candidates that answer 503. Then the default course by simulation, a thousand of each: course, bets and guards
are the same code, tasks come as events, a task a second.

`--only WORDS` runs the cases whose names contain them, and `--part K/N` the K-th of N parts of each. With
`--keep FOLDER` every part is kept there as it ends, is not run a second time, and rows are those of all parts
kept so far; `--part 0/N` runs none. So the whole is run piece by piece, and an interruption loses one piece.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path
from statistics import median
from typing import NamedTuple

import msgspec
from rollout_live import Case, migrate_all

from understudy.config import Rollout
from understudy.rollout.course import Step, decide
from understudy.rollout.evidence import Answered, Settled
from understudy.rollout.standing import Standing
from understudy.traffic.routes import Route

SHORT = "margin = 0.25\nshares = [0.2, 0.4, 1.0]\ntasks = [10, 10, 10]"
LIVE = (
    Case("out of order", 100, 0.8, -1.0, SHORT, 5),
    Case("equal", 1000, 0.8, 0.8, SHORT, 10),
    Case("worse by the margin of 25 points", 1000, 0.8, 0.55, SHORT, 10),
    Case("ten points worse, default course", 100, 0.8, 0.7, "", 50),
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
    ("ten points worse, from 60%", 500, 0.6, 0.5),
    ("ten points worse, from 50%", 500, 0.5, 0.4),
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


class Kept(NamedTuple):
    """What came of some migrations of one case."""

    stages: dict[str, int]
    tasks: list[int]
    candidates: list[int]
    requests: int = 0
    failed: int = 0
    lost: int = 0
    doubled: int = 0
    mixed: int = 0
    cpu_s: float = 0.0

    def and_also(self, other: Kept) -> Kept:
        return Kept(
            dict(Counter(self.stages) + Counter(other.stages)),
            self.tasks + other.tasks,
            self.candidates + other.candidates,
            self.requests + other.requests,
            self.failed + other.failed,
            self.lost + other.lost,
            self.doubled + other.doubled,
            self.mixed + other.mixed,
            self.cpu_s + other.cpu_s,
        )


NOTHING = Kept({}, [], [])


class Pieces:
    """Which part of each case is run, and what is kept of all of them."""

    def __init__(self, part: int, parts: int, folder: Path | None) -> None:
        self.part, self.parts, self.folder = part, parts, folder

    def whole(self, name: str, migrations: int, run: Callable[[int, int], Kept]) -> Kept:
        """``run`` is told the first migration and how many."""
        size = migrations // self.parts
        if self.folder is None:
            return run((self.part - 1) * size, size)
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = self.folder / f"{name.replace(' ', '-')}.{self.part}-of-{self.parts}.json"
        if self.part and not kept.exists():
            kept.write_bytes(msgspec.json.encode(run((self.part - 1) * size, size)))
        found = self.folder.glob(f"{name.replace(' ', '-')}.*.json")
        parts = (msgspec.json.decode(path.read_bytes(), type=Kept) for path in sorted(found))
        return reduce(Kept.and_also, parts, NOTHING)


def live(case: Case, minutes: float, first: int, size: int) -> Kept:
    with tempfile.TemporaryDirectory() as folder:
        case = case._replace(migrations=size, first=first)
        told = partial(_told, case.name)
        ended = migrate_all(case, Path(folder) / "case", told, minutes)
    counted = (ended.requests, ended.failed, ended.lost, ended.doubled, ended.mixed, ended.cpu_s)
    return Kept(dict(ended.stages), ended.tasks, ended.candidates, *counted)


def _told(name: str, said: str) -> None:
    progress(f"{name}: {said}")


def simulated(name: str, incumbent: float, candidate: float, first: int, size: int) -> Kept:
    ends: list[End] = []
    for seed in range(first, first + size):
        ends.append(migrate(incumbent, candidate, seed))
        progress(f"{name}: {len(ends)} of {size}")
    return Kept(dict(Counter(e.stage for e in ends)), [e.tasks for e in ends], [e.candidates for e in ends])


def progress(said: str) -> None:
    print(f"\r{said}\033[K", end="", file=sys.stderr, flush=True)


def row(name: str, kept: Kept, *more: str) -> None:
    if not kept.tasks:
        return
    runs = len(kept.tasks)
    shares = [kept.stages.get(stage, 0) / runs for stage in ("promoted", "rolled_back")]
    cells = (name, f"{runs:,}", *(f"{share:.1%}" for share in shares), f"{1 - sum(shares):.1%}")
    print(
        "|",
        " | ".join((*cells, f"{median(kept.tasks):,.0f}", f"{median(kept.candidates):,.0f}", *more)),
        "|",
        flush=True,
    )


def head(*more: str) -> None:
    print("|", " | ".join((*HEAD, *more)), "|")
    print("|" + "---|" * (len(HEAD) + len(more)))


def through_the_gateway(only: str, pieces: Pieces, minutes: float) -> None:
    head("at most", "requests", "failed for a client", "records lost", "doubled", "tasks that mixed models")
    cpu_s = 0.0
    for case in LIVE:
        if only not in (name := f"live {case.name}"):
            continue
        kept = pieces.whole(name, case.migrations, partial(live, case, minutes))
        counted = (
            max(kept.candidates, default=0),
            *(kept.requests, kept.failed, kept.lost, kept.doubled, kept.mixed),
        )
        shown = f"{case.name} ({case.old:.0%} → {503 if case.new < 0 else f'{case.new:.0%}'})"
        row(shown, kept, *(f"{n:,}" for n in counted))
        cpu_s += kept.cpu_s
    print(f"\n{cpu_s / 60:.1f} minutes of CPU for gateway, indexer, models, clients and controller.", end=" ")
    print("Where a candidate is out of order another model must answer the tasks that it began.\n")


def by_simulation(only: str, pieces: Pieces) -> None:
    head()
    for name, runs, incumbent, candidate in SIMULATED:
        if only in (full := f"simulated {name}"):
            kept = pieces.whole(full, runs, partial(simulated, name, incumbent, candidate))
            row(f"{name} ({incumbent:.0%} → {candidate:.0%})", kept)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trials through a gateway and by simulation.")
    parser.add_argument("--only", default="", help="words of a case's name, after `live` or `simulated`")
    parser.add_argument("--part", default="1/1", help="K/N: the K-th of N parts of the migrations")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep each part here, and show all kept")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="of each live case; then what has not ended waits"
    )
    given = parser.parse_args()
    only, (part, parts) = given.only, (int(number) for number in given.part.split("/"))
    pieces = Pieces(part, parts, given.keep)
    print("Through a real gateway and store (“at most”: tasks of the candidate until the end):\n")
    through_the_gateway(only, pieces, given.minutes)
    print("By simulation, on the default course:\n")
    by_simulation(only, pieces)
    print()
    print(
        "Required: an equal one promoted ≥ 90% and rolled back ≤ 5%; one worse by the margin promoted ≤ 5%;"
    )
    print("ten points worse rolled back within 300 tasks of it (median); an outage within 20 requests.")


if __name__ == "__main__":
    main()
