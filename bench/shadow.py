"""What a shadow costs the clients: latency with a trial in the shadow beside latency without.

One `understudy up` with its own controller, scripted models behind it that take 20 ms, and clients at a fixed
rate. Rounds alternate, shadow off and on, so that whatever else the machine does falls on both; on means that
a trial copies every call of the clients to the candidate while it is measured. It ignores the candidate's own
share of traffic: in the shadow it has none. Prints Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles

import uvloop
from rollout_live import Client, Models, gateway

from understudy.config import parse
from understudy.rollout.shadow import shadow_alias
from understudy.rollout.trials import Order, abort, begin
from understudy.traffic.store import open_store

RATE = 50
"""Requests per second."""
ROUND_S = 6.0
TAKES_S = 0.02
CONFIG = """
[gateway]
listen = "127.0.0.1:0"
[endpoints.vendor]
base_url = "http://127.0.0.1:{port}/v1"
[endpoints.own]
base_url = "http://127.0.0.1:{port}/v1"
[aliases.a]
model = "vendor/old"
[rollout]
replay_tasks = 0
shadow_tasks = 1000000
shadow_usd = 1000000
settle_s = 0.5
"""


class SlowModels(Models):
    """Both models, as slow as a fast model is."""

    def data_received(self, data: bytes) -> None:
        asyncio.get_running_loop().call_later(TAKES_S, super().data_received, data)


def serve(pipe: Connection) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: SlowModels(0.8, 0.8), "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    uvloop.run(main())


@contextmanager
def models() -> Iterator[int]:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join()


async def measure(port: int, name: str) -> list[float]:
    """Seconds from the moment a request was due until its answer was whole."""
    loop = asyncio.get_running_loop()
    idle = [(await loop.create_connection(Client, "127.0.0.1", port))[1] for _ in range(8)]
    spent: list[float] = []

    async def one(due: float, task: str) -> None:
        client = idle.pop()
        answered = await client.ask("a", task)
        assert answered.status == 200
        spent.append(time.perf_counter() - due)
        idle.append(client)

    begun, waiting = time.perf_counter(), set[asyncio.Task[None]]()
    for number in range(int(ROUND_S * RATE)):
        due = begun + number / RATE
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        if idle:
            waiting.add(asyncio.create_task(one(due, f"{name}-{number}")))
    await asyncio.gather(*waiting)
    for client in idle:
        client.transport.abort()
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description="Client latency with the shadow on and off.")
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    spent: dict[bool, list[float]] = {False: [], True: []}
    ratios: list[float] = []
    with tempfile.TemporaryDirectory() as name, models() as behind:
        folder = Path(name)
        text = CONFIG.format(port=behind)
        (folder / "understudy.toml").write_text(text)
        config = parse(text, "understudy.toml", folder)
        assert config.rollout is not None
        with open_store(config.store.url, folder) as store, gateway(folder) as port:
            uvloop.run(measure(port, "warm"))
            for number in range(rounds):
                pair: dict[bool, float] = {}
                for on in random.sample([False, True], 2):
                    if on:
                        initial = config.aliases["a"]
                        begin(store, "a", "own/new", Order("bench", ""), config.rollout, initial=initial)
                        time.sleep(3)  # the controller has seen it and copies
                    found = uvloop.run(measure(port, f"{number}-{on}"))
                    if on:
                        abort(store, "a", Order("bench", ""))
                        time.sleep(3)
                    spent[on] += found
                    pair[on] = median(found)
                ratios.append(pair[True] / pair[False])
                print(f"round {number + 1} of {rounds}: {ratios[-1]:.3f}", file=sys.stderr)
            copies = sum(1 for _ in store.calls(alias=shadow_alias("a")))
    print("| shadow | requests | median | p95 | p99 |\n|---|---|---|---|---|")
    for on, word in ((False, "off"), (True, "on")):
        cut = quantiles(spent[on], n=100)
        cells = [f"{1e3 * value:.2f} ms" for value in (median(spent[on]), cut[94], cut[98])]
        print(f"| {word} | {len(spent[on]):,} | {' | '.join(cells)} |")
    print(f"\nOn by off, medians of each round: {median(ratios):.3f} (median of {rounds} rounds, ", end="")
    print(
        f"{min(ratios):.3f} to {max(ratios):.3f}). {copies:,} copies were answered meanwhile. Required: 1.03."
    )


if __name__ == "__main__":
    main()
