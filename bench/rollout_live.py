"""Trials through a real gateway and store: `understudy up` as a process, scripted models behind it, clients.

Many aliases are on trial side by side, which is what makes a thousand of them affordable: each wave sends
every alias that is still on trial a few tasks over connections that stay open, and one more call of a task
that began some waves ago; reports the right answer of each to /feedback, waits until the outcomes have
settled, and has the product's controller look once. Nothing is virtual: dealing, fallback, recording,
indexing, grading and clocks are the product's. What an answer is depends on the task and the model alone. It
ignores replay and shadow (bench/shadow.py).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple, cast

import uvloop

from understudy import config as configuration
from understudy.config import Config
from understudy.rollout.controller import Controller
from understudy.rollout.own_call import Means
from understudy.rollout.trials import UNDER_WAY, Order, begin
from understudy.traffic.indexer import Indexer
from understudy.traffic.store import Store, open_store

CONNECTIONS = 16
TALK_WAVES = 6
"""Waves over which one task of each alias goes on calling, while shares grow."""
SETTLE_S = 0.5
LAG_S = 2.2
"""Evidence is read two seconds behind the present."""
MOST_WAVES = 2_000

CONFIG = """
[gateway]
listen = "127.0.0.1:0"
[endpoints.vendor]
base_url = "http://127.0.0.1:{port}/v1"
"""
OWN = """
[endpoints.own{n}]
base_url = "http://127.0.0.1:{port}/v1"
"""
MOST_OWN = 100
"""Endpoints of candidates: with one of its own an outage is seen by one alias alone."""
ALIAS = """
[aliases.a{n}]
model = "vendor/old"
"""


class Case(NamedTuple):
    """Migrations of one kind."""

    name: str
    migrations: int
    old: float
    """Share of the incumbent's answers that are right."""
    new: float
    """The candidate's; below 0: it answers 503."""
    settings: str
    """`[rollout]` as TOML; empty: the defaults, without replay and shadow."""
    wave: int
    """Tasks an alias is sent between two looks."""
    first: int = 0
    """Number of the first alias: a part of a case draws what it would draw in the whole."""

    @property
    def numbers(self) -> range:
        return range(self.first, self.first + self.migrations)


class Ended(NamedTuple):
    """What came of them."""

    stages: Counter[str]
    tasks: list[int]
    """Of each migration until its end."""
    candidates: list[int]
    """Of these, dealt to the candidate."""
    failed: int
    """Requests that a client saw fail."""
    lost: int
    """Answers without a record."""
    doubled: int
    """Records without an answer, or more than one for it."""
    mixed: int
    """Calls of a task that another model answered than its first one."""
    requests: int
    wall_s: float
    cpu_s: float
    """Of everything: gateway, indexer, models, clients, controller."""


def answer_of(task: str, model: str, right: float) -> bytes:
    """What a scripted model says: "yes" is right; drawn by the task's and the model's names."""
    place = int.from_bytes(hashlib.blake2b(f"{task} {model}".encode(), digest_size=8).digest()) / 2**64
    text = "yes" if place < right else "no"
    body = json.dumps(
        {
            "object": "chat.completion",
            "model": model,
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            ],
            "usage": {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10},
        }
    ).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
        len(body),
        body,
    )


OUT = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
_SAID = re.compile(rb'"model":"(old|new)".*"content":"([^"]+)"', re.S)


class Models(asyncio.Protocol):
    """Both scripted models, by the name that is asked for."""

    def __init__(self, old: float, new: float) -> None:
        self.right = {"old": old, "new": new}
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        if not found or length is None or len(rest) < int(length[1]):
            return
        self.buffer = b""
        said = _SAID.search(rest)
        assert said, rest
        model, task = said[1].decode(), said[2].decode()
        right = self.right[model]
        self.transport.write(OUT if right < 0 else answer_of(task, model, right))


def serve_models(pipe: Connection, old: float, new: float) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Models(old, new), "127.0.0.1", 0, backlog=1024)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    uvloop.run(main())


class Answered(NamedTuple):
    status: int
    call: str
    """Key of its record."""
    model: str
    """ENDPOINT/MODEL that answered."""
    attempts: int


class Client(asyncio.Protocol):
    """One connection that stays open: a request, then its answer."""

    def __init__(self) -> None:
        self.buffer = b""
        self.waiting: asyncio.Future[bytes] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        if found and length and len(rest) >= int(length[1]) and self.waiting is not None:
            self.buffer = b""
            self.waiting.set_result(head)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.waiting is not None and not self.waiting.done():
            self.waiting.set_exception(ConnectionError("the gateway hung up"))

    async def post(self, path: bytes, body: bytes, more: bytes = b"") -> bytes:
        """The head of the answer."""
        self.waiting = asyncio.get_running_loop().create_future()
        head = (
            b"POST %b HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n%bcontent-length: %d\r\n\r\n"
        )
        self.transport.write(head % (path, more, len(body)) + body)
        return await self.waiting

    async def ask(self, alias: str, task: str) -> Answered:
        body = f'{{"model":"{alias}","messages":[{{"role":"user","content":"{task}"}}]}}'.encode()
        head = await self.post(b"/v1/chat/completions", body, b"x-task-id: %b\r\n" % task.encode())
        named = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:] if b": " in line)
        attempts = int(named.get(b"x-understudy-attempts", b"1"))
        key, model = (named.get(name, b"").decode() for name in (b"x-understudy-call", b"x-understudy-model"))
        return Answered(int(head[9:12]), key, model, attempts)


