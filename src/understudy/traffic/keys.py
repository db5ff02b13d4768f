"""Keys that callers show to the gateway: made, looked up, limited and ended; only their hashes are kept.

It ignores what a key may still spend (allowances) and who must show one (gateway).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from typing import NamedTuple

from understudy.traffic.allowances import Limits
from understudy.traffic.database import Database, Row
from understudy.traffic.shelf import marks

_COLUMNS = f"id, name, created, revoked, {', '.join(Limits._fields)}"


class Key(NamedTuple):
    """A key callers show to the gateway; the secret itself is not kept."""

    id: str
    name: str
    created: float
    revoked: float | None
    limits: Limits = Limits()


class NewKey(NamedTuple):
    """A key at the only moment its secret is known."""

    key: Key
    secret: str


def create(database: Database, name: str, limits: Limits) -> NewKey:
    """In a transaction: see `Store.create_key`."""
    key = Key(secrets.token_hex(6), name, time.time(), None, limits)
    secret = f"us-{key.id}-{secrets.token_urlsafe(32)}"
    row = (*key[:4], *limits, _hashed(secret))
    database.execute(f"INSERT INTO keys ({_COLUMNS}, hash) VALUES ({marks(row)})", row)  # noqa: S608 literals
    return NewKey(key, secret)


def read(database: Database) -> list[Key]:
    """Every key ever made, oldest first."""
    sql = f"SELECT {_COLUMNS} FROM keys ORDER BY created"  # noqa: S608 literals
    return [_key(row) for row in database.query(sql)]


def one(database: Database, key_id: str) -> Key | None:
    """One key, living or revoked; None when there is none."""
    sql = f"SELECT {_COLUMNS} FROM keys WHERE id = ?"  # noqa: S608 literals
    found = database.query(sql, (key_id,))
    return _key(found[0]) if found else None


def revoke(database: Database, key_id: str) -> bool:
    """In a transaction: end a key; False when there is none or it has ended before."""
    sql = "UPDATE keys SET revoked = ? WHERE id = ? AND revoked IS NULL"
    return database.execute(sql, (time.time(), key_id)) == 1


def limit(database: Database, key_id: str, limits: Limits) -> bool:
    """In a transaction: give a key other limits; False when there is no such living key."""
    changes = ", ".join(f"{kind} = ?" for kind in Limits._fields)
    sql = f"UPDATE keys SET {changes} WHERE id = ? AND revoked IS NULL"  # noqa: S608 literals
    return database.execute(sql, (*limits, key_id)) == 1


def lookup(database: Database, secret: str) -> Key | None:
    """The living key behind a secret. Compared in constant time, also when there is no such key."""
    parts = secret.split("-", 2)
    key_id = parts[1] if len(parts) == 3 else ""
    sql = f"SELECT {_COLUMNS}, hash FROM keys WHERE id = ? AND revoked IS NULL"  # noqa: S608 literals
    found = database.query(sql, (key_id,))
    same = hmac.compare_digest(_hashed(secret), bytes(found[0][-1]) if found else bytes(32))
    return _key(found[0]) if same and found else None


def _key(row: Row) -> Key:
    return Key(row[0], row[1], row[2], row[3], Limits(*row[4:8]))


def _hashed(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "replace")).digest()
