"""How requests and answers are kept: every byte, but what repeats only once.

A request body is cut into a *frame* (the body with holes) and its messages. Messages form a chain: a node
holds what follows its parent, and its digest covers the whole conversation up to there. A request whose first
messages are known adds only the rest, so the n-th turn of a conversation costs one turn and a shared system
prompt costs nothing. Base64 data and long top-level values (tools, schemas) are lifted out of frame and
messages and kept under their own digest. A streamed answer is folded: its distinct events, with holes, and
the text that was in them. An answer mostly comes back as the next turn's message; that message is compressed
against it. Nothing is decoded and encoded again: a body comes back byte for byte. It ignores tables (store).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import NamedTuple

import msgspec

from understudy.traffic import folded

HOLE = b"\0"
"""Stands for a message in a frame. Legal JSON has no such byte."""
LIFTED = b"\1"
"""Opens and closes the digest (hex) of something lifted out."""
NODE_BYTES = 128
"""A chain node ends after a message at least this long: shorter ones don't repay a row of their own."""
LIFT_BYTES = 512
"""Shortest top-level value that is kept apart from its frame."""

_BASE64 = re.compile(rb"[A-Za-z0-9+/=_\\-]{1024,}")
_ASSISTANT = re.compile(rb'"role"\s*:\s*"assistant"')
_CONTENT = re.compile(rb'"content"\s*:\s*"((?:[^"\\\x00-\x1f]|\\.)++)"')
_DIGEST = re.compile(rb"\x01([0-9a-f]{32})\x01")


class Node(NamedTuple):
    """Messages that follow a known prefix; ``digest`` covers the chain up to and including them."""

    digest: bytes
    data: bytes


class Cut(NamedTuple):
    """A request body in pieces."""

    frame: bytes
    prefixes: list[bytes]
    """Digest after each message."""
    messages: list[bytes]
    lifted: dict[bytes, bytes]
    """Digest to content."""


def digest_of(data: bytes, parent: bytes = b"") -> bytes:
    """16 bytes of BLAKE2b over the parent's digest and the data."""
    return blake2b(parent + data, digest_size=16).digest()


