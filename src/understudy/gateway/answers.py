"""What a finished answer says of itself: model, usage, finish reason; estimates where the vendor did not say.

Read from the tapped copy after the relay is done, with typed decoding that builds nothing but these fields.
It ignores what the texts say.

An estimate counts four bytes of UTF-8 text per token (OpenAI help centre, "What are tokens and how to count
them": one token is about four characters of English), and at least one per streamed piece.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import msgspec

from understudy.forms import anthropic, responses
from understudy.forms.chat import Counts
from understudy.protocol import Json, Usage, iter_events, text_of, usage_of
from understudy.traffic.record import Route

DECODED_BYTES = 64 << 20
"""Longest answer unpacked from its content coding."""
BYTES_PER_TOKEN = 4
_LAST_EVENTS = 4
_EVENT_BYTES = 90
"""What an event of text has beside the text, about (Anthropic's messages, OpenAI's responses)."""

T = TypeVar("T")


class Seen(NamedTuple):
    """What an answer says of itself, in the words of chat completions."""

    model: str = ""
    usage: Usage | None = None
    finish_reason: str = ""
    pieces: int = 0
    """Streamed pieces that carried text; counted only when usage is missing."""
    text_bytes: int = 0
    """Bytes of the answer's text; counted only when usage is missing."""
    prompt: Usage | None = None
    """What was counted before an answer broke off."""
    fingerprint: str = ""
    """OpenAI's ``system_fingerprint``; other forms have none."""


class _Delta(msgspec.Struct):
    content: Any = None
    tool_calls: Any = None
    reasoning_content: Any = None


class _Choice(msgspec.Struct):
    finish_reason: Any = None
    delta: _Delta | None = None
    message: _Delta | None = None
    text: Any = None


class _Body(msgspec.Struct):
    model: Any = None
    system_fingerprint: Any = None
    usage: Any = None
    choices: list[_Choice] | None = None


_decode = msgspec.json.Decoder(_Body).decode


def decoded(body: bytes, coding: bytes) -> bytes:
    """The body without its content coding; as it is when the coding is unknown or the bytes are not sound."""
    if coding.lower() not in (b"gzip", b"deflate", b"x-gzip"):
        return body
    try:
        return zlib.decompressobj(wbits=47).decompress(body, DECODED_BYTES)
    except zlib.error:
        return body


def read(route: Route, body: bytes, streamed: bool) -> Seen:
    """For an answer on any route."""
    if route == "messages":
        return _read_messages(body) if streamed else _read_message(body)
    if route == "responses":
        return _read_responses(body) if streamed else _read_response(body)
    return read_stream(body) if streamed else read_json(body)


def read_json(body: bytes) -> Seen:
    """For an answer that was not streamed."""
    answer = _body(body)
    if answer is None:
        return Seen()
    seen = Seen(
        _text(answer.model), _usage(answer), _finish(answer), fingerprint=_text(answer.system_fingerprint)
    )
    if seen.usage is None:
        seen = seen._replace(text_bytes=sum(_text_bytes(choice) for choice in answer.choices or []))
    return seen


def read_stream(raw: bytes) -> Seen:
    """For server-sent events. The last events say it all when they hold usage and a finish reason."""
    tail = raw.rsplit(b"\n\n", _LAST_EVENTS + 1)[1:]
    seen = _read_events(event[6:] for event in tail if event.startswith(b"data: {"))
    if seen.usage is not None and seen.finish_reason and seen.model:
        return seen._replace(pieces=0, text_bytes=0)
    return _read_events(iter_events(raw))


def _read_events(events: Any) -> Seen:
    model = finish = fingerprint = ""
    usage: Usage | None = None
    pieces = size = 0
    for event in events:
        chunk = _body(event)
        if chunk is None:
            continue
        model = _text(chunk.model) or model
        fingerprint = _text(chunk.system_fingerprint) or fingerprint
        usage = _usage(chunk) or usage
        finish = _finish(chunk) or finish
        count = sum(_text_bytes(choice) for choice in chunk.choices or [])
        pieces += count > 0
        size += count
    return Seen(model, usage, finish, pieces, size, fingerprint=fingerprint)


def _body(raw: bytes) -> _Body | None:
    try:
        return _decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _usage(body: _Body) -> Usage | None:
    if not isinstance(body.usage, dict):
        return None
    try:
        return usage_of({"usage": body.usage})
    except (TypeError, ValueError, AttributeError):
        return None  # a vendor's odd usage must not cost us the record


def _finish(body: _Body) -> str:
    return _text(body.choices[0].finish_reason) if body.choices else ""


def _text_bytes(choice: _Choice) -> int:
    said = choice.delta or choice.message
    values = (said.content, said.tool_calls, said.reasoning_content) if said else (choice.text,)
    return sum(_size(value) for value in values)


def _size(value: object) -> int:
    if not value:
        return 0
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode(errors="replace"))
    return len(msgspec.json.encode(value))


# Anthropic's messages and OpenAI's responses


class _Message(msgspec.Struct):
    model: Any = None
    usage: dict[str, Any] | None = None
    stop_reason: Any = None
    content: Any = None


