"""How requests and answers are kept: every byte, but what repeats only once.

A request body is cut into a *frame* (the body with holes) and its messages. Messages form a chain: a node
holds what follows its parent, and its digest covers the whole conversation up to there. A request whose first
messages are known adds only the rest, so the n-th turn of a conversation costs one turn and a shared system
prompt costs nothing. Base64 data and long top-level values (tools, schemas) are lifted out of frame and
messages and kept under their own digest. Nothing is decoded and encoded again: a body comes back byte for
byte. It ignores tables (store).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import NamedTuple

import msgspec

HOLE = b"\0"
"""Stands for a message in a frame. Legal JSON has no such byte."""
LIFTED = b"\1"
"""Opens and closes the digest (hex) of something lifted out."""
NODE_BYTES = 128
"""A chain node ends after a message at least this long: shorter ones don't repay a row of their own."""
LIFT_BYTES = 512
"""Shortest top-level value that is kept apart from its frame."""

_BASE64 = re.compile(rb"[A-Za-z0-9+/=_\\-]{1024,}")
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
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
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


def _cut_messages(body: bytes, fields: dict[str, msgspec.Raw]) -> tuple[bytes, list[bytes]]:
    thread = bytes(fields.get("messages", fields.get("input", msgspec.Raw(b""))))
    if not thread.startswith(b"["):
        return body, []
    messages = [bytes(m) for m in msgspec.json.decode(thread, type=list[msgspec.Raw])]
    position = body.find(thread)
    kept = [body[:position]]
    for message in messages:
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
    """Chain nodes for all messages after the first ``known``."""
    nodes: list[Node] = []
    start = known
    for index in range(known, len(pieces.messages)):
        last = index == len(pieces.messages) - 1
        if last or len(pieces.messages[index]) >= NODE_BYTES:
            nodes.append(Node(pieces.prefixes[index], HOLE.join(pieces.messages[start : index + 1])))
            start = index + 1
    return nodes


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


def pack(data: bytes) -> bytes:
    """Data as stored: one byte naming the codec (``r`` raw, ``1`` deflate with our first dictionary)."""
    deflate = zlib.compressobj(3, zlib.DEFLATED, -15, 8, zlib.Z_DEFAULT_STRATEGY, _DICTIONARY_1)
    packed = deflate.compress(data) + deflate.flush()
    return b"1" + packed if len(packed) < len(data) else b"r" + data


def unpack(stored: bytes) -> bytes:
    """The inverse of `pack`."""
    if stored[:1] == b"r":
        return stored[1:]
    inflate = zlib.decompressobj(-15, _DICTIONARY_1)
    return inflate.decompress(stored[1:]) + inflate.flush()