def cut(body: bytes) -> Cut:
    """Take a request body apart. What is not a JSON object stays whole, marked as verbatim."""
    if HOLE in body or LIFTED in body:
        return Cut(b"V" + body, [], [], {})
    try:
        fields = _decode_fields(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Cut(b"V" + body, [], [], {})
    lifted: dict[bytes, bytes] = {}
    frame, messages = _cut_messages(body, fields)
    for name, value in fields.items():
        if name not in ("messages", "input") and len(bytes(value)) >= LIFT_BYTES:
            frame = frame.replace(bytes(value), _lift(bytes(value), lifted), 1)
    if b"base64" in body or b"input_audio" in body:
        messages = [_BASE64.sub(lambda m: _lift(m[0], lifted), message) for message in messages]
    return Cut(b"T" + frame, _prefixes(messages), messages, lifted)


_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_items = msgspec.json.Decoder(list[msgspec.Raw]).decode


def _cut_messages(body: bytes, fields: dict[str, msgspec.Raw]) -> tuple[bytes, list[bytes]]:
    thread = bytes(fields.get("messages", fields.get("input", msgspec.Raw(b""))))
    if not thread.startswith(b"["):
        return body, []
    messages = [bytes(m) for m in _decode_items(thread)]
    position = body.find(thread)
    kept = [body[:position]]
    for message in messages:
        start = position + 1  # behind a bracket or a comma, unless there is white space
        if not body.startswith(message, start):
            start = body.find(message, position)
        kept.append(body[position:start] + HOLE)
        position = start + len(message)
    return b"".join([*kept, body[position:]]), messages


def _lift(value: bytes, lifted: dict[bytes, bytes]) -> bytes:
    digest = digest_of(value)
    lifted[digest] = value
    return LIFTED + digest.hex().encode() + LIFTED


def _prefixes(messages: Sequence[bytes]) -> list[bytes]:
    digests: list[bytes] = []
    parent = b""
    for message in messages:
        parent = digest_of(message, parent or b"thread")
        digests.append(parent)
    return digests


def new_nodes(pieces: Cut, known: int) -> list[Node]:
    """Chain nodes for all messages after the first ``known``.

    Within a conversation that goes on, an answer has no node of its own: nobody branches off behind it, where
    examples in a prompt do.
    """
    nodes: list[Node] = []
    start = known
    for index in range(known, len(pieces.messages)):
        message, last = pieces.messages[index], index == len(pieces.messages) - 1
        if last or (len(message) >= NODE_BYTES and not (known and is_answer(message))):
            nodes.append(Node(pieces.prefixes[index], HOLE.join(pieces.messages[start : index + 1])))
            start = index + 1
    return nodes


def is_answer(message: bytes) -> bool:
    """Whether a message of a request is the assistant's."""
    return _ASSISTANT.search(message) is not None


def repeats(message: bytes, spoken: bytes) -> bool:
    """Whether a message repeats an answer, judged by a few bytes from its middle."""
    middle = len(message) // 2
    return message[middle : middle + 12] in spoken


def join(frame: bytes, nodes: Sequence[bytes], lifted: Callable[[bytes], bytes]) -> bytes:
    """The body again; ``nodes`` are the chain from its first message on, ``lifted`` finds by digest."""
    if frame.startswith(b"V"):
        return frame[1:]
    gaps = frame[1:].split(HOLE)
    messages = HOLE.join(nodes).split(HOLE) if nodes else []
    pieces = [gaps[0]]
    for message, gap in zip(messages, gaps[1:], strict=True):
        pieces += (message, gap)
    return _DIGEST.sub(lambda m: lifted(bytes.fromhex(m[1].decode())), b"".join(pieces))


# Bytes every call repeats: deflate finds them here instead of storing them with each small text. Never edit:
# what was written with it could not be read; add a second one under a new codec.
_DICTIONARY_1 = (
    b'"prompt_tokens_details":{"cached_tokens":0,"audio_tokens":0},"completion_tokens_details":{'
    b'"reasoning_tokens":0,"audio_tokens":0,"accepted_prediction_tokens":0,"rejected_prediction_tokens":0}'
    b',"type":"function","function":{"name":"","description":"","arguments":"{\\"","parameters":{"type":'
    b'"object","properties":{"type":"string"},"required":[],"tool_calls":[{"index":0,"id":"call_","tool_choice"'
    b':"auto","response_format":{"type":"json_schema","json_schema":{"name":"","strict":true,"schema":{'
    b'"stream":true,"stream_options":{"include_usage":true},"temperature":0.0,"max_tokens":"top_p":1,"seed":'
    b'{"role":"system","content":"You are a {"role":"tool","tool_call_id":"call_{"type":"text","text":"'
    b'{"type":"image_url","image_url":{"url":"data:image/png;base64,{"role":"assistant","content":"'
    b'{"role":"user","content":"{"id":"chatcmpl-","object":"chat.completion","created":17,"model":"gpt-4.1-'
    b'","choices":[{"index":0,"message":{"role":"assistant","content":"","refusal":null,"annotations":[]},'
    b'"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":1,"completion_tokens":1,'
    b'"total_tokens":1},"service_tier":"default","system_fingerprint":"fp_"}'
    b'data: {"id":"chatcmpl-","object":"chat.completion.chunk","created":17,"model":"","choices":[{"index":0,'
    b'"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\ndata: {"choices":[{"index":0,'
    b'"delta":{},"finish_reason":"stop"}],"usage":null}\n\ndata: [DONE]\n\n'
)


def lifted_in(data: bytes) -> list[bytes]:
    """Digests of what was lifted out of a frame or a node."""
    return [bytes.fromhex(digest.decode()) for digest in _DIGEST.findall(data)] if LIFTED in data else []


# The same of a later date: OpenAI's answers come indented, and a stream's events have more fields.
_DICTIONARY_2 = _DICTIONARY_1 + (
    b'{\n  "id": "chatcmpl-C",\n  "object": "chat.completion",\n  "created": 179,\n'
    b'  "model": "gpt-4.1-2025-04-14",\n  "choices": [\n    {\n      "index": 0,\n'
    b'      "message": {\n        "role": "assistant",\n        "content": "",\n'
    b'        "refusal": null,\n        "annotations": []\n      },\n      "logprobs": null,\n'
    b'      "finish_reason": "stop"\n    }\n  ],\n  "usage": {\n    "prompt_tokens": 1,\n'
    b'    "completion_tokens": 1,\n    "total_tokens": 1,\n    "prompt_tokens_details": {\n'
    b'      "cached_tokens": 0,\n      "audio_tokens": 0\n    },\n'
    b'    "completion_tokens_details": {\n      "reasoning_tokens": 0,\n      "audio_tokens": 0,\n'
    b'      "accepted_prediction_tokens": 0,\n      "rejected_prediction_tokens": 0\n    }\n  },\n'
    b'  "service_tier": "default",\n  "system_fingerprint": "fp_"\n}\n'
    b'data: {"id":"chatcmpl-C","object":"chat.completion.chunk","created":179,"model":"gpt-4.1-2025-04-14",'
    b'"service_tier":"default","system_fingerprint":"fp_","choices":[{"index":0,"delta":{"role":"assistant",'
    b'"content":"","refusal":null},"logprobs":null,"finish_reason":null}]}\n\n'
    b'data: {"id":"chatcmpl-C","object":"chat.completion.chunk","created":179,"model":"gpt-4.1-2025-04-14",'
    b'"choices":[{"index":0,"delta":{"content":""},"logprobs":null,"finish_reason":null}]}\n\n'
    b'"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]}\n\n'
    b'"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":1}}\n\ndata: [DONE]\n\n'
)
DICTIONARIES = _DICTIONARY_1, _DICTIONARY_2
_WINDOW = 32 << 10
"""How far back deflate finds what is repeated."""
_ID_BYTES = 6
_LEVEL = 4
"""Of deflate: 6 keeps bundles 3% smaller and takes twice as long (LOG.md, 2026-11-25)."""


def pack(data: bytes) -> bytes:
    """Data deflated, behind one byte that names the codec; as it is where that is shorter.

    ``r`` raw; ``f`` a folded answer; ``1``, ``2`` deflate with our first or second dictionary; ``s`` a
    message that says word for word what an answer said, ``3`` one deflated after it; ``4`` a folded answer
    deflated, as older versions left it. ``c`` is a bundle in columns (bundles).
    """
    packed = deflated([data], _DICTIONARY_2)
    return b"2" + packed if len(packed) < len(data) else b"r" + data


def lay(data: bytes) -> bytes:
    """Data as it is laid into a bundle: deflated there, with its neighbours."""
    return b"r" + data


def lay_answer(answer: bytes) -> bytes:
    """`lay` for an answer: a stream is folded."""
    stream = folded.fold(answer)
    return lay(answer) if stream is None else b"f" + stream


def lay_after(data: bytes, answer: int, spoken: bytes) -> bytes:
    """`lay` for messages of which the first repeats what the answer in the blob ``answer`` said."""
    again = _said_again(data, spoken)
    if again is not None:
        return b"s" + answer.to_bytes(_ID_BYTES) + _encode_again(again)
    return b"3" + answer.to_bytes(_ID_BYTES) + deflated([data], (_DICTIONARY_2 + spoken)[-_WINDOW:])


def named_answer(stored: bytes) -> int:
    """The blob of the answer that stored data came after; 0 for none."""
    return int.from_bytes(stored[1 : 1 + _ID_BYTES]) if stored[:1] in (b"3", b"s") else 0


class _Again(msgspec.Struct, array_like=True):
    """A message with a hole, and where in the answer stands what fills it."""

    start: int
    end: int
    before: bytes
    behind: bytes


_encode_again = msgspec.msgpack.Encoder().encode
_decode_again = msgspec.msgpack.Decoder(_Again).decode
_CLUE = 24
"""Bytes by which a text is looked for: a short needle is found faster."""


def _said_again(data: bytes, spoken: bytes) -> _Again | None:
    content = _CONTENT.search(data)
    if content is None:
        return None
    said = content[1]
    start = spoken.find(said[:_CLUE])
    if start < 0 or not spoken.startswith(said, start):
        return None
    return _Again(start, start + len(said), data[: content.start(1)], data[content.end(1) :])


def unpack(stored: bytes, spoken: bytes = b"") -> bytes:
    """The inverse of `pack`, `lay`, `lay_answer` and, given what was spoken, `lay_after`."""
    codec = stored[:1]
    if codec == b"r":
        return stored[1:]
    if codec == b"f":
        return folded.unfold(stored[1:])
    if codec == b"3":
        return _inflate(stored[1 + _ID_BYTES :], (_DICTIONARY_2 + spoken)[-_WINDOW:])
    if codec == b"s":
        again = _decode_again(stored[1 + _ID_BYTES :])
        return again.before + spoken[again.start : again.end] + again.behind
    data = _inflate(stored[1:], _DICTIONARY_1 if codec == b"1" else _DICTIONARY_2)
    return folded.unfold(data) if codec == b"4" else data


def spoken_in(stored: bytes) -> bytes:
    """The text within a stored answer; with what surrounds it, where it was not folded."""
    if stored[:1] == b"f":
        return folded.decode(stored[1:]).text
    if stored[:1] == b"4":
        return folded.decode(_inflate(stored[1:], _DICTIONARY_2)).text
    return unpack(stored)


def deflated(parts: Sequence[bytes], dictionary: bytes = _DICTIONARY_2) -> bytes:
    """The parts as one stream, with codes of their own for each: what is unlike has letters unlike."""
    deflate = zlib.compressobj(_LEVEL, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, dictionary)
    packed: list[bytes] = []
    for part in parts[:-1]:
        packed += (deflate.compress(part), deflate.flush(zlib.Z_BLOCK))
    return b"".join([*packed, deflate.compress(parts[-1]), deflate.flush()])


def inflated(packed: bytes) -> bytes:
    """The inverse of `deflated`."""
    return _inflate(packed, _DICTIONARY_2)


def _inflate(packed: bytes, dictionary: bytes) -> bytes:
    inflate = zlib.decompressobj(-15, dictionary)
    return inflate.decompress(packed) + inflate.flush()
