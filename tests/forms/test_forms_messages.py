"""Anthropic's messages as chat completions and back: requests, answers, what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from understudy.forms import openai
from understudy.forms.chat import Left
from understudy.forms.fault import Unmappable, Unreadable
from understudy.forms.messages import Writer, answer, request

HELLO: dict[str, Any] = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hello"}]}
MARK = {"cache_control": {"type": "ephemeral"}}
THOUGHT = {"type": "thinking", "thinking": "hm", "signature": "s"}


def test_a_conversation_with_everything() -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"}}
    pdf = {"type": "document", "title": "a", "source": {**image["source"], "media_type": "application/pdf"}}
    use = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Bonn"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "no"}]}
    schema = {"type": "object"}
    asked = request(
        {
            "model": "m",
            "max_tokens": 9,
            "system": [{"type": "text", "text": "Be brief.", **MARK}],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "look"}, image, pdf]},
                {"role": "assistant", "content": [THOUGHT, {"type": "text", "text": "ok"}, use]},
                {"role": "user", "content": [{**result, "is_error": True}, {"type": "text", "text": "and?"}]},
            ],
            "tools": [{"name": "weather", "description": "Tells.", "input_schema": schema, "strict": True}],
            "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
            "stop_sequences": ["END"],
            "metadata": {"user_id": "u1"},
            "top_k": 3,
            "thinking": {"type": "adaptive"},
            "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": schema}},
            "service_tier": "standard_only",
            "stream": True,
        },
        Left(),
    )
    png, document = "data:image/png;base64,QUJD", "data:application/pdf;base64,QUJD"
    call = {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Bonn"}'}}
    function = {"name": "weather", "parameters": schema, "description": "Tells.", "strict": True}
    assert asked == {
        "model": "m",
        "max_completion_tokens": 9,
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be brief.", **MARK}]},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "look"},
                    {"type": "image_url", "image_url": {"url": png}},
                    {"type": "file", "file": {"filename": "a", "file_data": document}},
                ],
            },
            {
                "role": "assistant",
                "content": "ok",
                "reasoning_content": "hm",
                "thinking_blocks": [THOUGHT],
                "tool_calls": [call],
            },
            {"role": "tool", "tool_call_id": "t1", "content": "no", "is_error": True},
            {"role": "user", "content": "and?"},
        ],
        "tools": [{"type": "function", "function": function}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "stop": ["END"],
        "user": "u1",
        "top_k": 3,
        "thinking": {"type": "adaptive"},
        "reasoning_effort": "low",
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema, "strict": True},
        },
        "service_tier": "default",
        "stream": True,
    }
    left = Left()
    sent = openai.request(asked, left, own=False)
    assert left.names == (
        "cache_control",
        "messages.reasoning_content",
        "messages.thinking_blocks",
        "messages.is_error",
    )
    assert sent["messages"][0] == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert (sent["max_tokens"], sent["stream_options"]) == (9, {"include_usage": True})
    assert openai.request(asked, Left(), own=True)["max_completion_tokens"] == 9


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"container": "c"}, "container"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
        ({"tools": [{"name": "x", "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"messages": [{"role": "user", "content": [{"type": "search_result"}]}]}, "messages[0].content[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "file"}}]}]},
            "messages[0].content[0].source",
        ),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
    ],
)
def test_what_chat_completions_have_no_word_for_is_refused_by_name(more: dict[str, Any], param: str) -> None:
    with pytest.raises(Unmappable) as caught:
        request(HELLO | more, Left())
    assert caught.value.param == param


def test_a_budget_of_thoughts_and_a_picture_from_a_tool_are_refused_by_an_openai_vendor() -> None:
    enabled = request(HELLO | {"thinking": {"type": "enabled", "budget_tokens": 1024}}, Left())
    picture = {
        "role": "tool",
        "tool_call_id": "t",
        "content": [{"type": "image_url", "image_url": {"url": "x"}}],
    }
    for asked, param in ((enabled, "thinking"), ({"messages": [picture]}, "messages[0].content[0]")):
        with pytest.raises(Unmappable) as caught:
            openai.request(asked, Left(), own=True)
        assert caught.value.param == param


COMPLETION: dict[str, Any] = {
    "id": "c1",
    "model": "gpt",
    "choices": [
        {
            "message": {
                "role": "assistant",
                "content": "It is ",
                "reasoning_content": "hm",
                "tool_calls": [{"id": "t1", "function": {"name": "weather", "arguments": '{"city":"Bonn"}'}}],
            },
            "finish_reason": "tool_calls",
        }
    ],
    "usage": {
        "prompt_tokens": 45,
        "completion_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 30, "cache_write_tokens": 5},
    },
}


@pytest.mark.parametrize("thinking", [False, True])
def test_a_completion_becomes_a_message(thinking: bool) -> None:
    body = HELLO | ({"thinking": {"type": "enabled"}} if thinking else {})
    message = json.loads(answer(COMPLETION, body))
    blocks = [
        {"type": "text", "text": "It is "},
        {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Bonn"}},
    ]
    thought = [{"type": "thinking", "thinking": "hm", "signature": ""}] if thinking else []
    assert message == {
        "id": "c1",
        "type": "message",
        "role": "assistant",
        "model": "gpt",
        "content": [*thought, *blocks],
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 10,
            "cache_creation_input_tokens": 5,
            "cache_read_input_tokens": 30,
            "output_tokens": 7,
        },
    }


def test_arguments_that_are_no_json_are_an_answer_that_cannot_be_read() -> None:
    call = {"id": "t1", "function": {"name": "weather", "arguments": '{"city":'}}
    with pytest.raises(Unreadable, match="no JSON object"):
        answer({"choices": [{"message": {"tool_calls": [call]}}]}, HELLO)


def test_pieces_of_two_calls_in_turns_are_not_muddled() -> None:
    writer = Writer(HELLO)
    first = {"index": 0, "id": "a", "function": {"name": "x", "arguments": "{"}}
    second = {"index": 1, "id": "b", "function": {"name": "x", "arguments": "{"}}
    writer.chunk({"choices": [{"delta": {"tool_calls": [first, second]}}]})
    with pytest.raises(Unreadable, match="in turns"):
        writer.chunk({"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]}}]})
