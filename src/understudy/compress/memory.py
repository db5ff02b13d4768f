"""Memory of large tensors, given back to the system as soon as they are freed.

glibc raises its threshold for blocks of their own with every large block that is freed; from then on hidden
states come from the heap, whose holes stay resident: a third of a pruning's peak. It ignores what is kept.

Source: mallopt(3), "dynamic mmap threshold".
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager

BLOCK = 4 << 20
"""Bytes from which a block is the system's own; smaller ones come and go too often to be worth a call."""
RAISED = 32 << 20
"""Where glibc's own threshold ends up, `DEFAULT_MMAP_THRESHOLD_MAX` on 64 bits."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


@contextmanager
def large_blocks_returned() -> Generator[None]:
    """Within, freed blocks of `BLOCK` bytes and more leave the process; a few hundredths of CPU is the price.

    The setting is the whole process's. Does nothing where the C library is not glibc.
    """
    mallopt = _mallopt()
    if mallopt is None:
        yield
        return
    _set(mallopt, BLOCK)
    try:
        yield
    finally:
        _set(mallopt, RAISED)


def _set(mallopt: Callable[[int, int], int], size: int) -> None:
    mallopt(M_MMAP_THRESHOLD, size)
    mallopt(M_TRIM_THRESHOLD, 2 * size)


def _mallopt() -> Callable[[int, int], int] | None:
    return getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
