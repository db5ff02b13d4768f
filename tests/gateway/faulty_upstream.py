"""An upstream that misbehaves on command, and a raw client: the two ends that gateway tests hold.

The upstream speaks plain HTTP/1.1 over asyncio streams. Each request is given to the next handler of its
script (the last one stays); a handler writes whatever bytes it likes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httptools

from understudy.config import Config, parse
from understudy.gateway.app import RunningGateway, start
from understudy.traffic.record import Call, Feedback, Record
from understudy.traffic.segments import Fault, read_segment, segment_files
from understudy.traffic.store import open_store

CHAT = "/v1/chat/completions"


class Served:
    """One request as the upstream got it."""

    def __init__(self, head: bytes, body: bytes, connection: int, writer: asyncio.StreamWriter) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        self.line = first
        self.headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines if line)}
        self.body = body
        self.connection = connection
        self.writer = writer

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def reset(self) -> None:
        """End the connection with a TCP reset."""
        import socket
        import struct

        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Handler = Callable[[Served], Awaitable[None]]


class FaultyUpstream:
    """A server on loopback; ``script`` says what becomes of each request."""

    def __init__(self) -> None:
        self.script: list[Handler] = [echo]
        self.served: list[Served] = []
        self.connections = 0
        self.gone = asyncio.Event()
        """A connection was closed by the other side."""
        self.port = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def start(self, port: int = 0, **tls: Any) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", port, limit=1 << 27, **tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        number = self.connections
        try:
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                while await self._one(reader, writer, number):
                    pass
        finally:
            self.gone.set()
            self._tasks.discard(task)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> bool:
        try:
            head = (await reader.readuntil(b"\r\n\r\n"))[:-4]
        except asyncio.IncompleteReadError:
            return False
        length = next(
            int(line.split(b":")[1])
            for line in head.lower().split(b"\r\n")
            if line.startswith(b"content-length")
        )
        served = Served(head, await reader.readexactly(length), number, writer)
        self.served.append(served)
        handler = self.script[min(len(self.served), len(self.script)) - 1]
        answering = asyncio.ensure_future(handler(served))
        watching = asyncio.ensure_future(_closed(reader))
        await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)
            return False
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        answering.result()
        return not writer.is_closing()


async def _closed(reader: asyncio.StreamReader) -> None:
    """Returns when the other side has closed; requests are never pipelined, so nothing is lost by looking."""
    while not reader.at_eof() and reader.exception() is None:  # noqa: ASYNC110 - a StreamReader has no event
        await asyncio.sleep(0.005)


FINGERPRINT = "fp_7"


def completion(text: str, model: str = "m-2026", **more: Any) -> dict[str, Any]:
    """A chat completion as vendors answer it."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": model,
        "system_fingerprint": FINGERPRINT,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
        **more,
    }


