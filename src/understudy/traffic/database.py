"""One connection to SQLite or PostgreSQL behind one small SQL dialect.

Statements are written for SQLite with ``?`` placeholders; what PostgreSQL says differently is replaced word
by word. Writers are serialised on both (BEGIN IMMEDIATE; one advisory lock), so what holds on one holds on
the other. It ignores what the tables mean (migrations, store).
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from understudy.errors import MissingExtraError, StoreError

if TYPE_CHECKING:
    import psycopg

Row = tuple[Any, ...]
Values = Sequence[Any]


class Database(Protocol):
    """What the store asks of a database. Safe to share between threads: one statement at a time."""

    name: str
    """The file, or the URL without its password."""

    def query(self, sql: str, values: Values = ()) -> list[Row]:
        """All rows of a SELECT."""
        ...

    def execute(self, sql: str, values: Values = ()) -> int:
        """Rows changed by one statement."""
        ...

    def many(self, sql: str, rows: Sequence[Values]) -> None:
        """One statement for many rows."""
        ...

    def transaction(self, *, durable: bool = False) -> Any:
        """``with``: all or nothing, alone among writers. ``durable`` waits for the disk."""
        ...

    def tables(self) -> frozenset[str]:
        """Names of the tables there."""
        ...

    def close(self) -> None: ...


def open_database(url: str, root: Path) -> Database:
    """The database behind ``sqlite:///FILE`` or ``postgresql://…``; a relative FILE lies under ``root``.

    Raises StoreError when it cannot be opened, MissingExtraError when psycopg is not installed.
    """
    scheme, _, rest = url.partition("://")
    if scheme == "sqlite" and rest.startswith("/") and len(rest) > 1:
        return SqliteDatabase(root / Path(rest[1:]).expanduser())
    if scheme in ("postgresql", "postgres"):
        return PostgresDatabase(url)
    raise StoreError(
        f"unknown store {_without_password(url)!r}",
        expected="sqlite:///FILE or postgresql://USER@HOST/NAME",
        next_step="correct [store] url in understudy.toml",
    )


class SqliteDatabase:
    """A SQLite file in write-ahead mode.

    ``synchronous = NORMAL``: after a power cut the last transactions may be gone, never half there. Records
    come back from their segment, whose offset is in the same transaction; what has no segment (routes, keys)
    is committed with ``durable``.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._lock = threading.RLock()
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            # what callers said is nobody else's business; SQLite gives its other files the same rights
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._connection = sqlite3.connect(
                path, timeout=10.0, isolation_level=None, check_same_thread=False
            )
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
            # what is deleted is overwritten: a text past its time must not stand in a free page
            self._connection.execute("PRAGMA secure_delete = ON")

    def query(self, sql: str, values: Values = ()) -> list[Row]:
        with self._lock, self._explained():
            return self._connection.execute(sql, values).fetchall()

    def execute(self, sql: str, values: Values = ()) -> int:
        with self._lock, self._explained():
            return self._connection.execute(sql, values).rowcount

    def many(self, sql: str, rows: Sequence[Values]) -> None:
        with self._lock, self._explained():
            self._connection.executemany(sql, rows)

    @contextmanager
    def transaction(self, *, durable: bool = False) -> Generator[None]:
        with self._lock:
            if durable:
                self.execute("PRAGMA synchronous = FULL")
            self.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
            finally:
                if durable:
                    self.execute("PRAGMA synchronous = NORMAL")

    def tables(self) -> frozenset[str]:
        return frozenset(r[0] for r in self.query("SELECT name FROM sqlite_master WHERE type = 'table'"))

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    @contextmanager
    def _explained(self) -> Generator[None]:
        try:
            yield
        except sqlite3.Error as error:
            reason = _SQLITE_REASONS.get((getattr(error, "sqlite_errorcode", None) or 0) & 0xFF)
            if reason is None:  # a wrong statement is our bug and keeps its traceback
                raise
            raise StoreError(f"{self.name}: {error}", expected=reason[0], next_step=reason[1]) from error
        except OSError as error:
            raise StoreError(f"{self.name}: {error.strerror}", expected="a folder to write in") from error


