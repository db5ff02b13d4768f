"""Brings records from segments into the store, in batches, exactly once, for as long as it runs.

The store keeps each segment's offset in the transaction of its records, so the indexer has no memory of its
own and may be killed at any moment. It ignores how frames are read (segments) and what calls cost: prices
arrive as a function.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from understudy.traffic.record import Call, Record
from understudy.traffic.segments import Fault, read_segment, segment_files, segment_name, segment_size
from understudy.traffic.store import Price, Store, unpriced

BATCH_RECORDS = 500
BATCH_BYTES = 8 << 20
"""A batch ends at the first of the two: what bounds the indexer's memory."""


class Batch(NamedTuple):
    """Consecutive records of one segment and the offset behind the last of them."""

    records: list[Record]
    faults: int
    end: int


class Indexer:
    """Fills ``store`` from the folder ``segments``; ``price`` gives what a call cost, or None."""

    def __init__(self, segments: Path, store: Store, price: Price = unpriced) -> None:
        self._segments = segments
        self._store = store
        self._price = price

    def run_once(self) -> int:
        """Index what is there now; returns how many records were new. Raises StoreError."""
        return sum(self._index(path) for path in segment_files(self._segments))

    def run(self, stop: threading.Event, interval_s: float = 0.5, *, for_s: float = math.inf) -> None:
        """`run_once` again and again until ``stop`` is set or ``for_s`` seconds are over, and once more then.

        Raises StoreError.
        """
        end = time.monotonic() + for_s
        while not stop.is_set() and time.monotonic() < end:
            self.run_once()
            stop.wait(interval_s)
        self.run_once()

    @property
    def lag_bytes(self) -> int:
        """Bytes of segments not in the store yet; what is growing here is not being kept up with."""
        reached = {segment.name: segment.reached for segment in self._store.segments()}
        behind = 0
        for path in segment_files(self._segments):
            known = reached.get(segment_name(path), 0)
            # a compressed segment may be gone between listing and looking, as may one that is being retired
            behind += max(0, segment_size(path) - known) if path.exists() else 0
        return behind

    def _index(self, path: Path) -> int:
        name = segment_name(path)
        offset = self._store.reached(name)
        if path.exists() and segment_size(path) <= offset:
            return 0
        return sum(
            self._store.insert(b.records, name, b.end, price=self._price, faults=b.faults)
            for b in _batches(path, offset)
        )


def _batches(path: Path, offset: int) -> Iterator[Batch]:
    records: list[Record] = []
    faults = size = 0
    end = offset
    for record, end in read_segment(path, offset):
        if isinstance(record, Fault):
            faults += 1
        else:
            records.append(record)
            size += len(record.request) + len(record.response) if isinstance(record, Call) else 0
        if len(records) >= BATCH_RECORDS or size >= BATCH_BYTES:
            yield Batch(records, faults, end)
            records, faults, size = [], 0, 0
    if records or faults:
        yield Batch(records, faults, end)
