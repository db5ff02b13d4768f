"""Translated calls that go wrong: errors, streams that break off, answers that nobody can read, clients that
leave; what the client gets and what is recorded."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import anthropic
import msgspec
import openai
import pytest
import vendors
from faulty_upstream import (
    SSE_HEAD,
    FaultyUpstream,
    Handler,
    ask,
    calls,
    chat,
    chunk,
    http,
    post,
    raw_client,
    running,
    sends,
    until,
)
from translated import CACHE_COUNTED, HANDLERS, anthropic_of, asked, config_of, openai_of

from understudy.config import Gateway


@pytest.mark.parametrize(
    ("kind", "handler", "status", "message", "retry"),
    [
        (
            "anthropic",
            vendors.anthropic_error(400, "invalid_request_error", "too long"),
            400,
            "too long",
            None,
        ),
        (
            "anthropic",
            vendors.anthropic_error(429, "rate_limit_error", "slow", retry_after="17"),
            429,
            "slow",
            "17",
        ),
        ("anthropic", vendors.anthropic_error(529, "overloaded_error", "busy"), 503, "busy", None),
        ("gemini", vendors.gemini_error(400, "INVALID_ARGUMENT", "bad schema"), 400, "bad schema", None),
        ("gemini", vendors.gemini_error(429, "RESOURCE_EXHAUSTED", "quota", "12.4s"), 429, "quota", "13"),
        ("gemini", vendors.gemini_error(503, "UNAVAILABLE", "overloaded"), 503, "overloaded", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_keep_status_message_and_retry_after(
    tmp_path: Path,
    upstream: FaultyUpstream,
    kind: str,
    handler: Handler,
    status: int,
    message: str,
    retry: str | None,
    stream: bool,
) -> None:
    upstream.script = [handler]

    def question(url: str) -> openai.APIStatusError:
        with openai_of(url) as client, pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(
                model="assistant", messages=[{"role": "user", "content": "x"}], stream=stream
            )
        return caught.value

    async with running(config_of(tmp_path, (kind, upstream))) as gateway:
        error = await asked(gateway.url, question)
    assert (error.status_code, error.body["message"]) == (status, message)  # type: ignore[index]
    assert error.response.headers.get("retry-after") == retry
    assert calls(tmp_path)[0].usage is None


async def test_a_messages_client_gets_errors_in_its_own_form(
    tmp_path: Path, upstream: FaultyUpstream
) -> None:
    body = json.dumps({"error": {"message": "no quota", "type": "x", "code": "insufficient_quota"}}).encode()
    upstream.script = [sends(http(429, body, headers={"retry-after": "60"}))]

    def question(url: str, model: str) -> anthropic.APIStatusError:
        with anthropic_of(url) as client, pytest.raises(anthropic.APIStatusError) as caught:
            client.messages.create(model=model, max_tokens=9, messages=[{"role": "user", "content": "x"}])
        return caught.value

    async with running(config_of(tmp_path, ("openai", upstream))) as gateway:
        limited = await asyncio.to_thread(question, gateway.url, "assistant")
        unknown = await asyncio.to_thread(question, gateway.url, "nobody")
    assert isinstance(limited, anthropic.RateLimitError)
    assert limited.body == {"type": "error", "error": {"type": "rate_limit_error", "message": "no quota"}}
    assert limited.response.headers["retry-after"] == "60"
    assert isinstance(unknown, anthropic.NotFoundError)
    assert unknown.body["error"]["type"] == "not_found_error"  # type: ignore[index]


async def test_a_busy_vendor_is_followed_by_another_that_speaks_another_form(
    tmp_path: Path, upstream: FaultyUpstream, second: FaultyUpstream
) -> None:
    upstream.script = [vendors.anthropic_error(529, "overloaded_error", "busy")]
    second.script = [vendors.openai(5)]
    config = config_of(tmp_path, ("anthropic", upstream), ("openai", second))
    async with running(config) as gateway:
        got = await ask(gateway.port, chat(stream=True))
    assert got.body == vendors.sse(vendors.openai_chunks({}), done=True)  # passed on byte for byte
    assert (got.headers["x-understudy-model"], got.headers["x-understudy-fallback"]) == (
        "openai/m",
        "openai/m",
    )
    assert "x-understudy-form" not in got.headers
    assert [(a.target, a.status, a.form) for a in calls(tmp_path)[0].attempts] == [
        ("anthropic/m", 503, "anthropic"),
        ("anthropic/m", 503, "anthropic"),
        ("openai/m", 200, ""),
    ]


async def test_an_error_in_the_first_event_is_followed_by_another_vendor(
    tmp_path: Path, upstream: FaultyUpstream, second: FaultyUpstream
) -> None:
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "busy"}}
    raw = vendors.sse([{"type": "ping"}, error], named=True)
    upstream.script = [sends(SSE_HEAD + chunk(raw) + b"0\r\n\r\n")]
    second.script = [vendors.gemini()]
    config = config_of(tmp_path, ("anthropic", upstream), ("gemini", second))
    async with running(config) as gateway:
        got = await ask(gateway.port, chat(stream=True))
    assert b"in Bonn." in got.body
    assert got.headers["x-understudy-model"] == "gemini/m"
    assert [(a.status, a.form) for a in calls(tmp_path)[0].attempts][-1] == (200, "gemini")


async def test_a_fallback_that_cannot_be_asked_leaves_the_vendors_error(
    tmp_path: Path, upstream: FaultyUpstream, second: FaultyUpstream
) -> None:
    upstream.script = [sends(http(503, b'{"error":{"message":"down"}}'))]
    config = config_of(tmp_path, ("openai", upstream), ("anthropic", second))
    async with running(config) as gateway:
        got = await ask(gateway.port, chat(logit_bias={"1": 5}))
    assert (got.status, got.json["error"]["message"]) == (503, "down")
    assert second.served == []
    (call,) = calls(tmp_path)
    assert [a.target for a in call.attempts if "logit_bias" in a.error] == ["anthropic/m"]


async def test_who_rests_is_asked_sooner_than_one_who_cannot_be(
    tmp_path: Path, upstream: FaultyUpstream, second: FaultyUpstream
) -> None:
    upstream.script = [sends(http(503, b'{"error":{"message":"down"}}'))] * 2 + [vendors.openai()]
    config = config_of(tmp_path, ("openai", upstream), ("anthropic", second))
    config = msgspec.structs.replace(
        config, gateway=Gateway(listen="127.0.0.1:0", break_after=1, rest_s=60.0)
    )
    async with running(config) as gateway:
        assert (await ask(gateway.port, chat(logit_bias={"1": 5}))).status == 503
        upstream.script = [vendors.openai()]
        assert (await ask(gateway.port, chat(logit_bias={"1": 5}))).status == 200
    assert second.served == []


MIDWAY = vendors.anthropic_events(vendors.anthropic_blocks({}))[:5]


async def test_an_error_in_mid_stream_reaches_the_client_as_one(
    tmp_path: Path, upstream: FaultyUpstream
) -> None:
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "busy"}}
    upstream.script = [sends(SSE_HEAD + chunk(vendors.sse([*MIDWAY, error], named=True)) + b"0\r\n\r\n")]

    def question(url: str) -> None:
        with openai_of(url) as client, pytest.raises(openai.APIError, match="busy"):
            list(
                client.chat.completions.create(
                    model="assistant", messages=[{"role": "user", "content": "x"}], stream=True
                )
            )

    async with running(config_of(tmp_path, ("anthropic", upstream))) as gateway:
        await asked(gateway.url, question)
    (call,) = calls(tmp_path)
    assert "busy" in call.attempts[-1].error
    assert call.usage_estimated


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        (b"", "ended before its answer"),
        (b"data: {oops\n\n", "cannot be read"),
        (vendors.sse([{"type": "content_block_start", "content_block": {"type": "hologram"}}]), "hologram"),
    ],
)
async def test_a_stream_that_cannot_be_finished_is_cut_and_never_ended_for_the_vendor(
    tmp_path: Path, upstream: FaultyUpstream, rest: bytes, reason: str
) -> None:
    begun = SSE_HEAD + chunk(vendors.sse(MIDWAY, named=True))
    upstream.script = [sends(begun, (chunk(rest) if rest else b"") + b"0\r\n\r\n", pause_s=0.05)]
    async with running(config_of(tmp_path, ("anthropic", upstream))) as gateway:
        got = await ask(gateway.port, chat(stream=True))
    assert (got.status, got.complete) == (200, False)
    assert b"[DONE]" not in got.body
    (call,) = calls(tmp_path)
    assert reason in call.attempts[-1].error
    assert call.attempts[-1].billed == "unknown"


async def test_unknown_events_are_skipped(tmp_path: Path, upstream: FaultyUpstream) -> None:
    events = vendors.anthropic_events(vendors.anthropic_blocks({}))
    news = {"type": "weather_report", "clouds": True}
    raw = vendors.sse([one for event in events for one in (news, event)], named=True)
    upstream.script = [sends(SSE_HEAD + chunk(raw) + b"0\r\n\r\n")]
    async with running(config_of(tmp_path, ("anthropic", upstream))) as gateway:
        got = await ask(gateway.port, chat(stream=True))
    assert got.complete
    assert b"in Bonn." in got.body


@pytest.mark.parametrize(
    "body", [b"<html>", b'{"type":"message"}', b'{"content":[{"type":"hologram"}]}', b"[]"]
)
async def test_an_answer_that_cannot_be_read_is_a_502(
    tmp_path: Path, upstream: FaultyUpstream, body: bytes
) -> None:
    upstream.script = [sends(http(200, body))]
    async with running(config_of(tmp_path, ("anthropic", upstream))) as gateway:
        got = await ask(gateway.port)
    assert (got.status, got.json["error"]["code"]) == (502, "upstream_broken")
    assert "cannot be read" in calls(tmp_path)[0].attempts[-1].error


@pytest.mark.parametrize("kind", ["anthropic", "gemini"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "body",
    [
        b'{"error":{"code":"x","message":null,"status":7,"details":[{"@type":"RetryInfo","retryDelay":"9s"}]}}',
        b'{"type":"error","error":{"type":[],"message":{}}}',
        b'{"candidates":[{"content":{"parts":[{"functionCall":{}}]}}],"usageMetadata":{"promptTokenCount":"x"}}',
        b'{"type":"message_start","message":{"id":1,"model":2,"usage":{"input_tokens":[]}}}',
        b'{"candidates":[{"content":{"parts":' + b"[" * 900 + b"]" * 900 + b"}}]}",
        b'{"candidates":{"a":1}}',
    ],
)
async def test_whatever_a_vendor_says_the_gateway_answers_and_goes_on(
    tmp_path: Path, upstream: FaultyUpstream, kind: str, stream: bool, body: bytes
) -> None:
    odd = SSE_HEAD + chunk(b"data: " + body + b"\n\n") + b"0\r\n\r\n" if stream else http(200, body)
    upstream.script = [sends(odd), sends(odd), HANDLERS[kind](0)]
    async with running(config_of(tmp_path, (kind, upstream))) as gateway:
        first = await ask(gateway.port, chat(stream=stream))
        assert first.status in (429, 500, 502)
        assert "error" in first.json
        upstream.script = [HANDLERS[kind](0)]
        assert (await ask(gateway.port, chat(stream=stream))).status == 200


async def test_a_client_that_goes_takes_the_vendors_call_with_it(
    tmp_path: Path, upstream: FaultyUpstream
) -> None:
    upstream.script = [sends(SSE_HEAD + chunk(vendors.sse(MIDWAY, named=True)), then="stall")]
    async with running(config_of(tmp_path, ("anthropic", upstream))) as gateway:
        async with raw_client(gateway.port) as client:
            client.writer.write(post(chat(stream=True)))
            assert b"It rai" in await client.reader.readuntil(b"It rai")
        await asyncio.wait_for(upstream.gone.wait(), 5)
        await until(lambda: calls(tmp_path))
    (call,) = calls(tmp_path)
    assert (call.status, call.usage_estimated) == (499, True)


async def test_a_messages_client_that_hangs_up_at_the_last_event_has_had_its_answer(
    tmp_path: Path, upstream: FaultyUpstream
) -> None:
    raw = vendors.sse(vendors.anthropic_events(vendors.anthropic_blocks({})), named=True)
    upstream.script = [sends(SSE_HEAD + chunk(raw), then="stall")]
    body = {"model": "assistant", "max_tokens": 9, "stream": True, "messages": []}
    async with running(config_of(tmp_path, ("anthropic", upstream))) as gateway:
        async with raw_client(gateway.port) as client:
            client.writer.write(post(body, "/v1/messages"))
            await client.reader.readuntil(b'{"type": "message_stop"}')
        await until(lambda: calls(tmp_path))
    (call,) = calls(tmp_path)
    assert (call.status, call.usage) == (200, CACHE_COUNTED)


async def test_a_vendor_that_waits_after_its_last_event_holds_nobody_up(
    tmp_path: Path, upstream: FaultyUpstream
) -> None:
    raw = vendors.sse(vendors.anthropic_events(vendors.anthropic_blocks({})), named=True)
    upstream.script = [sends(SSE_HEAD + chunk(raw), then="stall")]
    async with running(config_of(tmp_path, ("anthropic", upstream))) as gateway:
        got = await asyncio.wait_for(ask(gateway.port, chat(stream=True)), 5)
    assert got.complete
    assert got.body.endswith(b"data: [DONE]\n\n")