class _MessageEvent(msgspec.Struct):
    type: Any = None
    message: _Message | None = None
    delta: _Message | None = None
    usage: dict[str, Any] | None = None


class _Incomplete(msgspec.Struct):
    reason: Any = None


class _Response(msgspec.Struct):
    model: Any = None
    usage: dict[str, Any] | None = None
    status: Any = None
    incomplete_details: _Incomplete | None = None
    output: Any = None


class _ResponseEvent(msgspec.Struct):
    response: _Response | None = None


_decode_message = msgspec.json.Decoder(_Message).decode
_decode_message_event = msgspec.json.Decoder(_MessageEvent).decode
_decode_response = msgspec.json.Decoder(_Response).decode
_decode_response_event = msgspec.json.Decoder(_ResponseEvent).decode


def _read_message(body: bytes) -> Seen:
    message = _decoded(_decode_message, body)
    if message is None:
        return Seen()
    usage = _counted(anthropic.counts, message.usage)
    size = _size(message.content) if usage is None else 0
    return Seen(_text(message.model), usage, _ended(message.stop_reason), text_bytes=size)


def _read_messages(raw: bytes) -> Seen:
    """Usage grows: the first event counts the prompt, the last ones the whole."""
    model, finish, told, ended = "", "", {}, False
    for data in iter_events(raw):
        if b"message_start" not in data and b"message_delta" not in data:
            continue
        event = _decoded(_decode_message_event, data)
        if event is None:
            continue
        if event.message is not None:
            model, told = _text(event.message.model), dict(event.message.usage or {})
        if event.type == "message_delta":
            told |= {name: count for name, count in (event.usage or {}).items() if count is not None}
            finish, ended = _ended(event.delta.stop_reason if event.delta else None), True
    usage = _counted(anthropic.counts, told) if told else None
    if ended and usage is not None:
        return Seen(model, usage, finish)
    pieces, size = _grown(raw, b"content_block_delta")
    return Seen(model, None, finish, pieces, size, usage)


def _ended(reason: object) -> str:
    return anthropic.finish(reason) if reason else ""


def _read_response(body: bytes) -> Seen:
    response = _decoded(_decode_response, body)
    return Seen() if response is None else _of_response(response)


def _read_responses(raw: bytes) -> Seen:
    """The last event holds the whole response; one that broke off has at least its model."""
    last = Seen()
    for data in iter_events(raw):
        if b'"response"' in data:
            event = _decoded(_decode_response_event, data)
            if event is not None and event.response is not None:
                last = _of_response(event.response)
    if last.usage is not None:
        return last
    pieces, size = _grown(raw, b".delta")
    return last._replace(finish_reason="", pieces=pieces, text_bytes=size)


def _of_response(response: _Response) -> Seen:
    usage = _counted(responses.counts, response.usage)
    reason = _text(response.incomplete_details.reason) if response.incomplete_details else ""
    finish = {"max_output_tokens": "length"}.get(reason, reason)
    if not finish and response.status == "completed":
        called = isinstance(response.output, list) and b'"function_call"' in msgspec.json.encode(
            response.output
        )
        finish = "tool_calls" if called else "stop"
    size = _size(response.output) if usage is None else 0
    return Seen(_text(response.model), usage, finish, text_bytes=size)


def _counted(counts: Callable[[Json], Counts], usage: Json | None) -> Usage | None:
    if not usage:
        return None
    try:
        return usage_of({"usage": counts(usage).usage()})
    except (TypeError, ValueError, AttributeError):
        return None  # a vendor's odd usage must not cost us the record


def _grown(raw: bytes, mark: bytes) -> tuple[int, int]:
    """Pieces and bytes of what a stream has said, nearly: the events' own words are taken off."""
    pieces = [data for data in iter_events(raw) if mark in data]
    return len(pieces), sum(max(0, len(data) - _EVENT_BYTES) for data in pieces)


def _decoded(decode: Callable[[bytes], T], raw: bytes) -> T | None:
    try:
        return decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def estimate(request: bytes, seen: Seen) -> Usage:
    """Usage as far as it can be guessed from the texts."""
    completion = max(seen.pieces, -(-seen.text_bytes // BYTES_PER_TOKEN))
    if seen.prompt is not None:
        return msgspec.structs.replace(seen.prompt, completion_tokens=completion)
    return Usage(prompt_tokens=-(-_prompt_bytes(request) // BYTES_PER_TOKEN), completion_tokens=completion)


def _prompt_bytes(request: bytes) -> int:
    """Bytes of text a request puts to the model; images and audio are not text."""
    try:
        body: Json = msgspec.json.decode(request, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return 0
    messages = body.get("messages")
    if not isinstance(messages, list):
        return sum(_size(body.get(name)) for name in ("prompt", "input", "instructions", "tools"))
    total = _size(body.get("tools")) + _size(_message_text({"content": body.get("system")}))
    for message in messages:
        if isinstance(message, dict):
            total += _size(_message_text(message))
    return total


def _message_text(message: Json) -> str:
    try:
        return text_of(message.get("content"))
    except (AttributeError, TypeError):
        return ""
