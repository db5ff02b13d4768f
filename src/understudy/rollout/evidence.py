"""What a trial on live traffic goes by: which model a task was dealt to, and how the task went.

A task is what always goes to one model: the calls of an ``x-task-id``; without one, of a key; without that, a
single call. It counts for the model it was dealt to, also where another had to answer in its place. Two
things are told of it: how its first call went, as soon as that ended, and what came of it, some seconds after
it began. Both are read back from the store by times that are recorded there, so a process that starts again
tells the same in the same order. It ignores what follows from it (standing, controller).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from understudy.errors import InputError
from understudy.evaluate.grade import grade, is_json, reply_of, standard
from understudy.protocol import Json
from understudy.traffic.record import Feedback
from understudy.traffic.rows import StoredCall
from understudy.traffic.sample import Exchange, exchanges_of
from understudy.traffic.store import Store

LAG_S = 2.0
"""How far behind the present is read: by then a call is in the store."""
LONGEST_S = 900.0
"""Calls that last longer are not waited for."""
SLACK_S = 1.0
"""A call's key, by which it is found, is made a moment before its time is noted."""
FEW = 1000
"""So many keys are remembered without a thought."""


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
    call: str = ""
    """Key of its last answer; empty where there was none."""


class Judged(NamedTuple):
    """A judge's score of a task of which nobody else said how it went."""

    at: float
    """When it was given, Unix seconds."""
    candidate: bool
    outcome: float
    """In [0, 1]."""


Event = Answered | Settled | Judged


class _Task(NamedTuple):
    begun: float
    candidate: bool
    first: str
    """Key of its first call."""


class _Heard(NamedTuple):
    """A name by the time of its latest call."""

    at: float
    task: _Task | None
    """None for one that neither model was asked for."""


class _Turn(NamedTuple):
    """What a trial has come to, before any text is opened."""

    answered: list[tuple[_Task, StoredCall]]
    """First calls that have ended."""
    due: list[tuple[_Task, list[StoredCall]]]
    """Tasks whose time has come, with their calls until then."""


class Evidence:
    """Tells of each task of one trial once, in order of time; `look` reads for many of them at once."""

    def __init__(
        self,
        alias: str,
        *,
        candidate: str,
        incumbent: str,
        since: float,
        settle_s: float,
        idle_s: float = 1800.0,
    ) -> None:
        """``idle_s``: seconds without a call after which a task's name is forgotten."""
        self.alias = alias
        self._arms = {candidate: True, incumbent: False}
        self._since = self._told = since
        self._settle_s = settle_s
        self._read: dict[str, float] = {}
        """Calls that were read, with their times, as far back as one may still come into the store."""
        self._ahead: list[StoredCall] = []
        """Calls nearer to the present than is told of."""
        self._idle_s = max(idle_s, settle_s, LONGEST_S)
        self._tasks: dict[str, _Heard] = {}
        """By name, in the order in which they were last heard of."""
        self._running: dict[_Task, StoredCall] = {}
        """First calls that have not ended."""
        self._open: dict[_Task, list[StoredCall]] = {}
        """Calls of the tasks that have not settled."""

    @property
    def reads_since(self) -> float:
        """No call that began before this moment (Unix seconds) is still to come."""
        return max(self._since, self._told - self._settle_s - LONGEST_S)

    def unread(self, keys: Iterable[str]) -> list[str]:
        """Those of these calls that it has not been given."""
        return [key for key in keys if key not in self._read]

    def give(self, calls: Iterable[StoredCall]) -> None:
        """Calls of the alias, in order of time."""
        for stored in calls:
            self._read[stored.call.key] = stored.call.at
            if stored.call.at >= self._since:
                self._ahead.append(stored)

    def advance(self, upto: float) -> _Turn:
        """Go on to a time (Unix seconds)."""
        self._told = max(self._told, upto)
        here = [stored for stored in self._ahead if stored.call.at < self._told]
        self._ahead = [stored for stored in self._ahead if stored.call.at >= self._told]
        for stored in sorted(here, key=lambda each: each.call.key):
            self._hear(stored)
        turn = _Turn(list(self._answered()), list(self._due()))
        self._forget()
        oldest = self.reads_since - SLACK_S
        if len(self._read) > 2 * FEW and next(iter(self._read.values())) < oldest:
            self._read = {key: at for key, at in self._read.items() if at >= oldest}
        return turn

    def _hear(self, stored: StoredCall) -> None:
        name, at = _identity(stored), stored.call.at
        heard = self._tasks.pop(name, None)
        if heard is None or self._over(name, heard, at):
            heard = _Heard(at, self._task(stored))
            if heard.task:
                self._open[heard.task], self._running[heard.task] = [], stored
        self._tasks[name] = heard._replace(at=at)
        if heard.task and heard.task in self._open:
            self._open[heard.task].append(stored)

    def _answered(self) -> Iterator[tuple[_Task, StoredCall]]:
        for task, stored in list(self._running.items()):
            if ended_at(stored) <= self._told:
                del self._running[task]
                yield task, stored

    def _due(self) -> Iterator[tuple[_Task, list[StoredCall]]]:
        for task, calls in list(self._open.items()):
            if (end := task.begun + self._settle_s) <= self._told:
                del self._open[task]
                yield task, [stored for stored in calls if stored.call.at <= end]

    def _over(self, name: str, heard: _Heard, at: float) -> bool:
        """Whether a call at that time would begin a task anew; a key is one task for ever."""
        return at - heard.at > self._idle_s and not name.startswith("key ")

    def _forget(self) -> None:
        """Names of tasks that are over: a trial takes as much memory as its last half hour, and its keys."""
        gone: list[str] = []
        for name, heard in self._tasks.items():
            if self._told - heard.at <= self._idle_s:
                break
            if self._over(name, heard, self._told):
                gone.append(name)
        for name in gone:
            del self._tasks[name]

    def _task(self, stored: StoredCall) -> _Task | None:
        call = stored.call
        arm = self._arms.get(call.attempts[0].target if call.attempts else call.target)
        return None if arm is None else _Task(call.at, arm, call.key)

    def tell(
        self, turn: _Turn, texts: Mapping[str, Exchange], said: Mapping[str, list[Feedback]]
    ) -> list[Event]:
        """The events of a turn, with the texts that were opened for it and what was said of its calls."""
        events: list[Event] = [
            _answer(task, stored, texts.get(stored.call.key)) for task, stored in turn.answered
        ]
        for task, calls in turn.due:
            end = task.begun + self._settle_s
            grades = [
                value
                for stored in calls
                if (value := _grade(texts.get(stored.call.key), said.get(stored.call.key, ()), end))
                is not None
            ]
            outcome = fmean(grades) if grades else None
            last = [stored.call.key for stored in calls if stored.call.status < 400][-1:]
            events.append(Settled(end, task.candidate, outcome, _cost(calls), *last))
        return sorted(events, key=lambda event: event.at)


