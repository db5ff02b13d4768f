"""What reaches the gateway's port: sound HTTP in all its forms is served, ambiguous HTTP is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from faulty_upstream import (
    SSE_HEAD,
    FaultyUpstream,
    Served,
    ask,
    calls,
    chat,
    chunk,
    config_for,
    echo,
    feedback,
    post,
    raw_client,
    running,
)

from understudy.gateway import inbound
from understudy.gateway.app import RunningGateway

BODY = json.dumps(chat()).encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: gateway\r\n"


@pytest.fixture
async def gateway(tmp_path: Path, upstream: FaultyUpstream) -> AsyncIterator[RunningGateway]:
    async with running(config_for(tmp_path, {"local": upstream.url})) as gateway:
        yield gateway


def with_length(extra: bytes = b"", length: bytes = b"%d" % len(BODY)) -> bytes:
    return HEAD + extra + b"Content-Length: " + length + b"\r\n\r\n" + BODY


CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
SMUGGLING = {
    "CL.TE": HEAD + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKED,
    "TE.CL": HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n" + CHUNKED,
    "two lengths": with_length(b"Content-Length: 5\r\n"),
    "same length twice": with_length(b"Content-Length: %d\r\n" % len(BODY)),
    "list of lengths": with_length(length=b"5, 5"),
    "signed length": with_length(length=b"+%d" % len(BODY)),
    "hex length": with_length(length=b"0x10"),
    "obsolete folding": with_length(b"X-A: 1\r\n 2\r\n"),
    "space before colon": with_length(b"Transfer-Encoding : chunked\r\n"),
    "gzip, chunked": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + CHUNKED,
    "identity": HEAD + b"Transfer-Encoding: identity\r\n\r\n" + CHUNKED,
    "xchunked": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n" + CHUNKED,
    "chunked twice": HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKED,
    "bad chunk size": HEAD + b"Transfer-Encoding: chunked\r\n\r\n0x10\r\n" + BODY,
    "chunk without CRLF": HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\nx\n0\n\n",
    "bare line feeds": with_length().replace(b"\r\n", b"\n"),
    "bare carriage return": with_length(b"X-A: 1\rX-B: 2\r\n"),
    "NUL": with_length(b"X-A: \0\r\n"),
    "two hosts": with_length(b"Host: other\r\n"),
    "no host": with_length().replace(b"Host: gateway\r\n", b""),
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "CONNECT": b"CONNECT gateway:80 HTTP/1.1\r\nHost: gateway\r\n\r\n",
    "upgrade": with_length(b"Connection: Upgrade\r\nUpgrade: websocket\r\n"),
    "compressed body": with_length(b"Content-Encoding: gzip\r\n"),
    "header bomb": HEAD + b"X-A: 1\r\n" * 10_000,
    "endless header": HEAD + b"X-A: " + b"x" * 100_000,
    "endless URL": b"POST /" + b"x" * 100_000,
}


@pytest.mark.parametrize("name", SMUGGLING)
async def test_ambiguous_framing_is_refused_and_the_connection_closed(
    gateway: RunningGateway, upstream: FaultyUpstream, tmp_path: Path, name: str
) -> None:
    async with raw_client(gateway.port) as client:
        got = await client.ask(SMUGGLING[name] + with_length())
        assert got.status in (400, 413, 415, 431, 501, 505)
        assert got.json["error"]["code"] == "bad_framing"
        assert got.headers["connection"] == "close"
        assert await client.closed()
    assert upstream.served == []
    assert calls(tmp_path) == []


async def test_trailers_without_end_are_refused(gateway: RunningGateway, upstream: FaultyUpstream) -> None:
    """Nobody asked for them, and what parses them keeps the last one in memory."""
    async with raw_client(gateway.port) as client:
        client.writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKED[:-2] + b"X-Trailer: ")
        for _ in range(20):
            client.writer.write(b"x" * 10_000)
            await asyncio.sleep(0)
        got = await client.answer()
        assert (got.status, got.json["error"]["code"]) == (431, "bad_framing")
        assert await client.closed()
    assert upstream.served == []


async def test_chunks_of_one_byte_are_no_abuse(gateway: RunningGateway, upstream: FaultyUpstream) -> None:
    asked = json.dumps(chat("x" * 60_000)).encode()
    pieces = b"".join(chunk(asked[place : place + 1]) for place in range(len(asked)))
    async with raw_client(gateway.port) as client:
        got = await client.ask(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + pieces + b"0\r\n\r\n")
    assert got.status == 200
    assert len(upstream.served[0].body) == len(asked) - 8


async def test_a_client_that_does_not_read_its_answers_is_asked_to_wait(gateway: RunningGateway) -> None:
    """Short requests with long answers must not fill our memory."""
    ours = b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n"
    async with raw_client(gateway.port) as client:
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a StreamWriter's own transport
        client.writer.write(ours * 8000)
        largest = 0
        for _ in range(60):
            await asyncio.sleep(0.01)
            transports = [one._transport for one in gateway.plane.clients if isinstance(one, inbound.Inbound)]
            largest = max([largest, *(t.get_write_buffer_size() for t in transports if t)])
        assert 0 < largest < 1 << 20
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert {(await client.answer()).status for _ in range(8000)} == {200}


async def test_chunked_request_bodies(
    gateway: RunningGateway, upstream: FaultyUpstream, tmp_path: Path
) -> None:
    pieces = b"".join(chunk(BODY[place : place + 7]) for place in range(0, len(BODY), 7))
    async with raw_client(gateway.port) as client:
        with_trailer = b"Transfer-Encoding: chunked\r\n\r\n" + pieces + b"0\r\nX-Task-Id: forged\r\n\r\n"
        got = await client.ask(HEAD + with_trailer)
        assert got.status == 200
        assert (await client.ask(with_length())).status == 200
    assert [served.headers["content-length"] for served in upstream.served] == [str(len(BODY) - 8)] * 2
    assert [(call.request, call.task_id) for call in calls(tmp_path)] == [(BODY, "")] * 2


async def test_a_request_in_single_bytes(gateway: RunningGateway) -> None:
    async with raw_client(gateway.port) as client:
        for byte in with_length():
            client.writer.write(bytes([byte]))
            await asyncio.sleep(0)
        assert (await client.answer()).status == 200


async def test_expect_100_continue(gateway: RunningGateway) -> None:
    head, _, body = with_length(b"Expect: 100-continue\r\n").partition(b"\r\n\r\n")
    async with raw_client(gateway.port) as client:
        client.writer.write(head + b"\r\n\r\n")
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert (await client.ask(body)).status == 200


async def test_pipelined_requests_are_answered_in_order(
    gateway: RunningGateway, upstream: FaultyUpstream, tmp_path: Path
) -> None:
    async def slow_first(served: Served) -> None:
        await asyncio.sleep(0.1)
        await echo(served)

    upstream.script = [slow_first, echo]
    asked = [f"number {n}" for n in range(40)]
    async with raw_client(gateway.port) as client:
        client.writer.write(b"".join(post(chat(text)) for text in asked))
        client.writer.write(b"GET /health HTTP/1.1\r\nHost: gateway\r\n\r\n")
        answers = [await client.answer() for _ in asked]
        health = await client.answer()
    assert [a.json["choices"][0]["message"]["content"] for a in answers] == [f"You said: {t}" for t in asked]
    kept = [json.loads(call.request)["messages"][0]["content"] for call in calls(tmp_path)]
    assert kept == asked
    assert health.json["status"] == "ok"


async def test_thousands_of_pipelined_requests_behind_a_slow_one(
    gateway: RunningGateway, upstream: FaultyUpstream
) -> None:
    async def slow(served: Served) -> None:
        await asyncio.sleep(0.2)
        await echo(served)

    upstream.script = [slow]
    async with raw_client(gateway.port) as client:
        client.writer.write(with_length() + b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n" * 3000)
        statuses = [(await client.answer()).status for _ in range(3001)]
    assert statuses == [200] * 3001


async def test_http_1_0(gateway: RunningGateway, upstream: FaultyUpstream) -> None:
    async with raw_client(gateway.port) as client:
        got = await client.ask(with_length().replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert (got.status, got.headers["connection"]) == (200, "close")
        assert await client.closed()

    async def in_two(served: Served) -> None:
        await served.send(SSE_HEAD + chunk(b"data: 1\n\n"))
        await asyncio.sleep(0.02)
        await served.send(chunk(b"data: 2\n\n") + b"0\r\n\r\n")

    upstream.script = [in_two]
    async with raw_client(gateway.port) as client:
        client.writer.write(with_length().replace(b"HTTP/1.1", b"HTTP/1.0"))
        raw = await client.reader.read()
    assert b"transfer-encoding" not in raw
    assert raw.endswith(b"\r\n\r\ndata: 1\n\ndata: 2\n\n")


async def test_connection_close_is_obeyed(gateway: RunningGateway) -> None:
    async with raw_client(gateway.port) as client:
        got = await client.ask(with_length(b"Connection: close\r\n"))
        assert (got.status, got.headers["connection"]) == (200, "close")
        assert await client.closed()


async def test_what_travels_to_the_upstream(tmp_path: Path, upstream: FaultyUpstream) -> None:
    (tmp_path / "key").write_text("sk-vendor\n")
    keyed_endpoint = f'[endpoints.keyed]\nbase_url = "{upstream.url}"\napi_key = "file:key"'
    config = config_for(tmp_path, {"local": upstream.url}, rest=keyed_endpoint)
    sent = [
        "Authorization: Bearer us-client",
        "X-Api-Key: us-client",
        "Cookie: a=b",
        "Connection: keep-alive, x-hop",
        "X-Hop: 1",
        "X-Task-Id: t",
        "X-Tags: a=b",
        "OpenAI-Beta: assistants=v2",
        "User-Agent: x",
    ]
    async with running(config) as gateway:
        await ask(gateway.port, chat(), *sent)
        await ask(gateway.port, {**chat(), "model": "keyed/some/model"}, *sent)
        async with raw_client(gateway.port) as client:
            await client.ask(post(chat(), path="/v1/chat/completions?api-version=1"))
    plain, keyed, queried = upstream.served
    assert plain.headers == {
        "host": f"127.0.0.1:{upstream.port}",
        "openai-beta": "assistants=v2",
        "user-agent": "x",
        "content-length": str(len(BODY) - 8),
    }
    assert keyed.headers == plain.headers | {
        "authorization": "Bearer sk-vendor",
        "content-length": str(len(BODY) + 1),
    }
    assert keyed.json["model"] == "some/model"
    assert queried.line == "POST /v1/chat/completions?api-version=1 HTTP/1.1"
    assert [call.alias for call in calls(tmp_path)] == ["assistant", "keyed/some/model", "assistant"]


@pytest.mark.parametrize(
    ("request_line", "status", "code"),
    [
        ("GET /v1/chat/completions", 404, "unknown_path"),
        ("POST /v2/chat/completions", 404, "unknown_path"),
        ("POST /v1/models", 405, "method_not_allowed"),
        ("GET /feedback", 405, "method_not_allowed"),
        ("GET /v1/models/none", 404, "model_not_found"),
        ("POST /v1/chat/completions", 400, "invalid_json"),
    ],
)
async def test_wrong_paths_and_methods(
    gateway: RunningGateway, request_line: str, status: int, code: str
) -> None:
    async with raw_client(gateway.port) as client:
        got = await client.ask(f"{request_line} HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n".encode())
        assert (got.status, got.json["error"]["code"]) == (status, code)
        assert (await client.ask(with_length())).status == 200


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"call": "0" * 32},
        {"call": "0" * 31, "expected": "x"},
        {"call": "G" * 32, "expected": "x"},
        {"call": "0" * 32, "metric": "ok"},
        {"call": "0" * 32, "value": 1},
        {"call": "0" * 32, "expected": 1},
        {"call": "0" * 32, "metric": "ok", "value": "1"},
        {"call": "0" * 32, "expected": "x", "grade": 1},
    ],
)
async def test_feedback_that_says_nothing_is_refused(
    gateway: RunningGateway, tmp_path: Path, said: dict[str, object]
) -> None:
    async with raw_client(gateway.port) as client:
        got = await client.ask(post(said, path="/feedback"))
    assert (got.status, got.json["error"]["code"]) == (400, "invalid_feedback")
    assert feedback(tmp_path) == []


async def test_a_request_that_never_ends_is_given_up(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbound, "REQUEST_S", 0.05)
    async with raw_client(gateway.port) as client:
        got = await client.ask(HEAD)
        assert (got.status, got.json["error"]["code"]) == (408, "request_timeout")
        assert await client.closed()
