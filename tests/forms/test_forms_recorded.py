"""Recorded calls of every route, read as the chat completions they amount to."""

from __future__ import annotations

import json
from typing import Any

import pytest

from understudy.forms.recorded import answer_as_chat, request_as_chat
from understudy.protocol import answer_text, prompt_hash, usage_of

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather?"}]
REQUESTS: dict[str, dict[str, Any]] = {
    "chat.completions": {"model": "a", "messages": ASKED},
    "messages": {"model": "a", "max_tokens": 9, "system": "Be brief.", "messages": ASKED[1:]},
    "responses": {"model": "a", "instructions": "Be brief.", "input": "Weather?", "store": True},
}
MESSAGE = {
    "id": "m1",
    "type": "message",
    "model": "claude",
    "content": [{"type": "text", "text": "Rain."}],
    "stop_reason": "max_tokens",
    "usage": {"input_tokens": 10, "cache_read_input_tokens": 30, "output_tokens": 7},
}
RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1.0,
    "model": "gpt",
    "status": "incomplete",
    "incomplete_details": {"reason": "max_output_tokens"},
    "output": [{"type": "message", "content": [{"type": "output_text", "text": "Rain."}]}],
    "usage": {"input_tokens": 40, "input_tokens_details": {"cached_tokens": 30}, "output_tokens": 7},
}


def sse(*events: dict[str, Any]) -> bytes:
    return b"".join(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n".encode() for e in events)


MESSAGE_EVENTS = (
    {"type": "message_start", "message": {**MESSAGE, "content": [], "stop_reason": None}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Rain."}},
    {"type": "content_block_stop", "index": 0},
    {"type": "message_delta", "delta": {"stop_reason": "max_tokens"}, "usage": {"output_tokens": 7}},
    {"type": "message_stop"},
)
RESPONSE_EVENTS = (
    {"type": "response.created", "response": {**RESPONSE, "output": [], "usage": None}},
    {"type": "response.output_item.done", "output_index": 0, "item": RESPONSE["output"][0]},
    {"type": "response.incomplete", "response": RESPONSE},
)


def test_one_question_has_one_hash_whatever_form_it_was_put_in() -> None:
    read = [request_as_chat(route, json.dumps(body).encode()) for route, body in REQUESTS.items()]
    assert [request["messages"] for request in read if request] == [ASKED] * 3
    assert len({prompt_hash(request) for request in read if request}) == 1


@pytest.mark.parametrize(
    ("route", "raw", "stream"),
    [
        ("messages", json.dumps(MESSAGE).encode(), False),
        ("messages", sse(*MESSAGE_EVENTS), True),
        ("responses", json.dumps(RESPONSE).encode(), False),
        ("responses", sse(*RESPONSE_EVENTS), True),
    ],
)
def test_an_answer_is_read_with_its_text_reason_and_usage(route: str, raw: bytes, stream: bool) -> None:
    body = answer_as_chat(route, raw, stream)
    assert body is not None
    assert (answer_text(body), body["choices"][0]["finish_reason"]) == ("Rain.", "length")
    usage = usage_of(body)
    assert usage is not None
    assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (40, 30, 7)


@pytest.mark.parametrize(
    ("route", "events"), [("messages", MESSAGE_EVENTS[:4]), ("responses", RESPONSE_EVENTS[:2])]
)
def test_what_was_said_before_a_stream_broke_off_is_read(
    route: str, events: tuple[dict[str, Any], ...]
) -> None:
    body = answer_as_chat(route, sse(*events), True)
    assert body is not None
    assert answer_text(body) == "Rain."


@pytest.mark.parametrize("route", ["messages", "responses", "chat.completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_stays_an_error(route: str, stream: bool) -> None:
    raw = b'{"type": "error", "error": {"type": "overloaded_error", "message": "busy"}}'
    body = answer_as_chat(route, raw, stream)
    assert body is not None
    assert body["error"]["message"] == "busy"


def test_an_error_within_a_stream_stays_beside_what_was_said() -> None:
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "busy"}}
    body = answer_as_chat("messages", sse(*MESSAGE_EVENTS[:3], error), True)
    assert body is not None
    assert (answer_text(body), body["error"]["message"]) == ("Rain.", "busy")


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("messages", {**REQUESTS["messages"], "tools": [{"type": "web_search_20250305", "name": "w"}]}),
        ("responses", {**REQUESTS["responses"], "previous_response_id": "resp_0"}),
        ("messages", {"messages": 3}),
    ],
)
def test_half_a_question_is_none(route: str, body: dict[str, Any]) -> None:
    assert request_as_chat(route, json.dumps(body).encode()) is None


@pytest.mark.parametrize("route", ["messages", "responses", "chat.completions"])
@pytest.mark.parametrize("raw", [b"", b"<html>", b"[1]", b"{" * 2000, b'{"content": [3]}'])
def test_what_has_another_form_is_none_and_harms_nobody(route: str, raw: bytes) -> None:
    assert request_as_chat(route, raw) is None or raw.startswith(b'{"')
    assert answer_as_chat(route, raw, False) in (None, {"content": [3]}) or route == "responses"
