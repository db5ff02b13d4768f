"""How alike two texts are, by an embedding computed here: no download, no call.

The embedding that comes with the program counts character n-grams, hashed into a fixed number of dimensions:
it sees spelling and word choice, not meaning. Another one is put in by replacing the grader:
``GRADERS["similarity"] = partial(similarity, embed=mine)``; whoever verifies needs the same. It ignores order
beyond the length of an n-gram.

Source: Weinberger et al. 2009, arXiv 0902.2206 (feature hashing).
"""

from __future__ import annotations

import math
import unicodedata
import zlib
from collections.abc import Callable, Sequence

DIMENSIONS = 2048
SIZES = (3, 4, 5)
"""Characters of an n-gram; words are padded by a space."""

Embed = Callable[[str], Sequence[float]]


def character_ngrams(text: str) -> list[float]:
    """A vector of DIMENSIONS: square roots of hashed n-gram counts, so that repeats count less and less."""
    plain = f" {' '.join(unicodedata.normalize('NFKC', text).lower().split())} "
    counts = [0.0] * DIMENSIONS
    for size in SIZES:
        for start in range(len(plain) - size + 1):
            counts[zlib.crc32(plain[start : start + size].encode()) % DIMENSIONS] += 1.0
    return [math.sqrt(count) for count in counts]


def similarity(one: str, other: str, *, embed: Embed = character_ngrams) -> float:
    """Cosine of both embeddings in [0, 1]; two empty texts are alike, an empty and another are not."""
    if not one.strip() or not other.strip():
        return float(one.strip() == other.strip())
    a, b = embed(one), embed(other)
    length = math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))
    inner = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return min(max(inner / length, 0.0), 1.0) if length else 0.0
