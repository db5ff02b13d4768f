"""The client side of the data plane: connections to one endpoint, kept open and used again.

A connection serves one exchange at a time and hands it bytes as they come; it ignores what they mean.
Transfer framing is taken off (RFC 9112 §7), content coding is left on.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

from understudy.config import Endpoint
from understudy.forms.openai import is_openai
from understudy.forms.rules import rules_of
from understudy.forms.translation import vendor_of
from understudy.gateway.breaker import Breaker

IDLE_S = 30.0
"""An unused connection is closed after this long; vendors close theirs after 60 s or more."""
DRAIN_BYTES = 64 << 10
"""Longest rest of an unwanted answer that is read to keep its connection."""
HEAD_BYTES = 64 << 10
"""Longest head of an answer."""

Headers = list[tuple[bytes, bytes]]


class Answering(Protocol):
    """A connection as an exchange sees it, whichever form its vendor speaks."""

    @property
    def got_bytes(self) -> bool: ...
    @property
    def status(self) -> int: ...
    @property
    def headers(self) -> Headers: ...
    @property
    def length(self) -> int | None: ...
    @property
    def note(self) -> bytes:
        """Header lines of ours that say what was done to the call."""
        ...

    @property
    def fault(self) -> str:
        """What the vendor said went wrong within an answer that is complete."""
        ...

    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def abort(self) -> None: ...
    def discard(self) -> None: ...


class Sink(Protocol):
    """Who a connection works for."""

    def received(self, connection: Answering, chunk: bytes, complete: bool) -> None:
        """Bytes of the answer's body (perhaps none, when the head came alone); ``complete`` with the last."""
        ...

    def broken(self, connection: Answering, reason: str) -> None:
        """The connection ended before the answer did."""
        ...


class Upstream:
    """One endpoint: where it is, how we prove who we are, and its idle connections."""

    def __init__(self, name: str, endpoint: Endpoint, secret: str) -> None:
        url = urlsplit(endpoint.base_url)
        self.name = name
        self.made_of = (endpoint, secret)
        """What it was made of: an equal one need not be made again."""
        self.host = url.hostname or ""
        self.secure = url.scheme == "https"
        self.port = url.port or (443 if self.secure else 80)
        self.path = url.path.rstrip("/").encode()
        authority = url.netloc.rpartition("@")[2].encode()
        self.vendor = vendor_of(endpoint.kind, endpoint.base_url)
        self.kind = endpoint.kind
        credential = "{}: {}\r\n".format(*self.vendor.credential(secret)) if secret else ""
        self.head = b"host: %b\r\n%b" % (authority, credential.encode())
        """Header lines of every request: the authority and our credential."""
        self.rules = rules_of(endpoint.drop, endpoint.rename, endpoint.default)
        self.routes = routes_of(endpoint)
        """Routes whose calls are passed on as they come; others need translation."""
        self.breaker = Breaker()
        self.opened = 0
        self._tls = ssl.create_default_context() if self.secure else None
        self._idle: list[Connection] = []
        self._retired = False

    def take(self) -> Connection | None:
        """An idle connection, the most recently used first; None when there is none."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed:
                return connection
        return None

    async def connect(self, timeout_s: float) -> Connection:
        """A fresh connection. Raises OSError (TLS failures and timeouts included)."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_s):
                _, connection = await loop.create_connection(
                    lambda: Connection(self, loop),
                    self.host,
                    self.port,
                    ssl=self._tls,
                    server_hostname=self.host if self.secure else None,
                )
        except TimeoutError as error:
            raise TimeoutError(f"no connection within {timeout_s:g} s") from error
        self.opened += 1
        return connection

    def release(self, connection: Connection) -> None:
        """Take back a connection whose answer is complete."""
        if self._retired:
            connection.abort()
        else:
            self._idle.append(connection)

    def sweep(self, now: float) -> None:
        """Close what has been idle for too long (``now``: loop time)."""
        while self._idle and (self._idle[0].closed or now - self._idle[0].idle_since > IDLE_S):
            self._idle.pop(0).abort()

    def close(self) -> None:
        """Close every idle connection, and those in use when their answers are complete."""
        self._retired = True
        while self._idle:
            self._idle.pop().abort()


def routes_of(endpoint: Endpoint) -> frozenset[str]:
    """The routes that an endpoint has itself."""
    if endpoint.kind == "anthropic":
        return frozenset({"messages"})
    if endpoint.kind == "gemini":
        return frozenset()
    passes = endpoint.responses == "pass" or (endpoint.responses == "auto" and is_openai(endpoint.base_url))
    return frozenset({"chat.completions", "completions", "embeddings", *(["responses"] if passes else [])})


