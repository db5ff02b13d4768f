"""Routes in the store: where each alias leads, how it came to that, and how trials stand.

A change is a compare-and-set on the version, written with its history in one transaction. It ignores why a
route changes (rollout) and how gateways follow (gateway).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import msgspec

from understudy.traffic.database import Database, Row
from understudy.traffic.rows import CALLS
from understudy.traffic.shelf import marks

Stage = Literal["replay", "shadow", "canary", "held", "promoted", "rolled_back"]

_COLUMNS = (
    "alias, version, model, fallback, stage, changed_at, changed_by, reason, evidence, "
    "candidate, share, origin, deadline"
)


class Route(NamedTuple):
    """Where an alias leads; one version of it."""

    alias: str
    version: int
    """From 1; grows by one with each change."""
    model: str
    """ENDPOINT/MODEL that answers."""
    fallback: tuple[str, ...]
    """ENDPOINT/MODEL tried in order when the first cannot answer."""
    stage: Stage
    changed_at: float
    """Unix seconds."""
    changed_by: str
    reason: str
    evidence: str
    """Path or hash of the certificate that allowed it; empty when nobody asked for proof."""
    candidate: str = ""
    """ENDPOINT/MODEL on trial; empty when none is."""
    share: float = 0.0
    """Share of tasks the candidate has in a canary, or had when it was held."""
    origin: int = 0
    """Version with which its trial began."""
    deadline: float = 0.0
    """Unix seconds by which its trial is to be over; 0: whenever."""


def read(database: Database) -> dict[str, Route]:
    """The route of each alias that has one."""
    sql = f"SELECT {_COLUMNS} FROM routes ORDER BY alias"  # noqa: S608 literals
    return {row[0]: _route(row) for row in database.query(sql)}


def one(database: Database, alias: str) -> Route | None:
    """The route of one alias."""
    sql = f"SELECT {_COLUMNS} FROM routes WHERE alias = ?"  # noqa: S608 literals
    found = database.query(sql, (alias,))
    return _route(found[0]) if found else None


def put(database: Database, route: Route, staying: Sequence[bytes]) -> bool:
    """In a transaction: set a route in place of the version before its own; see `Store.set_route`."""
    found = one(database, route.alias)
    if (found.version if found else 0) != route.version - 1:
        return False
    row = (*route[:3], msgspec.json.encode(route.fallback).decode(), *route[4:])
    database.execute("DELETE FROM routes WHERE alias = ?", (route.alias,))
    for table in ("routes", "route_history"):
        database.execute(f"INSERT INTO {table} ({_COLUMNS}) VALUES ({marks(row)})", row)  # noqa: S608
    database.execute("DELETE FROM staying WHERE alias = ?", (route.alias,))
    if staying:
        sql = "INSERT INTO staying (alias, version, tasks) VALUES (?, ?, ?)"
        database.execute(sql, (route.alias, route.version, b"".join(staying)))
    return True


def staying(database: Database) -> dict[str, frozenset[bytes]]:
    """For each alias the tasks that stay with its model though the candidate's share covers them."""
    return {
        alias: frozenset(bytes(tasks[i : i + 8]) for i in range(0, len(tasks), 8))
        for alias, tasks in database.query("SELECT alias, tasks FROM staying")
    }


def history(database: Database, alias: str | None) -> list[Route]:
    """Every version of an alias's route, or of all in order of time; oldest first."""
    # clocks of several machines need not agree; versions do
    end = "ORDER BY changed_at, version" if alias is None else "WHERE alias = ? ORDER BY version"
    sql = f"SELECT {_COLUMNS} FROM route_history {end}"  # noqa: S608 literals
    return [_route(row) for row in database.query(sql, () if alias is None else (alias,))]


def put_looks(database: Database, looks: Sequence[tuple[str, float, str]]) -> None:
    """In a transaction: keep how trials stood, each in place of its last look."""
    sql = (
        "INSERT INTO looks (alias, at, seen) VALUES (?, ?, ?) "
        "ON CONFLICT (alias) DO UPDATE SET at = excluded.at, seen = excluded.seen"
    )
    database.many(sql, looks)


def looks(database: Database) -> dict[str, tuple[float, str]]:
    """The last look at each trial there was: its time and JSON."""
    return {alias: (at, seen) for alias, at, seen in database.query("SELECT alias, at, seen FROM looks")}


def dealt(database: Database, alias: str, since_key: str) -> Iterator[tuple[str, str]]:
    """Task and the target asked first, of each call with a task from a key on, in order."""
    sql = (
        "SELECT task_id, COALESCE((SELECT target FROM attempts WHERE call = calls.key "  # noqa: S608
        "AND number = (SELECT MIN(number) FROM attempts WHERE call = calls.key)), target) "
        f"FROM {CALLS} WHERE alias = ? AND key >= ? AND task_id <> '' ORDER BY key"
    )
    yield from ((row[0], row[1]) for row in database.query(sql, (alias, since_key)))


def _route(row: Row) -> Route:
    return Route(row[0], row[1], row[2], tuple(msgspec.json.decode(row[3], type=list[str])), *row[4:])
