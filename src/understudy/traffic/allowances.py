"""What keys may spend in a period, and the ledger of what is spoken for: the shared half of per-key limits.

A process draws a share of what is left and spends it alone, so the ledger is written now and then and not
with every call. A share is a sixteenth of what is left, so shares shrink as a limit comes near, and a process
that dies takes little with it. What was drawn counts as spent until it is given back. It ignores what is done
with a share (gateway.limits).

Periods are calendar minutes, days and months in UTC: a key that spends a minute's limit at its end may spend
the next one's at once.
"""

from __future__ import annotations

import datetime as dt
import math
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    from understudy.traffic.database import Database

Kind = Literal["requests_per_minute", "tokens_per_minute", "usd_per_day", "usd_per_month"]
KINDS: tuple[Kind, ...] = get_args(Kind)

SHARES = 16
"""One draw takes this part of what is left, or the least amount that is worth a draw."""
_LEAST: dict[Kind, float] = {
    "requests_per_minute": 1,
    "tokens_per_minute": 1_000,
    "usd_per_day": 0.01,
    "usd_per_month": 0.01,
}


class Limits(NamedTuple):
    """The most that calls with one key may spend; 0 is no limit."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    """Prompt and completion tokens."""
    usd_per_day: float = 0.0
    """By the catalog's prices; calls whose model has none count as nothing."""
    usd_per_month: float = 0.0

    def of(self, kind: Kind) -> float:
        return self[KINDS.index(kind)]


class Period(NamedTuple):
    """The minute, day or month that a limit counts in."""

    number: int
    """Grows with time."""
    begins_at: float
    """Unix seconds."""
    ends_at: float


def period_of(kind: Kind, at: float) -> Period:
    """The period that holds the moment ``at`` (Unix seconds)."""
    if kind == "usd_per_month":
        day = dt.datetime.fromtimestamp(at, dt.UTC)
        number = day.year * 12 + day.month - 1
        return Period(number, _month_begins(number), _month_begins(number + 1))
    length = 86_400 if kind == "usd_per_day" else 60
    number = int(at // length)
    return Period(number, number * length, (number + 1) * length)


def _month_begins(number: int) -> float:
    year, month = divmod(number, 12)
    return dt.datetime(year, month + 1, 1, tzinfo=dt.UTC).timestamp()


def draw(database: Database, key: str, kind: Kind, period: int, *, limit: float, owed: float) -> float:
    """Enter ``owed`` (spent beyond earlier draws; negative gives back) and draw a share; returns how much.

    Nothing is drawn where nothing is left; a ``limit`` of 0 draws nothing. Older periods of the key are
    forgotten. In the caller's transaction.
    """
    where = (key, kind, period)
    found = database.query("SELECT used FROM allowances WHERE key = ? AND kind = ? AND period = ?", where)
    used = max(0.0, (found[0][0] if found else 0.0) + owed)
    share = _share(kind, max(0.0, limit - used))
    database.execute("DELETE FROM allowances WHERE key = ? AND kind = ? AND period <= ?", where)
    database.execute(
        "INSERT INTO allowances (key, kind, period, used) VALUES (?, ?, ?, ?)", (*where, used + share)
    )
    return share


def _share(kind: Kind, left: float) -> float:
    share = min(left, max(_LEAST[kind], left / SHARES))
    return share if kind.startswith("usd") else float(math.floor(share))
