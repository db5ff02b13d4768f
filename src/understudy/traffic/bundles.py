"""Texts bound together: a run of consecutive blobs deflated as one, because small texts alike compress alike.

A text of a few hundred bytes deflated alone keeps half of itself; among its like a third. And a bundle needs
one row where its leaves would need one each. It ignores tables (shelf) and what a leaf says (texts).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple, TypeVar

import msgspec

from understudy.traffic import folded, texts
from understudy.traffic.folded import Columns

Slices = TypeVar("Slices", bytes, list[int])

BUNDLE_BYTES = 128 << 10
"""A bundle is closed when its leaves hold this much: four times what deflate looks back, and opened in
half a millisecond. A leaf as long as that is bound alone."""


class Leaf(NamedTuple):
    """One text as it is laid down."""

    id: int
    parent: int
    """Id of the leaf that this one goes on from; 0 for none."""
    laid: bytes
    """See `texts.lay`."""


class Bundle(NamedTuple):
    """Leaves of consecutive ids, some of which may have been taken out since."""

    first: int
    last: int
    leaves: int
    """How many are left."""
    data: bytes


class _Head(msgspec.Struct, array_like=True):
    """What stands before the columns. Ids grow by one mostly and parents are near, so small numbers do."""

    steps: list[int]
    """Each id less the one before."""
    parents: list[int]
    """How far back the parent is; 0 for none."""
    kinds: bytes
    """The codec of each leaf (`texts.pack`)."""
    lengths: list[int]
    """Of each leaf without its codec; of a folded stream, how many pieces its text has."""
    templates: list[tuple[bytes, bytes, bytes]]
    which: list[int]
    columns: list[int]
    """Bytes of each column."""


class _Index(msgspec.Struct, array_like=True):
    """What stood before the texts in the layout of older versions."""

    steps: list[int]
    """Each id less the one before."""
    parents: list[int]
    """How far back the parent is; 0 for none."""
    lengths: list[int]
    order: list[int]
    """Places of the leaves in the order in which their texts follow."""


_encode = msgspec.msgpack.Encoder().encode
_decode_head = msgspec.msgpack.Decoder(_Head).decode
_decode_before = msgspec.msgpack.Decoder(tuple[_Index, bytes]).decode
_decode_lengths = msgspec.msgpack.Decoder(list[int]).decode
_FOLDED, _RAW = b"fr"
_SIZE = 4


def bind(leaves: Sequence[Leaf]) -> Bundle:
    """The leaves as one row; their ids must grow."""
    ids = [leaf.id for leaf in leaves]
    kinds = b"".join([leaf.laid[:1] for leaf in leaves])
    streams = [folded.decode(leaf.laid[1:]) for leaf in leaves if leaf.laid[:1] == b"f"]
    beside = folded.side_by_side(streams)
    raw = [leaf.laid[1:] for leaf in leaves if leaf.laid[:1] == b"r"]
    others = [leaf.laid[1:] for leaf in leaves if leaf.laid[:1] not in b"fr"]
    counts = map(len, beside.lengths)
    columns = [
        b"".join(raw),
        b"".join(others),
        b"".join(beside.texts),
        _encode([length for lengths in beside.lengths for length in lengths]),
        b"\n".join(beside.ids),
        b"\n".join(beside.created),
    ]
    head = _Head(
        steps=[after - before for before, after in zip([ids[0], *ids], ids, strict=False)],
        parents=[leaf.id - leaf.parent if leaf.parent else 0 for leaf in leaves],
        kinds=kinds,
        lengths=[next(counts) if leaf.laid[:1] == b"f" else len(leaf.laid) - 1 for leaf in leaves],
        templates=beside.templates,
        which=beside.which,
        columns=[len(column) for column in columns],
    )
    first = _encode(head)
    packed = texts.deflated([len(first).to_bytes(_SIZE) + first, *filter(None, columns)])
    return Bundle(ids[0], ids[-1], len(leaves), b"c" + packed)


def unbind(first: int, data: bytes) -> list[Leaf]:
    """The inverse of `bind`; ``first`` is the id of the bundle's first leaf."""
    if data[:1] != b"c":
        return _unbind_before(first, data)
    whole = texts.inflated(data[1:])
    begin = _SIZE + int.from_bytes(whole[:_SIZE])
    head = _decode_head(whole[_SIZE:begin])
    ends = pairwise(accumulate(head.columns, initial=begin))
    raw, others, said, lengths, ids, created = (whole[a:b] for a, b in ends)
    counts = [n for kind, n in zip(head.kinds, head.lengths, strict=True) if kind == _FOLDED]
    pieces = _parts(_decode_lengths(lengths), counts)
    spoken = _parts(said, [sum(lengths) for lengths in pieces])
    columns = Columns(head.templates, head.which, ids.split(b"\n"), created.split(b"\n"), pieces, spoken)
    streams = iter(folded.apart(columns) if counts else [])
    laid: list[bytes] = []
    taken = {_RAW: 0, 0: 0}
    for kind, length in zip(head.kinds, head.lengths, strict=True):
        if kind == _FOLDED:
            laid.append(b"f" + folded.encode(next(streams)))
            continue
        column, place = (raw, _RAW) if kind == _RAW else (others, 0)
        laid.append(bytes([kind]) + column[taken[place] : taken[place] + length])
        taken[place] += length
    return _leaves(first, head.steps, head.parents, laid)


def _parts(whole: Slices, lengths: Sequence[int]) -> list[Slices]:
    return [whole[a:b] for a, b in pairwise(accumulate(lengths, initial=0))]


def _leaves(first: int, steps: Sequence[int], parents: Sequence[int], laid: Sequence[bytes]) -> list[Leaf]:
    leaves: list[Leaf] = []
    at = first
    for step, back, text in zip(steps, parents, laid, strict=True):
        at += step
        leaves.append(Leaf(at, at - back if back else 0, text))
    return leaves


def _unbind_before(first: int, data: bytes) -> list[Leaf]:
    """A bundle of an older version, where texts stood one behind the other."""
    index, whole = _decode_before(texts.unpack(data))
    laid = [b""] * len(index.lengths)
    start = 0
    for place in index.order:
        laid[place] = whole[start : start + index.lengths[place]]
        start += index.lengths[place]
    return _leaves(first, index.steps, index.parents, laid)


def bundled(leaves: Iterable[Leaf]) -> tuple[list[Bundle], list[Leaf]]:
    """Full bundles of leaves in the order of their ids, and the leaves that do not fill one yet."""
    bundles: list[Bundle] = []
    loose: list[Leaf] = []
    size = 0
    for leaf in leaves:
        if loose and len(leaf.laid) >= BUNDLE_BYTES:
            bundles.append(bind(loose))
            loose, size = [], 0
        loose.append(leaf)
        size += len(leaf.laid)
        if size >= BUNDLE_BYTES:
            bundles.append(bind(loose))
            loose, size = [], 0
    return bundles, loose
