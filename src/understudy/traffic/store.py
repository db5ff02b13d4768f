"""The store: recorded calls, feedback, routes and keys, in SQLite or PostgreSQL.

Records enter in one transaction with the offset of the segment they came from, so a segment indexed again
adds nothing. It ignores where records come from (segments, imports), how texts are kept (shelf), and what a
call costs: prices arrive as a function.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

from understudy.protocol import CallShape, Cost
from understudy.traffic import allowances, figures, fingerprints, hours, keys, routes, rows
from understudy.traffic.allowances import Kind, Limits
from understudy.traffic.database import Database, Row, open_database
from understudy.traffic.figures import AnsweredBy, Latency, ModelUse
from understudy.traffic.fingerprints import Fingerprint
from understudy.traffic.hours import Hour
from understudy.traffic.keys import Key, NewKey
from understudy.traffic.kinds import keep_kinds, sweep_kinds
from understudy.traffic.migrations import migrate
from understudy.traffic.record import Attempt, Call, Feedback, Record
from understudy.traffic.routes import Route, Stage
from understudy.traffic.rows import (
    ATTEMPT_COLUMNS,
    CALL_COLUMNS,
    CALLS,
    FEEDBACK_COLUMNS,
    OWN,
    ROW_COLUMNS,
    USAGE_COLUMNS,
    StoredCall,
)
from understudy.traffic.shelf import Bodies, Place, Shelf, chunks, marks

Price = Callable[[Call], Cost | None]

PAGE = 250
KEY_SLACK_S = 3600.0
"""A call's key is younger than the call by less than this."""
"""Calls read at a time: a reader never holds the database, nor more than a page, in memory."""


_OF_TARGET = "kind IN (SELECT id FROM kinds WHERE target = ?)"
_SHAPE_COLUMNS = f"key, at, modalities, features, max_tokens, task_id, parameters, {USAGE_COLUMNS}"


class Counts(NamedTuple):
    """How much is there."""

    calls: int
    feedback: int
    attempts: int
    blobs: int


class Segment(NamedTuple):
    """How far a segment has been indexed."""

    name: str
    reached: int
    """Offset in bytes behind the last record in the store."""
    faults: int
    """Records that could not be read."""


def unpriced(call: Call) -> Cost | None:
    """The price function of a store nobody gave prices to."""
    del call
    return None


def open_store(url: str, root: Path) -> Store:
    """Open a store, bringing its schema up to date.

    ``url`` is ``sqlite:///FILE`` (relative to ``root``; made if absent) or ``postgresql://…``. Raises
    StoreError when it cannot be reached, is locked, full, no database, or written by a newer version.
    """
    database = open_database(url, root)
    try:
        migrate(database)
    except BaseException:
        database.close()
        raise
    return Store(database)


