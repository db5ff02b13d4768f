"""How long the dashboard's pages take over a store of a million recorded calls. Prints Markdown.

A few thousand calls with their texts, of twelve aliases and twenty-four targets, enter as recorded calls do;
the rest are copies of their rows and of their feedback at other times, over ninety days, which is what a page
has to find its way through. Each page is asked for over HTTP, after one visit that is not counted; told are
the median and the slowest of ten, and the CPU of the dashboard's process, which is what remains where the
machine has other work. `--calls N` sets how many, `--store FOLDER` keeps the filled store there for another
run. It ignores the first visit after a start, for which the catalog is read beforehand.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

import msgspec

from gateway import cpu_s
from understudy.config import Rollout, parse
from understudy.protocol import Cost, Usage
from understudy.rollout.look import look_at
from understudy.rollout.standing import Standing
from understudy.rollout.trials import Order, begin
from understudy.traffic.database import Database, open_database
from understudy.traffic.hours import DAY_H, HOUR_S, Hour
from understudy.traffic.record import Call, Feedback, Record
from understudy.traffic.rows import CALLS, FEEDBACK_COLUMNS, ROW_COLUMNS
from understudy.traffic.store import open_store

CONFIG = """
[dashboard]
listen = "127.0.0.1:0"
[endpoints.openai]
base_url = "http://127.0.0.1:1/v1"
[endpoints.local]
base_url = "http://127.0.0.1:2/v1"
"""
NAMES = (
    "assistant", "search", "summaries", "triage", "translate", "extract", "titles", "moderation", "sql",
    "mail", "voice", "tests",
)  # fmt: skip
MODELS = ("openai/gpt-4.1", "openai/gpt-4o", "openai/gpt-4.1-mini", "openai/gpt-4-turbo")
SEED = 2_000
DAYS = 90
VISITS = 10
WORD = "kettle"
"""Said in one call of five hundred."""


class Timed(NamedTuple):
    path: str
    bytes: int
    wall_ms: list[float]
    cpu_ms: float
    """Of one visit."""


def written() -> str:
    """The config: every alias has a model and one of our own behind it."""
    aliases = [
        f'[aliases.{name}]\nmodel = "{MODELS[n % len(MODELS)]}"\nfallback = ["local/student"]\n'
        for n, name in enumerate(NAMES)
    ]
    return CONFIG + "".join(aliases)


def seed(now: float) -> list[Record]:
    """Calls of all aliases within the copies' step, a few of them failed, half with feedback."""
    records: list[Record] = []
    step = DAYS * 86_400 / SEED
    for number in range(SEED):
        call = _call(number, now - number * step - 1)
        records.append(call)
        if number % 2:
            value = float(number % 4 > 1)
            records.append(
                Feedback(key=_key(call.at, number), call=call.key, at=call.at, metric="success", value=value)
            )
    return records


def _call(number: int, at: float) -> Call:
    word = WORD if number % 500 == 7 else "parcel"
    text = f"Question {number}: where is the {word} of order {number * 7919}? " * 12
    ask = {"model": NAMES[number % 12], "messages": [{"role": "user", "content": text}]}
    said = {"choices": [{"message": {"role": "assistant", "content": f"Answer {number}. " * 40}}]}
    return Call(
        key=_key(at, number),
        at=at,
        route="chat.completions",
        alias=NAMES[number % 12],
        target="local/student" if number % 7 == 0 else MODELS[number % 12 % len(MODELS)],
        status=500 if number % 50 == 0 else 200,
        request=msgspec.json.encode(ask),
        response=msgspec.json.encode(said),
        attempts=[],
        usage=Usage(prompt_tokens=200, completion_tokens=100),
        total_s=1.0,
        task_id=f"t-{number // 4}",
        tags={"team": ("care", "growth")[number % 2], "release": f"r{number % 400}"},
    )


def _key(at: float, number: int) -> str:
    return f"{int(at * 1000):012x}70000000{number:012x}"


def multiply(database: Database, times: int, now: float) -> None:
    """Copies of every call and of what was said of it, so that neighbours in time have other texts; then the
    sums of hours and days anew. Two calls in three have a task of their own copy, the others one of all."""
    step = DAYS * 86_400 / SEED
    place = f"(CAST(({now} - at) / {step} AS INTEGER) + copy * 371) % {SEED}"
    at = f"({now} - {place} * {step} - copy * {step / times} - 1)"

    def moved(key: str) -> str:
        """A key of the new moment, the copy and the first call."""
        return f"printf('%012x7%07x', CAST({at} * 1000 AS INTEGER), copy) || substr({key}, 21)"

    changed = {
        "key": moved("key"), "at": at,
        "task_id": "CASE WHEN length(task_id) % 3 = 0 THEN task_id ELSE task_id || '-' || copy END",
    }  # fmt: skip
    copies = f"WITH RECURSIVE n(copy) AS (SELECT 1 UNION ALL SELECT copy + 1 FROM n WHERE copy < {times - 1})"
    with database.transaction():
        for table, columns, new in (
            ("calls", ROW_COLUMNS, changed),
            ("feedback", FEEDBACK_COLUMNS, {"key": moved("key"), "call": moved("call"), "at": at}),
        ):
            values = ", ".join(new.get(name, name) for name in columns.split(", "))
            database.execute(f"CREATE TEMP TABLE first_{table} AS SELECT * FROM {table}")
            database.execute(
                f"INSERT INTO {table} ({columns}) {copies} SELECT {values} FROM first_{table}, n "
                f"WHERE {times} > 1 ORDER BY 1"
            )
    _sum_up(database)