_ELSEWHERE = "point [store] url in understudy.toml elsewhere"
_SQLITE_REASONS: dict[int, tuple[str, str]] = {
    sqlite3.SQLITE_BUSY: ("a database free within 10 s", "end the other program that writes to it"),
    sqlite3.SQLITE_LOCKED: ("a database free within 10 s", "end the other program that writes to it"),
    sqlite3.SQLITE_FULL: ("room on the disk", "free some space; the segments keep what is not indexed yet"),
    sqlite3.SQLITE_IOERR: ("a disk that reads and writes", "check the disk"),
    sqlite3.SQLITE_CANTOPEN: ("a file that can be opened", _ELSEWHERE),
    sqlite3.SQLITE_READONLY: ("a file that can be written", "check the file's owner and mode"),
    sqlite3.SQLITE_PERM: ("a file that can be written", "check the file's owner and mode"),
    sqlite3.SQLITE_NOTADB: ("a SQLite database", _ELSEWHERE),
    sqlite3.SQLITE_CORRUPT: ("a whole database", "move it away; the segments fill a new one"),
}

_WRITER_LOCK = 0x756E6473  # any number, the same in every process


class PostgresDatabase:
    """A PostgreSQL database through psycopg 3; a lost connection is opened again by the next statement."""

    def __init__(self, url: str) -> None:
        try:
            import psycopg
        except ImportError as error:
            raise MissingExtraError("psycopg", "postgresql") from error
        self.name = _without_password(url)
        self._url = url
        self._lock = threading.RLock()
        self._psycopg = psycopg
        self._open: psycopg.Connection[Row] | None = None
        self._connection()

    def query(self, sql: str, values: Values = ()) -> list[Row]:
        with self._lock, self._explained():
            return self._connection().execute(_for_postgres(sql), values).fetchall()

    def execute(self, sql: str, values: Values = ()) -> int:
        with self._lock, self._explained():
            return self._connection().execute(_for_postgres(sql), values).rowcount

    def many(self, sql: str, rows: Sequence[Values]) -> None:
        with self._lock, self._explained(), self._connection().cursor() as cursor:
            cursor.executemany(_for_postgres(sql), rows)

    @contextmanager
    def transaction(self, *, durable: bool = False) -> Generator[None]:
        del durable  # a commit always waits for the disk
        with self._lock, self._explained(), self._connection().transaction():
            self.execute(f"SELECT pg_advisory_xact_lock({_WRITER_LOCK})")
            yield

    def tables(self) -> frozenset[str]:
        sql = "SELECT tablename FROM pg_catalog.pg_tables WHERE schemaname = current_schema()"
        return frozenset(row[0] for row in self.query(sql))

    def close(self) -> None:
        with self._lock:
            if self._open is not None:
                self._open.close()

    def _connection(self) -> psycopg.Connection[Row]:
        if self._open is None or self._open.closed:
            with self._explained():
                self._open = self._psycopg.connect(self._url, autocommit=True, connect_timeout=10)
        return self._open

    @contextmanager
    def _explained(self) -> Generator[None]:
        try:
            yield
        except self._psycopg.OperationalError as error:
            raise StoreError(
                f"{self.name}: {str(error).strip() or type(error).__name__}",
                expected="a PostgreSQL server that answers and has room",
                next_step="check that the server runs and [store] url in understudy.toml",
            ) from error


_POSTGRES_WORDS = (
    (" WITHOUT ROWID", ""),
    (" BLOB", " BYTEA"),
    (" REAL", " DOUBLE PRECISION"),
    (" INTEGER", " BIGINT"),
    ("?", "%s"),
)


def _for_postgres(sql: str) -> bytes:
    for ours, theirs in _POSTGRES_WORDS:
        sql = sql.replace(ours, theirs)
    return sql.encode()


def _without_password(url: str) -> str:
    scheme, mark, rest = url.partition("://")
    credentials, at, host = rest.rpartition("@")
    return f"{scheme}{mark}{credentials.partition(':')[0]}{at}{host}"
