"""What thousands of calls have in common, written once: target, route, price list, shape and the like.

It holds within a transaction of the caller's, the only writer there is. It ignores what columns mean (rows).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from understudy.traffic.rows import KIND_COLUMNS

if TYPE_CHECKING:
    from understudy.traffic.database import Database

Kind = tuple[Any, ...]
"""Values in the order of `KIND_COLUMNS`."""

_NAMES = KIND_COLUMNS.split(", ")
_SQL = f"SELECT {KIND_COLUMNS}, id FROM kinds WHERE target = ? AND answered_by = ?"  # noqa: S608 literals


def keep_kinds(database: Database, kinds: Iterable[Kind]) -> dict[Kind, int]:
    """The id of each kind; one not there yet is written."""
    wanted = dict.fromkeys(kinds)
    known: dict[Kind, int] = {}
    for model in dict.fromkeys(kind[:2] for kind in wanted):
        known |= {row[:-1]: row[-1] for row in database.query(_SQL, model)}
    new = [kind for kind in wanted if kind not in known]
    if new:
        last = int(database.query("SELECT COALESCE(MAX(id), 0) FROM kinds")[0][0])
        numbered = {kind: last + place for place, kind in enumerate(new, 1)}
        marks = ", ".join("?" * (len(_NAMES) + 1))
        sql = f"INSERT INTO kinds ({KIND_COLUMNS}, id) VALUES ({marks})"  # noqa: S608 literals and "?"
        database.many(sql, [(*kind, number) for kind, number in numbered.items()])
        known |= numbered
    return known


def sweep_kinds(database: Database) -> None:
    """Delete kinds that no call has any more: what a vendor said must not outlive its calls."""
    database.execute("DELETE FROM kinds WHERE id NOT IN (SELECT DISTINCT kind FROM calls)")
