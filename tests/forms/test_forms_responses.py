"""OpenAI's responses as chat completions and back: requests, answers, what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from understudy.forms.chat import Left
from understudy.forms.fault import Unmappable, VendorError
from understudy.forms.responses import Writer, answer, completion_of, request
from understudy.protocol import usage_of

HELLO: dict[str, Any] = {"model": "m", "input": "hello"}
SCHEMA = {"type": "object", "properties": {}}


def test_a_conversation_with_everything() -> None:
    left = Left()
    asked = request(
        {
            "model": "m",
            "instructions": "Be brief.",
            "input": [
                {"role": "developer", "content": "In French."},
                {
                    "type": "message",
                    "role": "user",
                    "content": [
                        {"type": "input_text", "text": "look"},
                        {"type": "input_image", "image_url": "https://x/a.png", "detail": "auto"},
                        {
                            "type": "input_file",
                            "filename": "a.pdf",
                            "file_data": "data:application/pdf;base64,Q",
                        },
                    ],
                },
                {"type": "reasoning", "id": "rs", "summary": [], "encrypted_content": "zzz"},
                {
                    "type": "message",
                    "id": "msg",
                    "role": "assistant",
                    "status": "completed",
                    "content": [{"type": "output_text", "text": "ok", "annotations": []}],
                },
                {"type": "function_call", "id": "fc", "call_id": "t1", "name": "weather", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "t1", "output": "rain"},
            ],
            "tools": [{"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}],
            "tool_choice": {"type": "function", "name": "weather"},
            "text": {
                "format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True},
                "verbosity": "low",
            },
            "reasoning": {"effort": "high", "summary": "auto"},
            "max_output_tokens": 50,
            "temperature": 0.5,
            "metadata": {"a": "b"},
            "stream": True,
            "truncation": "disabled",
        },
        left,
    )
    call = {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    function = {"name": "weather", "parameters": SCHEMA, "strict": True}
    assert asked == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": "In French."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "look"},
                    {"type": "image_url", "image_url": {"url": "https://x/a.png"}},
                    {
                        "type": "file",
                        "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,Q"},
                    },
                ],
            },
            {"role": "assistant", "content": "ok", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "t1", "content": "rain"},
        ],
        "tools": [{"type": "function", "function": function}],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
        },
        "verbosity": "low",
        "reasoning_effort": "high",
        "max_completion_tokens": 50,
        "temperature": 0.5,
        "stream": True,
    }
    assert left.names == ("input.reasoning",)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"previous_response_id": "r"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"store": True}, "store"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"tools": [{"type": "mcp"}]}, "tools[0]"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
            "input[0].content[0].file_id",
        ),
        ({"input": 3}, "input"),
    ],
)
def test_what_cannot_be_done_without_the_vendor_is_refused_by_name(more: dict[str, Any], param: str) -> None:
    with pytest.raises(Unmappable) as caught:
        request(HELLO | more, Left())
    assert caught.value.param == param


COMPLETION: dict[str, Any] = {
    "id": "c1",
    "created": 5,
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
        "prompt_tokens_details": {"cached_tokens": 30},
        "completion_tokens_details": {"reasoning_tokens": 2},
    },
}


def test_a_completion_becomes_a_response_and_is_read_back() -> None:
    response = json.loads(answer(COMPLETION, HELLO | {"metadata": {"a": "b"}, "instructions": "Be brief."}))
    assert [item["type"] for item in response["output"]] == ["reasoning", "message", "function_call"]
    assert response["output"][1]["content"][0]["text"] == "It is "
    assert response["output"][2]["call_id"] == "t1"
    assert (response["status"], response["metadata"], response["instructions"]) == (
        "completed",
        {"a": "b"},
        "Be brief.",
    )
    assert response["usage"] == {
        "input_tokens": 45,
        "input_tokens_details": {"cached_tokens": 30, "cache_write_tokens": 0},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 52,
    }
    back = completion_of(response)
    (choice,) = back["choices"]
    (expected,) = COMPLETION["choices"]
    call = {"type": "function", **expected["message"]["tool_calls"][0]}
    assert choice["message"] == expected["message"] | {"tool_calls": [call]}
    assert choice["finish_reason"] == "tool_calls"
    assert usage_of(back) == usage_of(COMPLETION)


@pytest.mark.parametrize(
    ("finish", "reason"), [("length", "max_output_tokens"), ("content_filter", "content_filter")]
)
def test_an_answer_cut_short_is_incomplete(finish: str, reason: str) -> None:
    choice = {"message": {"role": "assistant", "content": "a"}, "finish_reason": finish}
    response = json.loads(answer({"choices": [choice]}, HELLO))
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": reason})
    assert completion_of(response)["choices"][0]["finish_reason"] == finish


def test_an_error_in_mid_stream_is_a_failed_response() -> None:
    writer = Writer(HELLO)
    writer.chunk({"id": "c1", "model": "gpt", "choices": [{"delta": {"content": "It "}}]})
    event = json.loads(writer.error(VendorError(503, "busy", "overloaded_error")).split(b"data: ")[1])
    assert (event["type"], event["response"]["status"]) == ("response.failed", "failed")
    assert event["response"]["error"] == {"code": "overloaded_error", "message": "busy"}
