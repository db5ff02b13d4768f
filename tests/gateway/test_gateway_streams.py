"""Streams through the gateway, byte for byte, whatever the bytes, their chunks and their packets."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvloop
from faulty_upstream import FaultyUpstream, Got, Served, ask, chat, chunk, config_for
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.gateway.app import RunningGateway, start
from understudy.traffic.record import Call
from understudy.traffic.segments import read_segment

T = TypeVar("T")


class Relay:
    """A gateway and its upstream on uvloop in a thread, asked from the test's thread."""

    def __init__(self, folder: Path) -> None:
        self.loop = uvloop.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.upstream, self.gateway = self.do(self._start(folder))
        self.place = 0

    async def _start(self, folder: Path) -> tuple[FaultyUpstream, RunningGateway]:
        upstream = FaultyUpstream()
        await upstream.start()
        return upstream, await start(config_for(folder, {"local": upstream.url}))

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def close(self) -> None:
        self.do(self.gateway.stop(1.0))
        self.do(self.upstream.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def through(self, packets: list[bytes]) -> tuple[Got, Call]:
        """What the client gets and what is recorded when the upstream sends these packets."""

        async def handler(served: Served) -> None:
            for packet in packets:
                await served.send(packet)
                await asyncio.sleep(0)

        self.upstream.script = [handler]
        got = self.do(ask(self.gateway.port, chat(stream=True)))
        ((call, self.place),) = read_segment(self.gateway.plane.recorder.writer.path, self.place)
        return got, call


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    relay = Relay(tmp_path_factory.mktemp("relay"))
    yield relay
    relay.close()


def _event(text: str, end: bytes) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}).encode() + end


STREAMS = st.lists(
    st.one_of(
        st.binary(max_size=60),
        st.builds(_event, st.text(max_size=30), st.sampled_from([b"\n\n", b"\r\n\r\n", b"\r\r", b"\n"])),
        st.sampled_from([b": ping\n\n", b"data: [DONE]\n\n", b"data: {", b"\n\n", b"event: x\ndata: {}\n\n"]),
    ),
    max_size=8,
).map(b"".join)
SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=8)


def _cut(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces, place = [], 0
    for size in itertools.cycle(sizes):
        if place >= len(data):
            return pieces
        pieces.append(data[place : place + size])
        place += size
    return pieces


FUZZED = int(os.environ.get("UNDERSTUDY_FUZZED_STREAMS", "250"))
"""Ten thousand take half a minute: LOG.md says when that was done."""


@given(stream=STREAMS, chunks=SIZES, packets=SIZES, framing=st.sampled_from(["chunked", "length"]))
@settings(max_examples=FUZZED, deadline=None)
def test_streams_are_relayed_byte_for_byte(
    relay: Relay, stream: bytes, chunks: list[int], packets: list[int], framing: str
) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    if framing == "chunked":
        body = b"".join(chunk(piece) for piece in _cut(stream, chunks)) + b"0\r\n\r\n"
        wire = head + b"Transfer-Encoding: chunked\r\n\r\n" + body
    else:
        wire = head + b"Content-Length: %d\r\n\r\n" % len(stream) + stream
    got, call = relay.through(_cut(wire, packets))
    assert got.complete
    assert got.body == stream
    assert got.headers["content-type"] == "text/event-stream"
    assert call.response == stream
    assert (call.status, call.stream, call.attempts[-1].billed) == (200, True, "yes")
