"""What tests of `--ray` need: a server that counts what it is asked, and nodes that die as machines do."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="the extra `ray` is not installed")
NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 << 20}


class Server:
    """Answers `q7` with `odd`, after a while; knows how often it was asked what."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.delay_s = 0.0
        self.at: dict[int, Callable[[], object]] = {}
        """What happens at the so-many-eth call."""
        self.together: tuple[int, Callable[[], object]] | None = None
        """Nobody is answered until so many calls wait, that is all workers ask, and this has happened."""
        self.url = ""
        self._waiting = 0

    async def noted(self, question: str) -> None:
        self.asked[question] += 1
        act = self.at.pop(self.asked.total(), None)
        if act is not None:
            threading.Thread(target=act).start()
        await self._gathered()
        await asyncio.sleep(self.delay_s)

    async def _gathered(self) -> None:
        self._waiting += 1
        if self.together is not None and self._waiting >= self.together[0]:
            act, self.together = self.together[1], None
            await asyncio.to_thread(act)
            self._opened.set()
        elif self.together is not None:
            await self._opened.wait()
        self._waiting -= 1

    @contextmanager
    def held(self, count: int, act: Callable[[], object]) -> Generator[None]:
        """Its body's first ``count`` calls meet, and ``act`` happens then."""
        self.asked.clear()
        self._opened, self._waiting, self.together = asyncio.Event(), 0, (count, act)
        yield
        assert self.together is None, f"{self._waiting} of {count} calls met"

    async def chat(self, request: web.Request) -> web.Response:
        question = str((await request.json())["messages"][-1]["content"])
        await self.noted(question)
        if not question.startswith("q"):
            return web.json_response({"error": "no question"}, status=400)
        text = "odd" if int(question[1:]) % 2 else "even"
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return web.json_response({"choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": 1}})


@contextmanager
def serving(server: Server | None = None) -> Generator[Server]:
    """In a thread of its own: the questions come from other processes."""
    server, loop, ready = server or Server(), asyncio.new_event_loop(), threading.Event()
    runners: list[web.AppRunner] = []

    async def start() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", server.chat)
        if hasattr(server, "complete"):
            app.router.add_post("/v1/completions", server.complete)
        runner = web.AppRunner(app)
        runners.append(runner)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        ready.set()

    async def stop() -> None:
        await runners[0].cleanup()

    thread = threading.Thread(target=lambda: (loop.run_until_complete(start()), loop.run_forever()))
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@contextmanager
def cluster() -> Generator[Any]:
    """A head of one core on this machine, to which nodes can be added."""
    from ray.cluster_utils import Cluster

    nodes: Any = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    try:
        yield nodes
    finally:
        nodes.shutdown()


def another(nodes: Any) -> Any:
    node = nodes.add_node(**NODE)
    nodes.wait_for_nodes()
    return node


def workers(node: Any) -> list[int]:
    """Processes that a node's raylet started."""
    raylet = node.all_processes["raylet"][0].process.pid
    listed = Path(f"/proc/{raylet}/task").glob("*/children")
    return [int(pid) for path in listed for pid in path.read_text().split()]


def die(nodes: Any, node: Any) -> None:
    """As a machine does, with all that runs on it: without their raylet workers go on for seconds."""
    found = workers(node)
    assert found
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    nodes.remove_node(node, allow_graceful=False)
