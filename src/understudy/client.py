"""An HTTP/1.1 client of one origin: POST, whole answers, connections kept and used again.

It exists for thousands of calls in flight, where a general client costs more than everything that is done
with the answers. It ignores redirects (an answer like any other, so a key never travels to a host that nobody
named), cookies, proxies, and what an answer means (endpoint).

Source: RFC 9112 (HTTP/1.1), RFC 9110 §8.4 (content coding).
"""

from __future__ import annotations

import asyncio
import base64
import ssl
import time
import zlib
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple, cast
from urllib.parse import unquote, urlsplit

import httptools

from understudy.errors import InputError

IDLE_S = 15.0
"""A connection that was unused for longer is not used again: its server may be about to close it."""
CONNECT_S = 30.0
"""Longest wait for a connection to be made; the call's own limit holds besides."""
MOST_BYTES = 256 << 20
"""Longest answer, unpacked; none of a model's is near it, and memory has an end."""
KEPT = {b"retry-after", b"content-encoding", b"location"}
"""Headers of an answer that somebody reads."""

Loop = asyncio.AbstractEventLoop


class Response(NamedTuple):
    """A whole answer."""

    status: int
    headers: dict[bytes, bytes]
    """Those in KEPT, names in lower case."""
    body: bytes
    first_s: float
    """Seconds from the call to the first byte of the body (of the answer, where it has none)."""


