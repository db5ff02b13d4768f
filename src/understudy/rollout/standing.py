"""Where a trial stands: evidence folded into bets, task by task.

Each guard bets on its own; what is too slow or too dear is measured by the incumbent beside it, not by last
week's. It ignores where evidence comes from (evidence) and what follows from it (controller).
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from understudy.config import Rollout
from understudy.rollout.betting import Difference, Excess, Round, Rounds
from understudy.rollout.evidence import Answered, Event, Judged, Settled

RECENT = 500
"""Tasks of the incumbent from which its p95 is read."""
FEWEST = 20
"""Before it has had so many, nothing is called slow or dear."""


class Pair(NamedTuple):
    """A recorded call and the candidate's answer to a copy of it."""

    failed: bool
    invalid: bool
    was_invalid: bool
    """The incumbent's answer."""
    outcome: float | None
    was_outcome: float | None
    replayed: bool = False
    """The call was recorded before the trial began."""


class Ceiling:
    """The incumbent's recent p95, times a factor."""

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._recent: deque[float] = deque()
        self._ranked: list[float] = []
        self._limit: float | None = None

    def over(self, value: float | None, *, candidate: bool) -> float | None:
        """1 where ``value`` lies above what the incumbent had set before it, else 0; None while unknown."""
        if value is None:
            return None
        limit = self._limit
        if not candidate:
            self._keep(value)
        return None if limit is None else float(value > limit)

    def _keep(self, value: float) -> None:
        ranked = self._ranked
        if len(ranked) == RECENT:
            del ranked[bisect_left(ranked, self._recent.popleft())]
        self._recent.append(value)
        insort(ranked, value)
        if (count := len(ranked)) >= FEWEST:
            self._limit = ranked[(95 * count + 99) // 100 - 1] * self._factor


class Mean:
    """How often something happened."""

    def __init__(self) -> None:
        self._times = self._sum = 0.0

    def add(self, happened: float) -> None:
        self._times += 1
        self._sum += happened

    @property
    def cautious(self) -> float:
        """Rather too high where little was seen (rule of succession)."""
        return (self._sum + 1) / (self._times + 2)


class Guard:
    """One thing that must not happen to the candidate more often than beside it."""

    def __init__(self, tolerated: float) -> None:
        self.excess = Excess(tolerated)
        self._rounds = Rounds()
        self._usual = Mean()

    def add(self, happened: float | None, *, candidate: bool, alone: bool = False) -> None:
        """``alone``: the candidate has every task, so it is held against what was usual beside it."""
        if happened is None:
            return
        if candidate and alone:
            self.excess.add(Round(happened, 0.0), self._usual.cautious)
            return
        if not candidate:
            self._usual.add(happened)
        if closed := self._rounds.add(happened, candidate=candidate):
            self.excess.add(closed)

    def add_pair(self, candidate: float, incumbent: float) -> None:
        """Both models on the same request."""
        self.excess.add(Round(candidate, incumbent))


class Standing:
    """The evidence of one trial so far."""

    def __init__(self, settings: Rollout, alone_since: float = math.inf) -> None:
        """``alone_since``: when the candidate was given every task (Unix seconds)."""
        goal = 1.0 / settings.rollback_alpha
        self.difference = Difference(settings.margin, goal)
        self.replayed = Difference(settings.margin, goal)
        """Outcomes of copies of calls from before the trial: they can end it, never promote."""
        self.guards = {
            "errors": Guard(settings.errors),
            "invalid answers": Guard(settings.invalid),
            "time to the first byte": Guard(settings.slow),
            "total time": Guard(settings.slow),
            "cost per task": Guard(settings.costly),
        }
        self.answered = 0
        """Tasks of the candidate whose first call ended."""
        self.scored = 0
        """Tasks of the candidate of which somebody said how they went."""
        self.replays = 0
        """Copies answered of calls from before the trial."""
        self.pairs = 0
        """Copies answered in the shadow."""
        self.replay_over = False
        """There are no more recorded calls to answer."""
        self.alone_since = alone_since
        self._settled: deque[float] = deque(maxlen=max(settings.tasks, default=1))
        """When the latest of its tasks settled: no step wants to know of more."""
        self.judged = 0
        """Of the tasks with an outcome: those that a judge alone told of."""
        self.judge_trouble = ""
        """Why the judge brings no score; empty when it does, or there is none."""
        self.judge_broke = False
        """Its money is spent."""
        self.judge_lopsided = ""
        """In words, where it fails on one side more than on the other."""
        self.judge_usd = 0.0
        """US dollars it has cost."""
        self._first = Ceiling(settings.slow_factor)
        self._total = Ceiling(settings.slow_factor)
        self._cost = Ceiling(settings.costly_factor)

    def add(self, events: Iterable[Event]) -> None:
        """Fold in what happened, in order of time."""
        for event in events:
            if isinstance(event, Answered):
                self._add_answered(event)
            elif isinstance(event, Judged):
                self.judged += event.candidate
                self._add_outcome(event.outcome, candidate=event.candidate)
            else:
                cost = self._cost.over(event.usd, candidate=event.candidate)
                self._guard("cost per task", cost, event)
                self._add_outcome(event.outcome, candidate=event.candidate)
                if event.candidate:
                    self._settled.append(event.at)

    def add_pairs(self, pairs: Iterable[Pair]) -> None:
        """Fold in what the shadow showed."""
        for pair in pairs:
            self.replays += pair.replayed
            self.pairs += not pair.replayed
            self.guards["errors"].add_pair(float(pair.failed), 0.0)
            if not pair.failed:
                self.guards["invalid answers"].add_pair(float(pair.invalid), float(pair.was_invalid))
            if pair.outcome is not None and pair.was_outcome is not None:
                outcomes = self.replayed if pair.replayed else self.difference
                outcomes.add_pair(Round(pair.outcome, pair.was_outcome))

    def settled_since(self, moment: float) -> int:
        """Tasks of the candidate that settled after ``moment`` (Unix seconds), up to what a step wants."""
        return sum(at > moment for at in self._settled)

    def _add_answered(self, event: Answered) -> None:
        arm = event.candidate
        self.answered += arm
        self._guard("errors", float(event.failed), event)
        if event.failed:
            return
        self._guard("invalid answers", float(event.invalid), event)
        for name, ceiling, value in (
            ("time to the first byte", self._first, event.ttft_s),
            ("total time", self._total, event.total_s),
        ):
            self._guard(name, ceiling.over(value, candidate=arm), event)

    def _guard(self, name: str, happened: float | None, event: Answered | Settled) -> None:
        alone = event.at >= self.alone_since
        self.guards[name].add(happened, candidate=event.candidate, alone=alone)

    def _add_outcome(self, outcome: float | None, *, candidate: bool) -> None:
        if outcome is None:
            return
        self.scored += candidate
        self.difference.add(outcome, candidate=candidate)
