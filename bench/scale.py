"""Bench of what a store's questions cost as calls grow, and what follows for a billion of them.

Takes a store of `bench/dashboard.py` (`--store FILE`, SQLite, opened read-only), copies its first thousandth,
hundredth, tenth and all of its calls into stores of their own with the same indexes, and asks each what
pages, sampling and planning ask. Prints Markdown: measured CPU milliseconds, and for 10⁹ calls what a
question that walks an index (by the depth of its tree) or every call (in proportion) would take. It ignores
writing (bench/recording) and disks: all is in the page cache, which a terabyte would not be.
"""

from __future__ import annotations

import argparse
import math
import sqlite3
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

BILLION = 1_000_000_000


class Question(NamedTuple):
    what: str
    sql: str
    walks: bool
    """It reads every call of the store; otherwise a path through an index."""


QUESTIONS = (
    Question(
        "the last 50 calls of an alias",
        "select * from calls where alias = :alias order by key desc limit 50",
        walks=False,
    ),
    Question(
        "the last 50 failures of an alias",
        "select * from calls where alias = :alias and status >= 400 order by key desc limit 50",
        walks=False,
    ),
    Question("one call", "select * from calls where key = :key", walks=False),
    Question(
        "planning: the shape of every call of an alias",
        "select at, prompt_tokens, completion_tokens, modalities, features from calls "
        "left join kinds on kinds.id = calls.kind where alias = :alias",
        walks=True,
    ),
    Question(
        "planning on a window: the latest 10,000 calls of an alias",
        "select at, prompt_tokens, completion_tokens, modalities, features from calls "
        "left join kinds on kinds.id = calls.kind where alias = :alias order by key desc limit 10000",
        walks=False,
    ),
    Question("a sum over every call", "select sum(cost_usd), sum(prompt_tokens) from calls", walks=True),
)


def copied(source: Path, target: Path, calls: int) -> sqlite3.Connection:
    """A store of the first ``calls`` calls."""
    store = sqlite3.connect(target)
    store.execute("attach database ? as old", (f"file:{source}?mode=ro&immutable=1",))
    described = (
        "select type, sql from old.sqlite_master where tbl_name in ('calls', 'kinds') and sql is not null"
    )
    statements = sorted(store.execute(described).fetchall(), key=lambda kind: kind[0] != "table")
    for _, table in [kind for kind in statements if kind[0] == "table"]:
        store.execute(table)
    store.execute("insert into kinds select * from old.kinds")
    store.execute("insert into calls select * from old.calls order by key limit ?", (calls,))
    for _, sql in [kind for kind in statements if kind[0] != "table"]:
        store.execute(sql)
    store.commit()
    return store


def milliseconds(store: sqlite3.Connection, question: Question) -> float:
    """CPU of an answer, the median of seven."""
    key, alias = store.execute("select key, alias from calls order by key limit 1 offset 500").fetchone()
    spent: list[float] = []
    for _ in range(7):
        started = time.process_time()
        for _row in store.execute(question.sql, {"key": key, "alias": alias}):
            pass
        spent.append(time.process_time() - started)
    return 1000 * statistics.median(spent)


def projected(question: Question, calls: int, spent: float) -> float:
    """CPU milliseconds for a billion."""
    if question.walks:
        return spent * BILLION / calls
    return spent * math.log(BILLION) / math.log(calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, required=True)
    source = parser.parse_args().store
    with sqlite3.connect(f"file:{source}?mode=ro&immutable=1", uri=True) as whole:
        every = int(whole.execute("select count(*) from calls").fetchone()[0])
    sizes = [every // 1000, every // 100, every // 10, every]
    found: dict[Question, list[float]] = {question: [] for question in QUESTIONS}
    bytes_each = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for calls in sizes:
            path = Path(folder) / f"{calls}.db"
            store = copied(source, path, calls)
            bytes_each = path.stat().st_size / calls
            for question in QUESTIONS:
                found[question].append(milliseconds(store, question))
            store.close()
            path.unlink()
    print(f"| CPU ms | {' | '.join(f'{n:,} calls' for n in sizes)} | 10⁹, projected |")
    print("| --- |" + " --: |" * (len(sizes) + 1))
    for question, spent in found.items():
        shown = " | ".join(f"{ms:,.2f}" for ms in spent)
        print(f"| {question.what} | {shown} | {projected(question, every, spent[-1]):,.1f} |")
    print(f"\nRow and indexes: {bytes_each:.0f} bytes a call, {bytes_each * BILLION / 1e12:.2f} TB for 10⁹.")


if __name__ == "__main__":
    main()
