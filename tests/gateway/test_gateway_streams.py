"""Streams through the gateway, byte for byte, whatever the bytes, their chunks and their packets."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import pytest
import uvloop
from faulty_upstream import Got, RawClient, chat, chunk, config_for, post
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.gateway.app import RunningGateway, start
from understudy.traffic.record import Call
from understudy.traffic.segments import read_segment

T = TypeVar("T")
ASKED = post(chat(stream=True))


class Scripted(asyncio.Protocol):
    """An upstream that answers a request with the next packets of ``script``, one each turn of the loop."""

    script: list[list[bytes]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.loop = asyncio.get_running_loop()

    def data_received(self, data: bytes) -> None:
        if data.endswith(b"}"):  # a chat request in one write, as the gateway sends it
            self.send(Scripted.script.pop(0))

    def send(self, packets: list[bytes]) -> None:
        if packets:
            self.transport.write(packets[0])
            self.loop.call_soon(self.send, packets[1:])


class Relay:
    """A gateway and its upstream on uvloop in a thread, asked from the test's thread over one connection."""

    def __init__(self, folder: Path) -> None:
        self.loop = uvloop.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.gateway, self.client = self.do(self._start(folder))
        self.place = 0

    async def _start(self, folder: Path) -> tuple[RunningGateway, RawClient]:
        self.upstream = await asyncio.get_running_loop().create_server(Scripted, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{self.upstream.sockets[0].getsockname()[1]}/v1"
        gateway = await start(config_for(folder, {"local": url}))
        return gateway, RawClient(*await asyncio.open_connection("127.0.0.1", gateway.port))

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    async def _stop(self) -> None:
        self.client.writer.close()
        await self.gateway.stop(1.0)
        self.upstream.close()

    def close(self) -> None:
        self.do(self._stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def _through(self, wires: list[list[bytes]]) -> list[Got]:
        Scripted.script = list(wires)
        self.client.writer.write(ASKED * len(wires))
        return [await self.client.answer() for _ in wires]

    def through(self, wires: list[list[bytes]]) -> tuple[list[Got], list[Call]]:
        """What the client gets and what is recorded when the upstream sends these packets."""
        got = self.do(self._through(wires))
        frames = list(read_segment(self.gateway.plane.recorder.writer.path, self.place))
        self.place = frames[-1].end
        return got, [frame.record for frame in frames if isinstance(frame.record, Call)]


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    relay = Relay(tmp_path_factory.mktemp("relay"))
    yield relay
    relay.close()


def _event(text: str, end: bytes) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}).encode() + end


class Fuzzed(NamedTuple):
    """A stream and how it travels."""

    stream: bytes
    chunks: list[int]
    """Sizes, again and again; empty: the answer says its length and has no chunks."""
    packets: list[int]

    def wire(self) -> list[bytes]:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
        if not self.chunks:
            return _cut(head + b"Content-Length: %d\r\n\r\n" % len(self.stream) + self.stream, self.packets)
        body = b"".join(chunk(piece) for piece in _cut(self.stream, self.chunks)) + b"0\r\n\r\n"
        return _cut(head + b"Transfer-Encoding: chunked\r\n\r\n" + body, self.packets)


EVENTS = st.one_of(
    st.binary(max_size=60),
    st.builds(_event, st.text(max_size=30), st.sampled_from([b"\n\n", b"\r\n\r\n", b"\r\r", b"\n"])),
    st.sampled_from([b": ping\n\n", b"data: [DONE]\n\n", b"data: {", b"\n\n", b"event: x\ndata: {}\n\n"]),
)
SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=6)
STREAMS = st.builds(
    Fuzzed,
    st.lists(EVENTS, max_size=6).map(b"".join),
    st.one_of(st.just([]), SIZES),
    SIZES,
)
TOGETHER = 20
"""Streams one after the other over one connection: what the one before leaves behind would show."""


def _cut(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces, place = [], 0
    for size in itertools.cycle(sizes):
        if place >= len(data):
            return pieces
        pieces.append(data[place : place + size])
        place += size
    return pieces


FUZZED = int(os.environ.get("UNDERSTUDY_FUZZED_STREAMS", "600"))
"""Ten thousand take about a minute of CPU: bench/recording.py asks for them."""


@given(st.lists(STREAMS, min_size=TOGETHER, max_size=TOGETHER))
@settings(max_examples=FUZZED // TOGETHER, deadline=None)
def test_streams_are_relayed_byte_for_byte(relay: Relay, streams: list[Fuzzed]) -> None:
    got, kept = relay.through([fuzzed.wire() for fuzzed in streams])
    assert len(kept) == len(streams)
    for fuzzed, answer, call in zip(streams, got, kept, strict=True):
        assert answer.complete
        assert answer.body == fuzzed.stream
        assert answer.headers["content-type"] == "text/event-stream"
        assert call.response == fuzzed.stream
        assert (call.status, call.stream, call.attempts[-1].billed) == (200, True, "yes")
