"""A call whose vendor speaks another form than its application: asked in the one, answered in the other.

To an exchange it looks like a connection whose vendor speaks the application's form, so that routing,
retries, deadlines and records are the same for every call, and a call that needs no translation never comes
here. It ignores what the forms are (forms).
"""

from __future__ import annotations

import zlib
from typing import Any

import msgspec

from understudy.forms.fault import Unmappable, Unreadable
from understudy.forms.rules import Rules
from understudy.forms.translation import COUNTING, Streamed, Translation, rule_path
from understudy.gateway.refusal import Refusal, bad_request
from understudy.gateway.request import Call, Request, header_value
from understudy.gateway.routing import Target
from understudy.gateway.upstream import Answering, Connection, Headers, Sink, Upstream

LONGEST = 64 << 20
"""Most bytes of an answer that is translated as a whole."""
_CODINGS = (b"gzip", b"deflate", b"x-gzip")
_REPLACED = frozenset({b"content-type", b"content-encoding", b"content-length"})
_BETAS = "anthropic-beta"
_TRAVELS = (b"traceparent", b"tracestate")
"""Of an application's headers; the others say things to a vendor that is not asked."""


def translation_of(call: Call, request: Request, target: Target) -> Translation:
    """A request in the form of a target's vendor.

    Raises Refusal: 400 naming what cannot be said there, 404 for a route that it has not.
    """
    route = COUNTING if call.counts else call.route
    vendor = target.upstream.vendor.asked_for(route)
    if vendor is None:
        message = f"{target.name}: this model's vendor has no {call.path.decode()}"
        raise Refusal(404, "unsupported_route", message, param="model")
    try:
        body = msgspec.json.decode(request.body, type=dict[str, Any])
        rules, notes = _betas(call.route, request, target.rules)
        translation = Translation(route, vendor, body, target.model, rules, passing=_passing(route, target))
    except Unmappable as fault:
        raise _unmappable(fault, target) from fault
    except (msgspec.MsgspecError, RecursionError) as error:
        raise bad_request("invalid_json", f"the request body cannot be translated: {error}") from error
    translation.notes = (*notes, *translation.notes)
    return translation


def _passing(route: str, target: Target) -> bool:
    """Whether rules alone bring a call here."""
    return route == "chat.completions" and target.upstream.kind == "openai"


def _betas(route: str, request: Request, rules: Rules) -> tuple[Rules, tuple[str, ...]]:
    """A header that asks for more than the body says is a parameter like any other."""
    if route != "messages" or not request.header(_BETAS.encode()):
        return rules, ()
    if _BETAS not in rules.drop:
        raise Unmappable(_BETAS, f"the header {_BETAS} has no counterpart at this model's vendor")
    return rules, (f"drop {_BETAS}",)


def _unmappable(fault: Unmappable, target: Target) -> Refusal:
    path = rule_path(fault.param)
    where = f"[endpoints.{target.upstream.name}]"
    if path == "max_tokens":
        advice = f"; send max_tokens, or write under {where} default = {{ max_tokens = 4096 }}"
    elif path:
        advice = f'; leave it out, or write under {where} drop = ["{path}"]'
    else:
        advice = ""
    message = f"{target.name}: {fault.message}{advice}"
    return bad_request("unsupported_parameter", message, param=fault.param or None)


