"""Applications that speak one vendor's form, answered by another vendor: the official clients, unchanged but
for their base URL, against vendors as their documents describe them; and what is recorded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anthropic
import msgspec
import openai
import pytest
import vendors
from faulty_upstream import (
    SSE_HEAD,
    FaultyUpstream,
    Got,
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

from understudy.config import Config, Gateway, parse
from understudy.protocol import Usage

COUNTED = Usage(prompt_tokens=45, completion_tokens=7, cached_tokens=30, reasoning_tokens=2)
CACHE_COUNTED = Usage(
    prompt_tokens=45, completion_tokens=7, cached_tokens=30, reasoning_tokens=2, cache_write_tokens=5
)
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells it.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CLAUDE_TOOL = {"name": "weather", "description": "Tells it.", "input_schema": TOOL["function"]["parameters"]}


def config_of(
    folder: Path, first: tuple[str, FaultyUpstream], *others: tuple[str, FaultyUpstream], more: str = ""
) -> Config:
    """The alias ``assistant`` over endpoints named after their kinds, each with a key of its own."""
    lines = ["[gateway]", 'listen = "127.0.0.1:0"']
    for kind, upstream in (first, *others):
        lines += [
            f"[endpoints.{kind}]",
            f'kind = "{kind}"',
            f'base_url = "{upstream.url}"',
            'api_key = "file:key"',
        ]
        lines += ["default = { max_tokens = 4096 }"] if kind == "anthropic" else []
    fallback = ", ".join(f'"{kind}/m"' for kind, _ in others)
    lines += ["[aliases.assistant]", f'model = "{first[0]}/m"', f"fallback = [{fallback}]", more]
    (folder / "key").write_text("vendor-secret")
    return parse("\n".join(lines), "understudy.toml", folder)


HANDLERS: dict[str, Callable[[int], Handler]] = {
    "anthropic": vendors.anthropic,
    "gemini": vendors.gemini,
    "openai": vendors.openai,
}
KEYS = {
    "anthropic": ("x-api-key", "vendor-secret"),
    "gemini": ("x-goog-api-key", "vendor-secret"),
    "openai": ("authorization", "Bearer vendor-secret"),
}
USAGE = {"anthropic": CACHE_COUNTED, "gemini": COUNTED, "openai": COUNTED}
MODEL = {"anthropic": "claude-2026", "gemini": "gemini-2026", "openai": "gpt-2026"}


def openai_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="unused", max_retries=0)


def anthropic_of(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url.removesuffix("/v1"), api_key="unused", max_retries=0)


async def send(port: int, body: dict[str, Any], path: str, *headers: str) -> Got:
    """One request over a connection of its own."""
    async with raw_client(port) as client:
        return await client.ask(post(body, path, headers))


async def asked(url: str, question: Callable[[str], Any]) -> Any:
    return await asyncio.to_thread(question, url)


@pytest.mark.parametrize("kind", ["anthropic", "gemini"])
@pytest.mark.parametrize("tools", [False, True])
async def test_a_chat_client_is_answered_by_another_vendor(
    tmp_path: Path, upstream: FaultyUpstream, kind: str, tools: bool
) -> None:
    upstream.script = [HANDLERS[kind](0)]

    def question(url: str) -> Any:
        with openai_of(url) as client:
            raw = client.chat.completions.with_raw_response.create(
                model="assistant",
                messages=[
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "Weather?"},
                ],
                **({"tools": [TOOL], "tool_choice": "required"} if tools else {}),
            )
            return raw.headers, raw.parse()

    async with running(config_of(tmp_path, (kind, upstream))) as gateway:
        headers, answer = await asked(gateway.url, question)
    message = answer.choices[0].message
    if tools:
        assert message.tool_calls[0].function.name == "weather"
        assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Bonn"}
        assert answer.choices[0].finish_reason == "tool_calls"
    else:
        assert (message.content, answer.choices[0].finish_reason) == ("It rains in Bonn.", "stop")
    assert answer.usage.prompt_tokens == 45
    assert answer.usage.prompt_tokens_details.cached_tokens == 30
    assert answer.usage.completion_tokens_details.reasoning_tokens == 2
    assert answer.model == MODEL[kind]
    assert (headers["x-understudy-model"], headers["x-understudy-form"]) == (f"{kind}/m", kind)
    (served,) = upstream.served
    assert served.headers[KEYS[kind][0]] == KEYS[kind][1]
    assert "x-stainless-lang" not in served.headers
    (call,) = calls(tmp_path)
    assert json.loads(call.request)["messages"][1]["content"] == "Weather?"
    assert json.loads(call.response)["object"] == "chat.completion"
    assert (call.usage, call.usage_estimated) == (USAGE[kind], False)
    assert (call.answered_by, call.finish_reason) == (MODEL[kind], "tool_calls" if tools else "stop")
    assert [(a.target, a.form, a.billed) for a in call.attempts] == [(f"{kind}/m", kind, "yes")]


@pytest.mark.parametrize("kind", ["anthropic", "gemini"])
@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("piece", [0, 7])
async def test_a_chat_client_streams_from_another_vendor(
    tmp_path: Path, upstream: FaultyUpstream, kind: str, tools: bool, piece: int
) -> None:
    upstream.script = [HANDLERS[kind](piece)]

    async def question(url: str) -> Any:
        async with openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0) as client:
            text, arguments, last = "", "", None
            async for part in await client.chat.completions.create(
                model="assistant",
                messages=[{"role": "user", "content": "Weather?"}],
                stream=True,
                stream_options={"include_usage": True},
                **({"tools": [TOOL]} if tools else {}),
            ):
                for choice in part.choices:
                    text += choice.delta.content or ""
                    for call in choice.delta.tool_calls or []:
                        arguments += call.function.arguments or ""
                last = part
            return text, arguments, last

    async with running(config_of(tmp_path, (kind, upstream))) as gateway:
        text, arguments, last = await question(gateway.url)
    if tools:
        assert json.loads(arguments) == {"city": "Bonn"}
    else:
        assert text == "It rains in Bonn."
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (45, 7)
    (call,) = calls(tmp_path)
    assert call.response.endswith(b"data: [DONE]\n\n")
    assert (call.usage, call.stream, call.status) == (USAGE[kind], True, 200)
    assert call.finish_reason == ("tool_calls" if tools else "stop")


async def test_usage_is_recorded_though_the_client_did_not_ask_for_it(
    tmp_path: Path, upstream: FaultyUpstream
) -> None:
    upstream.script = [vendors.anthropic()]
    async with running(config_of(tmp_path, ("anthropic", upstream))) as gateway:
        got = await ask(gateway.port, chat(stream=True))
    assert b'"usage"' not in got.body
    assert calls(tmp_path)[0].usage == CACHE_COUNTED


@pytest.mark.parametrize("kind", ["openai", "gemini"])
@pytest.mark.parametrize("tools", [False, True])
async def test_a_messages_client_is_answered_by_another_vendor(
    tmp_path: Path, upstream: FaultyUpstream, kind: str, tools: bool
) -> None:
    upstream.script = [HANDLERS[kind](0)]

    def question(url: str) -> Any:
        with anthropic_of(url) as client:
            raw = client.messages.with_raw_response.create(
                model="assistant",
                max_tokens=100,
                system="Be brief.",
                messages=[{"role": "user", "content": "Weather?"}],
                **({"tools": [CLAUDE_TOOL], "tool_choice": {"type": "any"}} if tools else {}),
            )
            return raw.headers, raw.parse()

    async with running(config_of(tmp_path, (kind, upstream))) as gateway:
        headers, message = await asked(gateway.url, question)
    if tools:
        assert (message.content[0].name, message.content[0].input) == ("weather", {"city": "Bonn"})
        assert message.stop_reason == "tool_use"
    else:
        assert (message.content[0].text, message.stop_reason) == ("It rains in Bonn.", "end_turn")
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (15, 30)
    assert (message.usage.output_tokens, message.model) == (7, MODEL[kind])
    assert headers["x-understudy-model"] == f"{kind}/m"
    (call,) = calls(tmp_path)
    assert (call.route, call.usage, call.finish_reason) == (
        "messages",
        COUNTED,
        "tool_calls" if tools else "stop",
    )
    assert json.loads(call.response)["type"] == "message"


@pytest.mark.parametrize("kind", ["openai", "gemini"])
@pytest.mark.parametrize("tools", [False, True])
async def test_a_messages_client_streams_from_another_vendor(
    tmp_path: Path, upstream: FaultyUpstream, kind: str, tools: bool
) -> None:
    upstream.script = [HANDLERS[kind](11)]

    async def question(url: str) -> Any:
        base = url.removesuffix("/v1")
        client = anthropic.AsyncAnthropic(base_url=base, api_key="unused", max_retries=0)
        asking = client.messages.stream(
            model="assistant",
            max_tokens=100,
            messages=[{"role": "user", "content": "Weather?"}],
            **({"tools": [CLAUDE_TOOL]} if tools else {}),
        )
        async with client, asking as stream:
            return await stream.get_final_message()

    async with running(config_of(tmp_path, (kind, upstream))) as gateway:
        message = await question(gateway.url)
    if tools:
        assert (message.content[0].name, message.content[0].input) == ("weather", {"city": "Bonn"})
    else:
        assert message.content[0].text == "It rains in Bonn."
    assert message.stop_reason == ("tool_use" if tools else "end_turn")
    assert (message.usage.output_tokens, message.usage.cache_read_input_tokens) == (7, 30)
    (call,) = calls(tmp_path)
    assert (call.usage, call.stream, call.answered_by) == (COUNTED, True, MODEL[kind])


@pytest.mark.parametrize("piece", [0, 5])
async def test_a_messages_client_is_passed_on_to_anthropic_byte_for_byte(
    tmp_path: Path, upstream: FaultyUpstream, piece: int
) -> None:
    upstream.script = [vendors.anthropic(piece)]
    body = {"model": "assistant", "max_tokens": 9, "messages": [{"role": "user", "content": "Weather?"}]}
    headers = ("anthropic-version: 2023-06-01", "x-api-key: theirs", "anthropic-beta: new-2026")
    async with running(config_of(tmp_path, ("anthropic", upstream))) as gateway:
        whole = await send(gateway.port, body, "/v1/messages", *headers)
        streamed = await send(gateway.port, {**body, "stream": True}, "/v1/messages?beta=true", *headers)
        counted = await send(gateway.port, body, "/v1/messages/count_tokens", *headers)
    assert whole.body == json.dumps(vendors.anthropic_message(vendors.anthropic_blocks({}))).encode()
    assert streamed.body == vendors.sse(vendors.anthropic_events(vendors.anthropic_blocks({})), named=True)
    assert counted.json == {"input_tokens": 2095}
    assert whole.headers["x-understudy-model"] == "anthropic/m"
    assert "x-understudy-form" not in whole.headers
    first, second, third = upstream.served
    assert first.body == json.dumps(body).replace("assistant", "m").encode()
    assert (first.headers["x-api-key"], first.headers["anthropic-beta"]) == ("vendor-secret", "new-2026")
    assert second.line == "POST /v1/messages?beta=true HTTP/1.1"
    assert third.line == "POST /v1/messages/count_tokens HTTP/1.1"
    one, two = calls(tmp_path)  # counting tokens asks no model for an answer
    assert (one.route, one.usage, one.finish_reason) == ("messages", CACHE_COUNTED, "stop")
    assert (two.usage, two.finish_reason, two.answered_by) == (CACHE_COUNTED, "stop", "claude-2026")
    assert two.attempts[0].form == ""


@pytest.mark.parametrize("kind", ["anthropic", "gemini", "openai"])
@pytest.mark.parametrize("tools", [False, True])
async def test_a_responses_client_is_answered_by_every_vendor(
    tmp_path: Path, upstream: FaultyUpstream, kind: str, tools: bool
) -> None:
    upstream.script = [HANDLERS[kind](0)]
    tool = {"type": "function", "strict": False, **TOOL["function"]}

    def question(url: str) -> Any:
        with openai_of(url) as client:
            return client.responses.create(
                model="assistant",
                instructions="Be brief.",
                input="Weather?",
                metadata={"team": "a"},
                **({"tools": [tool]} if tools else {}),
            )

    async with running(config_of(tmp_path, (kind, upstream))) as gateway:
        response = await asked(gateway.url, question)
    if tools:
        call = response.output[-1]
        assert (call.type, call.name, json.loads(call.arguments)) == (
            "function_call",
            "weather",
            {"city": "Bonn"},
        )
    else:
        assert response.output_text == "It rains in Bonn."
    assert (response.status, response.metadata, response.store) == ("completed", {"team": "a"}, False)
    assert (response.usage.input_tokens, response.usage.output_tokens) == (45, 7)
    assert response.usage.input_tokens_details.cached_tokens == 30
    assert response.usage.output_tokens_details.reasoning_tokens == 2
    (call,) = calls(tmp_path)
    assert (call.route, call.usage) == ("responses", USAGE[kind])
    assert call.attempts[0].form == kind


@pytest.mark.parametrize("kind", ["anthropic", "gemini", "openai"])
@pytest.mark.parametrize("tools", [False, True])
async def test_a_responses_client_streams_from_every_vendor(
    tmp_path: Path, upstream: FaultyUpstream, kind: str, tools: bool
) -> None:
    upstream.script = [HANDLERS[kind](13)]
    tool = {"type": "function", "strict": False, **TOOL["function"]}

    def question(url: str) -> Any:
        with (
            openai_of(url) as client,
            client.responses.stream(
                model="assistant", input="Weather?", **({"tools": [tool]} if tools else {})
            ) as stream,
        ):
            kinds = [event.type for event in stream]
            return kinds, stream.get_final_response()

    async with running(config_of(tmp_path, (kind, upstream))) as gateway:
        kinds, response = await asked(gateway.url, question)
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    if tools:
        call = response.output[-1]
        assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Bonn"})
    else:
        assert response.output_text == "It rains in Bonn."
    assert response.usage.total_tokens == 52
    assert calls(tmp_path)[0].usage == USAGE[kind]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_responses_client_is_passed_on_where_the_route_is_there(
    tmp_path: Path, upstream: FaultyUpstream, stream: bool
) -> None:
    upstream.script = [vendors.openai_responses(9)]
    config = config_of(tmp_path, ("openai", upstream))
    native = config.endpoints["openai"]
    config.endpoints["openai"] = type(native)(base_url=native.base_url, responses="pass")
    body = {"model": "assistant", "input": "Weather?", "previous_response_id": "resp_0", "stream": stream}
    async with running(config) as gateway, raw_client(gateway.port) as client:
        got = await client.ask(post(body, "/v1/responses"))
    expected = vendors.sse(vendors.response_events(), named=True)
    assert got.body == (expected if stream else json.dumps(vendors.response_object()).encode())
    (call,) = calls(tmp_path)
    assert (call.usage, call.finish_reason, call.answered_by) == (COUNTED, "stop", "gpt-2026")


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"previous_response_id": "resp_0"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
    ],
)
async def test_what_a_response_cannot_be_made_of_is_named(
    tmp_path: Path, upstream: FaultyUpstream, more: dict[str, Any], param: str
) -> None:
    async with running(config_of(tmp_path, ("openai", upstream))) as gateway:
        got = await send(gateway.port, {"model": "assistant", "input": "x", **more}, "/v1/responses")
    assert (got.status, got.json["error"]["param"]) == (400, param)
    assert upstream.served == []


async def test_an_unmappable_parameter_is_refused_by_name_and_recorded(
    tmp_path: Path, upstream: FaultyUpstream
) -> None:
    config = config_of(tmp_path, ("anthropic", upstream), ("openai", upstream))
    async with running(config) as gateway:
        got = await ask(gateway.port, chat(logprobs=True))
    error = got.json["error"]
    assert (got.status, error["param"], error["code"]) == (400, "logprobs", "unsupported_parameter")
    assert 'drop = ["logprobs"]' in error["message"]
    assert upstream.served == []  # an alias hides no swap: the fallback is not asked for what was refused
    (call,) = calls(tmp_path)
    assert (call.status, call.target, call.usage) == (400, "anthropic/m", None)
    assert [(a.status, a.billed) for a in call.attempts] == [(0, "no")]


async def test_without_a_rule_anthropic_needs_max_tokens(tmp_path: Path, upstream: FaultyUpstream) -> None:
    config = config_of(tmp_path, ("anthropic", upstream))
    config.endpoints["anthropic"] = type(config.endpoints["anthropic"])(
        kind="anthropic", base_url=upstream.url
    )
    async with running(config) as gateway:
        got = await ask(gateway.port)
    assert (got.status, got.json["error"]["param"]) == (400, "max_tokens")
    assert "default = { max_tokens = 4096 }" in got.json["error"]["message"]


async def test_declared_rules_are_applied_and_named(tmp_path: Path, upstream: FaultyUpstream) -> None:
    upstream.script = [vendors.anthropic()]
    more = 'drop = ["seed", "messages.name"]\nrename = { user = "safety_identifier" }'
    body = chat(seed=7, user="u", messages=[{"role": "user", "content": "hi", "name": "ann"}])
    async with running(config_of(tmp_path, ("anthropic", upstream), more=more)) as gateway:
        got = await ask(gateway.port, body)
    named = "drop seed, drop messages.name, rename user=safety_identifier, default max_tokens"
    assert (got.status, got.headers["x-understudy-rules"]) == (200, named)
    sent = upstream.served[0].json
    assert (sent["max_tokens"], sent["metadata"]) == (4096, {"user_id": "u"})
    assert json.loads(calls(tmp_path)[0].request)["seed"] == 7  # recorded as it was sent


async def test_rules_hold_at_an_openai_endpoint_too_and_leave_the_answer_alone(
    tmp_path: Path, upstream: FaultyUpstream
) -> None:
    upstream.script = [vendors.openai(6)]
    more = 'rename = { max_tokens = "max_completion_tokens" }'
    async with running(config_of(tmp_path, ("openai", upstream), more=more)) as gateway:
        got = await ask(gateway.port, chat(max_tokens=5, stream=True))
        plain = await ask(gateway.port, chat(max_completion_tokens=5))
    assert got.body == vendors.sse(vendors.openai_chunks({}), done=True)
    assert got.headers["x-understudy-rules"] == "rename max_tokens=max_completion_tokens"
    assert upstream.served[0].json["max_completion_tokens"] == 5
    assert "x-understudy-rules" not in plain.headers
    assert plain.json["model"] == "gpt-2026"


async def test_hints_are_left_out_and_named(tmp_path: Path, upstream: FaultyUpstream) -> None:
    upstream.script = [vendors.gemini()]
    async with running(config_of(tmp_path, ("gemini", upstream))) as gateway:
        got = await ask(gateway.port, chat(prompt_cache_key="k"))
    assert (got.status, got.headers["x-understudy-left-out"]) == (200, "prompt_cache_key")


async def test_a_header_of_betas_is_a_parameter(tmp_path: Path, upstream: FaultyUpstream) -> None:
    upstream.script = [vendors.openai()]
    body = {"model": "assistant", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}]}
    beta = ("anthropic-version: 2023-06-01", "anthropic-beta: context-1m-2025-08-07")
    for more in ("", 'drop = ["anthropic-beta"]'):
        async with running(config_of(tmp_path, ("openai", upstream), more=more)) as gateway:
            got = await send(gateway.port, body, "/v1/messages", *beta)
        assert got.status == (200 if more else 400)
        if more:
            assert got.headers["x-understudy-rules"] == "drop anthropic-beta"
        else:
            assert got.json["error"]["type"] == "invalid_request_error"
            assert "anthropic-beta" in got.json["error"]["message"]


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


async def test_connections_are_used_again(tmp_path: Path, upstream: FaultyUpstream) -> None:
    upstream.script = [vendors.anthropic()]
    async with running(config_of(tmp_path, ("anthropic", upstream))) as gateway:
        for stream in (False, True, False):
            assert (await ask(gateway.port, chat(stream=stream))).status == 200
    assert upstream.connections == 1


async def test_models_are_listed_in_the_clients_form(tmp_path: Path, upstream: FaultyUpstream) -> None:
    def question(url: str) -> Any:
        with anthropic_of(url) as client:
            page = client.models.list()
            return [model.id for model in page], client.models.retrieve("assistant").display_name

    async with running(config_of(tmp_path, ("openai", upstream))) as gateway:
        assert await asked(gateway.url, question) == (["assistant"], "assistant")


async def test_an_embeddings_client_is_answered_by_gemini(tmp_path: Path, upstream: FaultyUpstream) -> None:
    upstream.script = [vendors.gemini()]

    def question(url: str) -> Any:
        with openai_of(url) as client:
            two = client.embeddings.create(
                model="assistant", input=["rain", "Bonn!"], dimensions=3, encoding_format="float"
            )
            # a client that is told no form asks for base64 and takes it apart
            return two, client.embeddings.create(model="assistant", input="rain")

    async with running(config_of(tmp_path, ("gemini", upstream))) as gateway:
        two, one = await asked(gateway.url, question)
    assert [vector.index for vector in two.data] == [0, 1]
    assert two.data[0].embedding == pytest.approx([4.0, 0.1, -1.5])
    assert two.data[1].embedding == pytest.approx([5.0, 0.1, -1.5])
    assert (two.usage.prompt_tokens, two.model) == (4, "assistant")
    assert one.data[0].embedding == pytest.approx([4.0, 0.1, -1.5])
    first, _ = upstream.served
    assert first.line == "POST /v1/models/m:batchEmbedContents HTTP/1.1"
    assert first.json["requests"][1] == {
        "model": "models/m",
        "content": {"parts": [{"text": "Bonn!"}]},
        "outputDimensionality": 3,
    }
    counted, guessed = calls(tmp_path)
    assert (counted.route, counted.usage, counted.usage_estimated) == (
        "embeddings",
        Usage(prompt_tokens=4, completion_tokens=0),
        False,
    )
    assert (guessed.usage, guessed.usage_estimated) == (Usage(prompt_tokens=1, completion_tokens=0), True)


@pytest.mark.parametrize(
    ("said", "param"),
    [({"input": [[1, 2]]}, "input"), ({"input": []}, "input"), ({"input": "x", "user": "u"}, "user")],
)
async def test_embeddings_that_gemini_cannot_make_are_refused(
    tmp_path: Path, upstream: FaultyUpstream, said: dict[str, Any], param: str
) -> None:
    async with running(config_of(tmp_path, ("gemini", upstream))) as gateway:
        got = await send(gateway.port, {"model": "assistant", **said}, "/v1/embeddings")
    assert (got.status, got.json["error"]["param"]) == (400, param)
    assert not upstream.served


async def test_gemini_counts_for_a_messages_client(tmp_path: Path, upstream: FaultyUpstream) -> None:
    upstream.script = [vendors.gemini()]

    def question(url: str) -> Any:
        with anthropic_of(url) as client:
            return client.messages.count_tokens(
                model="assistant", system="Be brief.", messages=[{"role": "user", "content": "Weather?"}]
            )

    async with running(config_of(tmp_path, ("gemini", upstream))) as gateway:
        counted = await asked(gateway.url, question)
    assert counted.input_tokens == 31
    (served,) = upstream.served
    assert served.line == "POST /v1/models/m:countTokens HTTP/1.1"
    assert served.json["generateContentRequest"] == {
        "model": "models/m",
        "contents": [{"role": "user", "parts": [{"text": "Weather?"}]}],
        "systemInstruction": {"parts": [{"text": "Be brief."}]},
    }
    assert calls(tmp_path) == []


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("gemini", "/v1/completions"),
        ("anthropic", "/v1/completions"),
        ("anthropic", "/v1/embeddings"),
        ("openai", "/v1/messages/count_tokens"),
    ],
)
async def test_a_route_that_a_vendor_has_not_is_a_404(
    tmp_path: Path, upstream: FaultyUpstream, kind: str, path: str
) -> None:
    async with running(config_of(tmp_path, (kind, upstream))) as gateway:
        got = await send(gateway.port, {"model": "assistant", "input": "x"}, path)
    assert got.status == 404
    assert path.removeprefix("/v1") in got.json["error"]["message"]


async def test_over_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ssl

    pem = Path(__file__).with_name("localhost.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    server = FaultyUpstream()
    server.script = [vendors.gemini(8)]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    await server.start(ssl=context)
    try:
        text = f'[endpoints.google]\nkind = "gemini"\nbase_url = "https://localhost:{server.port}/v1beta"\n'
        text += '[gateway]\nlisten = "127.0.0.1:0"\n'
        async with running(parse(text, "understudy.toml", tmp_path)) as gateway:
            got = await ask(gateway.port, chat(stream=True, model="google/gemini-2.5-pro"))
    finally:
        await server.stop()
    assert b"in Bonn." in got.body
    line = "POST /v1beta/models/gemini-2.5-pro:streamGenerateContent?alt=sse HTTP/1.1"
    assert server.served[0].line == line
