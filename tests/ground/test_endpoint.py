"""Endpoint: a real server on loopback; retries, streams and refusals as a user meets them."""

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web

from understudy.endpoint import HttpEndpoint, ScriptedModel
from understudy.errors import EndpointError

REQUEST = {"messages": [{"role": "user", "content": "two words"}]}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Start = Callable[[Handler], Awaitable[str]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    runners: list[web.AppRunner] = []

    async def run(handler: Handler) -> str:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", handler)
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
