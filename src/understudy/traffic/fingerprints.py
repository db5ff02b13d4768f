"""Which ``system_fingerprint`` each target answered with, from when to when.

Summed in the transaction of the calls: a year of them is a few rows, which stay when calls are forgotten.
They ignore what a change of fingerprint means (catalog.events).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from understudy.traffic.record import Call
from understudy.traffic.rows import text

if TYPE_CHECKING:
    from understudy.traffic.database import Database

LONGEST = 64
"""Characters kept: OpenAI's have thirteen."""


class Fingerprint(NamedTuple):
    """One fingerprint under one model id of one target, in answered calls."""

    target: str
    answered_by: str
    """The id named in the answers."""
    fingerprint: str
    calls: int
    first_at: float
    """Unix seconds."""
    last_at: float


_COLUMNS = ", ".join(Fingerprint._fields)


def add(database: Database, calls: Iterable[Call]) -> None:
    """Count calls just inserted, in the caller's transaction."""
    sums: dict[tuple[str, str, str], Fingerprint] = {}
    for call in calls:
        if call.fingerprint and call.status < 400:
            one = _of(call)
            sums[one[:3]] = _plus(sums.get(one[:3], one._replace(calls=0)), one)
    if not sums:
        return
    sql = (
        f"INSERT INTO fingerprints ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?) "  # noqa: S608 literals
        "ON CONFLICT (target, answered_by, fingerprint) DO UPDATE SET "
        "calls = fingerprints.calls + excluded.calls, "
        "first_at = CASE WHEN excluded.first_at < fingerprints.first_at "
        "THEN excluded.first_at ELSE fingerprints.first_at END, "
        "last_at = CASE WHEN excluded.last_at > fingerprints.last_at "
        "THEN excluded.last_at ELSE fingerprints.last_at END"
    )
    database.many(sql, sorted(sums.values()))


def read(database: Database) -> list[Fingerprint]:
    """All of them, by target, model id and first sight."""
    sql = f"SELECT {_COLUMNS} FROM fingerprints ORDER BY target, answered_by, first_at, fingerprint"  # noqa: S608
    return [Fingerprint(row[0], row[1], row[2], int(row[3]), *row[4:]) for row in database.query(sql)]


def _of(call: Call) -> Fingerprint:
    fingerprint = text(call.fingerprint[:LONGEST])
    return Fingerprint(text(call.target), text(call.answered_by), fingerprint, 1, call.at, call.at)


def _plus(one: Fingerprint, other: Fingerprint) -> Fingerprint:
    return one._replace(
        calls=one.calls + other.calls,
        first_at=min(one.first_at, other.first_at),
        last_at=max(one.last_at, other.last_at),
    )
