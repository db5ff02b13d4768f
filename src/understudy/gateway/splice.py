"""Where the model's name stands in a request body, found without building the document.

Routing needs two values of a request, ``model`` and ``stream``; everything else is forwarded as the very
bytes that came. The name is found as a byte span, so that nested keys of the same name (tools, messages),
escapes and duplicates can neither be mistaken for it nor slip past it. It ignores every other field.

Source: RFC 8259 (§4: behaviour on duplicate names is unpredictable, so they are refused).
"""

from __future__ import annotations

import re
from typing import NamedTuple

import msgspec

from understudy.gateway.refusal import Refusal, bad_request


class Head(NamedTuple):
    """What routing reads; ``body[start:end]`` is the JSON string of the model, quotes included."""

    model: str
    stream: bool
    start: int
    end: int


class _Routed(msgspec.Struct):
    model: str
    stream: bool | None = None


_decode = msgspec.json.Decoder(_Routed).decode
_decode_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_key = msgspec.json.Decoder(str).decode
_KEY = b'"model"'
# every letter of "model" is U+006x, so a spelling of the key by escapes contains this
_ESCAPED_LETTER = b"\\u006"
_VALUE = re.compile(rb'"model"[ \t\r\n]*:[ \t\r\n]*("[^"\\]*")')
_MEMBER = re.compile(
    rb'[ \t\r\n]*[{,][ \t\r\n]*("[^"\\]*+(?:\\.[^"\\]*+)*+")[ \t\r\n]*:[ \t\r\n]*', re.DOTALL
)
_END = re.compile(rb"[ \t\r\n]*\}[ \t\r\n]*\Z")


def read_head(body: bytes) -> Head:
    """Model, stream and the model's span. Raises Refusal (400) for what cannot be routed."""
    routed = _routed(body)
    if body.count(_KEY) == 1 and _ESCAPED_LETTER not in body:
        # the only spelling of the key there is must be the one the decoder found at the top
        found = _VALUE.search(body)
        if found:
            return Head(routed.model, routed.stream is True, found.start(1), found.end(1))
    start, end = _only_span(body)
    return Head(routed.model, routed.stream is True, start, end)


def _routed(body: bytes) -> _Routed:
    try:
        routed = _decode(body)
        if not body.isascii():
            body.decode()
    except msgspec.ValidationError as error:
        param = "stream" if "$.stream" in str(error) else "model"
        raise bad_request("invalid_value", f"the request cannot be routed: {error}", param=param) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise bad_request("invalid_json", f"the request body is not JSON: {error}") from error
    return routed


def _only_span(body: bytes) -> tuple[int, int]:
    """Span of the one top-level ``model``, for a JSON object known to have at least one.

    The decoder gives each member's value but not its place, so the object is walked member by member, each
    value's length telling where the next one starts. A repeated key shows: its first value is not the one the
    decoder kept, or its key comes by twice.
    """
    values = _decode_members(body)
    spans: dict[str, tuple[int, int]] = {}
    place = 0
    while member := _MEMBER.match(body, place):
        key, start = _decode_key(member[1]), member.end()
        value = bytes(values[key])
        place = start + len(value)
        if key in spans or not body.startswith(value, start):
            raise _repeated(key)
        spans[key] = (start, place)
    if not _END.match(body, place):
        raise _repeated(list(spans)[-1])
    return spans["model"]


def _repeated(key: str) -> Refusal:
    return bad_request(
        "duplicate_key", f"the request has the key {key[:100]!r} more than once", param=key[:100]
    )


def splice(body: bytes, head: Head, model_json: bytes) -> bytes:
    """The body with another model's name in the place of the old one, all other bytes untouched."""
    return b"%b%b%b" % (body[: head.start], model_json, body[head.end :])
