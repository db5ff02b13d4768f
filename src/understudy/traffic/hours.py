"""Hourly and daily sums of what each alias had from each target: read instead of a million calls.

They are written in the transaction of the calls they count, so they never differ from them. They ignore
texts, tasks and single calls (store); an hour is counted from the Unix epoch, in UTC.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from understudy.traffic.rows import CALL_COLUMNS

if TYPE_CHECKING:
    from understudy.traffic.database import Database

HOUR_S = 3600
DAY_H = 24


class Hour(NamedTuple):
    """What one alias had from one target in one hour, or in one day."""

    hour: int
    """Hours since the Unix epoch; of a day its first."""
    alias: str
    target: str
    calls: int
    failed: int
    """Of `calls`, those with a status of 400 or more."""
    priced: int
    """Of `calls`, those that have a price."""
    prompt_tokens: float
    """Token sums are floating point: absurd counts must not overflow a column; exact up to 2**53."""
    completion_tokens: float
    cached_tokens: float
    cost_usd: float
    """Of the calls that have a price."""
    total_s: float
    """Seconds that callers waited, summed over the calls."""


_COLUMNS = ", ".join(Hour._fields)
_PLACE = {name: place for place, name in enumerate(CALL_COLUMNS.split(", "))}


def add(database: Database, calls: Sequence[Sequence[Any]]) -> None:
    """Count rows of ``calls`` (in the order of `CALL_COLUMNS`) just inserted, in the caller's transaction."""
    sums = _sums(map(_hour, calls))
    _grow(database, "hours", "hour", sums)
    _grow(database, "days", "day", _sums(one._replace(hour=one.hour // DAY_H) for one in sums))


def read(database: Database, since: float | None, until: float | None) -> list[Hour]:
    """Hours in order, from the one that holds ``since`` up to the one before ``until`` (Unix seconds)."""
    first = 0 if since is None else int(since // HOUR_S)
    beyond = 2**53 if until is None else int(-(-until // HOUR_S))
    sql = f"SELECT {_COLUMNS} FROM hours WHERE hour >= ? AND hour < ? ORDER BY hour, alias, target"  # noqa: S608
    return [Hour(*row) for row in database.query(sql, (first, beyond))]


def read_days(database: Database, since: float | None) -> list[Hour]:
    """Days in order, from the one that holds ``since`` (Unix seconds) on; each is named by its first hour."""
    first = 0 if since is None else int(since // HOUR_S) // DAY_H
    columns = _COLUMNS.replace("hour", f"day * {DAY_H}", 1)
    sql = f"SELECT {columns} FROM days WHERE day >= ? ORDER BY day, alias, target"  # noqa: S608 literals
    return [Hour(*row) for row in database.query(sql, (first,))]


def _sums(hours: Iterable[Hour]) -> list[Hour]:
    """One for each hour (or day), alias and target."""
    sums: dict[tuple[int, str, str], Hour] = {}
    for one in hours:
        sums[one[:3]] = _plus(sums[one[:3]], one) if one[:3] in sums else one
    return sorted(sums.values())


def _grow(database: Database, table: Literal["hours", "days"], period: str, sums: Sequence[Hour]) -> None:
    columns, grown = _COLUMNS.replace("hour", period, 1), Hour._fields[3:]
    sql = (
        f"INSERT INTO {table} ({columns}) VALUES ({', '.join('?' * len(Hour._fields))}) "  # noqa: S608 literals
        f"ON CONFLICT ({period}, alias, target) DO UPDATE SET "
        + ", ".join(f"{name} = {table}.{name} + excluded.{name}" for name in grown)
    )
    database.many(sql, sums)


def _hour(row: Sequence[Any]) -> Hour:
    cost = row[_PLACE["cost_usd"]]
    return Hour(
        hour=int(row[_PLACE["at"]] // HOUR_S),
        alias=row[_PLACE["alias"]],
        target=row[_PLACE["target"]],
        calls=1,
        failed=int(row[_PLACE["status"]] >= 400),
        priced=int(cost is not None),
        prompt_tokens=float(row[_PLACE["prompt_tokens"]] or 0),
        completion_tokens=float(row[_PLACE["completion_tokens"]] or 0),
        cached_tokens=float(row[_PLACE["cached_tokens"]] or 0),
        cost_usd=cost or 0.0,
        total_s=row[_PLACE["total_s"]],
    )


def _plus(one: Hour, other: Hour) -> Hour:
    return Hour._make((*one[:3], *(a + b for a, b in zip(one[3:], other[3:], strict=True))))