class Connection(asyncio.Protocol):
    """One connection to an upstream; the parser calls the ``on_`` methods while bytes are fed."""

    note = b""
    fault = ""

    def __init__(self, upstream: Upstream, loop: asyncio.AbstractEventLoop) -> None:
        self.upstream = upstream
        self.closed = False
        self.idle_since = 0.0
        self.got_bytes = False
        """Whether a byte of the current answer has come."""
        self.status = 0
        self.headers: Headers = []
        """Of the current answer, names in lower case."""
        self.length: int | None = None
        """Content-Length of the answer, if it said one."""
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._sink: Sink | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._head_bytes = 0
        self._head_done = False
        self._interim = False
        self._complete = False
        self._keep = False
        self._until_close = False
        self._paused = False
        self._draining = 0

    # -- used by an exchange

    def send(self, sink: Sink, parts: Sequence[bytes]) -> None:
        """Start a request; the answer goes to ``sink``."""
        self._sink = sink
        self._reset()
        assert self._transport is not None
        self._transport.writelines(parts)

    def pause(self) -> None:
        """Stop reading: the client cannot keep up."""
        if not self._paused and not self.closed and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._paused and not self.closed and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()

    def abort(self) -> None:
        """Drop the connection at once; the sink hears nothing more."""
        self._sink = None
        self.closed = True
        if self._transport is not None:
            self._transport.abort()

    def discard(self) -> None:
        """Forget the current answer: read its short rest to keep the connection, or drop it."""
        self._sink = None
        if not self._complete:
            self._draining = DRAIN_BYTES
            self.resume()

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        sink, self._sink = self._sink, None
        if sink is None:
            return
        if self._until_close and self._head_done and exc is None:
            self._complete = True
            sink.received(self, b"", True)
        else:
            sink.broken(self, f"connection lost: {exc}" if exc else "connection closed by the upstream")

    def data_received(self, data: bytes) -> None:
        self.got_bytes = True
        fault = ""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            fault = f"malformed answer: {error}"
        if self._sink is None:
            self._unwanted(len(data), fault)
        elif self._head_done:
            self._deliver(self._sink, fault)
        else:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                fault = f"the answer's head is longer than {HEAD_BYTES} bytes"
            if fault:
                self._break(self._sink, fault)

    def _deliver(self, sink: Sink, fault: str) -> None:
        parts = self._parts
        chunk = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        if self._complete:
            # what is wrong behind a complete answer costs the connection, not the answer
            self._keep = self._keep and not fault
            self._sink = None
            sink.received(self, chunk, True)
            self._settle()
            return
        if chunk or not fault:
            sink.received(self, chunk, False)
        if fault and self._sink is sink:
            self._break(sink, fault)

    def _break(self, sink: Sink, fault: str) -> None:
        self.abort()
        sink.broken(self, fault)

    def _unwanted(self, count: int, fault: str) -> None:
        """The rest of an answer that was discarded; else bytes that nobody asked for."""
        self._parts.clear()
        self._draining, left = 0, self._draining - count
        if left > 0 and self._complete:
            self._keep = self._keep and not fault
            self._settle()
        elif left > 0 and not fault:
            self._draining = left
        else:
            self.abort()

    def _settle(self) -> None:
        """The answer is complete: keep the connection for the next one, or close it."""
        if self._keep and not self.closed:
            self.resume()
            self.idle_since = self._loop.time()
            self.upstream.release(self)
        else:
            self.abort()

    def _reset(self) -> None:
        self.got_bytes = self._head_done = self._interim = self._complete = False
        self._keep = self._until_close = False
        self._head_bytes = 0
        self._parts.clear()

    # -- httptools callbacks

    def on_message_begin(self) -> None:
        if self._complete:  # an answer nobody asked for
            self._keep = False
            return
        self.headers = []
        self.length = None
        self._until_close = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._head_done:
            return  # trailers
        name = name.lower()
        if name == b"content-length":
            self.length = int(value)
            self._until_close = False
        elif name == b"transfer-encoding":
            self._until_close = False
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self._complete:
            return
        self.status = self._parser.get_status_code()
        self._interim = self.status < 200
        if not self._interim:
            self._head_done = True
            self._keep = self._parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        if not self._complete:
            self._parts.append(body)

    def on_message_complete(self) -> None:
        if not self._interim:
            self._complete = True
