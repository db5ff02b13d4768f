"""By when a trial must begin on each alias, kept for some minutes.

It takes the traffic of two weeks and thousands of calls to tell, so a reader is shown the last figures while
others are made. It ignores how they are made (rollout.calendar, handed in).
"""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Callable
from typing import NamedTuple

from understudy.catalog.facts import Catalog
from understudy.dashboard.desk import Desk
from understudy.errors import StoreError
from understudy.traffic.store import Store

KEPT_S = 300.0


class Row(NamedTuple):
    """One alias; the fields are those of `rollout.calendar.Entry`."""

    alias: str
    model: str
    retires: dt.date | None
    tasks_per_day: float
    tasks_needed: float | None
    days_needed: float | None
    latest_start: dt.date | None
    missing: str


class Calendar:
    """The last figures, and how old they are."""

    def __init__(self, read: Callable[[Store, Catalog], list[Row]]) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._rows: list[Row] | None = None
        self._made_at = 0.0
        self._making: threading.Thread | None = None

    def rows(self, desk: Desk) -> dict[str, Row]:
        """By alias. Raises StoreError where there are none yet and none can be made."""
        with self._lock:
            if self._rows is None:
                self._make(desk)
            kept = self._rows
            if desk.now() - self._made_at > KEPT_S and (not self._making or not self._making.is_alive()):
                self._making = threading.Thread(target=self._make_again, args=(desk,), daemon=True)
                self._making.start()
            return {row.alias: row for row in kept or []}

    def close(self) -> None:
        """Wait for figures under way: after this nothing reads the store."""
        if self._making is not None:
            self._making.join()

    def _make(self, desk: Desk) -> None:
        at = desk.now()
        self._rows, self._made_at = self._read(desk.store, desk.catalog), at

    def _make_again(self, desk: Desk) -> None:
        try:
            self._make(desk)
        except StoreError:  # whoever opens a page is told; here the last figures stay
            self._made_at = desk.now()
