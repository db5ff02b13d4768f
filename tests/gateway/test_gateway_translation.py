"""Applications that speak one vendor's form, answered by another vendor: the official clients, unchanged but
for their base URL, against vendors as their documents describe them; and what is recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
import vendors
from faulty_upstream import (
    FaultyUpstream,
    ask,
    calls,
    chat,
    post,
    raw_client,
    running,
)
from translated import (
    CACHE_COUNTED,
    CLAUDE_TOOL,
    COUNTED,
    HANDLERS,
    KEYS,
    MODEL,
    TOOL,
    USAGE,
    anthropic_of,
    asked,
    config_of,
    openai_of,
    send,
)


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
