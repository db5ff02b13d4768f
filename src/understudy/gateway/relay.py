"""One exchange: a client's call, the attempts to have it answered, the answer relayed, and its record.

Rules: another try only before the first byte of an answer, and only after a failed connect, 429 or 5xx; an
upstream that keeps failing is passed over where another may answer; two models' texts are never spliced; a
client that goes away takes the upstream call with it; every way an exchange can end leaves one record. It
ignores how bytes reach the client (inbound) and come from the upstream (upstream).
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import Protocol

from understudy.forms.translation import Translation
from understudy.gateway.plane import Plane
from understudy.gateway.recorder import Finished
from understudy.gateway.refusal import Refusal, reason
from understudy.gateway.request import Call, Request, forwarded, header_value, returned
from understudy.gateway.routing import Target
from understudy.gateway.splice import Head, read_head
from understudy.gateway.translating import Translated, translation_of
from understudy.gateway.upstream import Answering, Connection
from understudy.traffic.record import Attempt, Billed, Route, new_key

TRIES_PER_TARGET = 2
LONGEST_WAIT_S = 2.0
"""A Retry-After beyond this is not waited for: the next target is asked, or the client told."""
BACKOFF_S = 0.1
TAP_BYTES = 64 << 20
"""Longest answer kept for the record; a longer one is relayed whole and recorded cut, with a note."""

CLIENT_GONE = 499
"""Status in the record when the client went away first (nginx's convention)."""


class Client(Protocol):
    """The client's connection, as an exchange sees it."""

    def write(self, data: bytes) -> None: ...
    def finish(self, keep: bool) -> None:
        """The answer is complete."""
        ...

    def cut(self, reset: bool) -> None:
        """The answer cannot be completed: end the connection, with a TCP reset where nothing else tells."""
        ...

    def refuse(self, refusal: Refusal) -> None:
        """Answer with an error of our own; nothing of another answer has been written."""
        ...


_LAST: dict[Route, tuple[bytes, ...]] = {
    "messages": (b'"message_stop"',),
    "responses": (b'"response.completed"', b'"response.incomplete"', b'"response.failed"'),
}
"""What the last event of a stream says where it is not [DONE]; in a text the quotes would be escaped."""


class Exchange:
    """The life of one call; begins when the request is complete."""

    def __init__(self, plane: Plane, client: Client, call: Call, request: Request, caller: str) -> None:
        self._plane = plane
        self._client = client
        self._call = call
        self._request = request
        self._caller = caller
        self._key = new_key()
        self._at = time.time()
        self._now = plane.loop.time
        self._idle_s = plane.settings.idle_timeout_s
        self._begun = self._now()
        self._head: Head = read_head(request.body)
        self._task = request.header(b"x-task-id")
        self._targets = plane.table.targets(self._head.model, self._task, caller)
        self._place = 0
        self._tries = 0
        self._attempts: list[Attempt] = []
        self._translation: Translation | None = None
        """For a target that speaks another form."""
        self._unasked: list[Attempt] = []
        """Targets passed over because the request cannot be said there."""
        self._attempt_begun = self._begun
        self._connection: Answering | None = None
        self._reused = False
        self._waiting: asyncio.Task[None] | asyncio.TimerHandle | None = None
        self._deadline = float("inf")
        self._total_deadline = self._begun + plane.settings.total_timeout_s
        self._started = False
        self._over = False
        self._paused = False
        self._chunked = False
        self._until_close = False
        """The client knows the end of the answer by the end of the connection."""
        self._keep = False
        self._status = 0
        self._streamed = self._head.stream
        self._coding = b""
        self._first_byte = 0.0
        self._tap: list[bytes] = []
        self._tapped = 0

    def begin(self) -> None:
        """Ask the first target."""
        self._plane.exchanges.add(self)
        self._place = self._willing(0)
        refusal = self._say(self._target)
        if refusal is not None and self._place:
            self._place = 0  # who rests is asked sooner than nobody
            refusal = self._say(self._target)
        if refusal is None or (self._target.on_trial and self._move_on()):
            self._try()
        else:
            self._refuse(refusal)

    # -- attempts

    @property
    def _target(self) -> Target:
        return self._targets[self._place]

    def _willing(self, place: int) -> int:
        """The first target from ``place`` on whose upstream does not rest; ``place`` when all of them do."""
        now = self._now()
        for later in range(place, len(self._targets)):
            if self._targets[later].upstream.breaker.admits(now):
                return later
        return place

    def _say(self, target: Target) -> Refusal | None:
        """Put the request into the form of a target; a refusal where it cannot be said there."""
        if self._call.route in target.as_is:
            self._translation = None
            return None
        try:
            self._translation = translation_of(self._call, self._request, target)
        except Refusal as refusal:
            error = f"not asked: {refusal.message}"
            self._unasked.append(
                Attempt(
                    target=target.name, status=0, billed="no", started=self._at, ended=self._at, error=error
                )
            )
            return refusal
        return None

    def _move_on(self) -> bool:
        """Go to the next target that can be asked this; False where there is none."""
        place, said = self._place, self._translation
        while place + 1 < len(self._targets):
            place = self._willing(place + 1)
            if self._say(self._targets[place]) is None:
                self._place, self._tries = place, 0
                return True
        self._translation = said
        return False

    def _try(self, fresh: bool = False) -> None:
        self._waiting = None
        self._attempt_begun = self._now()
        connection = None if fresh else self._target.upstream.take()
        if connection is None:
            self._waiting = self._plane.loop.create_task(self._connect())
        else:
            self._plane.metrics.connections_reused += 1
            self._send(connection, reused=True)

    async def _connect(self) -> None:
        try:
            connection = await self._target.upstream.connect(self._plane.settings.connect_timeout_s)
        except OSError as error:
            self._waiting = None
            self._unreachable(error)
        else:
            self._waiting = None
            self._send(connection, reused=False)

    def _send(self, connection: Connection, reused: bool) -> None:
        self._reused = reused
        self._deadline = self._now() + self._plane.settings.first_byte_timeout_s
        if self._translation is None:
            self._connection = connection
            connection.send(self, self._wire())
        else:
            self._connection = Translated(self._translation, self._target.upstream, connection, self)
            self._connection.send(self._request)

    def _wire(self) -> list[bytes]:
        request, head, target = self._request, self._head, self._target
        upstream, body = target.upstream, request.body
        query = b"?" + request.query if request.query else b""
        length = len(body) - (head.end - head.start) + len(target.model_json)
        return [
            b"POST %b%b%b HTTP/1.1\r\n%b%bcontent-length: %d\r\n\r\n"
            % (upstream.path, self._call.path, query, upstream.head, forwarded(request), length),
            body[: head.start],
            target.model_json,
            body[head.end :],
        ]

    def _unreachable(self, error: OSError) -> None:
        reason = str(error) or type(error).__name__
        asked = self._target
        asked.upstream.breaker.failed(self._now())
        self._note(asked, 0, "no", f"cannot connect: {reason}")
        wait = self._next(b"")
        if wait is None:
            self._refuse(Refusal(502, "upstream_unreachable", f"{asked.name} is out of reach: {reason}"))
        else:
            self._again(wait)

    def _next(self, retry_after: bytes) -> float | None:
        """Seconds until the next try, the place moved to its target; None when there is none."""
        self._tries += 1
        wait = BACKOFF_S * (1 + random.random())  # noqa: S311 - jitter, not a secret
        if retry_after:
            wait = float(retry_after) if retry_after.isdigit() else LONGEST_WAIT_S + 1
        last = self._place + 1 == len(self._targets)
        rests = not last and self._target.upstream.breaker.rests(self._now())
        if self._tries < TRIES_PER_TARGET and wait <= LONGEST_WAIT_S and not rests:
            return wait
        return 0.0 if self._move_on() else None

    def _again(self, wait: float) -> None:
        self._deadline = float("inf")
        self._waiting = self._plane.loop.call_later(wait, self._try)

    def _note(self, target: Target, status: int, billed: Billed, error: str = "") -> None:
        """Keep what became of the current attempt."""
        now = self._now()
        self._attempts.append(
            Attempt(
                target=target.name,
                status=status,
                billed=billed,
                started=self._at + self._attempt_begun - self._begun,
                ended=self._at + now - self._begun,
                error=error,
                form="" if self._call.route in target.as_is else target.upstream.kind,
            )
        )
        outcome = str(status) if status else "failed"
        self._plane.metrics.attempts[target.upstream.name, outcome] += 1

    # -- the upstream's side (Sink)

    def received(self, connection: Answering, chunk: bytes, complete: bool) -> None:
        """Bytes of the answer's body; the head is known by now."""
        out = b""
        if not self._started:
            if self._passes_on(connection):
                return
            out = self._start(connection, chunk if complete else None)
        self._deadline = self._now() + self._idle_s
        if chunk:
            self._tapped += len(chunk)
            if self._tapped <= TAP_BYTES:
                self._tap.append(chunk)
            out += b"%x\r\n%b\r\n" % (len(chunk), chunk) if self._chunked else chunk
        if complete:
            self._connection = None
            self._complete(out + b"0\r\n\r\n" if self._chunked else out, connection.fault)
        elif out:
            self._client.write(out)

    def _passes_on(self, connection: Answering) -> bool:
        """Whether this answer is an error after which somebody else is asked."""
        status = connection.status
        if status != 429 and status < 500:
            return False
        retry_after = next((v for n, v in connection.headers if n == b"retry-after"), b"")
        asked = self._target
        if status >= 500:
            asked.upstream.breaker.failed(self._now())
        wait = self._next(retry_after)
        if wait is None:
            return False
        self._note(asked, status, "no")
        self._connection = None
        connection.discard()
        self._again(wait)
        return True

    def _start(self, connection: Answering, whole: bytes | None) -> bytes:
        """The head of the answer for the client; ``whole`` is the body when it came all at once."""
        self._started = True
        self._status = connection.status
        self._first_byte = self._now()
        if self._status < 500:
            self._target.upstream.breaker.answered()
        self._streamed = False
        for name, value in connection.headers:
            if name == b"content-type":
                self._streamed = value.startswith(b"text/event-stream")
            elif name == b"content-encoding":
                self._coding = value
        length = len(whole) if whole is not None else connection.length
        modern = self._request.modern
        self._chunked = length is None and modern
        self._until_close = length is None and not modern
        self._keep = self._request.keep_alive and not self._plane.draining
        framing = b"transfer-encoding: chunked\r\n" if self._chunked else b""
        if length is not None:
            framing = b"content-length: %d\r\n" % length
        return b"HTTP/1.1 %d %b\r\n%b%b%b%b\r\n" % (
            self._status,
            reason(self._status),
            returned(connection.headers),
            framing,
            self._own_headers() + connection.note,
            b"" if self._keep else b"connection: close\r\n",
        )

    def _own_headers(self) -> bytes:
        lines = b"x-understudy-call: %b\r\nx-understudy-model: %b\r\n" % (
            self._key.encode(),
            header_value(self._target.name),
        )
        tries = len(self._attempts) + 1
        if tries > 1:
            lines += b"x-understudy-attempts: %d\r\n" % tries
        if self._place:
            lines += b"x-understudy-fallback: %b\r\n" % header_value(self._target.name)
        return lines

    def _complete(self, last: bytes, fault: str) -> None:
        self._plane.metrics.bytes_relayed += self._tapped
        if self._tapped > TAP_BYTES:
            fault = f"record cut at {TAP_BYTES} bytes of {self._tapped}"
        self._note(self._target, self._status, "yes" if self._status < 400 else "no", fault)
        recorder = self._plane.recorder
        # kept first: a process that is killed then loses no call whose answer anybody has
        if not recorder.strict:
            self._end(self._status)
            self._client.write(last)
            self._client.finish(self._keep)
        elif self._end(self._status) or recorder.writer.on_full != "refuse":
            recorder.durable().add_done_callback(lambda done: self._acknowledge(done, last))
        else:
            self._client.cut(self._until_close)

    def _acknowledge(self, done: asyncio.Future[None], last: bytes) -> None:
        """Strict mode: the record is on disk, so the answer may end."""
        if done.exception() is not None:
            self._client.cut(self._until_close)
            return
        self._client.write(last)
        self._client.finish(self._keep)

    def broken(self, connection: Answering, reason: str) -> None:
        """The upstream went away before its answer was complete."""
        self._connection = None
        if self._started:
            self._cut(reason)
            return
        self._note(self._target, 0, "unknown", reason)
        if self._reused and not connection.got_bytes:
            self._try(fresh=True)  # an idle connection that died: RFC 9110 §9.2.2 allows to send again
            return
        self._target.upstream.breaker.failed(self._now())
        self._refuse(
            Refusal(502, "upstream_broken", f"{self._target.name} broke off before answering: {reason}")
        )

    def _cut(self, reason: str) -> None:
        self._note(self._target, self._status, "unknown", reason)
        self._client.cut(self._until_close)
        self._end(self._status)

    # -- the client's side

    def client_gone(self) -> None:
        """The client closed its connection: nobody waits for the answer any more."""
        if self._over:
            return
        if self._streamed and self._said_done():
            # clients of this protocol hang up at [DONE] and need not wait for HTTP's own end
            self._stop_upstream()
            self._note(self._target, self._status, "yes")
            self._end(self._status)
        else:
            self._give_up("the client went away", CLIENT_GONE)

    def _said_done(self) -> bool:
        """Whether the last event relayed was the stream's last."""
        end = b"".join(self._tap[-2:]).rstrip()
        marks = _LAST.get(self._call.route)
        if marks is None:
            return end.endswith(b"data: [DONE]")
        last = end.rpartition(b"\n\n")[2]
        return any(mark in last for mark in marks)

    def pause(self) -> None:
        """The client reads slower than the upstream writes."""
        self._paused = True
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        self._paused = False
        self._deadline = self._now() + self._idle_s
        if self._connection is not None:
            self._connection.resume()

    # -- clocks

    def tick(self, now: float) -> None:
        """Look at the deadlines. A slow client holds up the answer itself, so only the total counts then."""
        settings = self._plane.settings
        if now >= self._total_deadline:
            self._timed_out(f"no complete answer within {settings.total_timeout_s:g} s")
        elif now >= self._deadline and not self._paused:
            kind = "byte for" if self._started else "answer within"
            limit = self._idle_s if self._started else settings.first_byte_timeout_s
            self._timed_out(f"no {kind} {limit:g} s")

    def _timed_out(self, reason: str) -> None:
        if self._started:
            self._stop_upstream()
            self._cut(reason)
        else:
            asked = self._stop_upstream()
            self._target.upstream.breaker.failed(self._now())
            self._note(self._target, 0, "unknown" if asked else "no", reason)
            self._refuse(Refusal(504, "upstream_timeout", f"{self._target.name}: {reason}"))

    def stop(self) -> None:
        """The process ends before the answer does."""
        self._give_up("the gateway was stopped", self._status or 503)
        self._client.cut(self._until_close)

    def _give_up(self, reason: str, status: int) -> None:
        asked = self._stop_upstream()
        self._note(self._target, self._status if self._started else 0, "unknown" if asked else "no", reason)
        self._end(status)

    def _stop_upstream(self) -> bool:
        """Abort whatever is under way; whether a request had been sent."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
        return connection is not None

    # -- the end

    def _refuse(self, refusal: Refusal) -> None:
        """Answer for an upstream that did not; the record keeps the attempts."""
        own = ((b"x-understudy-call", self._key.encode()),)
        refusal.headers = (*own, (b"x-understudy-attempts", b"%d" % len(self._attempts)))
        self._tap = [refusal.body(anthropic=self._call.route == "messages")]
        self._streamed = False
        self._end(refusal.status)
        if self._plane.recorder.strict:
            self._plane.recorder.durable().add_done_callback(lambda _: self._client.refuse(refusal))
        else:
            self._client.refuse(refusal)

    def _end(self, status: int) -> bool:
        """Keep the record; False when it could not be written."""
        self._over = True
        plane, request = self._plane, self._request
        plane.exchanges.discard(self)
        now = self._now()
        plane.metrics.requests[self._call.route, status] += 1
        plane.metrics.seconds[self._call.route].add(now - self._begun)
        if self._first_byte:
            plane.metrics.first_byte[self._call.route].add(self._first_byte - self._begun)
        if self._call.counts:
            return True
        return plane.recorder.keep(
            Finished(
                key=self._key,
                at=self._at,
                route=self._call.route,
                alias=self._head.model,
                target=self._target.name,
                status=status,
                streamed=self._streamed,
                request=request.body,
                response=b"".join(self._tap),
                coding=self._coding,
                attempts=[*self._unasked, *self._attempts] if self._unasked else self._attempts,
                ttft_s=self._first_byte - self._begun if self._first_byte else 0.0,
                total_s=now - self._begun,
                task_id=self._task.decode("latin-1"),
                tags=request.tags(),
                caller=self._caller,
                traceparent=request.header(b"traceparent").decode("latin-1"),
                spoken=None
                if self._translation is None or self._translation.passing
                else self._translation.spoken,
            )
        )
