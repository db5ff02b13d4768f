"""A streamed answer folded: its text in one piece, and once what every event repeats around it.

Any bytes may be folded and come back as they were; a stream whose events differ in nothing but what they say
becomes small. Many of them are laid out as columns, like beside like, so that deflate finds what they share.
It ignores which answers belong together (bundles) and what an event means.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import accumulate, islice, pairwise
from typing import NamedTuple

import msgspec

_BETWEEN = b"\n\n"
"""Between two events."""
_SAID = re.compile(
    rb'"(?:content|text|delta|arguments|partial_json|thinking|reasoning_content)":\s?"'
    rb'((?:[^"\\\x00-\x1f]|\\.)++)"'
)
_ID = re.compile(rb'"(?:id|response_id|item_id)":\s?"([0-9A-Za-z_-]{8,80})"')
_CREATED = re.compile(rb'"created(?:_at)?":\s?(\d{9,12})\b')
_HOLES = b"\0", b"\1"
"""Stand in a template for an answer's id and its second."""


class Folded(msgspec.Struct, array_like=True):
    """A stream: what stands before, between and behind the pieces of its text, and the text in one piece."""

    before: bytes
    between: bytes
    behind: bytes
    lengths: list[int]
    text: bytes


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Folded).decode


def fold(answer: bytes) -> bytes | None:
    """A stream folded; None for what is none, or has no events that differ in nothing but what they say."""
    if not answer.startswith((b"data:", b"event:")):
        return None
    # the first one or two may stand in events of their own kind
    said = list(islice(_SAID.finditer(answer), 3))
    if not said:
        return None
    head, tail = _around(answer, said[-1])
    folded = _evenly(answer, head, tail) or _somehow(answer, head, tail)
    return encode(folded) if folded else None


def _around(answer: bytes, said: re.Match[bytes]) -> tuple[bytes, bytes]:
    """What stands before and behind a piece of text in its event."""
    begin, end = answer.rfind(_BETWEEN, 0, said.start()), answer.find(_BETWEEN, said.end())
    return answer[max(0, begin + len(_BETWEEN)) : said.start(1)], answer[said.end(1) : end]


def _evenly(answer: bytes, head: bytes, tail: bytes) -> Folded | None:
    """Folded where all events of the one kind follow each other, as they mostly do: a tenth of the time."""
    events = answer.split(_BETWEEN)
    alike = (place for place, event in enumerate(events) if event.startswith(head) and event.endswith(tail))
    first, last = next(alike, 0), len(events)
    while last > first and not (events[last - 1].startswith(head) and events[last - 1].endswith(tail)):
        last -= 1
    if last - first < 2:
        return None
    begin, end = len(head), -len(tail)
    pieces = [event[begin:end] for event in events[first:last]]
    before = _BETWEEN.join([*events[:first], head])
    between = tail + _BETWEEN + head
    behind = _BETWEEN.join([tail, *events[last:]])
    folded = Folded(before, between, behind, [len(piece) for piece in pieces], b"".join(pieces))
    return folded if before + between.join(pieces) + behind == answer else None


def _somehow(answer: bytes, head: bytes, tail: bytes) -> Folded | None:
    between = tail + _BETWEEN + head
    first, *pieces = answer.split(between)
    if not pieces:
        return None
    begin = first.rfind(head) + len(head) if head in first else len(first)
    end = max(0, pieces[-1].find(tail))
    before, behind = first[:begin], pieces[-1][end:]
    pieces = [first[begin:], *pieces[:-1], pieces[-1][:end]]
    return Folded(before, between, behind, [len(piece) for piece in pieces], b"".join(pieces))


def unfold(folded: bytes) -> bytes:
    """The stream again."""
    stream = decode(folded)
    ends = pairwise(accumulate(stream.lengths, initial=0))
    return stream.before + stream.between.join([stream.text[a:b] for a, b in ends]) + stream.behind


class Columns(NamedTuple):
    """Many folded streams side by side. A template is one's before, between and behind with holes."""

    templates: list[tuple[bytes, bytes, bytes]]
    which: list[int]
    """The template of each stream."""
    ids: list[bytes]
    """Of each stream; empty where its template has no such hole."""
    created: list[bytes]
    lengths: list[list[int]]
    texts: list[bytes]


def side_by_side(streams: Iterable[Folded]) -> Columns:
    """The inverse of `apart`."""
    columns = Columns([], [], [], [], [], [])
    known: dict[tuple[bytes, bytes, bytes], int] = {}
    for stream in streams:
        parts = (stream.before, stream.between, stream.behind)
        values = _repeated(parts)
        for hole, value in zip(_HOLES, values, strict=True):
            if value:
                parts = (
                    parts[0].replace(value, hole),
                    parts[1].replace(value, hole),
                    parts[2].replace(value, hole),
                )
        columns.which.append(known.setdefault(parts, len(known)))
        columns.ids.append(values[0])
        columns.created.append(values[1])
        columns.lengths.append(stream.lengths)
        columns.texts.append(stream.text)
    columns.templates.extend(known)
    return columns


def apart(columns: Columns) -> list[Folded]:
    """The streams one by one."""
    rows = zip(columns.which, columns.ids, columns.created, columns.lengths, columns.texts, strict=True)
    return [
        Folded(*_filled(columns.templates[which], (ident, created)), lengths, text)
        for which, ident, created, lengths, text in rows
    ]


def _repeated(parts: Sequence[bytes]) -> tuple[bytes, bytes]:
    """An answer's id and second; empty where it has none, or holes could not be told from what is there."""
    if any(hole in part for part in parts for hole in _HOLES):
        return b"", b""
    ident, created = _ID.search(parts[0]), _CREATED.search(parts[0])
    return ident[1] if ident else b"", created[1] if created else b""


def _filled(parts: tuple[bytes, bytes, bytes], values: tuple[bytes, bytes]) -> tuple[bytes, bytes, bytes]:
    for hole, value in zip(reversed(_HOLES), reversed(values), strict=True):
        if value:
            parts = (
                parts[0].replace(hole, value),
                parts[1].replace(hole, value),
                parts[2].replace(hole, value),
            )
    return parts