def look(store: Store, trials: Sequence[Evidence], now: float) -> list[list[Event]]:
    """What has happened to each of some trials since the last look; each statement asks for all of them.

    Raises StoreError.
    """
    if not trials:
        return []
    arrived = store.arrived([t.alias for t in trials], min(t.reads_since for t in trials) - SLACK_S)
    fresh = [key for trial in trials for key in trial.unread(arrived.get(trial.alias, ()))]
    found: dict[str, list[StoredCall]] = {}
    for stored in store.some(fresh):
        found.setdefault(stored.call.alias, []).append(stored)
    for trial in trials:
        trial.give(found.get(trial.alias, ()))
    turns = [trial.advance(now - LAG_S) for trial in trials]
    said: dict[str, list[Feedback]] = {}
    due = [stored.call.key for turn in turns for _, calls in turn.due for stored in calls]
    for feedback in store.feedback(due):
        said.setdefault(feedback.call, []).append(feedback)
    held_against = [key for key, of in said.items() if any(each.expected for each in of)]
    judged = [stored.call.key for turn in turns for _, stored in turn.answered if not _hopeless(stored)]
    texts = exchanges_of(store, {**dict.fromkeys(judged, ()), **{key: said[key] for key in held_against}})
    return [trial.tell(turn, texts, said) for trial, turn in zip(trials, turns, strict=True)]


def ended_at(stored: StoredCall) -> float:
    """Unix seconds."""
    return stored.call.at + stored.call.total_s


def _hopeless(stored: StoredCall) -> bool:
    """Whether it needs no text to tell that an answer failed or is of no use."""
    return _failed(stored) or stored.call.finish_reason == "length"


def _answer(task: _Task, stored: StoredCall, text: Exchange | None) -> Answered:
    """Recorded without its texts, an answer is not judged."""
    call, failed = stored.call, _failed(stored)
    bad = call.finish_reason == "length" or (text is not None and useless(text.request, text.body))
    return Answered(ended_at(stored), task.candidate, failed, bad and not failed, call.ttft_s, call.total_s)


def _grade(text: Exchange | None, said: Sequence[Feedback], end: float) -> float | None:
    """How right one call was by what was said of it until then; without its text only numbers tell."""
    said = [each for each in said if each.at <= end]
    if expected := [each.expected for each in said if each.expected]:
        return graded(text._replace(expected=expected[-1])) if text is not None else None
    return _mean({each.metric: each.value for each in said if each.value is not None})


def graded(each: Exchange) -> float | None:
    """How right an answer was, in [0, 1]: by the right answer where one was reported, else the mean of the
    numbers that were; None without either, and for a grader that does not exist."""
    if each.expected is not None:
        try:
            rule = standard(each)
            return grade(rule.grader, reply_of(each.body), rule.expected)
        except InputError:  # a tag of the application's; a trial is not the place to refuse it
            return None
    return _mean(each.grades)


def _mean(grades: Mapping[str, float]) -> float | None:
    numbers = [value for value in grades.values() if 0.0 <= value <= 1.0]
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
