"""The server side of the data plane: a client's connection, its requests in order, its answers.

Bytes are parsed by llhttp in its strict mode, which refuses the ambiguities that request smuggling lives on
(both lengths, two lengths, folded headers, bare line ends); what it lets pass and a proxy must not is refused
here. It ignores what a request asks for (relay, local).

Source: RFC 9112 (§6.3 message body length, §9.3 persistence and pipelining, §9.6 tear-down).
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from typing import cast

import httptools

from understudy.errors import UserError
from understudy.gateway import local
from understudy.gateway.keys import KEY_HEADERS, KeyRing, secret_of, unauthorised
from understudy.gateway.limits import Purse
from understudy.gateway.plane import Plane
from understudy.gateway.refusal import Refusal, broken_framing, reason
from understudy.gateway.relay import Exchange
from understudy.gateway.request import Call, Request
from understudy.gateway.upstream import Headers

BODY_BYTES = 64 << 20
"""Longest request body."""
HEAD_BYTES = 64 << 10
"""Longest request head."""
REQUEST_S = 120.0
"""Longest time from the first byte of a request to its last."""
IDLE_S = 300.0
"""An unused connection is closed after this long."""
PIPELINED = 16
"""Complete requests waiting behind the one in flight before reading stops."""
FRAMING_BYTES = 64 << 10
"""Most that chunk sizes and trailers may take up, besides eight bytes for each byte of the body."""
LINGER_S = 2.0
"""Time given to a refused client to read its answer while what it still sends is thrown away."""

_CALLS = {
    path: call
    for prefix in (b"/v1", b"")
    for call in (
        Call("chat.completions", b"/chat/completions"),
        Call("completions", b"/completions"),
        Call("embeddings", b"/embeddings"),
        Call("responses", b"/responses"),
        Call("messages", b"/messages"),
        Call("messages", b"/messages/count_tokens", counts=True),
    )
    for path in (prefix + call.path,)
}
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Inbound(asyncio.Protocol):
    """One client connection; the parser calls the ``on_`` methods while bytes are fed."""

    def __init__(self, plane: Plane) -> None:
        self._plane = plane
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._exchange: Exchange | None = None
        self._busy = False
        """A request is being answered."""
        self._waiting: deque[Request | Refusal] = deque()
        self._since = plane.loop.time()
        self._receiving = False
        self._ending = False
        """Whatever still comes in is thrown away."""
        self._working_off = False
        self._held = False
        """Reading is stopped until waiting requests are answered."""
        self._congested = False
        """The client does not read what it is told; nothing more is answered until it does."""
        self._refusal: Refusal | None = None
        self._url = b""
        self._headers: Headers = []
        self._body: list[bytes] = []
        self._complete: deque[Request] = deque()
        """Requests that the bytes being fed completed."""
        self._body_bytes = 0
        self._message_bytes = 0
        """All bytes since the last message was complete, whatever they are part of."""
        self._in_head = True
        self._version = ""
        self._keep = False
        self._checking: asyncio.Task[None] | None = None
        """The look-up of a key not seen before; a loop alone would not keep it."""
        self._keep_this = False
        """Whether the request being answered leaves the connection open."""
        self._linger_until = 0.0
        self._path = b""
        """Of the request being answered: errors have the form of its route."""

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._plane.clients.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._plane.clients.discard(self)
        self._ending = True
        self._transport = None
        self._waiting.clear()
        if self._exchange is not None:
            self._exchange.client_gone()
            self._exchange = None

    def data_received(self, data: bytes) -> None:
        if self._ending:
            return
        self._message_bytes += len(data)
        self._feed(data)
        if self._message_bytes > HEAD_BYTES and self._receiving:
            self._refusal = self._refusal or self._size_fault()
        while self._complete:
            self._arrived(self._complete.popleft())
        if self._refusal is not None and not self._ending:
            self._ending = True
            self._arrived(self._refusal)

    def _feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError:
            raise  # a bug of ours, not of the client
        except httptools.HttpParserUpgrade:
            self._refusal = self._refusal or broken_framing("this server upgrades to no other protocol")
        except httptools.HttpParserError as error:
            self._refusal = self._refusal or broken_framing(f"malformed request: {error}")

    def _size_fault(self) -> Refusal | None:
        """What in a message that is still coming is longer than it may be, its body apart."""
        if self._in_head:
            return _head_too_long()
        framing = self._message_bytes - self._body_bytes
        return _framing_too_long() if framing > HEAD_BYTES + FRAMING_BYTES + 8 * self._body_bytes else None

    def pause_writing(self) -> None:
        self._congested = True
        if self._exchange is not None:
            self._exchange.pause()

    def resume_writing(self) -> None:
        self._congested = False
        if self._exchange is not None:
            self._exchange.resume()
        elif not self._busy and not self._working_off:
            self._work_off()

    # -- httptools callbacks

    def on_message_begin(self) -> None:
        self._headers = []
        self._body = []
        self._url = b""
        self._body_bytes = 0
        self._in_head = self._receiving = True
        self._since = self._plane.loop.time()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # trailers are not headers
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._version = self._parser.get_http_version()
        self._keep = self._version == "1.1" and self._parser.should_keep_alive()
        if self._refusal is None:
            self._refusal = self._head_fault()

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes > BODY_BYTES:
            self._refusal = self._refusal or _body_too_long()
        if self._refusal is None:
            self._body.append(body)

    def on_message_complete(self) -> None:
        self._receiving = False
        self._in_head = True
        self._message_bytes = 0
        if self._refusal is not None:
            return
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        path, _, query = self._url.partition(b"?")
        modern = self._version == "1.1"
        headers, method = self._headers, self._parser.get_method()
        request = Request(method, path, query, headers, dict(headers), body, modern, self._keep)
        self._complete.append(request)

    def _head_fault(self) -> Refusal | None:
        """What in a complete head forbids to go on; sends 100 Continue where it is waited for."""
        if self._version not in ("1.0", "1.1"):
            return broken_framing("expected HTTP/1.1", 505)
        if self._parser.should_upgrade():
            return broken_framing("this server upgrades to no other protocol")
        hosts = 0
        for name, value in self._headers:
            if name == b"host":
                hosts += 1
            elif name in _CHECKED and (fault := _CHECKED[name](value)):
                return fault
            elif name == b"expect" and self._version == "1.1" and not self._busy:
                self.write(_CONTINUE)
        if self._plane.keys is not None and not self._shows_a_key():
            return unauthorised(False, close=True)
        if hosts > 1 or (hosts == 0 and self._version == "1.1"):
            return broken_framing(f"expected one Host header, got {hosts}")
        return None

    def _shows_a_key(self) -> bool:
        """Whether a body is worth reading: without a key it is refused in the end whatever it says."""
        for name, _ in self._headers:
            if name in KEY_HEADERS:
                return True
        return self._url.partition(b"?")[0] == local.HEALTH

    # -- requests in order

    def _arrived(self, item: Request | Refusal) -> None:
        if self._linger_until:
            return  # behind an answer that ended the connection
        if not self._busy and not self._congested:
            self._answer(item)
            return
        self._waiting.append(item)
        if len(self._waiting) >= PIPELINED and not self._held and self._transport is not None:
            self._held = True
            self._transport.pause_reading()

    def _answer(self, item: Request | Refusal) -> None:
        self._busy = True
        self._keep_this = False
        self._path = b""
        try:
            if isinstance(item, Refusal):
                raise item
            self._path = item.path
            self._keep_this = item.keep_alive
            self._admit(item)
        except Refusal as refusal:
            self.refuse(refusal)

    def _admit(self, request: Request) -> None:
        """Serve a caller who shows a known key, or anybody where none is required."""
        keys = self._plane.keys
        if keys is None or request.path == local.HEALTH:
            self._serve(request, "")
            return
        secret = secret_of(request)
        caller = keys.known(secret)
        if caller is not None:
            self._serve(request, caller)
        else:
            self._checking = self._plane.loop.create_task(self._look_up(keys, request, secret))

    async def _look_up(self, keys: KeyRing, request: Request, secret: bytes) -> None:
        try:
            caller = await keys.look_up(secret)
            if self._transport is not None:
                self._serve(request, caller)
        except Refusal as refusal:
            self.refuse(refusal)
        except UserError as error:
            self.refuse(Refusal(503, "store_unreachable", f"the key cannot be checked: {error.value}"))

    def _serve(self, request: Request, caller: str) -> None:
        call = _CALLS.get(request.path) if request.method == b"POST" else None
        if call is None:
            self._reply(local.answer(self._plane, request))
            return
        purse = self._plane.keys.purse(caller) if self._plane.keys else None
        if purse is None or purse.admit():
            self._exchange_for(call, request, caller)
        else:
            self._checking = self._plane.loop.create_task(self._wait_for(purse, call, request, caller))

    async def _wait_for(self, purse: Purse, call: Call, request: Request, caller: str) -> None:
        try:
            await self._plane.counted(purse)
            if self._transport is not None:
                self._exchange_for(call, request, caller)
        except Refusal as refusal:
            self.refuse(refusal)

    def _exchange_for(self, call: Call, request: Request, caller: str) -> None:
        if self._plane.recorder.refusing:
            raise local.not_recordable()
        self._exchange = exchange = Exchange(self._plane, self, call, request, caller)
        exchange.begin()

    def _reply(self, reply: local.Reply) -> None:
        if not (reply.recorded and self._plane.recorder.strict):
            self._send(reply.status, reply.body, reply.kind, ())
            return

        def written(done: asyncio.Future[None]) -> None:
            if done.exception() is None:
                self._send(reply.status, reply.body, reply.kind, ())
            else:
                self.refuse(local.not_recordable())

        self._plane.recorder.durable().add_done_callback(written)

    def _send(self, status: int, body: bytes, kind: bytes, headers: tuple[tuple[bytes, bytes], ...]) -> None:
        """A whole answer of our own."""
        keep = self._keep_this and not self._plane.draining
        lines = b"".join(b"%b: %b\r\n" % header for header in headers)
        self.write(
            b"HTTP/1.1 %d %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n%b%b\r\n%b"
            % (
                status,
                reason(status),
                kind,
                len(body),
                lines,
                b"" if keep else b"connection: close\r\n",
                body,
            )
        )
        self.finish(keep)

    # -- used by an exchange

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def finish(self, keep: bool) -> None:
        self._exchange = None
        self._busy = False
        self._since = self._plane.loop.time()
        if not keep:
            self._end()
        elif not self._working_off:
            self._work_off()

    def _work_off(self) -> None:
        """Answer what waited, one after the other: a loop, because answers of our own end at once."""
        self._working_off = True
        while self._waiting and not self._busy and not self._congested:
            self._answer(self._waiting.popleft())
        self._working_off = False
        if self._held and not self._waiting and self._transport is not None:
            self._held = False
            self._transport.resume_reading()

    def refuse(self, refusal: Refusal) -> None:
        if refusal.close:
            self._keep_this = False
        body = refusal.body(anthropic=b"/messages" in self._path)
        self._send(refusal.status, body, b"application/json", refusal.headers)

    def cut(self, reset: bool) -> None:
        self._exchange = None
        if self._transport is None:
            return
        if reset:
            # the client takes the end of the connection for the end of the answer, unless it is a reset
            sock = self._transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._transport.abort()
        else:
            self._transport.close()

    def _end(self) -> None:
        """Close after the answer is out; what the client still sends is thrown away for a moment, because a
        reset would take the answer from it (RFC 9112 §9.6)."""
        self._ending = True
        self._waiting.clear()
        self._linger_until = self._plane.loop.time() + LINGER_S
        if self._transport is None:
            return
        if self._receiving:
            self._transport.write_eof()
        else:
            self._transport.close()

    # -- used by the plane

    def tick(self, now: float) -> None:
        """Look at the deadlines (``now``: loop time)."""
        if self._linger_until:
            if now > self._linger_until:
                self.abort()
        elif self._receiving and not self._busy and now - self._since > REQUEST_S:
            self._ending = True
            self._arrived(Refusal(408, "request_timeout", f"no whole request in {REQUEST_S:g} s", close=True))
        elif not self._receiving and not self._busy and now - self._since > IDLE_S:
            self.abort()

    def drain(self) -> None:
        """Close as soon as nothing is in flight."""
        if not self._busy and not self._receiving:
            self._end()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()


def _check_length(value: bytes) -> Refusal | None:
    return _body_too_long() if int(value) > BODY_BYTES else None


def _check_transfer(value: bytes) -> Refusal | None:
    if value.strip().lower() == b"chunked":
        return None
    return broken_framing("Transfer-Encoding can only be chunked", 501)


def _check_coding(value: bytes) -> Refusal | None:
    if value.strip().lower() == b"identity":
        return None
    return broken_framing("a request body must not be compressed", 415)


_CHECKED = {
    b"content-length": _check_length,
    b"transfer-encoding": _check_transfer,
    b"content-encoding": _check_coding,
}


def _head_too_long() -> Refusal:
    return broken_framing(f"the request's head is longer than {HEAD_BYTES} bytes", 431)


def _framing_too_long() -> Refusal:
    return broken_framing("the request's chunks and trailers are longer than its body can need", 431)


def _body_too_long() -> Refusal:
    return broken_framing(f"the request's body is longer than {BODY_BYTES} bytes", 413)
