"""Endpoint: a real server on loopback; retries, streams and refusals as a user meets them."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any, Literal

import pytest
from aiohttp import web

from understudy.config import Endpoint as Settings
from understudy.endpoint import HttpEndpoint, ScriptedModel, http_endpoint, wait_of
from understudy.errors import EndpointError, InputError

REQUEST = {"messages": [{"role": "user", "content": "two words"}]}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Start = Callable[[Handler], Awaitable[str]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    runners: list[web.AppRunner] = []

    async def run(handler: Handler) -> str:
        app = web.Application()
        app.router.add_post("/v1/{path:.*}", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        runners.append(runner)
        host, port = runner.addresses[0][:2]
        return f"http://{host}:{port}/v1"

    yield run
    for runner in runners:
        await runner.cleanup()


async def test_a_busy_server_is_asked_again_and_the_model_name_is_spliced(start: Start) -> None:
    seen: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append((await request.json())["model"])
        if len(seen) < 3:
            return web.Response(status=429, headers={"retry-after": "0"})
        return web.json_response(
            {"choices": [{"message": {"content": "yes"}}], "usage": {"prompt_tokens": 3}}
        )

    async with HttpEndpoint("local/m", await start(handler), "m") as endpoint:
        answer = await endpoint.chat({**REQUEST, "model": "alias"})
    assert (answer.text, answer.attempts, answer.usage.prompt_tokens) == ("yes", 3, 3)
    assert seen == ["m", "m", "m"]


async def test_a_refusal_is_not_retried_and_keeps_its_status(start: Start) -> None:
    calls = 0

    async def handler(request: web.Request) -> web.Response:
        nonlocal calls
        calls += 1
        return web.json_response({"error": {"message": "no such model"}}, status=404)

    async with HttpEndpoint("local/m", await start(handler), "m") as endpoint:
        with pytest.raises(EndpointError, match="no such model") as caught:
            await endpoint.chat(REQUEST)
    assert (caught.value.status, calls) == (404, 1)


async def test_a_stream_comes_back_assembled_with_time_to_first_token(start: Start) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for text in ("a", "b"):
            await response.write(f'data: {{"choices":[{{"delta":{{"content":"{text}"}}}}]}}\n\n'.encode())
        return response

    async with HttpEndpoint("local/m", await start(handler), "m") as endpoint:
        answer = await endpoint.chat({**REQUEST, "stream": True})
    assert answer.text == "ab"
    assert 0 < answer.ttft_s <= answer.total_s


async def test_nobody_there_is_said_with_the_next_command() -> None:
    async with HttpEndpoint("local/m", "http://127.0.0.1:9/v1", "m", retries=0) as endpoint:
        with pytest.raises(EndpointError, match="curl http://127"):
            await endpoint.chat(REQUEST)


async def test_an_answer_that_is_not_json_is_shown(start: Start) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(text="<html>proxy</html>")

    async with HttpEndpoint("local/m", await start(handler), "m") as endpoint:
        with pytest.raises(EndpointError, match="<html>proxy"):
            await endpoint.chat(REQUEST)


async def test_the_scripted_model_answers_counts_and_fails_on_demand() -> None:
    model = ScriptedModel(
        "test/echo", lambda r: r["messages"][-1]["content"].upper(), fail=lambda call: call == 2
    )
    answer = await model.chat(REQUEST)
    assert (answer.text, answer.usage.prompt_tokens, answer.usage.completion_tokens) == ("TWO WORDS", 2, 2)
    with pytest.raises(EndpointError):
        await model.chat(REQUEST)
    assert (await model.complete({"prompt": "p"})).text == "P"


ANTHROPIC = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude-2026",
    "content": [{"type": "text", "text": "two words"}],
    "stop_reason": "end_turn",
    "usage": {"input_tokens": 3, "cache_read_input_tokens": 4, "output_tokens": 2},
}
GEMINI = {
    "candidates": [{"content": {"parts": [{"text": "two "}, {"text": "words"}]}, "finishReason": "STOP"}],
    "usageMetadata": {"promptTokenCount": 7, "cachedContentTokenCount": 4, "candidatesTokenCount": 2},
}


@pytest.mark.parametrize(
    ("kind", "body", "path", "key"),
    [
        ("anthropic", ANTHROPIC, "/v1/messages", "x-api-key"),
        ("gemini", GEMINI, "/v1/models/m:generateContent", "x-goog-api-key"),
    ],
)
async def test_other_vendors_are_asked_in_their_own_form(
    start: Start, kind: Literal["anthropic", "gemini"], body: dict[str, Any], path: str, key: str
) -> None:
    seen: list[web.Request] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(request)
        return web.json_response(body)

    settings = Settings(kind=kind, base_url=await start(handler), default={"max_tokens": 50}, drop=["seed"])
    async with http_endpoint(f"{kind}/m", settings, "m", api_key="secret") as endpoint:
        answer = await endpoint.chat({**REQUEST, "seed": 1})
        with pytest.raises(EndpointError, match="no completions route"):
            await endpoint.complete({"prompt": "x"})
        with pytest.raises(EndpointError, match=r"logit_bias.*\n.*\n.*drop") as caught:
            await endpoint.chat({**REQUEST, "logit_bias": {"1": 1}})
    assert caught.value.status == 400
    assert (answer.text, answer.usage.prompt_tokens, answer.usage.cached_tokens) == ("two words", 7, 4)
    assert (seen[0].path, seen[0].headers[key], len(seen)) == (path, "secret", 1)


async def test_a_stream_of_another_vendor_is_assembled(start: Start) -> None:
    events = [
        {"type": "message_start", "message": {**ANTHROPIC, "content": []}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "two words"}},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 2}},
        {"type": "message_stop"},
    ]
    pieces = [f"data: {json.dumps(event)}\n\n" for event in events]
    raw = ["".join(pieces), "".join(pieces[:3])]

    async def handler(request: web.Request) -> web.Response:
        return web.Response(text=raw.pop(0), content_type="text/event-stream")

    async with HttpEndpoint("c/m", await start(handler), "m", kind="anthropic") as endpoint:
        asked = {**REQUEST, "stream": True, "max_tokens": 9}
        assert (await endpoint.chat(asked)).text == "two words"
        with pytest.raises(EndpointError, match="ended before"):
            await endpoint.chat(asked)


async def test_without_a_limit_anthropic_cannot_be_asked_at_all(start: Start) -> None:
    async with HttpEndpoint("c/m", "http://127.0.0.1:9", "m", kind="anthropic") as endpoint:
        with pytest.raises(InputError, match=r"default = \{ max_tokens = 4096 \}"):
            await endpoint.chat(REQUEST)


async def test_a_429_slows_every_call_and_fails_none(start: Start) -> None:
    """Twenty calls at once to a server that takes five a moment: more refusals than retries, no failure."""
    taken: list[float] = []

    async def handler(request: web.Request) -> web.Response:
        now = asyncio.get_running_loop().time()
        if len([t for t in taken if now - t < 0.2]) >= 5:
            return web.Response(status=429, headers={"retry-after": "0.1"})
        taken.append(now)
        return web.json_response({"choices": [{"message": {"content": "yes"}}]})

    async with HttpEndpoint("local/m", await start(handler), "m", retries=1) as endpoint:
        answers = await asyncio.gather(*(endpoint.chat(REQUEST) for _ in range(20)))
    assert [a.text for a in answers] == ["yes"] * 20
    assert max(a.attempts for a in answers) > 2


@pytest.mark.parametrize(
    ("status", "body", "wait"),
    [(429, "insufficient_quota", "1"), (503, "later", "900"), (429, "tomorrow", "86400")],
)
async def test_what_no_waiting_mends_is_told_at_once(start: Start, status: int, body: str, wait: str) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=status, text=body, headers={"retry-after": wait})

    async with HttpEndpoint("local/m", await start(handler), "m") as endpoint:
        with pytest.raises(EndpointError, match=body) as caught:
            await endpoint.chat(REQUEST)
    assert caught.value.status == status


def test_retry_after_is_seconds_or_a_date() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=40), usegmt=True)
    waits = [
        wait_of({b"retry-after": text}) for text in (b"7", b"1.5", soon.encode(), b"nan", b"-3", b"soon")
    ]
    assert waits == [7, 1.5, pytest.approx(40, abs=2), 0, 0, 0]
    assert wait_of({}) == 0


async def test_a_password_in_a_url_is_not_told() -> None:
    async with HttpEndpoint("local/m", "http://me:secret@127.0.0.1:9/v1", "m", retries=0) as endpoint:
        with pytest.raises(EndpointError) as caught:
            await endpoint.chat(REQUEST)
    assert "secret" not in str(caught.value)
    assert "curl http://127.0.0.1:9/v1/models" in str(caught.value)
