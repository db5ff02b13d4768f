"""Chats that begin alike, laid out so that the beginning is computed once.

Recorded traffic repeats itself: every call of a task carries the same instructions and examples. A bundle is
one such beginning followed by the continuations of several documents; `corpus.collate` gives each
continuation the positions and the sight it has in its own document, so its activations are the same, while
the beginning costs its tokens once and counts once in a loss. It ignores how bundles fill rows (corpus).

One level of sharing, after prefix trees in serving (RadixAttention, arXiv 2312.07104 §3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from understudy.compress.document import Document

LEAST_SHARED = 16
"""Tokens in common below which laying out together is not worth its mask."""


def bundles(documents: Sequence[Document], length: int) -> list[list[Document]]:
    """Documents in bundles of at most ``length`` tokens; one that shares nothing is a bundle by itself.

    In a bundle of several the first is the beginning, and ``after`` of the others is 0. A continuation
    repeats the last token of the beginning, so that its first own token is predicted from there.
    """
    ordered = sorted(documents, key=lambda d: d.tokens)
    common = [_common(a.tokens, b.tokens) for a, b in pairwise(ordered)]
    return [
        bundle
        for start, stop in _runs(common)
        for bundle in _laid_out(ordered[start:stop], common[start : stop - 1], length)
    ]


def distinct_tokens(documents: Sequence[Document]) -> Iterator[int]:
    """For each document, how many of its tokens come after what it shares with an earlier one.

    Counted in steps of `LEAST_SHARED`, by the hash of the tokens up to there.
    """
    seen: set[int] = set()
    for document in documents:
        marks = [
            hash(tuple(document.tokens[:stop]))
            for stop in range(LEAST_SHARED, len(document.tokens), LEAST_SHARED)
        ]
        known = next((i for i, mark in enumerate(marks) if mark not in seen), len(marks))
        seen.update(marks[known:])
        yield len(document.tokens) - known * LEAST_SHARED


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _runs(common: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges [start, stop) of ordered documents to lay out together: where most tokens are saved.

    A range is split where neighbours share least, if the parts save more than the whole.
    """
    waiting = [(0, len(common) + 1)]
    while waiting:
        start, stop = waiting.pop()
        inner = common[start : stop - 1]
        if not inner:
            yield start, stop
            continue
        least = min(inner)
        cuts = [start, *(start + i + 1 for i, shared in enumerate(inner) if shared == least), stop]
        parts = list(pairwise(cuts))
        if least >= LEAST_SHARED and _saved(common, start, stop) >= sum(_saved(common, *p) for p in parts):
            yield start, stop
        else:
            waiting += reversed(parts)


def _saved(common: Sequence[int], start: int, stop: int) -> int:
    """Tokens that laying the range out together saves."""
    inner = common[start : stop - 1]
    return (min(inner) - 1) * len(inner) if inner else 0


def _laid_out(documents: Sequence[Document], common: Sequence[int], length: int) -> Iterator[list[Document]]:
    """A run as bundles that fit; the beginning is repeated in each. ``common`` is between neighbours."""
    if not common:
        yield from ([d] for d in documents)
        return
    # every continuation keeps a token of its own: a document may be another's beginning
    shared = min(*common, *(len(d.tokens) - 1 for d in documents))
    beginning = _beginning(documents, shared)
    bundle, room = [beginning], length - shared
    for document in documents:
        rest = document.since(shared - 1)
        if len(rest.tokens) > room and len(bundle) > 1:
            yield bundle
            bundle, room = [beginning], length - shared
        bundle.append(rest)
        room -= len(rest.tokens)
    yield bundle


def _beginning(documents: Sequence[Document], shared: int) -> Document:
    """The first tokens, marked as answers where one of the documents marks them."""
    marks = [any(column) for column in zip(*(d.answer[:shared] for d in documents), strict=True)]
    return documents[0].upto(shared)._replace(answer=marks)
