"""A page of recorded calls: filtered, searched, and found by key, so page 20,000 costs what page 1 does.

One condition drives an index; the others are tested along it, over at most `WINDOW` calls at a time. Texts
are opened only for what is shown, or, when words are sought, for `TEXT_WINDOW` calls at a time. A page that
ends early says how far it looked and where to go on. It ignores how calls are shown (calls).
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from understudy.dashboard.exchange import shown
from understudy.traffic import rows
from understudy.traffic.database import Database, Row
from understudy.traffic.rows import CALL_COLUMNS, CALLS, StoredCall
from understudy.traffic.shelf import Shelf

PAGE = 50
WINDOW = 10_000
TEXT_WINDOW = 500
_CHUNK = 250
"""Texts opened at once: fewer would unpack the bundles they share several times over."""

Direction = Literal["older", "newer"]


class Filter(NamedTuple):
    """What is asked for; empty means all."""

    alias: str = ""
    status: str = ""
    """ok, failed or an HTTP status."""
    task: str = ""
    tag: str = ""
    """NAME=VALUE, or a NAME."""
    since: dt.date | None = None
    """First day (UTC)."""
    until: dt.date | None = None
    """Last day (UTC)."""
    text: str = ""
    """Looked for in request and answer."""


class Cursor(NamedTuple):
    """Where a page begins: beside this key, in this direction. An empty key is the newest end."""

    key: str = ""
    direction: Direction = "older"


class Found(NamedTuple):
    """One page, newest first."""

    calls: list[StoredCall]
    """With their texts."""
    older: Cursor | None
    newer: Cursor | None
    looked_back_to: float | None
    """Unix seconds; set when the page ended because enough had been looked at, not found."""


class Query(NamedTuple):
    """Conditions of a filter: those an index answers, and those tested along it."""

    driving: list[str]
    driving_values: list[Any]
    residual: list[str]
    residual_values: list[Any]


def find(database: Database, wanted: Filter, cursor: Cursor) -> Found:
    """The page of calls beside the cursor. Raises StoreError."""
    query = conditions(wanted)
    edge = _edge(database, query, wanted, cursor)
    page = _matching(database, query, wanted, cursor, edge)
    more = len(page) > PAGE
    page = page[:PAGE]
    beyond = page[-1].call.key if more else edge
    calls = page if cursor.direction == "older" else page[::-1]
    onward = Cursor(beyond, cursor.direction) if beyond else None
    back = _turned(calls, cursor)
    older, newer = (onward, back) if cursor.direction == "older" else (back, onward)
    stopped = _time_of(database, edge) if edge and not more else None
    return Found(calls, older, newer, stopped)


def conditions(wanted: Filter) -> Query:
    """Which conditions drive an index: a task, else failures, else an alias, else time alone."""
    query = Query([], [], [], [])
    failed = wanted.status == "failed" or (wanted.status.isdigit() and int(wanted.status) >= 400)
    if wanted.task:
        # the literal repeats what the partial index says: without it the planner may not use the index
        _add(query, True, "task_id <> ''")
        _add(query, True, "task_id = ?", wanted.task)
    # beside a task, an expression in place of a column keeps the planner from taking another index
    if failed:
        _add(query, not wanted.task, "status + 0 >= 400" if wanted.task else "status >= 400")
    if wanted.alias:
        _add(query, not wanted.task, "alias || '' = ?" if wanted.task else "alias = ?", wanted.alias)
    if wanted.status == "ok":
        _add(query, False, "status < 400")
    if wanted.status.isdigit():
        _add(query, False, "status = ?", int(wanted.status))
    if wanted.tag:
        _add(query, False, "tags LIKE ? ESCAPE '\\'", _tag_pattern(wanted.tag))
    if wanted.since:
        _add(query, True, "key >= ?", _first_key(wanted.since))
    if wanted.until:
        _add(query, True, "key < ?", _first_key(wanted.until + dt.timedelta(days=1)))
    return query


def statement(query: Query, cursor: Cursor, edge: str, columns: str, limit: int) -> tuple[str, list[Any]]:
    """The SQL of one page and its values; ``edge`` is the last key looked at (empty: the end)."""
    beyond, upto, order = ("<", ">=", "DESC") if cursor.direction == "older" else (">", "<=", "ASC")
    where = [*query.driving, *query.residual]
    values = [*query.driving_values, *query.residual_values]
    for sign, key in ((beyond, cursor.key), (upto, edge)):
        if key:
            where.append(f"key {sign} ?")
            values.append(key)
    clause = f"WHERE {' AND '.join(where)}" if where else ""
    sql = f"SELECT {columns} FROM calls {clause} ORDER BY key {order} LIMIT {limit}"  # noqa: S608 literals, "?"
    return sql, values


def _edge(database: Database, query: Query, wanted: Filter, cursor: Cursor) -> str:
    """The key behind which this page does not look; empty when it may look at everything."""
    window = TEXT_WINDOW if wanted.text else WINDOW if query.residual else 0
    if not window:
        return ""
    driving = query if wanted.text else query._replace(residual=[], residual_values=[])
    if wanted.text and query.residual:
        bound = _edge(database, query, wanted._replace(text=""), cursor)
        return _nth(database, driving, cursor, bound, window) or bound
    return _nth(database, driving, cursor, "", window)


def _nth(database: Database, query: Query, cursor: Cursor, edge: str, place: int) -> str:
    sql, values = statement(query, cursor, edge, "key", 1)
    found = database.query(f"{sql} OFFSET {place - 1}", values)
    return str(found[0][0]) if found else ""


def _matching(
    database: Database, query: Query, wanted: Filter, cursor: Cursor, edge: str
) -> list[StoredCall]:
    """One call more than a page holds, if there is one."""
    keys, values = statement(query, cursor, edge, "key", TEXT_WINDOW if wanted.text else PAGE + 1)
    order = "DESC" if cursor.direction == "older" else "ASC"
    # keys first: what an index alone can answer opens only the rows that are shown
    sql = f"SELECT {CALL_COLUMNS} FROM {CALLS} WHERE key IN ({keys}) ORDER BY key {order}"  # noqa: S608 as above
    table = database.query(sql, values)
    if not wanted.text:
        return _stored(database, table)
    found: list[StoredCall] = []
    needles = _needles(wanted.text)
    for start in range(0, len(table), _CHUNK):
        found += [c for c in _stored(database, table[start : start + _CHUNK]) if _contains(c, needles)]
        if len(found) > PAGE:
            return found[: PAGE + 1]
    return found


def _stored(database: Database, table: Sequence[Row]) -> list[StoredCall]:
    """A call that retention deleted meanwhile has no bodies any more and is left out."""
    bodies = Shelf(database).get([rows.place_of_row(row) for row in table])
    return [rows.stored_call(row, [], body) for row, body in zip(table, bodies, strict=True) if body]


def _contains(stored: StoredCall, needles: frozenset[bytes]) -> bool:
    call = stored.call
    hays = [call.request.lower(), call.response.lower()]
    if call.stream:  # the events cut words in pieces
        said = " ".join(part.text for turn in shown(call).answered for part in turn.parts)
        hays.append(said.encode("utf-8", "replace").lower())
    return any(needle in hay for needle in needles for hay in hays)


def _needles(text: str) -> frozenset[bytes]:
    """The words as they are, and in the two ways in which JSON writes them. Case is ignored from A to Z."""
    written = (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
    return frozenset(way.encode("utf-8", "replace").lower() for way in written)


def _turned(calls: list[StoredCall], cursor: Cursor) -> Cursor | None:
    """The way back to where the reader came from."""
    if not cursor.key:
        return None
    if cursor.direction == "older":
        return Cursor(calls[0].call.key if calls else cursor.key, "newer")
    return Cursor(calls[-1].call.key if calls else cursor.key, "older")


def _add(query: Query, driving: bool, condition: str, *values: Any) -> None:
    (query.driving if driving else query.residual).append(condition)
    (query.driving_values if driving else query.residual_values).extend(values)


def _tag_pattern(tag: str) -> str:
    """LIKE pattern over tags kept as JSON, e.g. ``%"team":"search"%``."""
    name, equals, value = tag.partition("=")
    sought = json.dumps(name.strip(), ensure_ascii=False) + ":"
    if equals:
        sought += json.dumps(value.strip(), ensure_ascii=False)
    for special in ("\\", "%", "_"):
        sought = sought.replace(special, "\\" + special)
    return f"%{sought}%"


def _first_key(day: dt.date) -> str:
    """The smallest key of a day: a UUIDv7 begins with its milliseconds."""
    start = dt.datetime.combine(day, dt.time(), dt.UTC)
    return f"{max(0, int(start.timestamp() * 1000)):012x}"


def _time_of(database: Database, key: str) -> float:
    return float(database.query("SELECT at FROM calls WHERE key = ?", (key,))[0][0])
