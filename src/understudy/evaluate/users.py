"""What users had to put up with, model by model: asking again, asking otherwise, saying that it was no good.

From recorded traffic alone, before a move and after it: whoever answered a task's first call is the arm it
counts for. A retry puts the same question again in one task, a rephrasing puts one much like it in its words;
a task is frustrated when it has either, or negative feedback. It ignores why: a user who asks again may have
asked badly, on every arm alike, so what tells is the difference between arms.

Sources: Wilson 1927; Newcombe 1998, Statistics in Medicine 17, 873-890 (method 10, difference of two shares).
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec

from understudy.errors import EvidenceError
from understudy.evaluate.grade import grade, normalised, reply_of, standard
from understudy.evaluate.similarity import similarity
from understudy.evaluate.task import wilson
from understudy.protocol import text_of
from understudy.traffic.sample import Exchange

USERS = "users.jsonl"
ALIKE = 0.5
"""Similarity from which a question counts as the last one put otherwise."""
GOOD = 0.5
"""Feedback below it is negative; a right answer scores at least this."""


class TaskMarks(msgspec.Struct, frozen=True, kw_only=True):
    """One task as its user met it; a line of `users.jsonl`."""

    task: str
    """Hash of the task's id, or of the call's key."""
    model: str
    """ENDPOINT/MODEL that answered its first call."""
    at: float
    calls: int
    retries: int
    rephrasings: int
    negative: bool | None
    """Whether feedback was negative; None where nobody said anything."""
    completed: bool | None
    """Whether the last call of which something is known was right."""


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """A share of tasks with its 95% interval."""

    of: int
    share: float
    low: float
    high: float


class UserFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One arm's tasks."""

    model: str
    tasks: int
    retried: Rate
    rephrased: Rate
    negative: Rate
    """Of the tasks of which somebody said something."""
    frustrated: Rate
    """With any of the three."""
    completed: Rate
    """Of the tasks of which it is known."""
    more_frustrated: tuple[float, float, float] | None = None
    """Share frustrated less the incumbent's, with its 95% interval; None for the incumbent and without it."""
    less_completed: tuple[float, float, float] | None = None
    """Incumbent's share completed less this one's, with its 95% interval."""


def marks_of(sample: Iterable[Exchange]) -> list[TaskMarks]:
    """The tasks of recorded exchanges, in order of time."""
    tasks: dict[str, list[Exchange]] = defaultdict(list)
    for exchange in sorted(sample, key=lambda e: e.at):
        tasks[exchange.task_id or exchange.key].append(exchange)
    return [_marks(name, calls) for name, calls in tasks.items()]


def _marks(name: str, calls: Sequence[Exchange]) -> TaskMarks:
    retries = rephrasings = 0
    before = ""
    for call in calls:
        turns = _asked(call)
        if not turns:
            continue
        last, earlier = turns[-1], turns[-2] if len(turns) > 1 else before
        same = bool(earlier) and normalised(last) == normalised(earlier)
        retries += same
        rephrasings += bool(earlier) and not same and similarity(last, earlier) >= ALIKE
        before = last
    said = [value for call in calls for value in call.grades.values()]
    known = [done for call in calls if (done := _done(call)) is not None]
    return TaskMarks(
        task=hashlib.sha256(name.encode()).hexdigest()[:16],
        model=calls[0].target,
        at=calls[0].at,
        calls=len(calls),
        retries=retries,
        rephrasings=rephrasings,
        negative=any(value < GOOD for value in said) if said else None,
        completed=known[-1] if known else None,
    )


def _asked(call: Exchange) -> list[str]:
    """What the user said, turn by turn; none where the call goes on with a tool's result."""
    messages = cast(list[dict[str, Any]], call.request.get("messages") or [])
    if not messages or messages[-1].get("role") != "user":
        return []
    return [text_of(m.get("content")) for m in messages if m.get("role") == "user"]


def _done(call: Exchange) -> bool | None:
    if call.expected is not None:
        rule = standard(call)
        return grade(rule.grader, reply_of(call.body), rule.expected) >= GOOD
    if call.grades:
        return all(value >= GOOD for value in call.grades.values())
    return None


def figures(marks: Sequence[TaskMarks], incumbent: str) -> list[UserFigures]:
    """One line for each arm, the incumbent first."""
    arms: dict[str, list[TaskMarks]] = defaultdict(list)
    for mark in marks:
        arms[mark.model].append(mark)
    own = _arm(incumbent, arms.pop(incumbent)) if incumbent in arms else None
    others = [_arm(model, arms[model]) for model in sorted(arms)]
    return ([own] if own else []) + [_against(other, own) if own else other for other in others]


def _arm(model: str, marks: Sequence[TaskMarks]) -> UserFigures:
    return UserFigures(
        model=model,
        tasks=len(marks),
        retried=_rate([m.retries > 0 for m in marks]),
        rephrased=_rate([m.rephrasings > 0 for m in marks]),
        negative=_rate([m.negative for m in marks if m.negative is not None]),
        frustrated=_rate([m.retries > 0 or m.rephrasings > 0 or bool(m.negative) for m in marks]),
        completed=_rate([m.completed for m in marks if m.completed is not None]),
    )


def _rate(marks: Sequence[bool]) -> Rate:
    low, high = wilson(sum(marks), len(marks))
    return Rate(of=len(marks), share=sum(marks) / len(marks) if marks else 0.0, low=low, high=high)


def _against(arm: UserFigures, own: UserFigures) -> UserFigures:
    return msgspec.structs.replace(
        arm,
        more_frustrated=newcombe(arm.frustrated, own.frustrated),
        less_completed=newcombe(own.completed, arm.completed),
    )


def newcombe(one: Rate, other: Rate) -> tuple[float, float, float] | None:
    """one - other with its 95% interval from both Wilson intervals; None where either has no task."""
    if not one.of or not other.of:
        return None
    difference = one.share - other.share
    below = math.hypot(one.share - one.low, other.high - other.share)
    above = math.hypot(one.high - one.share, other.share - other.low)
    return difference, difference - below, difference + above


def write_marks(folder: Path, marks: Sequence[TaskMarks]) -> None:
    """``folder/users.jsonl``: no text, no id of a user, only what the figures need."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / USERS).write_bytes(b"".join(msgspec.json.encode(mark) + b"\n" for mark in marks))


def read_marks(folder: Path) -> list[TaskMarks]:
    """None where the file is absent. Raises EvidenceError naming a broken line."""
    path = folder / USERS
    lines = path.read_bytes().splitlines() if path.exists() else []
    marks: list[TaskMarks] = []
    for number, line in enumerate(lines, start=1):
        try:
            marks.append(msgspec.json.decode(line, type=TaskMarks))
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise EvidenceError(str(path), [f"{USERS} line {number}: {error}"]) from error
    return marks
