"""Streams through two translations: however they are cut, and whatever they hold, they say the same."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.forms.events import EventReader
from understudy.forms.fault import Unreadable
from understudy.forms.recorded import answer_as_chat
from understudy.forms.translation import Translation, vendor_of
from understudy.protocol import assemble_stream, iter_events

USAGE = {"input_tokens": 10, "cache_read_input_tokens": 30, "output_tokens": 7}
TEXT = st.text(min_size=1, max_size=12)
ARGUMENTS = st.dictionaries(TEXT, TEXT, max_size=2)
BODIES: dict[str, dict[str, Any]] = {
    "chat.completions": {
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 9,
        "stream_options": {"include_usage": True},
    },
    "messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 9},
    "responses": {"input": "x", "max_output_tokens": 9},
}
KINDS = ("anthropic", "gemini", "openai")
PAIRS = [
    (route, kind) for route in BODIES for kind in KINDS if (route, kind) not in {("messages", "anthropic")}
]


def translation(route: str, kind: str) -> Translation:
    return Translation(
        route, vendor_of(kind, "http://x"), {**BODIES[route], "model": "a", "stream": True}, "m"
    )


def split(raw: bytes, places: list[int]) -> list[bytes]:
    cuts = [0, *sorted(place % (len(raw) + 1) for place in places), len(raw)]
    return [raw[a:b] for a, b in pairwise(cuts)]


def translated(said: Translation, pieces: list[bytes]) -> bytes:
    stream = said.stream()
    out = b"".join(stream.feed(piece) for piece in pieces)
    return out if stream.ended else out + stream.close()


def anthropic_stream(texts: list[str], calls: list[dict[str, str]]) -> bytes:
    message = {"id": "m1", "model": "claude", "usage": USAGE | {"output_tokens": 1}, "content": []}
    events: list[dict[str, Any]] = [{"type": "message_start", "message": message}, {"type": "ping"}]
    events.append({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}})
    for text in texts:
        delta = {"type": "text_delta", "text": text}
        events.append({"type": "content_block_delta", "index": 0, "delta": delta})
    events.append({"type": "content_block_stop", "index": 0})
    for index, arguments in enumerate(calls, 1):
        block = {"type": "tool_use", "id": f"t{index}", "name": "f", "input": {}}
        events.append({"type": "content_block_start", "index": index, "content_block": block})
        written = json.dumps(arguments, ensure_ascii=False)
        for piece in (written[:3], written[3:]):
            delta = {"type": "input_json_delta", "partial_json": piece}
            events.append({"type": "content_block_delta", "index": index, "delta": delta})
        events.append({"type": "content_block_stop", "index": index})
    ending = {"delta": {"stop_reason": "tool_use" if calls else "end_turn"}, "usage": {"output_tokens": 7}}
    events += [{"type": "message_delta", **ending}, {"type": "message_stop"}]
    return b"".join(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n".encode() for e in events)


def gemini_stream(texts: list[str], calls: list[dict[str, str]]) -> bytes:
    parts: list[dict[str, Any]] = [{"text": text} for text in texts]
    parts += [{"functionCall": {"name": "f", "args": arguments}} for arguments in calls]
    pieces = [{"candidates": [{"content": {"parts": [part]}}], "responseId": "m1"} for part in parts]
    usage = {"promptTokenCount": 40, "cachedContentTokenCount": 30, "candidatesTokenCount": 7}
    last = {"candidates": [{"finishReason": "STOP"}], "modelVersion": "gemini", "usageMetadata": usage}
    return b"".join(b"data: %b\r\n\r\n" % json.dumps(piece).encode() for piece in [*pieces, last])


def openai_stream(texts: list[str], calls: list[dict[str, str]]) -> bytes:
    deltas: list[dict[str, Any]] = [{"content": text} for text in texts]
    for index, arguments in enumerate(calls):
        function = {"name": "f", "arguments": ""}
        deltas.append(
            {"tool_calls": [{"index": index, "id": f"t{index}", "type": "function", "function": function}]}
        )
        piece = {"arguments": json.dumps(arguments)}
        deltas.append({"tool_calls": [{"index": index, "function": piece}]})
    chunks = [{"id": "m1", "model": "gpt", "choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    finish = {"index": 0, "delta": {}, "finish_reason": "tool_calls" if calls else "stop"}
    usage = {"prompt_tokens": 40, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 30}}
    chunks += [{"id": "m1", "choices": [finish]}, {"id": "m1", "choices": [], "usage": usage}]
    return b"".join(b"data: %b\n\n" % json.dumps(one).encode() for one in chunks) + b"data: [DONE]\n\n"


STREAMS = {"anthropic": anthropic_stream, "gemini": gemini_stream, "openai": openai_stream}


@pytest.mark.parametrize(("route", "kind"), PAIRS)
@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(TEXT, min_size=1, max_size=4),
    calls=st.lists(ARGUMENTS, max_size=2),
    places=st.lists(st.integers(0, 10_000), max_size=12),
)
def test_a_stream_keeps_text_tools_and_usage_however_it_is_cut(
    route: str, kind: str, texts: list[str], calls: list[dict[str, str]], places: list[int]
) -> None:
    raw = STREAMS[kind](texts, calls)
    said = translation(route, kind)
    whole = translated(said, [raw])
    in_pieces = translated(translation(route, kind), split(raw, places))
    assert _timeless(in_pieces) == _timeless(whole)
    read = answer_as_chat(route, whole, True)
    assert read is not None
    (choice,) = read["choices"]
    assert choice["message"].get("content") == "".join(texts)
    made = [json.loads(call["function"]["arguments"]) for call in choice["message"].get("tool_calls") or []]
    assert made == calls
    assert choice["finish_reason"] == ("tool_calls" if calls else "stop")
    assert (read["usage"]["prompt_tokens"], read["usage"]["completion_tokens"]) == (40, 7)
    assert read["usage"]["prompt_tokens_details"]["cached_tokens"] == 30
    usage = said.spoken.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (40, 30, 7)


def _timeless(raw: bytes) -> list[Any]:
    """Events without the second in which they were made."""
    return [re.sub(rb'"created(_at)?":\d+', b"", event) for event in iter_events(raw)]


LAST = {
    "anthropic": b'{"type": "message_stop"}',
    "gemini": b'"candidatesTokenCount": 7}}',
    "openai": b'"stop"}]}',
}
"""With what a stream is whole: what may come behind it are counts."""


@pytest.mark.parametrize(("route", "kind"), PAIRS)
def test_a_stream_that_breaks_off_is_never_ended_for_the_vendor(route: str, kind: str) -> None:
    raw = STREAMS[kind](["some", "text"], [])
    whole = raw.index(LAST[kind]) + len(LAST[kind])
    for end in [*range(0, whole, 61), whole - 1]:
        stream = translation(route, kind).stream()
        out = stream.feed(raw[:end])
        with pytest.raises(Unreadable):
            stream.close()
        assert not any(mark in out for mark in (b"message_stop", b"response.completed", b"[DONE]"))
    assert translated(translation(route, kind), [raw[:whole]])


@settings(max_examples=150, deadline=None)
@given(
    events=st.lists(
        st.text(st.characters(exclude_characters="\r\n", exclude_categories=("Cs",)), max_size=9), max_size=5
    ),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    places=st.lists(st.integers(0, 500), max_size=8),
)
def test_events_are_the_same_however_they_are_cut(events: list[str], end: str, places: list[int]) -> None:
    raw = "".join(f": hello{end}data: {event}{end}id: 7{end}{end}" for event in events).encode()
    reader = EventReader()
    read = [event for piece in split(raw, places) for event in reader.feed(piece)]
    read += reader.close()
    assert read == [event.encode() for event in events]


def test_a_stream_of_thoughts_can_be_given_back() -> None:
    blocks = [
        {
            "type": "content_block_start",
            "content_block": {"type": "thinking", "thinking": "", "signature": ""},
        },
        {"type": "content_block_delta", "delta": {"type": "thinking_delta", "thinking": "hm"}},
        {"type": "content_block_delta", "delta": {"type": "signature_delta", "signature": "s"}},
        {"type": "content_block_stop"},
        {"type": "content_block_start", "content_block": {"type": "redacted_thinking", "data": "z"}},
        {"type": "content_block_stop"},
    ]
    raw = anthropic_stream(["a"], [])
    begun, rest = raw.split(b"event: ping", 1)
    inserted = b"".join(b"data: %b\n\n" % json.dumps(block).encode() for block in blocks)
    out = translated(translation("chat.completions", "anthropic"), [begun, inserted, b"event: ping" + rest])
    message = assemble_stream(out)["choices"][0]["message"]
    assert message["reasoning_content"] == "hm"
    assert message["thinking_blocks"] == [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "redacted_thinking", "data": "z"},
    ]
