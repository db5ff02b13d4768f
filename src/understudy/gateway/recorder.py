"""From a finished exchange to a record in the segment log.

It decides what of a call is kept (`record = "metadata"` keeps no texts, `[redact]` takes findings out) and
when the client may hear the end (strict: not before the disk has it). It ignores framing and syncing
(segments) and what a finding is (traffic.redact).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from typing import Literal, NamedTuple, cast

from understudy.forms.translation import Spoken
from understudy.gateway import answers
from understudy.traffic.record import Attempt, Call, Feedback, Route
from understudy.traffic.redact import Redactor
from understudy.traffic.segments import SegmentWriter


class Finished(NamedTuple):
    """All that an exchange knows of itself when it is over."""

    key: str
    at: float
    route: Route
    alias: str
    target: str
    status: int
    streamed: bool
    """The answer's body is server-sent events."""
    request: bytes
    response: bytes
    coding: bytes
    """Content-Encoding of the answer."""
    attempts: list[Attempt]
    ttft_s: float
    total_s: float
    task_id: str
    tags: dict[str, str]
    caller: str
    """Id of the caller's key; empty where none is required."""
    traceparent: str = ""
    """W3C trace context of the caller."""
    spoken: Spoken | None = None
    """What a translated answer said of itself: its vendor may count what the application's form does not."""


Listener = Callable[[Call, Finished], None]


class Recorder:
    """Keeps calls and feedback; one per process.

    Of the aliases in ``without_texts`` no texts are kept, whatever the ``mode``. What ``redactor`` finds is
    taken out before a record is written. Each of ``told`` is given every call as it is written.
    """

    def __init__(
        self,
        writer: SegmentWriter,
        mode: Literal["buffered", "strict", "metadata"],
        *,
        without_texts: Collection[str] = (),
        redactor: Redactor | None = None,
        told: Sequence[Listener] = (),
    ) -> None:
        self.writer = writer
        self.strict = mode == "strict"
        self._texts = mode != "metadata"
        self._without_texts = frozenset(without_texts)
        self._redactor = redactor
        self._told = tuple(told)

    @property
    def refusing(self) -> bool:
        """Whether calls must be refused because they could not be recorded."""
        return self.writer.refusing

    def keep(self, done: Finished) -> bool:
        """Append a call to the log; False when the disk is full and the record was dropped."""
        call = self._call(done)
        if self._redactor:
            call = cast(Call, self._redactor.record(call))
        kept = self.writer.append(call)
        for tell in self._told:
            tell(call, done)
        return kept

    def keep_feedback(self, feedback: Feedback) -> bool:
        """Append feedback to the log; False when the disk is full and it was dropped."""
        return self.writer.append(self._redactor.record(feedback) if self._redactor else feedback)

    def durable(self) -> asyncio.Future[None]:
        """Resolves when all that was kept so far is on disk."""
        return self.writer.durable()

    def _call(self, done: Finished) -> Call:
        response = answers.decoded(done.response, done.coding) if done.coding else done.response
        texts = self._texts and done.alias not in self._without_texts
        seen = _seen(done, response)
        usage, estimated = seen.usage, False
        if usage is None and _reached_a_model(done):
            usage, estimated = answers.estimate(done.request, seen), True
        return Call(
            key=done.key,
            at=done.at,
            route=done.route,
            alias=done.alias,
            target=done.target,
            status=done.status,
            stream=done.streamed,
            request=done.request if texts else b"",
            response=response if texts and not self._unreadable(done, response) else b"",
            attempts=done.attempts,
            answered_by=seen.model,
            fingerprint=seen.fingerprint,
            usage=usage,
            usage_estimated=estimated,
            ttft_s=done.ttft_s,
            total_s=done.total_s,
            finish_reason=seen.finish_reason,
            task_id=done.task_id,
            tags=done.tags,
            caller=done.caller,
        )

    def _unreadable(self, done: Finished, decoded: bytes) -> bool:
        """Whether findings may hide in a content coding we could not take off."""
        return (
            self._redactor is not None
            and done.coding.lower() not in (b"", b"identity")
            and decoded is done.response
        )


def _seen(done: Finished, response: bytes) -> answers.Seen:
    said = done.spoken
    if said is None or done.status >= 400:
        return answers.read(done.route, response, done.streamed)
    return answers.Seen(said.model, said.usage, said.finish_reason, said.pieces, said.text_bytes)


def _reached_a_model(done: Finished) -> bool:
    """Whether tokens may have been spent: an answer began, or nobody can say that none did."""
    return bool(done.attempts) and done.attempts[-1].billed != "no"