@contextmanager
def models(old: float, new: float) -> Iterator[int]:
    """The scripted models in a process of their own; yields their port."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=serve_models, args=(theirs, old, new), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join()


@contextmanager
def gateway(folder: Path) -> Iterator[int]:
    """`understudy up` in a folder with its config; yields its port."""
    command = [sys.executable, "-m", "understudy", "up", "--json"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=log)
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        yield int(ready["url"].rpartition(":")[2].split("/")[0])
    finally:
        process.terminate()
        process.communicate()


class World:
    """All aliases of a case, the clients and the controller."""

    def __init__(self, case: Case, config: Config, store: Store, port: int) -> None:
        self.case, self.config, self.store, self.port = case, config, store, port
        self.indexer = Indexer(config.path(config.store.segments), store)
        self.controller = Controller(store, config, _no_copies)
        self.sent: Counter[str] = Counter()
        self.dealt: Counter[str] = Counter()
        self.calls: set[str] = set()
        self.tasks: set[str] = set()
        self.failed = 0
        self.clients: list[Client] = []

    async def run(self, told: Callable[[str], None], minutes: float) -> None:
        ends = time.monotonic() + 60.0 * minutes
        loop = asyncio.get_running_loop()
        self.clients = [
            (await loop.create_connection(Client, "127.0.0.1", self.port))[1] for _ in range(CONNECTIONS)
        ]
        for wave in range(MOST_WAVES):
            running = [r.alias for r in self.store.routes().values() if r.stage in UNDER_WAY]
            told(f"wave {wave}: {len(running)} under way, {sum(self.sent.values())} tasks")
            if not running or time.monotonic() > ends:
                break
            await self._wave(running, wave)
            await self._settled()
            await self.controller.step()
        for client in self.clients:
            client.transport.close()

    async def _wave(self, aliases: Sequence[str], wave: int) -> None:
        waiting = [(alias, f"{alias}-{wave}-{n}") for n in range(self.case.wave) for alias in aliases]
        waiting += [(alias, f"{alias}-talk-{wave // TALK_WAVES}") for alias in aliases]
        waiting.reverse()

        async def work(client: Client) -> None:
            while waiting:
                alias, task = waiting.pop()
                answered = await client.ask(alias, task)
                self.calls.add(answered.call)
                self.failed += answered.status != 200
                if task not in self.tasks:
                    self.tasks.add(task)
                    self.sent[alias] += 1
                    self.dealt[alias] += answered.model.endswith("/new") or answered.attempts > 1
                said = f'{{"call":"{answered.call}","expected":"yes"}}'.encode()
                await client.post(b"/v1/feedback", said)

        await asyncio.gather(*(work(client) for client in self.clients))

    async def _settled(self) -> None:
        """Until everything is in the store and every outcome has had its time."""
        await asyncio.sleep(SETTLE_S + LAG_S)
        while self.indexer.lag_bytes:  # noqa: ASYNC110 - another process fills the store
            await asyncio.sleep(0.1)


def _no_copies(candidate: str) -> Means:
    raise AssertionError(f"these trials copy nothing to {candidate}")


def migrate_all(case: Case, folder: Path, told: Callable[[str], None], minutes: float = math.inf) -> Ended:
    """Put every alias of the case on trial and send tasks until all have ended, or so many minutes are over:
    what has not ended then counts as waiting."""
    folder.mkdir(parents=True)
    begun, cpu = time.monotonic(), _cpu()
    with models(case.old, case.new) as behind:
        trials = "".join(OWN.format(n=n, port=behind) for n in range(min(case.migrations, MOST_OWN)))
        trials += "".join(ALIAS.format(n=n) for n in case.numbers)
        course = f"{case.settings}\nreplay_tasks = 0\nshadow_tasks = 0\nsettle_s = {SETTLE_S}\n"
        # the controller reads [rollout]; the gateway's copy has none, so that it starts no controller itself
        plain = CONFIG.format(port=behind) + trials
        (folder / "understudy.toml").write_text(plain)
        config = configuration.parse(f"{plain}\n[rollout]\n{course}", "understudy.toml", folder)
        assert config.rollout is not None
        with open_store(config.store.url, folder) as store:
            for n in case.numbers:
                name = f"a{n}"
                order, initial = Order("bench", "a migration"), config.aliases[name]
                begin(
                    store,
                    name,
                    f"own{(n - case.first) % MOST_OWN}/new",
                    order,
                    config.rollout,
                    initial=initial,
                )
            with gateway(folder) as port:
                world = World(case, config, store, port)
                uvloop.run(world.run(told, minutes))
            return _ended(world, time.monotonic() - begun, _cpu() - cpu)


def _ended(world: World, wall_s: float, cpu_s: float) -> Ended:
    recorded, mixed = _recorded(world.store)
    names = [f"a{n}" for n in world.case.numbers]
    routes = world.store.routes()
    return Ended(
        stages=Counter(routes[name].stage for name in names),
        tasks=[world.sent[name] for name in names],
        candidates=[world.dealt[name] for name in names],
        failed=world.failed,
        lost=len(world.calls - recorded.keys()),
        doubled=len(recorded.keys() - world.calls) + sum(n - 1 for n in recorded.values()),
        mixed=mixed,
        requests=len(world.calls),
        wall_s=wall_s,
        cpu_s=cpu_s,
    )


def _recorded(store: Store) -> tuple[Counter[str], int]:
    """How often each call is in the store, and how many calls went elsewhere than their task's first."""
    found: Counter[str] = Counter()
    targets: dict[str, str] = {}
    mixed = 0
    for stored in store.calls():
        call = stored.call
        found[call.key] += 1
        asked = call.attempts[0].target
        mixed += targets.setdefault(call.task_id, asked) != asked
    return found, mixed


def _cpu() -> float:
    """CPU seconds of this process and of its children that have ended, with theirs."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system