def events(text: str, *, usage: bool = True, model: str = "m-2026") -> bytes:
    """The same as server-sent events, a word at a time."""
    base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": model}
    base["system_fingerprint"] = FINGERPRINT
    words = [word + " " for word in text.split()]
    chunks: list[dict[str, Any]] = [
        {**base, "choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]}
        for word in words
    ]
    chunks.append({**base, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    if usage:
        numbers = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        chunks.append({**base, "choices": [], "usage": numbers})
    return b"".join(b"data: %b\n\n" % json.dumps(chunk).encode() for chunk in chunks) + b"data: [DONE]\n\n"


def http(
    status: int, body: bytes, kind: str = "application/json", headers: Mapping[str, str] | None = None
) -> bytes:
    """A whole answer with its length."""
    lines = [f"HTTP/1.1 {status} Whatever", f"content-type: {kind}", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


SSE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def echo(served: Served) -> None:
    """Answers with what was said last, streamed if asked to."""
    asked = served.json
    if "messages" not in asked:
        asked = {**asked, "messages": [{"content": str(asked.get("prompt") or asked.get("input"))}]}
    said = f"You said: {asked['messages'][-1]['content']}"
    if asked.get("stream"):
        await served.send(SSE_HEAD + chunk(events(said)) + b"0\r\n\r\n")
    else:
        await served.send(http(200, json.dumps(completion(said)).encode()))


def answers(status: int, body: bytes = b'{"error":{"message":"no"}}', **headers: str) -> Handler:
    """A handler that always answers the same."""

    async def handler(served: Served) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        await served.send(http(status, body, headers=named))

    return handler


def sends(*pieces: bytes, then: str = "keep", pause_s: float = 0.0) -> Handler:
    """A handler that sends bytes, then keeps the connection, closes or resets it, or stalls."""

    async def handler(served: Served) -> None:
        for piece in pieces:
            await served.send(piece)
            await asyncio.sleep(pause_s)
        if then == "close":
            served.writer.close()
        elif then == "reset":
            served.reset()
        elif then == "stall":
            await asyncio.sleep(60)

    return handler


def config_for(
    folder: Path, endpoints: Mapping[str, str], gateway: str = "", store: str = "", rest: str = ""
) -> Config:
    """A config with one section per endpoint and the alias ``assistant`` over all of them in order."""
    names = list(endpoints)
    lines = ["[gateway]", 'listen = "127.0.0.1:0"', gateway, "[store]", store]
    for name, url in endpoints.items():
        lines += [f"[endpoints.{name}]", f'base_url = "{url}"']
    fallback = ", ".join(f'"{name}/m"' for name in names[1:])
    lines += ["[aliases.assistant]", f'model = "{names[0]}/m"', f"fallback = [{fallback}]", rest]
    return parse("\n".join(lines), "understudy.toml", folder)


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[RunningGateway]:
    """A gateway for the block; stopped with a short grace."""
    gateway = await start(config)
    try:
        yield gateway
    finally:
        await gateway.stop(grace_s=2.0)


def records(folder: Path) -> list[Record | Fault]:
    return [frame.record for path in segment_files(folder / "segments") for frame in read_segment(path)]


def log_bytes(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in (folder / "segments").iterdir())


def stored(folder: Path) -> set[str]:
    """Keys of the calls in the store."""
    with open_store("sqlite:///understudy.db", folder) as store:
        return {kept.call.key for kept in store.calls()}


def calls(folder: Path) -> list[Call]:
    return [record for record in records(folder) if isinstance(record, Call)]


def feedback(folder: Path) -> list[Feedback]:
    return [record for record in records(folder) if isinstance(record, Feedback)]


class Got(NamedTuple):
    """An answer as a raw client saw it."""

    status: int
    headers: dict[str, str]
    body: bytes
    complete: bool
    """The answer ended as its framing promised."""

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)


class RawClient:
    """A connection that sends the bytes it is told to, and reads answers; use `raw_client`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._parser = httptools.HttpResponseParser(self)
        self._answers: deque[Got] = deque()
        self.on_message_begin()

    async def ask(self, data: bytes) -> Got:
        self.writer.write(data)
        return await self.answer()

    async def answer(self) -> Got:
        """The next answer, to its end or the connection's."""
        while not self._answers:
            try:
                data = await asyncio.wait_for(self.reader.read(1 << 20), 10)
            except ConnectionError:
                data = b""
            if not data:
                return Got(self._status, self._headers, b"".join(self._body), False)
            self._parser.feed_data(data)
        return self._answers.popleft()

    async def closed(self) -> bool:
        """Whether the other side has closed, nothing more having been said."""
        return await asyncio.wait_for(self.reader.read(1), 10) == b""

    def on_message_begin(self) -> None:
        self._status = 0
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode().lower()] = value.decode()

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        if self._status >= 200:
            self._answers.append(Got(self._status, self._headers, b"".join(self._body), True))


@asynccontextmanager
async def raw_client(port: int) -> AsyncIterator[RawClient]:
    """A connection for the block."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield RawClient(reader, writer)
    finally:
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that has no event; fails after ten seconds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def post(body: bytes | Mapping[str, Any], path: str = CHAT, headers: Iterable[str] = ()) -> bytes:
    """A POST request's bytes."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: gateway", f"Content-Length: {len(raw)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + raw


def chat(content: str = "hello", **more: Any) -> dict[str, Any]:
    return {"model": "assistant", "messages": [{"role": "user", "content": content}], **more}


async def ask(port: int, body: bytes | Mapping[str, Any] | None = None, *headers: str) -> Got:
    """One chat request over a connection of its own."""
    async with raw_client(port) as client:
        return await client.ask(post(chat() if body is None else body, headers=headers))
