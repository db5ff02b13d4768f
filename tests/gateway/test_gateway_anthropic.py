"""Chat completions as Anthropic messages and back: every mapping written out by hand, and what is refused."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from understudy.gateway.anthropic import Stream, completion_of, request_of
from understudy.gateway.refusal import Refusal
from understudy.protocol import assemble_chunks

HELLO: dict[str, Any] = {
    "model": "claude",
    "max_tokens": 100,
    "messages": [{"role": "user", "content": "hello"}],
}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells it.", "parameters": {"type": "object"}},
}


def test_a_conversation_with_tools_and_images() -> None:
    call = {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Bonn"}'}}
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}}
    asked = request_of(
        {
            "model": "claude",
            "max_completion_tokens": 50,
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "look"}, picture]},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "t1", "content": "rain"},
                {"role": "user", "content": "and?"},
            ],
            "tools": [TOOL],
            "tool_choice": "required",
            "parallel_tool_calls": False,
            "temperature": 0.5,
            "stop": "END",
            "user": "u1",
            "n": 1,
            "frequency_penalty": 0.0,
            "response_format": {"type": "text"},
        }
    )
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "rain"}]}
    use = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Bonn"}}
    assert asked == {
        "model": "claude",
        "max_tokens": 50,
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "look"}, image]},
            {"role": "assistant", "content": [use]},
            {"role": "user", "content": [result, {"type": "text", "text": "and?"}]},
        ],
        "tools": [{"name": "weather", "description": "Tells it.", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "temperature": 0.5,
        "stop_sequences": ["END"],
        "metadata": {"user_id": "u1"},
    }


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"seed": 1}, "seed"),
        ({"logprobs": True}, "logprobs"),
        ({"temperature": 1.5}, "temperature"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [{**TOOL, "function": {**TOOL["function"], "strict": True}}]}, "tools[0].function.strict"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"messages": [{"role": "user", "content": "a", "name": "x"}]}, "messages[0].name"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]"),
        ({"messages": [*HELLO["messages"], {"role": "system", "content": "late"}]}, "messages[1]"),
        ({"messages": [{"role": "critic", "content": "a"}]}, "messages[0].role"),
    ],
)
def test_what_cannot_be_said_there_is_refused_by_name(more: dict[str, Any], param: str) -> None:
    with pytest.raises(Refusal) as caught:
        request_of(HELLO | more)
    error = msgspec.json.decode(caught.value.body())["error"]
    assert (caught.value.status, error["param"]) == (400, param)


@pytest.mark.parametrize("more", [{"messages": ["a"]}, {"temperature": "hot"}, {"tools": [3]}])
def test_what_is_no_chat_completion_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(Refusal, match="not formed"):
        request_of(HELLO | more)


USAGE = {
    "input_tokens": 10,
    "cache_read_input_tokens": 30,
    "cache_creation_input_tokens": 5,
    "output_tokens": 7,
}
COUNTED = {
    "prompt_tokens": 45,
    "completion_tokens": 7,
    "total_tokens": 52,
    "prompt_tokens_details": {"cached_tokens": 30, "cache_write_tokens": 5},
}
MESSAGE: dict[str, Any] = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude-2026",
    "content": [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "text", "text": "It is "},
        {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Bonn"}},
    ],
    "stop_reason": "tool_use",
    "usage": USAGE,
}


def test_a_message_becomes_a_completion() -> None:
    done = completion_of(MESSAGE, 5)
    assert (done["id"], done["model"], done["created"], done["usage"]) == ("msg_1", "claude-2026", 5, COUNTED)
    call = {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Bonn"}'}}
    said = {"role": "assistant", "content": "It is ", "reasoning_content": "hm", "tool_calls": [call]}
    assert done["choices"] == [{"index": 0, "message": said, "finish_reason": "tool_calls"}]


@pytest.mark.parametrize(
    "change", [{"stop_reason": "pause_turn"}, {"content": [{"type": "server_tool_use"}]}]
)
def test_an_answer_of_a_kind_unknown_here_is_an_error(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"pause_turn|server_tool_use"):
        completion_of(MESSAGE | change, 0)


def test_a_stream_says_what_the_whole_message_says() -> None:
    start = MESSAGE | {"content": [], "stop_reason": None, "usage": USAGE | {"output_tokens": 1}}
    blocks = [
        ({"type": "thinking", "thinking": ""}, [{"type": "thinking_delta", "thinking": "hm"}]),
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
    events.append(
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 7}}
    )
    events.append({"type": "message_stop"})
    stream = Stream(5, include_usage=True)
    chunks = [chunk for event in events for chunk in stream.feed(event)]
    assert chunks[-1]["choices"] == []
    assert assemble_chunks(chunks) == completion_of(MESSAGE, 5)


def test_usage_is_not_sent_unasked_and_an_error_is_passed_on() -> None:
    stream = Stream(5, include_usage=False)
    list(stream.feed({"type": "message_start", "message": MESSAGE}))
    ending = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 7}}
    (chunk,) = stream.feed(ending)
    assert chunk["choices"][0]["finish_reason"] == "stop"
    error = {"type": "overloaded_error", "message": "busy"}
    assert list(stream.feed({"type": "error", "error": error})) == [{"error": error}]
