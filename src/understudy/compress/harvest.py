"""Which recorded answers of a black box are worth learning: no failures, and nothing twice.

Scores come as plain values from whoever has feedback and graders. Near-duplicates are found by hashes of
five-word shingles and confirmed by counting them; of two that are alike the better one stays. It ignores
where answers were recorded (traffic) and how they are graded (evaluate).

Source: Broder 1997 (resemblance by shingles and min-wise hashing); banding as in Leskovec et al., Mining of
Massive Datasets §3.4.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from understudy.compress.document import Chat
from understudy.protocol import text_of

LEAST = 0.5
"""Score below which an answer counts as a failure."""
ALIKE = 0.9
"""Share of shingles in common from which two chats are one."""
WORDS = 5
BANDS, ROWS = 20, 6
"""Chats that share 90% of their shingles meet in a band with probability 1 − (1 − 0.9⁶)²⁰ > 0.9999."""


class Answered(NamedTuple):
    """A chat, and how good its last answer was, in [0, 1]; None: nobody said."""

    chat: Chat
    score: float | None


class Harvest(NamedTuple):
    """What is worth learning, and what was left out."""

    chats: list[Chat]
    failed: int
    alike: int

    def __str__(self) -> str:
        return (
            f"{len(self.chats):,} answers; left out {self.failed:,} failures, {self.alike:,} near-duplicates"
        )


def harvest(answered: Sequence[Answered], *, least: float = LEAST, alike: float = ALIKE) -> Harvest:
    """Answers scored at least ``least`` or not at all, of near-duplicates the best, in their order."""
    good = [i for i, a in enumerate(answered) if a.score is None or a.score >= least]
    shingles = {i: _shingles(answered[i].chat) for i in good}
    ranked = sorted(good, key=lambda i: (-_or_least(answered[i].score, least), i))
    kept: list[int] = []
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for index in ranked:
        own, bands = shingles[index], list(_bands(shingles[index]))
        near = {other for band in bands for other in buckets[band]}
        if any(_resemblance(own, shingles[other]) >= alike for other in near):
            continue
        kept.append(index)
        for band in bands:
            buckets[band].append(index)
    return Harvest([answered[i].chat for i in sorted(kept)], len(answered) - len(good), len(good) - len(kept))


def _or_least(score: float | None, least: float) -> float:
    """One that nobody scored is worth less than one that was found good."""
    return least if score is None else score


def _shingles(chat: Chat) -> frozenset[int]:
    """Hashes of every five words in a row, of all messages; of a short chat one of all its words."""
    words = " ".join(f"{m.get('role')}: {text_of(m.get('content'))}" for m in chat).lower().split()
    count = max(len(words) - WORDS + 1, 1)
    shown = _shown(chat)
    return frozenset(zlib.crc32(" ".join(words[i : i + WORDS]).encode(), shown) for i in range(count))


def _shown(chat: Chat) -> int:
    """A hash of pictures, sound and tool calls: what they are of makes two chats different."""
    parts = [m.get("content") for m in chat if not isinstance(m.get("content"), str)]
    calls = [m.get("tool_calls") for m in chat]
    return zlib.crc32(msgspec.json.encode([parts, calls], order="sorted"))


def _resemblance(one: frozenset[int], two: frozenset[int]) -> float:
    return len(one & two) / max(len(one | two), 1)


def _bands(shingles: frozenset[int]) -> Iterator[tuple[int, bytes]]:
    """Min-wise hashes in bands: two sets that are alike have one band in common."""
    values = np.fromiter(shingles, dtype=np.uint64, count=len(shingles))
    mixed: NDArray[np.uint64] = values[None, :] * _FACTORS[:, None] + _TERMS[:, None]
    least = (mixed >> np.uint64(32)).min(axis=1)
    for band, part in enumerate(least.reshape(BANDS, ROWS)):
        yield band, part.tobytes()


# multiply-shift hashing wraps round at 64 bits; factors are odd
_FACTORS, _TERMS = np.random.default_rng(5).integers(0, 1 << 63, size=(2, BANDS * ROWS), dtype=np.uint64) | 1