class Client:
    """Calls one origin; close it when done.

    At most ``connections`` are open; further calls wait for one, first come, first served. ``timeout_s`` is
    for the answer, counted from when a connection is at hand. Raises InputError for a base URL or a header
    that cannot be sent.
    """

    def __init__(
        self, base_url: str, headers: Mapping[str, str], *, connections: int, timeout_s: float
    ) -> None:
        url = urlsplit(base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise InputError(f"not a URL: {base_url!r}", expected="http://HOST[:PORT]/v1 or https://…")
        self._host = url.hostname
        self._port = url.port or (443 if url.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if url.scheme == "https" else None
        self._path = url.path.rstrip("/")
        self._head = _head_of(url.netloc, headers, url.username, url.password)
        self._timeout_s = timeout_s
        self._free = max(connections, 1)
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def post(self, path: str, body: bytes) -> Response:
        """POST to the base URL with ``path`` behind it.

        Raises OSError when there is no connection or it breaks (TimeoutError and ssl.SSLError are such), and
        what was not HTTP is said by a ConnectionError.
        """
        started = time.perf_counter()
        if self._free <= 0:
            await self._turn()
        self._free -= 1
        try:
            connection = self._take() or await self._connect()
            head = b"POST %b HTTP/1.1\r\n%bcontent-length: %d\r\n\r\n" % (
                f"{self._path}{path}".encode(),
                self._head,
                len(body),
            )
            return await connection.ask(head + body, started, self._timeout_s)
        finally:
            self._free += 1
            self._wake()

    def _take(self) -> _Connection | None:
        now = time.monotonic()
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed and now - connection.idle_since < IDLE_S:
                return connection
            connection.close()
        return None

    async def _turn(self) -> None:
        """Wait until a connection may be used."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self._wake()  # the turn was ours already: pass it on
            raise

    def _wake(self) -> None:
        while self._waiting and self._free > 0:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        limit = min(CONNECT_S, self._timeout_s)
        try:
            async with asyncio.timeout(limit):
                _, connection = await loop.create_connection(
                    lambda: _Connection(loop, self._idle, self._open),
                    self._host,
                    self._port,
                    ssl=self._tls,
                    server_hostname=self._host if self._tls else None,
                )
        except TimeoutError as error:
            raise TimeoutError(f"no connection within {limit:g} s") from error
        return connection

    async def close(self) -> None:
        for connection in list(self._open):
            connection.close()
        self._idle.clear()
        await asyncio.sleep(0)  # lets the transports close


def _head_of(netloc: str, headers: Mapping[str, str], user: str | None, password: str | None) -> bytes:
    """Header lines of every request. Raises InputError for one that would break out of its line."""
    lines = {"host": netloc.rpartition("@")[2], **{name.lower(): value for name, value in headers.items()}}
    if user is not None and "authorization" not in lines:
        pair = f"{unquote(user)}:{unquote(password or '')}".encode()
        lines["authorization"] = f"Basic {base64.b64encode(pair).decode()}"
    broken = [name for name, value in lines.items() if not (name + value).isprintable() or not _latin(value)]
    if broken:
        raise InputError(
            f"the header {broken[0]} holds a character that cannot be sent",
            expected="one line of Latin letters, digits and signs",
            next_step="look for a line break or a typographic quote in the key",
        )
    return "".join(f"{name}: {value}\r\n" for name, value in lines.items()).encode("latin-1")


def _latin(value: str) -> bool:
    return all(ord(character) < 256 for character in value)


class _Connection(asyncio.Protocol):
    """One connection, one call at a time; the parser calls the ``on_`` methods while bytes are fed."""

    def __init__(self, loop: Loop, idle: list[_Connection], opened: set[_Connection]) -> None:
        self.closed = False
        self.idle_since = 0.0
        self._loop = loop
        self._idle = idle
        self._opened = opened
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Response] | None = None
        self._parser = httptools.HttpResponseParser(cast(Any, self))
        self._started = self._first = 0.0
        self._headers: dict[bytes, bytes] = {}
        self._parts: list[bytes] = []
        self._size = 0
        self._status = 0
        self._framed = False
        """The answer says where it ends; else it ends with the connection."""
        self._fault: OSError | None = None

    async def ask(self, request: bytes, started: float, timeout_s: float) -> Response:
        assert self._transport is not None
        answer = self._answer = self._loop.create_future()
        self._started, self._first, self._size, self._status = started, 0.0, 0, 0
        self._headers, self._parts = {}, []
        self._transport.write(request)
        limit = self._loop.call_later(timeout_s, self._expire, timeout_s)
        try:
            return await answer
        finally:
            limit.cancel()
            if self._answer is answer:  # cancelled: what comes now belongs to nobody
                self.close()

    def close(self) -> None:
        self.closed = True
        answer, self._answer = self._answer, None
        if answer is not None and not answer.done():
            answer.set_exception(ConnectionError("the connection was closed on our side"))
        self._opened.discard(self)
        if self._transport is not None:
            self._transport.abort()

    def _expire(self, seconds: float) -> None:
        self._fail(TimeoutError(f"no whole answer within {seconds:g} s"))

    def _fail(self, error: OSError) -> None:
        answer, self._answer = self._answer, None
        self.close()
        if answer is not None and not answer.done():
            answer.set_exception(error)

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._opened.add(self)

    def data_received(self, data: bytes) -> None:
        if self._answer is None:  # bytes that nobody asked for
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fault = self._fault or ConnectionError(f"not an HTTP answer: {error}")
        if self._fault is not None:
            self._fail(self._fault)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and self._status >= 200 and not self._framed and exc is None:
            self._complete(keep=False)
        self._fail(ConnectionError(str(exc) if exc else "the server closed the connection without an answer"))

    # -- httptools callbacks

    def on_message_begin(self) -> None:
        self._framed = False
        if self._answer is None:  # an answer nobody asked for must not become the next call's
            self._fault = ConnectionError("the server answered twice")

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name in KEPT:
            self._headers[name] = value
        elif name in (b"content-length", b"transfer-encoding"):
            self._framed = True

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if not self._first:
            self._first = time.perf_counter()
        self._size += len(body)
        if self._size > MOST_BYTES:
            self._fault = ConnectionError(f"the answer is longer than {MOST_BYTES >> 20} MiB")
        else:
            self._parts.append(body)

    def on_message_complete(self) -> None:
        if self._status >= 200:  # else an interim answer: the real one follows
            self._complete(keep=self._parser.should_keep_alive() and self._framed)

    def _complete(self, *, keep: bool) -> None:
        answer, self._answer = self._answer, None
        if answer is None or self._fault is not None:
            self._answer = answer
            return
        parts = self._parts
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        coding = self._headers.get(b"content-encoding", b"").strip().lower()
        try:
            body = _unpacked(body, coding) if coding not in (b"", b"identity") else body
        except OSError as error:
            self._answer, self._fault = answer, error
            return
        first = (self._first or time.perf_counter()) - self._started
        if not answer.done():
            answer.set_result(Response(self._status, self._headers, body, first))
        if keep and not self.closed:
            self.idle_since = time.monotonic()
            self._idle.append(self)
        else:
            self.close()


def _unpacked(body: bytes, coding: bytes) -> bytes:
    """The body without its content coding, which nobody asked for. Raises ConnectionError."""
    if coding not in (b"gzip", b"x-gzip", b"deflate"):
        raise ConnectionError(f"the answer is packed as {coding.decode('latin-1')}, which was not asked for")
    inflate = zlib.decompressobj(zlib.MAX_WBITS | 32)  # 32: gzip or zlib, by its head
    try:
        plain = inflate.decompress(body, MOST_BYTES)
    except zlib.error as error:
        raise ConnectionError(f"the answer cannot be unpacked: {error}") from error
    if inflate.unconsumed_tail:
        raise ConnectionError(f"the answer is longer than {MOST_BYTES >> 20} MiB")
    if not inflate.eof:
        raise ConnectionError("the answer cannot be unpacked: it is cut off")
    return plain
