"""What happens to segments once they are indexed: compressed, and one day deleted with their calls.

Whole segments go, and from the store what is as old. A segment that is still written or not wholly in the
store is never touched, so nothing is deleted that was not indexed before. A segment's age is that of its last
record. It ignores when to run (gateway.indexing) and how the store finds unshared texts (shelf).
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import NamedTuple

from understudy.config import Store as Settings
from understudy.traffic.segments import (
    compress_segment,
    is_open,
    read_segment,
    segment_files,
    segment_name,
    segment_size,
)
from understudy.traffic.store import Store

DAY_S = 86_400.0
GB = 10**9
QUIET_S = 5.0
"""A segment written to more recently is left alone: its writer may just be opening it."""
SWEEP_S = 600.0
"""How often texts of forgotten calls are swept at most: it reads the places of all calls that are left."""
BATCH_CALLS = 1000
CALLS_A_ROUND = 20_000
"""Calls deleted in a round at most, so that the indexer is never kept waiting for long."""

_log = logging.getLogger("understudy.retention")


class Retired(NamedTuple):
    """What one round did."""

    compressed: int
    """Segments."""
    deleted: int
    """Segments."""
    calls: int
    blobs: int


class Retention:
    """Takes care of the folder ``segments`` and of ``store`` as `[store] keep_days` and `keep_gb` say."""

    def __init__(self, segments: Path, store: Store, settings: Settings) -> None:
        self._segments = segments
        self._store = store
        self._settings = settings
        self._forget_before = 0.0
        """The time of the youngest segment deleted for want of room."""
        self._next_sweep = 0.0

    def run_once(self, now: float, stop: threading.Event | None = None) -> Retired:
        """One round at ``now`` (Unix seconds); it ends early when ``stop`` is set. Raises StoreError."""
        stop = stop or threading.Event()
        indexed = self._indexed(now)
        old = sum(self._too_old(path, now) for path in indexed)
        _delete(indexed[:old])
        kept, compressed = self._compress(indexed[old:], stop)
        beyond = self._beyond_room(kept)
        _delete(kept[:beyond])
        calls = self._forget(now, stop)
        return Retired(compressed, old + beyond, calls, self._sweep(stop))

    def _compress(self, indexed: list[Path], stop: threading.Event) -> tuple[list[Path], int]:
        """Where the segments are then, and how many were compressed."""
        paths: list[Path] = []
        for path in indexed:
            try:
                paths.append(path if stop.is_set() else compress_segment(path))
            except OSError as error:
                _log.warning("%s stays as it is: %s", path, error.strerror)
                paths.append(path)
        return paths, sum(one != other for one, other in zip(indexed, paths, strict=True))

    def _indexed(self, now: float) -> list[Path]:
        """Segments that are wholly in the store and written by nobody, oldest first."""
        reached = {segment.name: segment.reached for segment in self._store.segments()}
        quiet = [
            path
            for path in segment_files(self._segments)
            if now - path.stat().st_mtime > QUIET_S
            and not is_open(path)
            and _read_to_the_end(path, reached.get(segment_name(path), 0))
        ]
        return sorted(quiet, key=lambda path: path.stat().st_mtime)

    def _too_old(self, path: Path, now: float) -> bool:
        days = self._settings.keep_days
        return days > 0 and now - path.stat().st_mtime > days * DAY_S

    def _beyond_room(self, oldest_first: list[Path]) -> int:
        """How many of these must go so that the folder fits; notes how old they are."""
        if self._settings.keep_gb <= 0:
            return 0
        total = sum(path.stat().st_size for path in segment_files(self._segments))
        count = 0
        while total > self._settings.keep_gb * GB and count < len(oldest_first):
            last = oldest_first[count].stat()
            self._forget_before = max(self._forget_before, last.st_mtime + 0.001)
            total -= last.st_size
            count += 1
        return count

    def _forget(self, now: float, stop: threading.Event) -> int:
        before = self._forget_before
        if self._settings.keep_days > 0:
            before = max(before, now - self._settings.keep_days * DAY_S)
        forgotten, part = 0, BATCH_CALLS if before > 0 else 0
        while part == BATCH_CALLS and forgotten < CALLS_A_ROUND and not stop.is_set():
            part = self._store.forget(before, BATCH_CALLS)
            forgotten += part
        return forgotten

    def _sweep(self, stop: threading.Event) -> int:
        if stop.is_set() or time.monotonic() < self._next_sweep:
            return 0
        self._next_sweep = time.monotonic() + SWEEP_S
        return self._store.sweep()


def _read_to_the_end(path: Path, reached: int) -> bool:
    """Whether all records are indexed; a process that was killed leaves half a frame, which is none."""
    return reached >= segment_size(path) or next(read_segment(path, reached), None) is None


def _delete(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