class Store:
    """Every method may be called from any thread; every method raises StoreError as `open_store` does."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._shelf = Shelf(database)

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # records in

    def insert(
        self,
        records: Sequence[Record],
        segment: str,
        offset: int,
        *,
        price: Price = unpriced,
        faults: int = 0,
    ) -> int:
        """Keep records read from ``segment`` up to ``offset``; returns how many were new.

        One transaction: after a crash either all of it is there with the offset, or nothing. A batch that
        ends at or before the offset already reached adds nothing, and no key is kept twice. ``faults`` are
        added to the segment's count.
        """
        with self._database.transaction():
            if offset <= self.reached(segment):
                return 0
            fresh = self._fresh(records)
            self._insert_calls([r for r in fresh if isinstance(r, Call)], price)
            feedback = [rows.feedback_row(r) for r in fresh if isinstance(r, Feedback)]
            self._many("feedback", FEEDBACK_COLUMNS, feedback)
            self._database.execute(
                "INSERT INTO segments (name, reached, faults) VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE "
                "SET reached = excluded.reached, faults = segments.faults + excluded.faults",
                (segment, offset, faults),
            )
        return len(fresh)

    def reached(self, segment: str) -> int:
        """Offset up to which a segment is indexed; 0 for one never seen."""
        found = self._database.query("SELECT reached FROM segments WHERE name = ?", (segment,))
        return int(found[0][0]) if found else 0

    def segments(self) -> list[Segment]:
        """How far each segment has been indexed."""
        return [
            Segment(*r)
            for r in self._database.query("SELECT name, reached, faults FROM segments ORDER BY name")
        ]

    def _fresh(self, records: Sequence[Record]) -> list[Record]:
        """Records not in the store, each key once."""
        unique = {(type(r), r.key): r for r in records}
        known = {(Call, key) for key in self._keys_in("calls", [k for t, k in unique if t is Call])}
        known |= {(Feedback, k) for k in self._keys_in("feedback", [k for t, k in unique if t is Feedback])}
        return [record for identity, record in unique.items() if identity not in known]

    def _keys_in(self, table: Literal["calls", "feedback"], keys: Sequence[str]) -> list[str]:
        found: list[str] = []
        for part in chunks(keys):
            sql = f"SELECT key FROM {table} WHERE key IN ({marks(part)})"  # noqa: S608 a literal and "?"
            found += [row[0] for row in self._database.query(sql, part)]
        return found

    def _insert_calls(self, calls: Sequence[Call], price: Price) -> None:
        places = self._shelf.put([Bodies(c.request, c.response) for c in calls])
        table = [rows.call_row(c, price(c), rows.shape_of(c), p) for c, p in zip(calls, places, strict=True)]
        table.sort(key=itemgetter(0))  # several gateways' calls: in the order of their keys, pages are filled
        kinds = keep_kinds(self._database, [row[OWN:] for row in table])
        self._many("calls", ROW_COLUMNS, [(*row[:OWN], kinds[row[OWN:]]) for row in table])
        hours.add(self._database, table)
        fingerprints.add(self._database, calls)
        self._many("attempts", ATTEMPT_COLUMNS, [row for call in calls for row in rows.attempt_rows(call)])

    def _many(self, table: str, columns: str, values: Sequence[Row]) -> None:
        if values:
            sql = f"INSERT INTO {table} ({columns}) VALUES ({marks(values[0])})"  # noqa: S608 literals and "?"
            self._database.many(sql, values)

    # records out

    def calls(
        self,
        *,
        alias: str | None = None,
        target: str | None = None,
        task_id: str | None = None,
        since: float | None = None,
        until: float | None = None,
        ok: bool | None = None,
        search: str | None = None,
        limit: int | None = None,
        newest_first: bool = False,
        texts: bool = False,
    ) -> Iterator[StoredCall]:
        """Recorded calls in order of time.

        ``since`` and ``until`` are Unix seconds, ``ok`` means a status below 400, ``search`` is looked for in
        request and answer (which opens every text), ``texts`` fills ``call.request`` and ``call.response``.
        """
        where = _Where()
        where.add("alias = ?", alias)
        where.add(_OF_TARGET, target)
        where.add("task_id = ?", task_id)
        where.add("at >= ?", since)
        where.add("at < ?", until)
        where.add("status < ?" if ok else "status >= ?", None if ok is None else 400)
        found = (c for page in self._pages(where, newest_first) for c in self._page(page, texts, search))
        return islice(found, limit)

    def call(self, key: str) -> StoredCall | None:
        """One call with its texts; None when there is none."""
        sql = f"SELECT {CALL_COLUMNS} FROM {CALLS} WHERE key = ?"  # noqa: S608 literals
        found = self._database.query(sql, (key,))
        if not found:
            return None
        return next(iter(self._page(found, True, None)), None)

    def some(self, keys: Sequence[str], *, texts: bool = False) -> Iterator[StoredCall]:
        """The calls with these keys, in the order of their keys, that are there."""
        for part in chunks(sorted(keys)):
            sql = f"SELECT {CALL_COLUMNS} FROM {CALLS} WHERE key IN ({marks(part)}) ORDER BY key"  # noqa: S608
            if found := self._database.query(sql, part):
                yield from self._page(found, texts, None)

    def arrived(self, aliases: Sequence[str], since: float) -> dict[str, list[str]]:
        """Keys of the calls of some aliases that began since then (Unix seconds), by alias, each in order."""
        found: dict[str, list[str]] = {}
        for part in chunks(aliases):
            of_them = f"alias IN ({marks(part)}) AND key >= ?"
            sql = f"SELECT alias, key FROM calls WHERE {of_them} ORDER BY alias, key"  # noqa: S608 only "?"
            for alias, key in self._database.query(sql, (*part, _key_at(since))):
                found.setdefault(alias, []).append(key)
        return found

    def _pages(self, where: _Where, newest_first: bool) -> Iterator[list[Row]]:
        """Rows page by page, each page found by the last key of the one before."""
        order, beyond = ("DESC", "key < ?") if newest_first else ("ASC", "key > ?")
        page: list[Row] = []
        while not page or len(page) == PAGE:
            here = where.and_also(beyond, page[-1][0]) if page else where
            sql = f"SELECT {CALL_COLUMNS} FROM {CALLS} {here.sql} ORDER BY key {order} LIMIT {PAGE}"  # noqa: S608
            page = self._database.query(sql, here.values)
            if not page:
                return
            yield page

    def _page(self, page: Sequence[Row], texts: bool, search: str | None) -> list[StoredCall]:
        attempts = self._attempts([row[0] for row in page])
        bodies: list[Bodies | None] = [Bodies(b"", b"")] * len(page)
        if texts or search:
            bodies = self._shelf.get([rows.place_of_row(row) for row in page])
        sought = (search or "").encode()
        return [
            rows.stored_call(row, attempts.get(row[0], []), texts_of if texts else Bodies(b"", b""))
            for row, texts_of in zip(page, bodies, strict=True)
            if texts_of is not None
            and (not sought or sought in texts_of.request or sought in texts_of.response)
        ]

    def _attempts(self, keys: Sequence[str]) -> dict[str, list[Attempt]]:
        found: dict[str, list[Attempt]] = {}
        sql = f"SELECT {ATTEMPT_COLUMNS} FROM attempts WHERE call IN ({marks(keys)}) ORDER BY call, number"  # noqa: S608
        for call, _, target, status, billed, started, ended, error, form in self._database.query(sql, keys):
            attempt = Attempt(
                target=target,
                status=status,
                billed=billed,
                started=started,
                ended=ended,
                error=error,
                form=form,
            )
            found.setdefault(call, []).append(attempt)
        return found

    def feedback(self, calls: Sequence[str]) -> list[Feedback]:
        """What was said of these calls (keys), in order of time."""
        found: list[Feedback] = []
        for part in chunks(calls):
            sql = f"SELECT {FEEDBACK_COLUMNS} FROM feedback WHERE call IN ({marks(part)}) ORDER BY at, key"  # noqa: S608
            found += [
                Feedback(key=r[0], call=r[1], at=r[2], metric=r[3], value=r[4], expected=r[5], comment=r[6])
                for r in self._database.query(sql, part)
            ]
        return found

    def shapes(
        self,
        *,
        alias: str | None = None,
        target: str | None = None,
        since: float | None = None,
        latest: int | None = None,
    ) -> list[CallShape]:
        """The shape of every answered call (or of the ``latest`` so many), in order of time, read from
        columns alone: no text is opened.

        ``completed`` is the last feedback under the metric ``completed`` or ``success``, at least one half.
        """
        where = _Where()
        where.add("status < ?", 400)
        where.add("alias = ?", alias)
        where.add(_OF_TARGET, target)
        where.add("at >= ?", since)
        # keys begin with the millisecond, so a window is a stretch of an index and what is older is not read
        where.add("key >= ?", None if since is None else f"{int((since - KEY_SLACK_S) * 1000):012x}")
        end = "ORDER BY key" if latest is None else f"ORDER BY key DESC LIMIT {int(latest)}"
        sql = f"SELECT {_SHAPE_COLUMNS} FROM {CALLS} {where.sql} {end}"  # noqa: S608 literals, a number and "?"
        table = self._database.query(sql, where.values)
        said = self._completed(None if latest is None else [row[0] for row in table])
        ordered = table if latest is None else table[::-1]
        return [rows.call_shape(row, said.get(row[0])) for row in ordered]

    def _completed(self, calls: Sequence[str] | None) -> dict[str, bool]:
        """Call key to whether it was said to have completed; ``calls`` None: of all that were said."""
        words = "WHERE metric IN ('completed', 'success')"
        parts = [()] if calls is None else chunks(calls)
        said: list[Row] = []
        for part in parts:
            among = f"AND call IN ({marks(part)})" if part else ""
            said += self._database.query(f"SELECT call, value, at, key FROM feedback {words} {among}", part)  # noqa: S608
        said.sort(key=lambda row: row[2:])
        return {row[0]: row[1] >= 0.5 for row in said if row[1] is not None}

    def models(self) -> list[ModelUse]:
        """See `figures.models`."""
        return figures.models(self._database)

    def answered_by(self, *, since: float | None = None) -> list[AnsweredBy]:
        """See `figures.answered_by`; ``since`` in Unix seconds."""
        return figures.answered_by(self._database, since)

    def fingerprints(self) -> list[Fingerprint]:
        """Each ``system_fingerprint`` seen in answers, by target, model id and first sight."""
        return fingerprints.read(self._database)

    def latencies(self, *, latest: int = 2_000) -> list[Latency]:
        """See `figures.latencies`."""
        return figures.latencies(self._database, latest)

    def hours(self, *, since: float | None = None, until: float | None = None) -> list[Hour]:
        """Calls, tokens, cost and failures per hour, alias and target, oldest first; whole hours (UTC)."""
        return hours.read(self._database, since, until)

    def days(self, *, since: float | None = None) -> list[Hour]:
        """The same per day (UTC), each named by its first hour."""
        return hours.read_days(self._database, since)

    def counts(self) -> Counts:
        """Rows of the large tables."""
        tables = ("calls", "feedback", "attempts", "blobs")
        sql = "SELECT " + ", ".join(f"(SELECT COUNT(*) FROM {table})" for table in tables)  # noqa: S608 literals
        counts = Counts(*self._database.query(sql)[0])
        plain = self._database.query(f"SELECT COUNT(*) FROM {CALLS} WHERE plain = 1")[0][0]  # noqa: S608
        bound = self._database.query("SELECT COALESCE(SUM(leaves), 0) FROM bundles")[0][0]
        return counts._replace(attempts=counts.attempts + plain, blobs=counts.blobs + int(bound))

    # records out of the store for good

    def forget(self, before: float, limit: int = 1000) -> int:
        """Delete up to ``limit`` calls older than ``before`` (Unix seconds), oldest first, with attempts and
        feedback; returns how many.

        Texts go with `sweep`. Hourly sums stay, and what a segment says is not indexed again.
        """
        bound = f"{max(0, int(before * 1000)):012x}"  # keys begin with their time in milliseconds
        sql = "SELECT key, frame, messages, response FROM calls WHERE key < ? ORDER BY key LIMIT ?"
        with self._database.transaction():
            old = self._database.query(sql, (bound, limit))
            upto = old[-1][0] if len(old) == limit else bound
            self._shelf.release([Place(*row[1:]) for row in old])
            for table, column in (("calls", "key"), ("attempts", "call"), ("feedback", "call")):
                self._database.execute(f"DELETE FROM {table} WHERE {column} <= ?", (upto,))  # noqa: S608
        return len(old)

    def sweep(self, limit: int = 2000) -> int:
        """Delete the texts of forgotten calls that no other call shares; returns how many blobs.

        ``limit`` blobs in a transaction, so that nobody waits long for the store.
        """
        if not self._database.query("SELECT 1 FROM released LIMIT 1"):
            return 0
        with self._database.transaction():
            self._shelf.settle()
            sweep_kinds(self._database)
        swept = part = self._sweep(limit)
        while part == limit:
            part = self._sweep(limit)
            swept += part
        return swept

    def _sweep(self, limit: int) -> int:
        with self._database.transaction():
            return self._shelf.sweep(limit)

    # routes

    def routes(self) -> dict[str, Route]:
        """The route of each alias that has one."""
        return routes.read(self._database)

    def route(self, alias: str) -> Route | None:
        """The route of one alias."""
        return routes.one(self._database, alias)

    def routes_version(self) -> int:
        """A number that grows with every change of any route: what gateways poll."""
        return int(self._database.query("SELECT COALESCE(SUM(version), 0) FROM routes")[0][0])

    def set_route(
        self,
        alias: str,
        model: str,
        *,
        expected_version: int,
        fallback: Sequence[str] = (),
        stage: Stage = "promoted",
        by: str,
        reason: str,
        evidence: str = "",
        candidate: str = "",
        share: float = 0.0,
        origin: int = 0,
        deadline: float = 0.0,
        staying: Sequence[bytes] = (),
        at: float | None = None,
    ) -> bool:
        """Compare and set: False, and nothing changed, when the alias is not at ``expected_version``.

        0 stands for an alias without a route; ``at`` is the time of the change in Unix seconds, None now;
        ``staying`` are digests of 8 bytes, see `staying`. The change and its history are on disk on return.
        """
        when = time.time() if at is None else at
        route = Route(
            *(alias, expected_version + 1, model, tuple(fallback), stage, when, by, reason, evidence),
            *(candidate, share, origin, deadline),
        )
        with self._database.transaction(durable=True):
            return routes.put(self._database, route, staying)

    def staying(self) -> dict[str, frozenset[bytes]]:
        """See `routes.staying`."""
        return routes.staying(self._database)

    def set_look(self, alias: str, at: float, seen: str) -> None:
        """Keep how a trial stood at a time (Unix seconds), as JSON, in place of the last look."""
        self.set_looks([(alias, at, seen)])

    def set_looks(self, looks: Sequence[tuple[str, float, str]]) -> None:
        """The same for several trials at once."""
        with self._database.transaction():
            routes.put_looks(self._database, looks)

    def looks(self) -> dict[str, tuple[float, str]]:
        """The last look at each trial there was: its time and JSON."""
        return routes.looks(self._database)

    def dealt(self, alias: str, since: float) -> Iterator[tuple[str, str]]:
        """Task and the target asked first, of each call with a task since then (Unix seconds), in order."""
        return routes.dealt(self._database, alias, _key_at(since))

    def route_history(self, alias: str | None = None) -> list[Route]:
        """See `routes.history`."""
        return routes.history(self._database, alias)

    # keys

    def create_key(self, name: str, limits: Limits = Limits()) -> NewKey:  # noqa: B008 immutable
        """A new key. Its secret is shown here and never again: only its SHA-256 is kept, which is enough for
        256 random bits (a slow hash is for passwords)."""
        with self._database.transaction(durable=True):
            return keys.create(self._database, name, limits)

    def keys(self) -> list[Key]:
        """Every key ever made, oldest first."""
        return keys.read(self._database)

    def key(self, key_id: str) -> Key | None:
        """One key, living or revoked; None when there is none."""
        return keys.one(self._database, key_id)

    def revoke_key(self, key_id: str) -> bool:
        """End a key; False when there is none or it has ended before."""
        with self._database.transaction(durable=True):
            return keys.revoke(self._database, key_id)

    def limit_key(self, key_id: str, limits: Limits) -> bool:
        """Give a key other limits; False when there is no such living key."""
        with self._database.transaction(durable=True):
            return keys.limit(self._database, key_id, limits)

    def draw(self, key_id: str, kind: Kind, period: int, *, limit: float, owed: float = 0.0) -> float:
        """A share of what a key may still spend in a period, see `allowances.draw`."""
        with self._database.transaction():
            return allowances.draw(self._database, key_id, kind, period, limit=limit, owed=owed)

    def lookup_key(self, secret: str) -> Key | None:
        """The living key behind a secret; see `keys.lookup`."""
        return keys.lookup(self._database, secret)


class _Where:
    """Conditions joined by AND; a value of None leaves its condition out."""

    def __init__(self, conditions: Sequence[str] = (), values: Sequence[Any] = ()) -> None:
        self._conditions = list(conditions)
        self.values = list(values)

    def add(self, condition: str, value: Any) -> None:
        if value is not None:
            self._conditions.append(condition)
            self.values.append(value)

    def and_also(self, condition: str, value: Any) -> _Where:
        return _Where([*self._conditions, condition], [*self.values, value])

    @property
    def sql(self) -> str:
        return "WHERE " + " AND ".join(self._conditions) if self._conditions else ""


def _key_at(moment: float) -> str:
    """What every key of that time or a later one is not less than: keys begin with milliseconds."""
    return f"{max(0, int(moment * 1000)):012x}"
