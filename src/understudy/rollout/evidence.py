"""What a trial on live traffic goes by: which model a task was dealt to, and how the task went.

A task is what always goes to one model: the calls of an ``x-task-id``; without one, of a key; without that, a
single call. It counts for the model it was dealt to, also where another had to answer in its place. Two
things are told of it: how its first call went, as soon as that ended, and what came of it, some seconds after
it began. Both are read back from the store by times that are recorded there, so a process that starts again
tells the same in the same order. It ignores what follows from it (standing, controller).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from statistics import fmean
from typing import NamedTuple

from understudy.errors import InputError
from understudy.evaluate.grade import grade, is_json, reply_of, standard
from understudy.protocol import Json
from understudy.traffic.rows import StoredCall
from understudy.traffic.sample import Exchange, exchange
from understudy.traffic.store import Store

LAG_S = 2.0
"""How far behind the present is read: by then a call is in the store."""
LONGEST_S = 900.0
"""Calls that last longer are not waited for."""


class Answered(NamedTuple):
    """A task's first call ended."""

    at: float
    """Unix seconds."""
    candidate: bool
    """Dealt to the candidate, else to the incumbent."""
    failed: bool
    """The model it was dealt to could not answer, whoever answered in its place."""
    invalid: bool
    """Empty, cut off, or not the JSON that was asked for."""
    ttft_s: float
    total_s: float


class Settled(NamedTuple):
    """A task's outcome, as far as it was known when its time had come."""

    at: float
    candidate: bool
    outcome: float | None
    """Mean grade of its calls in [0, 1]; None where nobody said anything."""
    usd: float | None
    """What it cost; None where a call has no price."""


Event = Answered | Settled


class _Task(NamedTuple):
    begun: float
    candidate: bool
    first: str
    """Key of its first call."""


class Evidence:
    """Tells of each task of one trial once, in order of time."""

    def __init__(
        self, store: Store, alias: str, *, candidate: str, incumbent: str, since: float, settle_s: float
    ) -> None:
        self._store = store
        self._alias = alias
        self._arms = {candidate: True, incumbent: False}
        self._since = self._told = since
        self._settle_s = settle_s
        self._tasks: dict[str, _Task | None] = {}
        self._answered: set[str] = set()
        self._settled: set[str] = set()

    def until(self, now: float) -> list[Event]:
        """What has happened since the last time it was asked. Raises StoreError."""
        upto = max(self._told, now - LAG_S)
        since = max(self._since, self._told - self._settle_s - LONGEST_S)
        calls = list(self._store.calls(alias=self._alias, since=since, until=upto))
        events: list[Event] = [*self._first_calls(calls, upto), *self._outcomes(calls, upto)]
        self._told = upto
        return sorted(events, key=lambda event: event.at)

    def _first_calls(self, calls: Iterable[StoredCall], upto: float) -> Iterator[Answered]:
        for stored in calls:
            call, name = stored.call, _identity(stored)
            task = self._task(name, stored)
            ended = call.at + call.total_s
            if task and task.first == call.key and ended <= upto and name not in self._answered:
                self._answered.add(name)
                failed = _failed(stored)
                bad = not failed and (call.finish_reason == "length" or self._invalid(call.key))
                yield Answered(ended, task.candidate, failed, bad, call.ttft_s, call.total_s)

    def _outcomes(self, calls: Iterable[StoredCall], upto: float) -> Iterator[Settled]:
        due: dict[str, list[StoredCall]] = {}
        for stored in calls:
            name = _identity(stored)
            task = self._tasks.get(name)
            end = task.begun + self._settle_s if task else upto
            if task and stored.call.at <= end <= upto and name not in self._settled:
                due.setdefault(name, []).append(stored)
        self._settled.update(due)
        said = {f.call for f in self._store.feedback([s.call.key for of in due.values() for s in of])}
        for name, of_task in due.items():
            task = self._tasks[name]
            assert task is not None, "only tasks of the trial are due"
            end = task.begun + self._settle_s
            spoken_of = [stored.call.key for stored in of_task if stored.call.key in said]
            yield Settled(end, task.candidate, self._outcome(spoken_of, end), _cost(of_task))

    def _task(self, name: str, stored: StoredCall) -> _Task | None:
        """The call's task; None for one that neither model was asked for."""
        if name not in self._tasks:
            dealt_to = stored.call.attempts[0].target if stored.call.attempts else stored.call.target
            arm = self._arms.get(dealt_to)
            self._tasks[name] = None if arm is None else _Task(stored.call.at, arm, stored.call.key)
        return self._tasks[name]

    def _outcome(self, keys: Iterable[str], end: float) -> float | None:
        found = (exchange(self._store, key, until=end) for key in keys)
        grades = [value for each in found if each is not None and (value := graded(each)) is not None]
        return fmean(grades) if grades else None

    def _invalid(self, key: str) -> bool:
        """Recorded without its texts, an answer is not judged."""
        found = exchange(self._store, key)
        return found is not None and useless(found.request, found.body)


def graded(each: Exchange) -> float | None:
    """How right an answer was, in [0, 1]: by the right answer where one was reported, else the mean of the
    numbers that were; None without either, and for a grader that does not exist."""
    if each.expected is not None:
        try:
            rule = standard(each)
            return grade(rule.grader, reply_of(each.body), rule.expected)
        except InputError:  # a tag of the application's; a trial is not the place to refuse it
            return None
    numbers = [value for value in each.grades.values() if 0.0 <= value <= 1.0]
    return fmean(numbers) if numbers else None


def _identity(stored: StoredCall) -> str:
    call = stored.call
    return f"task {call.task_id}" if call.task_id else f"key {call.caller}" if call.caller else call.key


def _failed(stored: StoredCall) -> bool:
    """Whether the first attempt came to nothing; a client that went away is nobody's failure."""
    call = stored.call
    if not call.attempts:
        return call.status >= 500
    first = call.attempts[0]
    refused = first.status == 0 or first.status == 429 or first.status >= 500
    return call.status != 499 and (refused or bool(first.error))


def useless(request: Json, body: Json) -> bool:
    """Whether an answer is of no use, whatever it says: empty, or not the JSON that was asked for."""
    reply = reply_of(body)
    if reply.tool_calls:
        return not all(is_json(c.arguments or "{}") for c in reply.tool_calls)
    wants_json = "json" in str((request.get("response_format") or {}).get("type", ""))
    return not reply.text.strip() or (wants_json and not is_json(reply.text))


def _cost(calls: Iterable[StoredCall]) -> float | None:
    costs = [stored.cost.usd if stored.cost else None for stored in calls]
    return None if None in costs else sum(usd for usd in costs if usd is not None)
