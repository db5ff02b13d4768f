"""What a finished answer says of itself: model, usage, finish reason; estimates where the vendor did not say.

Read from the tapped copy after the relay is done, with typed decoding that builds nothing but these fields.
It ignores what the texts say.

An estimate counts four bytes of UTF-8 text per token (OpenAI help centre, "What are tokens and how to count
them": one token is about four characters of English), and at least one per streamed piece.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import msgspec

from understudy.protocol import Json, Usage, iter_events, text_of, usage_of

DECODED_BYTES = 64 << 20
"""Longest answer unpacked from its content coding."""
BYTES_PER_TOKEN = 4
_LAST_EVENTS = 4


class Seen(NamedTuple):
    """What an answer says of itself."""

    model: str = ""
    usage: Usage | None = None
    finish_reason: str = ""
    pieces: int = 0
    """Streamed pieces that carried text; counted only when usage is missing."""
    text_bytes: int = 0
    """Bytes of the answer's text; counted only when usage is missing."""


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


def read_json(body: bytes) -> Seen:
    """For an answer that was not streamed."""
    answer = _body(body)
    if answer is None:
        return Seen()
    seen = Seen(_text(answer.model), _usage(answer), _finish(answer))
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
    model = finish = ""
    usage: Usage | None = None
    pieces = size = 0
    for event in events:
        chunk = _body(event)
        if chunk is None:
            continue
        model = _text(chunk.model) or model
        usage = _usage(chunk) or usage
        finish = _finish(chunk) or finish
        count = sum(_text_bytes(choice) for choice in chunk.choices or [])
        pieces += count > 0
        size += count
    return Seen(model, usage, finish, pieces, size)


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


def estimate(request: bytes, seen: Seen) -> Usage:
    """Usage as far as it can be guessed from the texts."""
    completion = max(seen.pieces, -(-seen.text_bytes // BYTES_PER_TOKEN))
    return Usage(prompt_tokens=-(-_prompt_bytes(request) // BYTES_PER_TOKEN), completion_tokens=completion)


def _prompt_bytes(request: bytes) -> int:
    """Bytes of text a request puts to the model; images and audio are not text."""
    try:
        body: Json = msgspec.json.decode(request, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return 0
    messages = body.get("messages")
    if not isinstance(messages, list):
        return sum(_size(body.get(name)) for name in ("prompt", "input"))
    total = _size(body.get("tools"))
    for message in messages:
        if isinstance(message, dict):
            total += _size(_message_text(message))
    return total


def _message_text(message: Json) -> str:
    try:
        return text_of(message.get("content"))
    except (AttributeError, TypeError):
        return ""
