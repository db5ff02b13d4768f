"""Bench of an endpoint asked from a Ray cluster: what a call costs the command that gives the order.

A fake endpoint answers at once; it is asked by the plain client and then by clusters of nodes of one core,
all on this machine, which is therefore no measure of how fast many machines would be: the command's own
CPU-time a call is, for that core is what gives out first. Prints Markdown. `--calls N` makes it smaller.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple

from ray_capture import nodes

from evaluate import fake_endpoint
from understudy.cluster import connect
from understudy.endpoint import Endpoint, HttpEndpoint
from understudy.fleet import Fleet

IN_FLIGHT = 256


class Asked(NamedTuple):
    name: str
    per_second: float
    cpu_us: float
    """Of the command a call."""


async def ask(endpoint: Endpoint, name: str, calls: int) -> Asked:
    gate = asyncio.Semaphore(IN_FLIGHT)

    async def one(number: int) -> None:
        async with gate:
            message = {"role": "user", "content": f"{number} " + 200 * "word "}
            answer = await endpoint.chat({"messages": [message]})
        assert answer.status == 200

    await asyncio.gather(*(one(n) for n in range(IN_FLIGHT)))  # workers start, connections open
    wall, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(one(n) for n in range(calls)))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Asked(name, calls / wall, 1e6 * cpu / calls)


def client(port: int) -> HttpEndpoint:
    return HttpEndpoint("fake/m", f"http://127.0.0.1:{port}/v1", "m")


async def plainly(port: int, calls: int) -> Asked:
    async with client(port) as endpoint:
        return await ask(endpoint, "the plain client", calls)


async def spread(port: int, calls: int, cluster: Any, count: int) -> Asked:
    async with Fleet(client(port), cluster=cluster) as fleet:
        return await ask(fleet, f"Ray, {count} node{'s' if count > 1 else ''}", calls)


@contextmanager
def clusters(count: int) -> Any:
    with nodes(count) as (cluster, _), connect(cluster.address) as there:
        yield there


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=5000)
    calls = parser.parse_args().calls
    if find_spec("ray") is None:
        print("Not measured: the package `ray` is not installed (`pip install 'understudy[ray]'`).")
        return
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with fake_endpoint() as port:
        found = [asyncio.run(plainly(port, calls))]
        for count in (1, 2):
            with clusters(count) as there:
                found.append(asyncio.run(spread(port, calls, there, count)))
            print(found[-1], file=sys.stderr, flush=True)
    print(
        f"{calls:,} chats of 1 KB, {IN_FLIGHT} in flight, endpoint and all nodes on this machine of "
        f"{os.cpu_count()} cores (load {os.getloadavg()[0]:.1f} at the end).\n"
    )
    print(
        "| asked by | calls/s here | CPU-µs of the command a call | calls/s that one core of it hands out |"
    )
    print("| --- | --: | --: | --: |")
    for one in found:
        print(f"| {one.name} | {one.per_second:,.0f} | {one.cpu_us:,.0f} | {1e6 / one.cpu_us:,.0f} |")


if __name__ == "__main__":
    main()