class Translated:
    """One attempt at a vendor that speaks another form."""

    def __init__(
        self, translation: Translation, upstream: Upstream, connection: Connection, sink: Sink
    ) -> None:
        self.status = 0
        self.headers: Headers = []
        self.note = _note(translation, upstream)
        self.fault = ""
        self._translation = translation
        self._upstream = upstream
        self._connection = connection
        self._sink = sink
        self._stream: Streamed | None = None
        self._whole: list[bytes] = []
        self._held = 0
        self._unpack: Any = None
        self._over = False

    def send(self, request: Request) -> None:
        """Ask the vendor."""
        translation, upstream = self._translation, self._upstream
        lines = [b"%b: %b\r\n" % (name.encode(), value.encode()) for name, value in translation.headers]
        lines += [b"%b: %b\r\n" % (name, value) for name, value in request.headers if name in _TRAVELS]
        accepted = b"text/event-stream" if translation.streamed else b"application/json"
        head = (
            b"POST %b%b HTTP/1.1\r\n%b%bcontent-type: application/json\r\naccept: %b\r\n"
            b"accept-encoding: identity\r\ncontent-length: %d\r\n\r\n"
        )
        path = translation.path.encode()
        body = translation.body
        given = (upstream.path, path, upstream.head, b"".join(lines), accepted, len(body))
        self._connection.send(self, [head % given, body])

    # -- as a connection

    @property
    def got_bytes(self) -> bool:
        return self._connection.got_bytes

    @property
    def length(self) -> int | None:
        """Not known before the answer is translated."""
        return self._connection.length if self._translation.passing else None

    def pause(self) -> None:
        self._connection.pause()

    def resume(self) -> None:
        self._connection.resume()

    def abort(self) -> None:
        """Drop the connection; the exchange hears nothing more."""
        self._over = True
        self._connection.abort()

    def discard(self) -> None:
        """Forget the answer, keep the connection where its rest is short."""
        self._over = True
        self._connection.discard()

    # -- as a sink

    def received(self, connection: Answering, chunk: bytes, complete: bool) -> None:
        """Bytes of the vendor's answer."""
        if self._over:
            return
        if not self.status:
            self._begin(connection)
        try:
            self._take(self._unpacked(chunk), complete)
        except (Unreadable, zlib.error) as fault:
            self._over = True
            connection.abort()
            self._sink.broken(self, f"the vendor's answer cannot be read: {fault}")

    def broken(self, connection: Answering, reason: str) -> None:
        """The vendor went away."""
        if not self._over:
            self._over = True
            self._sink.broken(self, reason)

    def _begin(self, connection: Answering) -> None:
        self.status = connection.status
        kind = coding = b""
        for name, value in connection.headers:
            if name == b"content-type":
                kind = value
            elif name == b"content-encoding":
                coding = value.lower()
        if self._translation.passing:
            self.headers = list(connection.headers)
            return
        streamed = self._translation.streamed and self.status < 400
        ours = b"text/event-stream; charset=utf-8" if streamed else b"application/json"
        kept = [(name, value) for name, value in connection.headers if name not in _REPLACED]
        self.headers = [*kept, (b"content-type", ours)]
        if coding in _CODINGS:
            self._unpack = zlib.decompressobj(wbits=47)
        if streamed and kind.startswith(b"text/event-stream"):
            self._stream = self._translation.stream()

    def _unpacked(self, chunk: bytes) -> bytes:
        if self._unpack is None or not chunk:
            return chunk
        unpacked = self._unpack.decompress(chunk, LONGEST)
        if self._unpack.unconsumed_tail:
            raise Unreadable(f"longer than {LONGEST} bytes when unpacked")
        return unpacked

    def _take(self, chunk: bytes, complete: bool) -> None:
        if self._translation.passing:
            self._sink.received(self, chunk, complete)
        elif self._stream is not None:
            self._take_piece(self._stream, chunk, complete)
        else:
            self._whole.append(chunk)
            self._held += len(chunk)
            if self._held > LONGEST:
                raise Unreadable(f"longer than {LONGEST} bytes")
            if complete:
                self._take_whole(b"".join(self._whole))

    def _take_piece(self, stream: Streamed, chunk: bytes, complete: bool) -> None:
        out = stream.feed(chunk)
        if complete and not stream.ended:
            out += stream.close()
        if stream.failed is not None:
            self.fault = f"the vendor reported within its answer: {stream.failed.message}"
            if not stream.begun:
                self._fail_before_the_answer(stream)
                return
        if stream.ended:
            if not complete:
                self._connection.discard()
            self._over = True
            self._sink.received(self, out, True)
        elif stream.begun:
            # also when nothing is to be said: a sign of life from the vendor moves the deadline
            self._sink.received(self, out, False)

    def _fail_before_the_answer(self, stream: Streamed) -> None:
        """An error in the first event is an error like any other: somebody else may be asked."""
        assert stream.failed is not None
        self._over = True
        self._connection.discard()
        self.status = stream.failed.status
        self._deliver_error(stream.failed.retry_after_s, self._translation.error_body(stream.failed))

    def _take_whole(self, raw: bytes) -> None:
        if self.status < 400:
            if self._translation.streamed:
                raise Unreadable("a stream was asked for, and something else came")
            body = self._translation.answer(raw)
            self._over = True
            self._sink.received(self, body, True)
            return
        told = self._translation.error(self.status, raw)
        self.status = told.status
        self._over = True
        self._deliver_error(told.retry_after_s, self._translation.error_body(told))

    def _deliver_error(self, retry_after_s: float | None, body: bytes) -> None:
        told = any(name == b"retry-after" for name, _ in self.headers)
        if retry_after_s is not None and not told:
            self.headers.append((b"retry-after", b"%d" % -(-retry_after_s // 1)))
        self.headers = [(n, v) for n, v in self.headers if n != b"content-type"]
        self.headers.append((b"content-type", b"application/json"))
        self._sink.received(self, body, True)


def _note(translation: Translation, upstream: Upstream) -> bytes:
    """Which form was spoken, which rules changed something, what was left out: nothing is done in silence."""
    lines = b"" if translation.passing else b"x-understudy-form: %b\r\n" % upstream.kind.encode()
    if translation.notes:
        lines += b"x-understudy-rules: %b\r\n" % header_value(", ".join(translation.notes))
    if translation.left_out:
        lines += b"x-understudy-left-out: %b\r\n" % header_value(", ".join(translation.left_out))
    return lines
