"""Chat completions as Anthropic messages and back: every mapping written out by hand, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from understudy.forms.anthropic import Stream, answer, error, request
from understudy.forms.chat import Left
from understudy.forms.fault import Told, Unmappable, Unreadable, VendorError
from understudy.protocol import assemble_chunks, usage_of

HELLO: dict[str, Any] = {
    "model": "claude",
    "max_tokens": 100,
    "messages": [{"role": "user", "content": "hello"}],
}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells it.", "parameters": {"type": "object"}},
}
THOUGHT = {"type": "thinking", "thinking": "hm", "signature": "s"}


def chunks_of(stream: Stream, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    told = [one for event in events for one in stream.feed(json.dumps(event).encode())]
    return [one.chunk for one in told if one.chunk is not None]


def test_a_conversation_with_tools_images_files_and_thoughts() -> None:
    call = {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Bonn"}'}}
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}}
    elsewhere = {"type": "image_url", "image_url": {"url": "https://x.io/a.png", "detail": "auto"}}
    file = {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,QUJD"}}
    marked = {"type": "text", "text": "look", "cache_control": {"type": "ephemeral"}}
    asked = request(
        {
            "model": "claude",
            "max_completion_tokens": 50,
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [marked, picture, elsewhere, file]},
                {"role": "assistant", "content": None, "tool_calls": [call], "thinking_blocks": [THOUGHT]},
                {"role": "tool", "tool_call_id": "t1", "content": "rain"},
                {"role": "user", "content": "and?"},
            ],
            "tools": [TOOL],
            "tool_choice": "required",
            "parallel_tool_calls": False,
            "temperature": 0.5,
            "top_k": 3,
            "stop": "END",
            "user": "u1",
            "n": 1,
            "frequency_penalty": 0.0,
            "response_format": {"type": "text"},
            "service_tier": "default",
            "thinking": {"type": "enabled", "budget_tokens": 1024},
        },
        Left(),
    )
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"}}
    linked = {"type": "image", "source": {"type": "url", "url": "https://x.io/a.png"}}
    pdf = {"type": "base64", "media_type": "application/pdf", "data": "QUJD"}
    document = {"type": "document", "source": pdf, "title": "a.pdf"}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "rain"}]}
    use = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Bonn"}}
    assert asked == {
        "model": "claude",
        "max_tokens": 50,
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [
            {"role": "user", "content": [marked, image, linked, document]},
            {"role": "assistant", "content": [THOUGHT, use]},
            {"role": "user", "content": [result, {"type": "text", "text": "and?"}]},
        ],
        "tools": [{"name": "weather", "description": "Tells it.", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "temperature": 0.5,
        "top_k": 3,
        "stop_sequences": ["END"],
        "metadata": {"user_id": "u1"},
        "service_tier": "standard_only",
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    }


def test_effort_and_schema_are_said_in_the_vendors_words() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    strict = {**TOOL, "function": {**TOOL["function"], "strict": True}}
    more = {"reasoning_effort": "high", "response_format": form, "tools": [strict]}
    asked = request(HELLO | more, Left())
    assert asked["output_config"] == {"effort": "high", "format": {"type": "json_schema", "schema": schema}}
    assert asked["tools"][0]["strict"] is True
    assert request(HELLO | {"reasoning_effort": "none"}, Left())["thinking"] == {"type": "disabled"}


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"seed": 1}, "seed"),
        ({"logprobs": True}, "logprobs"),
        ({"store": True}, "store"),
        ({"verbosity": "low"}, "verbosity"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"temperature": 1.5}, "temperature"),
        ({"reasoning_effort": "minimal"}, "reasoning_effort"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"messages": [{"role": "user", "content": "a", "name": "x"}]}, "messages[0].name"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]"),
        ({"messages": [*HELLO["messages"], {"role": "system", "content": "late"}]}, "messages[1]"),
        ({"messages": [{"role": "critic", "content": "a"}]}, "messages[0].role"),
        ({"messages": ["a"]}, "messages"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"detail": "low"}}]}
                ]
            },
            "messages[0].content[0].image_url.detail",
        ),
    ],
)
def test_what_cannot_be_said_there_is_refused_by_name(more: dict[str, Any], param: str) -> None:
    with pytest.raises(Unmappable) as caught:
        request(HELLO | more, Left())
    assert caught.value.param == param


def test_an_answer_of_our_own_can_be_sent_back_as_clients_dump_it() -> None:
    said = answer(MESSAGE, 0)["choices"][0]["message"]
    dumped = {**said, "refusal": None, "annotations": [], "audio": None, "function_call": None}
    messages = [*HELLO["messages"], dumped, {"role": "tool", "tool_call_id": "t1", "content": "rain"}]
    asked = request(HELLO | {"messages": messages}, Left())
    assert asked["messages"][1]["content"] == MESSAGE["content"]


def test_hints_are_left_out_and_named() -> None:
    left = Left()
    asked = request(HELLO | {"prompt_cache_key": "k", "prompt_cache_retention": None}, left)
    assert (asked.keys() >= {"prompt_cache_key"}, left.names) == (False, ("prompt_cache_key",))


USAGE = {
    "input_tokens": 10,
    "cache_read_input_tokens": 30,
    "cache_creation_input_tokens": 5,
    "output_tokens": 7,
    "output_tokens_details": {"thinking_tokens": 4},
}
COUNTED = {
    "prompt_tokens": 45,
    "completion_tokens": 7,
    "total_tokens": 52,
    "prompt_tokens_details": {"cached_tokens": 30, "cache_write_tokens": 5},
    "completion_tokens_details": {"reasoning_tokens": 4},
}
MESSAGE: dict[str, Any] = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude-2026",
    "content": [
        THOUGHT,
        {"type": "text", "text": "It is "},
        {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Bonn"}},
    ],
    "stop_reason": "tool_use",
    "usage": USAGE,
}


def test_a_message_becomes_a_completion() -> None:
    done = answer(MESSAGE, 5)
    assert (done["id"], done["model"], done["created"], done["usage"]) == ("msg_1", "claude-2026", 5, COUNTED)
    call = {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Bonn"}'}}
    said = {"role": "assistant", "content": "It is ", "reasoning_content": "hm", "tool_calls": [call]}
    message = said | {"thinking_blocks": [THOUGHT]}
    assert done["choices"] == [{"index": 0, "message": message, "finish_reason": "tool_calls"}]
    usage = usage_of(done)
    assert usage is not None
    assert (usage.cached_tokens, usage.cache_write_tokens, usage.reasoning_tokens) == (30, 5, 4)


def test_a_reason_unknown_here_is_passed_on_and_a_block_is_not() -> None:
    assert answer(MESSAGE | {"stop_reason": "pause_turn"}, 0)["choices"][0]["finish_reason"] == "pause_turn"
    with pytest.raises(Unreadable, match="server_tool_use"):
        answer(MESSAGE | {"content": [{"type": "server_tool_use"}]}, 0)


def events_of_message() -> list[dict[str, Any]]:
    start = MESSAGE | {"content": [], "stop_reason": None, "usage": USAGE | {"output_tokens": 1}}
    blocks = [
        (
            {"type": "thinking", "thinking": "", "signature": ""},
            [{"type": "thinking_delta", "thinking": "hm"}, {"type": "signature_delta", "signature": "s"}],
        ),
        ({"type": "text", "text": ""}, [{"type": "text_delta", "text": t} for t in ("It ", "is ")]),
        (
            {"type": "tool_use", "id": "t1", "name": "weather", "input": {}},
            [{"type": "input_json_delta", "partial_json": p} for p in ('{"city"', ':"Bonn"}')],
        ),
    ]
    events: list[dict[str, Any]] = [{"type": "message_start", "message": start}, {"type": "ping"}]
    for index, (block, deltas) in enumerate(blocks):
        events.append({"type": "content_block_start", "index": index, "content_block": block})
        events += [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
        events.append({"type": "content_block_stop", "index": index})
    ending = {"delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 7}}
    return [*events, {"type": "message_delta", **ending}, {"type": "message_stop"}]


def test_a_stream_says_what_the_whole_message_says() -> None:
    stream = Stream(5)
    chunks = chunks_of(stream, events_of_message())
    assert (chunks[-1]["choices"], stream.done, stream.complete) == ([], True, True)
    assert assemble_chunks(chunks) == answer(MESSAGE, 5)


def test_an_error_is_told_and_what_is_new_is_skipped() -> None:
    stream = Stream(5)
    told = {"type": "error", "error": {"type": "overloaded_error", "message": "busy"}}
    assert list(stream.feed(json.dumps(told).encode())) == [
        Told(error=VendorError(503, "busy", "overloaded_error"))
    ]
    assert list(stream.feed(b'{"type":"weather_report"}')) == []
    with pytest.raises(Unreadable, match="JSON"):
        list(stream.feed(b"{"))
    with pytest.raises(Unreadable, match="message_start"):
        list(stream.feed(b'{"type":"message_start"}'))


def test_errors_by_status() -> None:
    body = b'{"type":"error","error":{"type":"overloaded_error","message":"busy"}}'
    assert error(529, body) == VendorError(503, "busy", "overloaded_error")
    assert error(502, b"<html>").message == "<html>"
