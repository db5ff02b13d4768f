"""Texts bound together: a run of consecutive blobs deflated as one, because small texts alike compress alike.

A text of a few hundred bytes deflated alone keeps half of itself; among its like a third. And a bundle needs
one row where its leaves would need one each. It ignores tables (shelf) and what a leaf says (texts).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from understudy.traffic import texts

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


class _Index(msgspec.Struct, array_like=True):
    """What stands before the texts. Ids grow by one mostly and parents are near, so small numbers do."""

    steps: list[int]
    """Each id less the one before."""
    parents: list[int]
    """How far back the parent is; 0 for none."""
    lengths: list[int]
    order: list[int]
    """Places of the leaves in the order in which their texts follow."""


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[_Index, bytes]).decode


def bind(leaves: Sequence[Leaf]) -> Bundle:
    """The leaves as one row; their ids must grow."""
    # requests beside requests and answers beside answers: what is alike within deflate's window
    order = sorted(range(len(leaves)), key=lambda place: leaves[place].laid[:1])
    ids = [leaf.id for leaf in leaves]
    index = _Index(
        steps=[after - before for before, after in zip([ids[0], *ids], ids, strict=False)],
        parents=[leaf.id - leaf.parent if leaf.parent else 0 for leaf in leaves],
        lengths=[len(leaf.laid) for leaf in leaves],
        order=order,
    )
    data = _encode((index, b"".join([leaves[place].laid for place in order])))
    return Bundle(ids[0], ids[-1], len(leaves), texts.pack(data))


def unbind(first: int, data: bytes) -> list[Leaf]:
    """The inverse of `bind`; ``first`` is the id of the bundle's first leaf."""
    index, whole = _decode(texts.unpack(data))
    laid = [b""] * len(index.lengths)
    start = 0
    for place in index.order:
        laid[place] = whole[start : start + index.lengths[place]]
        start += index.lengths[place]
    leaves: list[Leaf] = []
    at = first
    for step, back, text in zip(index.steps, index.parents, laid, strict=True):
        at += step
        leaves.append(Leaf(at, at - back if back else 0, text))
    return leaves


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
