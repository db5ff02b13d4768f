"""Upstreams and clients that misbehave: for each fault the client's answer and the record that is kept."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
from pathlib import Path

import pytest
from faulty_upstream import (
    SSE_HEAD,
    FaultyUpstream,
    Handler,
    Served,
    answers,
    ask,
    calls,
    chat,
    chunk,
    completion,
    config_for,
    echo,
    events,
    http,
    post,
    raw_client,
    running,
    sends,
    until,
)

from understudy.protocol import Usage
from understudy.traffic.record import Call


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def attempts(call: Call) -> list[tuple[str, int, str]]:
    return [(attempt.target, attempt.status, attempt.billed) for attempt in call.attempts]


async def one(folder: Path, upstream: FaultyUpstream, *script: Handler, gateway: str = "", **body: object):
    """What the client gets and what is recorded when one upstream follows a script."""
    upstream.script = list(script)
    async with running(config_for(folder, {"local": upstream.url}, gateway)) as running_gateway:
        got = await ask(running_gateway.port, chat(**body))
    (call,) = calls(folder)
    return got, call


# before the first byte: another try, or an error that says what happened


async def test_refused_connection(tmp_path: Path) -> None:
    dead = f"http://127.0.0.1:{free_port()}/v1"
    async with running(config_for(tmp_path, {"dead": dead})) as gateway:
        got = await ask(gateway.port)
    assert (got.status, got.json["error"]["code"]) == (502, "upstream_unreachable")
    assert got.headers["x-understudy-attempts"] == "2"
    (call,) = calls(tmp_path)
    assert (call.key, call.status) == (got.headers["x-understudy-call"], 502)
    assert attempts(call) == [("dead/m", 0, "no")] * 2
    assert call.usage is None
    assert call.response == got.body


async def test_refused_connection_with_a_fallback(tmp_path: Path, upstream: FaultyUpstream) -> None:
    endpoints = {"dead": f"http://127.0.0.1:{free_port()}/v1", "local": upstream.url}
    async with running(config_for(tmp_path, endpoints)) as gateway:
        got = await ask(gateway.port)
    assert got.status == 200
    assert got.headers["x-understudy-model"] == got.headers["x-understudy-fallback"] == "local/m"
    assert got.headers["x-understudy-attempts"] == "3"
    (call,) = calls(tmp_path)
    assert attempts(call) == [("dead/m", 0, "no"), ("dead/m", 0, "no"), ("local/m", 200, "yes")]
    assert call.target == "local/m"


@pytest.mark.parametrize("headers", [{}, {"Retry_After": "0"}])
async def test_429_is_tried_again(tmp_path: Path, upstream: FaultyUpstream, headers: dict[str, str]) -> None:
    got, call = await one(tmp_path, upstream, answers(429, **headers), echo)
    assert (got.status, got.headers["x-understudy-attempts"]) == (200, "2")
    assert "x-understudy-fallback" not in got.headers
    assert attempts(call) == [("local/m", 429, "no"), ("local/m", 200, "yes")]
    assert upstream.connections == 1


@pytest.mark.parametrize(("size", "connections"), [(30_000, 1), (300_000, 2)])
async def test_a_discarded_answer_keeps_its_connection_when_it_is_short(
    tmp_path: Path, upstream: FaultyUpstream, size: int, connections: int
) -> None:
    head = b"HTTP/1.1 503 No\r\ncontent-length: %d\r\n\r\n" % size
    pieces = [bytes(10_000) for _ in range(size // 10_000)]
    got, call = await one(tmp_path, upstream, sends(head, *pieces), echo)
    assert (got.status, got.headers["x-understudy-attempts"]) == (200, "2")
    assert attempts(call) == [("local/m", 503, "no"), ("local/m", 200, "yes")]
    assert upstream.connections == connections


async def test_429_that_asks_for_patience_is_the_clients_to_see(
    tmp_path: Path, upstream: FaultyUpstream
) -> None:
    got, call = await one(tmp_path, upstream, answers(429, Retry_After="60"))
    assert (got.status, got.headers["retry-after"]) == (429, "60")
    assert attempts(call) == [("local/m", 429, "no")]
    assert call.usage is None


async def test_5xx_then_the_fallback(
    tmp_path: Path, upstream: FaultyUpstream, second: FaultyUpstream
) -> None:
    upstream.script = [answers(500), answers(503)]
    async with running(config_for(tmp_path, {"one": upstream.url, "two": second.url})) as gateway:
        got = await ask(gateway.port)
    assert (got.status, got.headers["x-understudy-fallback"]) == (200, "two/m")
    (call,) = calls(tmp_path)
    assert attempts(call) == [("one/m", 500, "no"), ("one/m", 503, "no"), ("two/m", 200, "yes")]


async def test_5xx_everywhere_relays_the_last_answer(tmp_path: Path, upstream: FaultyUpstream) -> None:
    got, call = await one(tmp_path, upstream, answers(500), answers(502, b'{"error":"last"}'))
    assert (got.status, got.body) == (502, b'{"error":"last"}')
    assert (call.status, call.response) == (502, got.body)
    assert attempts(call) == [("local/m", 500, "no"), ("local/m", 502, "no")]


async def test_400_is_relayed_and_not_tried_again(tmp_path: Path, upstream: FaultyUpstream) -> None:
    got, call = await one(tmp_path, upstream, answers(400, b'{"error":"bad"}'))
    assert (got.status, got.body) == (400, b'{"error":"bad"}')
    assert attempts(call) == [("local/m", 400, "no")]


@pytest.mark.parametrize(
    "handler",
    [
        sends(then="reset"),
        sends(then="close"),
        sends(b"HTTP/1.1 200 OK\r\ncontent-type: app", then="reset"),
        sends(b"HTTP/1.1 200 OK\r\ncontent-type: app", then="close"),
        sends(b"SSH-2.0-OpenSSH\r\n\r\n", then="stall"),
        sends(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n", then="stall"),
        sends(b"HTTP/1.1 101 Switching\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n", then="stall"),
        sends(b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 20_000, then="stall"),
    ],
    ids=["reset", "closed", "reset-in-head", "closed-in-head", "not-http", "two-lengths", "101", "head-bomb"],
)
async def test_broken_before_an_answer(
    tmp_path: Path, upstream: FaultyUpstream, second: FaultyUpstream, handler: Handler
) -> None:
    """The request may have been worked on and billed, so nobody else is asked."""
    upstream.script = [handler]
    async with running(config_for(tmp_path, {"one": upstream.url, "two": second.url})) as gateway:
        got = await ask(gateway.port)
    assert (got.status, got.json["error"]["code"]) == (502, "upstream_broken")
    (call,) = calls(tmp_path)
    assert attempts(call) == [("one/m", 0, "unknown")]
    assert call.status == 502
    assert call.usage_estimated
    assert second.served == []


async def test_an_idle_connection_that_died_is_replaced(tmp_path: Path, upstream: FaultyUpstream) -> None:
    upstream.script = [echo, sends(then="close"), echo]
    async with running(config_for(tmp_path, {"local": upstream.url})) as gateway:
        await ask(gateway.port)
        got = await ask(gateway.port)
    assert (got.status, got.headers["x-understudy-attempts"]) == (200, "2")
    assert [served.connection for served in upstream.served] == [1, 1, 2]
    assert attempts(calls(tmp_path)[1]) == [("local/m", 0, "unknown"), ("local/m", 200, "yes")]


async def test_first_byte_timeout(tmp_path: Path, upstream: FaultyUpstream) -> None:
    settings = "first_byte_timeout_s = 0.1"
    got, call = await one(tmp_path, upstream, sends(then="stall"), gateway=settings)
    assert (got.status, got.json["error"]["code"]) == (504, "upstream_timeout")
    assert attempts(call) == [("local/m", 0, "unknown")]
    assert call.status == 504
    await asyncio.wait_for(upstream.gone.wait(), 5)


async def test_connect_timeout(tmp_path: Path) -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(3)]
        for sock in waiting:  # a full accept queue answers no SYN
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        dead = f"http://127.0.0.1:{full.getsockname()[1]}/v1"
        async with running(config_for(tmp_path, {"dead": dead}, "connect_timeout_s = 0.1")) as gateway:
            got = await ask(gateway.port)
        for sock in waiting:
            sock.close()
    assert (got.status, got.json["error"]["code"]) == (502, "upstream_unreachable")
    (call,) = calls(tmp_path)
    assert attempts(call) == [("dead/m", 0, "no")] * 2
    assert "no connection within 0.1 s" in call.attempts[0].error


# after the first byte: what came is relayed, the end is a cut the client notices


@pytest.mark.parametrize(
    "handler",
    [
        sends(SSE_HEAD, chunk(events("a b c")[:300]), then="reset", pause_s=0.05),
        sends(SSE_HEAD, chunk(events("a b c")[:300]), then="close", pause_s=0.05),
        sends(SSE_HEAD + chunk(events("a b c")[:300]), b"xyz\r\n", then="stall", pause_s=0.05),
        sends(SSE_HEAD + chunk(events("a b c")[:300]) + b"5\r\nabcdefgh", then="stall"),
        sends(SSE_HEAD + chunk(events("a b c")[:300]), then="stall"),
        sends(http(200, events("a b c"), "text/event-stream")[:-500], then="close", pause_s=0.05),
    ],
    ids=["reset", "closed", "garbage-chunk", "garbage-chunk-at-once", "stalled", "short-content-length"],
)
async def test_cut_in_mid_stream(tmp_path: Path, upstream: FaultyUpstream, handler: Handler) -> None:
    got, call = await one(tmp_path, upstream, handler, gateway="idle_timeout_s = 0.2", stream=True)
    assert (got.status, got.complete) == (200, False)
    assert got.body.startswith(events("a b c")[:300])
    assert call.response == got.body
    assert (call.status, call.stream, call.usage_estimated) == (200, True, True)
    assert call.usage is not None
    assert call.usage.completion_tokens >= 1
    assert attempts(call) == [("local/m", 200, "unknown")]
    assert call.attempts[0].error
    assert len(upstream.served) == 1


async def test_total_timeout_cuts_a_stream_that_never_ends(tmp_path: Path, upstream: FaultyUpstream) -> None:
    async def forever(served: Served) -> None:
        await served.send(SSE_HEAD)
        while True:
            await served.send(chunk(b": still here\n\n"))
            await asyncio.sleep(0.02)

    got, call = await one(tmp_path, upstream, forever, gateway="total_timeout_s = 0.3", stream=True)
    assert not got.complete
    assert call.response == got.body
    assert call.attempts[0].error == "no complete answer within 0.3 s"


async def test_http_1_0_client_sees_a_cut_as_a_reset(tmp_path: Path, upstream: FaultyUpstream) -> None:
    """Without chunks the end of the connection would pass for the end of the answer."""
    upstream.script = [sends(SSE_HEAD, chunk(b"data: 1\n\n"), then="reset", pause_s=0.05)]
    config = config_for(tmp_path, {"local": upstream.url})
    async with running(config) as gateway, raw_client(gateway.port) as client:
        client.writer.write(post(chat(stream=True)).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
        with pytest.raises(ConnectionResetError):
            await client.reader.read()
    assert calls(tmp_path)[0].response == b"data: 1\n\n"


# odd but sound answers


async def test_gzip_passes_through_and_is_recorded_in_clear(tmp_path: Path, upstream: FaultyUpstream) -> None:
    body = json.dumps(completion("packed")).encode()
    packed = gzip.compress(body)
    upstream.script = [sends(http(200, packed, headers={"content-encoding": "gzip"}))]
    async with running(config_for(tmp_path, {"local": upstream.url})) as gateway:
        got = await ask(gateway.port, chat(), "Accept-Encoding: br, gzip, zstd")
    assert (got.headers["content-encoding"], got.body) == ("gzip", packed)
    assert upstream.served[0].headers["accept-encoding"] == "gzip"
    (call,) = calls(tmp_path)
    assert call.response == body
    assert call.usage == Usage(prompt_tokens=7, completion_tokens=3)


@pytest.mark.parametrize(
    "junk",
    [b'{"choices": 3}', b"\xff\xfe not utf-8", b"", b"[" * 100_000, b'{"usage":{"prompt_tokens":"x"}}'],
)
async def test_bodies_that_make_no_sense_are_relayed_and_recorded(
    tmp_path: Path, upstream: FaultyUpstream, junk: bytes
) -> None:
    got, call = await one(tmp_path, upstream, sends(http(200, junk)))
    assert (got.status, got.body, got.complete) == (200, junk, True)
    assert call.response == junk
    assert call.usage_estimated


async def test_an_answer_that_ends_with_the_connection(tmp_path: Path, upstream: FaultyUpstream) -> None:
    body = json.dumps(completion("till the end")).encode()
    handler = sends(
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n" + body, then="close", pause_s=0.05
    )
    got, call = await one(tmp_path, upstream, handler)
    assert (got.complete, got.body, got.headers["transfer-encoding"]) == (True, body, "chunked")
    assert attempts(call) == [("local/m", 200, "yes")]


async def test_interim_answers_are_skipped(tmp_path: Path, upstream: FaultyUpstream) -> None:
    body = json.dumps(completion("x")).encode()
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"
    got, _ = await one(tmp_path, upstream, sends(interim, http(200, body), pause_s=0.02))
    assert (got.status, got.body) == (200, body)
    assert "link" not in got.headers


async def test_bytes_behind_an_answer_cost_the_connection_not_the_answer(
    tmp_path: Path, upstream: FaultyUpstream
) -> None:
    upstream.script = [sends(http(200, b"{}") + b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nforged"), echo]
    async with running(config_for(tmp_path, {"local": upstream.url})) as gateway:
        first, then = await ask(gateway.port), await ask(gateway.port)
    assert (first.body, then.json["choices"][0]["message"]["content"]) == (b"{}", "You said: hello")
    assert [served.connection for served in upstream.served] == [1, 2]
    assert [(call.response, attempts(call)) for call in calls(tmp_path)] == [
        (b"{}", [("local/m", 200, "yes")]),
        (then.body, [("local/m", 200, "yes")]),
    ]


@pytest.mark.parametrize("size", [1, 7, 8 << 20])
async def test_chunks_of_any_size_are_one_answer(tmp_path: Path, upstream: FaultyUpstream, size: int) -> None:
    said = events("tiny") if size < 100 else b"data: " + b"x" * size + b"\n\ndata: [DONE]\n\n"
    pieces = [chunk(said[place : place + size]) for place in range(0, len(said), size)]
    got, call = await one(tmp_path, upstream, sends(SSE_HEAD, *pieces, b"0\r\n\r\n"), stream=True)
    assert (got.status, got.complete, got.body == said, call.response == said) == (200, True, True, True)
    assert attempts(call) == [("local/m", 200, "yes")]


async def test_an_answer_of_fifty_megabytes(tmp_path: Path, upstream: FaultyUpstream) -> None:
    body = json.dumps(completion("x" * 50_000_000)).encode()
    got, call = await one(tmp_path, upstream, sends(http(200, body)))
    assert (got.status, got.complete, got.body == body) == (200, True, True)
    assert call.response == body
    assert call.usage == Usage(prompt_tokens=7, completion_tokens=3)


async def test_a_burst_of_5xx_is_recorded_call_by_call(
    tmp_path: Path, upstream: FaultyUpstream, second: FaultyUpstream
) -> None:
    """The first calls find out, the others go past it at once; every answer is whole, every try is kept."""
    upstream.script = [answers(503)]
    settings = "break_after = 4\nrest_s = 60.0"
    async with running(config_for(tmp_path, {"one": upstream.url, "two": second.url}, settings)) as gateway:
        got = [await ask(gateway.port, chat(f"n{n}")) for n in range(12)]
    assert {answer.status for answer in got} == {200}
    assert len(upstream.served) == 4
    kept = [attempts(call) for call in calls(tmp_path)]
    failed, answered = ("one/m", 503, "no"), ("two/m", 200, "yes")
    assert kept == [[failed, failed, answered]] * 2 + [[answered]] * 10


async def test_headers_of_the_upstreams_connection_stay_there(
    tmp_path: Path, upstream: FaultyUpstream
) -> None:
    named = {
        "connection": "keep-alive, x-private",
        "x-private": "1",
        "keep-alive": "timeout=5",
        "x-understudy-model": "forged",
        "x-request-id": "r-1",
        "set-cookie": "a=b",
    }
    got, _ = await one(tmp_path, upstream, sends(http(200, b"{}", headers=named)))
    assert got.headers["x-request-id"] == "r-1"
    assert got.headers["x-understudy-model"] == "local/m"
    assert not {"x-private", "keep-alive", "set-cookie"} & set(got.headers)


# clients that go away


async def _gone(folder: Path, upstream: FaultyUpstream, when: Handler, gateway: str = "") -> Call:
    """The record of a call whose client leaves as soon as ``when`` runs at the upstream."""
    reached = asyncio.Event()

    async def handler(served: Served) -> None:
        await when(served)
        reached.set()
        await asyncio.sleep(60)

    upstream.script = [handler]
    async with running(config_for(folder, {"local": upstream.url}, gateway)) as running_gateway:
        async with raw_client(running_gateway.port) as client:
            client.writer.write(post(chat(stream=True)))
            await asyncio.wait_for(reached.wait(), 5)
            if when is not _nothing:
                await client.reader.readuntil(b"data: ")
        await asyncio.wait_for(upstream.gone.wait(), 5)
        await until(lambda: not running_gateway.plane.exchanges)
    (call,) = calls(folder)
    return call


async def _nothing(served: Served) -> None:
    del served


@pytest.mark.parametrize("mode", ["buffered", "strict", "metadata"])
async def test_client_gone_before_the_first_byte(tmp_path: Path, upstream: FaultyUpstream, mode: str) -> None:
    call = await _gone(tmp_path, upstream, _nothing, f'record = "{mode}"')
    assert (call.status, call.response, call.usage_estimated) == (499, b"", True)
    assert call.usage is not None
    assert call.usage.prompt_tokens > 0
    assert attempts(call) == [("local/m", 0, "unknown")]


@pytest.mark.parametrize("mode", ["buffered", "strict", "metadata"])
async def test_client_gone_in_mid_stream(tmp_path: Path, upstream: FaultyUpstream, mode: str) -> None:
    said = events("one two three")[:500]

    async def begin(served: Served) -> None:
        await served.send(SSE_HEAD + chunk(said))

    call = await _gone(tmp_path, upstream, begin, f'record = "{mode}"')
    assert (call.status, call.usage_estimated) == (499, True)
    assert call.response == (b"" if mode == "metadata" else said)
    assert call.usage is not None
    assert call.usage.completion_tokens >= 2
    assert attempts(call) == [("local/m", 200, "unknown")]


async def test_a_client_that_hangs_up_at_done_has_had_its_whole_answer(
    tmp_path: Path, upstream: FaultyUpstream
) -> None:
    said = events("one two three")
    assert said.endswith(b"data: [DONE]\n\n")

    reached = asyncio.Event()

    async def handler(served: Served) -> None:
        await served.send(SSE_HEAD + chunk(said))
        reached.set()
        await asyncio.sleep(60)

    upstream.script = [handler]
    async with running(config_for(tmp_path, {"local": upstream.url})) as gateway:
        async with raw_client(gateway.port) as client:
            client.writer.write(post(chat(stream=True)))
            await asyncio.wait_for(reached.wait(), 5)
            await client.reader.readuntil(b"[DONE]")
        await until(lambda: not gateway.plane.exchanges)
    (call,) = calls(tmp_path)
    assert (call.status, call.response) == (200, said)
    assert attempts(call) == [("local/m", 200, "yes")]


async def test_client_gone_while_waiting_for_another_try(tmp_path: Path, upstream: FaultyUpstream) -> None:
    upstream.script = [answers(503, Retry_After="2")]
    async with running(config_for(tmp_path, {"local": upstream.url})) as gateway:
        async with raw_client(gateway.port) as client:
            client.writer.write(post(chat()))
            await until(lambda: gateway.plane.metrics.attempts)
        await until(lambda: not gateway.plane.exchanges)
    (call,) = calls(tmp_path)
    assert call.status == 499
    assert attempts(call) == [("local/m", 503, "no"), ("local/m", 0, "no")]
    assert len(upstream.served) == 1


async def test_client_gone_before_its_request_was_whole(tmp_path: Path, upstream: FaultyUpstream) -> None:
    """Nobody was asked and nothing was answered: there is no call to record."""
    async with running(config_for(tmp_path, {"local": upstream.url})) as gateway:
        async with raw_client(gateway.port) as client:
            client.writer.write(post(chat())[:-5])
            await until(lambda: gateway.plane.clients)
        await until(lambda: not gateway.plane.clients)
    assert (upstream.served, calls(tmp_path)) == ([], [])


async def test_client_gone_while_the_upstream_is_being_reached(tmp_path: Path) -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(3)]
        for sock in waiting:  # a full accept queue answers no SYN
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        dead = f"http://127.0.0.1:{full.getsockname()[1]}/v1"
        async with running(config_for(tmp_path, {"dead": dead})) as gateway:
            async with raw_client(gateway.port) as client:
                client.writer.write(post(chat()))
                await until(lambda: gateway.plane.exchanges)
            await until(lambda: not gateway.plane.exchanges)
        for sock in waiting:
            sock.close()
    (call,) = calls(tmp_path)
    assert (call.status, call.usage, attempts(call)) == (499, None, [("dead/m", 0, "no")])


async def test_client_gone_while_strict_mode_waits_for_the_disk(
    tmp_path: Path, upstream: FaultyUpstream
) -> None:
    """The answer was whole and is recorded as it was; that nobody heard its end changes nothing."""
    config = config_for(tmp_path, {"local": upstream.url}, 'record = "strict"')
    async with running(config) as gateway:
        writer = gateway.plane.recorder.writer
        async with raw_client(gateway.port) as client:
            client.writer.write(post(chat()))
            await until(lambda: writer.counters.records)
        await until(lambda: not gateway.plane.clients)
    (call,) = calls(tmp_path)
    assert (call.status, attempts(call)) == (200, [("local/m", 200, "yes")])


async def test_a_slow_client_holds_the_upstream_back(tmp_path: Path, upstream: FaultyUpstream) -> None:
    """The stream waits in the upstream, not in our memory, however long it is; and nothing is lost."""
    piece, count = b"data: " + b"x" * 65_000 + b"\n\n", 800
    sent = 0

    async def flood(served: Served) -> None:
        nonlocal sent
        served.writer.transport.set_write_buffer_limits(high=0)
        await served.send(SSE_HEAD)
        for _ in range(count):
            await served.send(chunk(piece))
            sent += 1
        await served.send(b"0\r\n\r\n")

    upstream.script = [flood]
    config = config_for(tmp_path, {"local": upstream.url}, "idle_timeout_s = 0.2")
    async with running(config) as gateway, raw_client(gateway.port) as client:
        client.writer.write(post(chat(stream=True)))
        before = -1
        while sent != before or sent == 0:
            before = sent
            await asyncio.sleep(0.5)
        assert sent < count * 0.6
        got = await client.answer()
    assert got.complete
    assert got.body == piece * count
    assert calls(tmp_path)[0].response == got.body


async def test_a_large_request_passes_and_a_too_large_one_does_not(
    tmp_path: Path, upstream: FaultyUpstream
) -> None:
    async def size(served: Served) -> None:
        await served.send(http(200, b"%d" % len(served.body)))

    upstream.script = [size]
    async with running(config_for(tmp_path, {"local": upstream.url})) as gateway:
        got = await ask(gateway.port, chat("x" * 50_000_000))
        assert int(got.body) == len(json.dumps({**chat("x" * 50_000_000), "model": "m"}))
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 70000000\r\n\r\n"
        async with raw_client(gateway.port) as client:
            refused = await client.ask(head)
            assert (refused.status, refused.headers["connection"]) == (413, "close")
            assert await client.closed()
    assert len(calls(tmp_path)) == 1
    assert len(calls(tmp_path)[0].request) > 50_000_000
