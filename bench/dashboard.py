"""How long the dashboard's pages take over a store of a million recorded calls. Prints Markdown.

A few thousand calls with their texts enter as recorded calls do; the rest are copies of their rows at other
times, over thirty days, which is what a page has to find its way through. Each page is asked for over HTTP,
after one visit that is not counted; told are the median and the slowest of ten, and the CPU of the
dashboard's process, which is what remains where the machine has other work. `--calls N` sets how many. It
ignores the first visit after a start, for which the catalog is read beforehand.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
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
from understudy.traffic.hours import HOUR_S, Hour
from understudy.traffic.record import Call, Feedback, Record, new_key
from understudy.traffic.rows import CALL_COLUMNS
from understudy.traffic.store import open_store

CONFIG = """
[dashboard]
listen = "127.0.0.1:0"
[endpoints.openai]
base_url = "http://127.0.0.1:1/v1"
[endpoints.local]
base_url = "http://127.0.0.1:2/v1"
[aliases.assistant]
model = "openai/gpt-4.1"
[aliases.search]
model = "local/student"
"""
SEED = 2_000
DAYS = 30
VISITS = 10


class Timed(NamedTuple):
    path: str
    bytes: int
    wall_ms: list[float]
    cpu_ms: float
    """Of one visit."""


def seed(now: float) -> list[Record]:
    """Calls of both aliases within the copies' step, a few of them failed, half with feedback."""
    records: list[Record] = []
    step = DAYS * 86_400 / SEED
    for number in range(SEED):
        at = now - number * step - 1
        ask = {"model": "assistant", "messages": [{"role": "user", "content": f"Question {number}? " * 30}]}
        said = {"choices": [{"message": {"role": "assistant", "content": f"Answer {number}. " * 20}}]}
        alias, target = [("assistant", "openai/gpt-4.1"), ("search", "local/student")][number % 3 == 0]
        call = Call(
            key=f"{int(at * 1000):012x}7{new_key()[-19:]}",
            at=at,
            route="chat.completions",
            alias=alias,
            target=target,
            status=500 if number % 50 == 0 else 200,
            request=msgspec.json.encode(ask),
            response=msgspec.json.encode(said),
            attempts=[],
            usage=Usage(prompt_tokens=200, completion_tokens=100),
            total_s=1.0,
            task_id=f"t-{number // 4}",
        )
        records.append(call)
        if number % 2:
            said_of = Feedback(
                key=new_key(), call=call.key, at=at, metric="success", value=float(number % 4 > 1)
            )
            records.append(said_of)
    return records


def multiply(database: Database, times: int) -> None:
    """Copies of every call, each a little earlier than the last; then the hourly sums anew."""
    others = CALL_COLUMNS.removeprefix("key, at, ")
    shift = DAYS * 86_400 / SEED / times
    database.execute("CREATE TEMP TABLE first AS SELECT * FROM calls")
    for copy in range(1, times):
        back = copy * shift
        moment = f"printf('%012x', CAST((at - {back}) * 1000 AS INTEGER))"
        key = f"{moment} || printf('8%07x', {copy}) || substr(key, 21)"
        with database.transaction():
            database.execute(
                f"INSERT INTO calls ({CALL_COLUMNS}) SELECT {key}, at - {back}, {others} FROM first"
            )
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
            f"target, {', '.join(sums[name] for name in Hour._fields[3:])} FROM calls GROUP BY 1, 2, 3"
        )


def fill(folder: Path, calls: int) -> str:
    """The store; returns a call's key."""
    now = time.time()
    (folder / "understudy.toml").write_text(CONFIG)
    config = parse(CONFIG, "understudy.toml", folder)
    with open_store(config.store.url, folder) as store:
        records = seed(now)
        store.insert(records, "s", 1, price=lambda call: Cost(0.01, "2026-01-01", "bench"))
        order, initial = Order("bench", ""), config.aliases["assistant"]
        begun = begin(store, "assistant", "local/student", order, Rollout(), initial=initial).now
        seen = msgspec.json.encode(look_at(begun, Standing(Rollout()), Rollout()))
        store.set_look("assistant", now, seen.decode())
    database = open_database(config.store.url, folder)
    multiply(database, max(1, calls // SEED))
    database.close()
    return records[0].key


@contextmanager
def dashboard(folder: Path) -> Iterator[tuple[str, int]]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Page times over a large store.")
    parser.add_argument("--calls", type=int, default=1_000_000)
    calls = parser.parse_args().calls
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        key = fill(folder, calls)
        with dashboard(folder) as (url, pid):
            time.sleep(5)
            paths = [
                "/", "/traffic", "/traffic?alias=search&status=failed", "/traffic?task=t-100",
                f"/traffic/{key}", "/models", "/plan", "/evaluations", "/rollouts", "/own",
            ]  # fmt: skip
            timed = [visit(url, path, pid) for path in paths]
        with open_store("sqlite:///understudy.db", folder) as store:
            count = store.counts().calls
    print(f"{count:,} recorded calls.\n\n| page | KiB | median | slowest | CPU |\n|---|---|---|---|---|")
    for each in timed:
        shown = "/traffic/KEY" if each.path.endswith(key) else each.path
        times = f"{median(each.wall_ms):.0f} ms | {max(each.wall_ms):.0f} ms | {each.cpu_ms:.0f} ms"
        print(f"| {shown} | {each.bytes / 1024:.0f} | {times} |")
    print("\nRequired: each page in less than 200 ms.")


if __name__ == "__main__":
    main()