def _sum_up(database: Database) -> None:
    sums = {
        "calls": "COUNT(*)", "failed": "SUM(status >= 400)", "priced": "SUM(cost_usd IS NOT NULL)",
        "prompt_tokens": "SUM(prompt_tokens)", "completion_tokens": "SUM(completion_tokens)",
        "cached_tokens": "SUM(COALESCE(cached_tokens, 0))", "cost_usd": "SUM(COALESCE(cost_usd, 0))",
        "total_s": "SUM(total_s)",
    }  # fmt: skip
    with database.transaction():
        database.execute("DELETE FROM hours")
        database.execute(
            f"INSERT INTO hours ({', '.join(Hour._fields)}) SELECT CAST(at / {HOUR_S} AS INTEGER), alias, "
            f"target, {', '.join(sums[name] for name in Hour._fields[3:])} FROM {CALLS} GROUP BY 1, 2, 3"
        )
        database.execute("DELETE FROM days")
        columns = ", ".join(Hour._fields[1:])
        summed = ", ".join(f"SUM({name})" for name in Hour._fields[3:])
        database.execute(
            f"INSERT INTO days (day, {columns}) SELECT hour / {DAY_H}, alias, target, {summed} FROM hours "
            "GROUP BY 1, 2, 3"
        )


def fill(folder: Path, calls: int) -> None:
    """The store, unless it is there from another run."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "understudy.db").exists():
        return
    now = time.time()
    (folder / "understudy.toml").write_text(written())
    config = parse(written(), "understudy.toml", folder)
    with open_store(config.store.url, folder) as store:
        store.insert(seed(now), "s", 1, price=lambda call: Cost(0.01, "2026-01-01", "bench"))
        order, initial = Order("bench", ""), config.aliases["assistant"]
        begun = begin(store, "assistant", "local/student", order, Rollout(), initial=initial).now
        seen = msgspec.json.encode(look_at(begun, Standing(Rollout()), Rollout()))
        store.set_look("assistant", now, seen.decode())
    database = open_database(config.store.url, folder)
    multiply(database, max(1, calls // SEED), now)
    database.close()


@contextmanager
def dashboard(folder: Path) -> Generator[tuple[str, int]]:
    """`understudy dashboard`; yields its address and its process."""
    command = [sys.executable, "-m", "understudy", "dashboard", "--json"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"], process.pid
    finally:
        process.terminate()
        process.communicate()


def visit(url: str, path: str, pid: int) -> Timed:
    urllib.request.urlopen(url + path).read()
    spent: list[float] = []
    before, size = cpu_s(pid), 0
    for _ in range(VISITS):
        begun = time.perf_counter()
        size = len(urllib.request.urlopen(url + path).read())
        spent.append(1e3 * (time.perf_counter() - begun))
    return Timed(path, size, spent, 1e3 * (cpu_s(pid) - before) / VISITS)


def addresses(folder: Path) -> list[str]:
    """Every page, and of the list what readers ask of it: filters, words, pages far back."""
    with closing(open_database("sqlite:///understudy.db", folder)) as database:
        count = int(database.query("SELECT COUNT(*) FROM calls")[0][0])
        deep = str(
            database.query("SELECT key FROM calls ORDER BY key LIMIT 1 OFFSET ?", (count // 10,))[0][0]
        )
        day = time.strftime("%Y-%m-%d", time.gmtime(int(deep[:12], 16) / 1000))
    lists = (
        "", f"before={deep}", f"after={deep}", f"alias=search&before={deep}", "alias=search&status=failed",
        f"status=500&before={deep}", "task=t-100", "tag=team%3Dcare", "tag=release%3Dr333", "tag=no%3Dsuch",
        f"tag=release%3Dr333&status=ok&before={deep}", f"from={day}&to={day}", f"q={WORD}",
        f"q={WORD}&before={deep}", "q=no+such+words", f"q={WORD}&alias=search&status=failed",
    )  # fmt: skip
    return [
        "/", *(f"/traffic?{query}" for query in lists), f"/traffic/{deep}", "/models", "/models?q=gpt",
        "/plan", "/evaluations", "/rollouts", "/own",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Page times over a large store.")
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--store", type=Path, help="Folder to keep the filled store in, or to take it from.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = given.store or Path(name)
        fill(folder, given.calls)
        with dashboard(folder) as (url, pid):
            time.sleep(5)
            timed = [visit(url, path, pid) for path in addresses(folder)]
        with open_store("sqlite:///understudy.db", folder) as store:
            count = store.counts().calls
    print(f"{count:,} recorded calls.\n\n| page | KiB | median | slowest | CPU |\n|---|---|---|---|---|")
    for each in timed:
        shown = re.sub("[0-9a-f]{32}", "KEY", each.path).replace("|", "%7C")
        times = f"{median(each.wall_ms):.0f} ms | {max(each.wall_ms):.0f} ms | {each.cpu_ms:.0f} ms"
        print(f"| {shown} | {each.bytes / 1024:.0f} | {times} |")
    print("\nRequired: each page in less than 200 ms.")


if __name__ == "__main__":
    main()
