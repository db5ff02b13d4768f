"""What a shadow costs the clients: latency with a trial in the shadow beside latency without.

One `understudy up` with its own controller, clients at a fixed rate, and each model behind it in a process of
its own, for the candidate's work is not what is measured; once they answer at once, and once after 50 to 200
ms, each request the same in every round. Blocks of four rounds, shadow off, on, on, off (or the other way
about), so that neither a drift of the machine nor the order falls on one side. A block's figure is the median
with the shadow over the median without; reported are their median and the 95% interval of it by order
statistics. On means that the controller copies the clients' calls meanwhile, as fast as it does. It ignores
the candidate's own share of traffic: in the shadow it has none. Prints Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from math import comb
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import uvloop
from rollout_live import Client, Models, gateway

from understudy.config import Config, parse
from understudy.rollout.shadow import shadow_alias
from understudy.rollout.trials import Order, abort, begin
from understudy.traffic.store import Store, open_store

RATE = 40
"""Requests per second."""
ROUND_S = 4.0
CONNECTIONS = 32
TURN_S = 3.0
"""By then the controller has seen that the shadow was turned on or off."""
LATENCIES = {"at once": (0.0, 0.0), "after 50 to 200 ms": (0.05, 0.2)}
"""Shortest and longest answer, in seconds."""
CONFIG = """
[gateway]
listen = "127.0.0.1:0"
[endpoints.vendor]
base_url = "http://127.0.0.1:{port}/v1"
[endpoints.own]
base_url = "http://127.0.0.1:{own}/v1"
[aliases.a]
model = "vendor/old"
[rollout]
replay_tasks = 0
shadow_tasks = 1000000
shadow_usd = 1000000
settle_s = 0.5
"""


class SlowModels(Models):
    """A model that takes as long for a request as it did in every other round."""

    def __init__(self, shortest: float, longest: float) -> None:
        super().__init__(0.8, 0.8)
        self.shortest, self.longest = shortest, longest

    def data_received(self, data: bytes) -> None:
        number = re.search(rb"-(\d+)\"", data)
        place = int(number[1]) * 0.618034 % 1.0 if number else 0.0
        takes = self.shortest + place * (self.longest - self.shortest)
        asyncio.get_running_loop().call_later(takes, super().data_received, data)


def serve(pipe: Connection, shortest: float, longest: float) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: SlowModels(shortest, longest), "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    uvloop.run(main())


@contextmanager
def model(shortest: float, longest: float) -> Generator[int]:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=serve, args=(theirs, shortest, longest), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join()


async def measure(port: int, name: str) -> list[float]:
    """Seconds from the moment a request was due until its answer was whole."""
    loop = asyncio.get_running_loop()
    idle = [(await loop.create_connection(Client, "127.0.0.1", port))[1] for _ in range(CONNECTIONS)]
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


class Switch:
    """Turns the shadow on and off."""

    def __init__(self, store: Store, config: Config) -> None:
        self.store, self.config, self.on = store, config, False

    def to(self, on: bool) -> None:
        if on == self.on:
            return
        rollout, initial = self.config.rollout, self.config.aliases["a"]
        assert rollout is not None
        if on:
            begin(self.store, "a", "own/new", Order("bench", ""), rollout, initial=initial)
        else:
            abort(self.store, "a", Order("bench", ""))
        self.on = on
        time.sleep(TURN_S)


class Measured(NamedTuple):
    spent: dict[bool, list[float]]
    """Seconds, without and with the shadow."""
    ratios: list[float]
    """Of each block."""
    copies: int


def measured(shortest: float, longest: float, blocks: int, folder: Path) -> Measured:
    with model(shortest, longest) as vendor, model(shortest, longest) as own:
        text = CONFIG.format(port=vendor, own=own)
        (folder / "understudy.toml").write_text(text)
        config = parse(text, "understudy.toml", folder)
        spent: dict[bool, list[float]] = {False: [], True: []}
        ratios: list[float] = []
        with open_store(config.store.url, folder) as store, gateway(folder) as port:
            switch = Switch(store, config)
            uvloop.run(measure(port, "warm"))
            for number in range(blocks):
                first = bool(number % 2)
                block: dict[bool, list[float]] = {False: [], True: []}
                for turn, on in enumerate((first, not first, not first, first)):
                    switch.to(on)
                    block[on] += uvloop.run(measure(port, f"{number}-{turn}"))
                for on, found in block.items():
                    spent[on] += found
                ratios.append(median(block[True]) / median(block[False]))
                print(f"block {number + 1} of {blocks}: {ratios[-1]:.3f}", file=sys.stderr)
            copies = sum(1 for _ in store.calls(alias=shadow_alias("a")))
    return Measured(spent, ratios, copies)


def interval(values: list[float]) -> tuple[float, float]:
    """Bounds of the median at a confidence of at least 95%, by order statistics; of fewer than six values all
    that there is."""
    ranked, n = sorted(values), len(values)
    below = [sum(comb(n, i) for i in range(k + 1)) / 2**n for k in range(n)]
    k = sum(1 for chance in below[: n // 2] if chance <= 0.025)
    return (ranked[k - 1], ranked[n - k]) if k else (ranked[0], ranked[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Client latency with the shadow on and off.")
    parser.add_argument("--blocks", type=int, default=10)
    blocks = parser.parse_args().blocks
    print("| answers come | shadow | requests | median | p95 | p99 |\n|---|---|---|---|---|---|")
    said: list[str] = []
    for words, (shortest, longest) in LATENCIES.items():
        with tempfile.TemporaryDirectory() as folder:
            found = measured(shortest, longest, blocks, Path(folder))
        for on, word in ((False, "off"), (True, "on")):
            cut = quantiles(found.spent[on], n=100)
            cells = [f"{1e3 * value:.2f} ms" for value in (median(found.spent[on]), cut[94], cut[98])]
            print(f"| {words} | {word} | {len(found.spent[on]):,} | {' | '.join(cells)} |", flush=True)
        low, high = interval(found.ratios)
        said.append(
            f"{words}: on by off {median(found.ratios):.3f} ({low:.3f} to {high:.3f}, {blocks} blocks; "
            f"{found.copies:,} copies answered meanwhile)"
        )
    print(f"\nMedians of blocks, {'; '.join(said)}. Required: 1.03.")


if __name__ == "__main__":
    main()
