"""A trial as operators have it: `understudy up` as a process, scripted models behind it over real sockets."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from aiohttp import ClientSession, web

from understudy.traffic.routes import Route
from understudy.traffic.store import Store, open_store

Script = Callable[[dict[str, Any]], dict[str, Any]]
"""A chat request to the message that answers it."""

CONFIG = """
[gateway]
listen = "127.0.0.1:0"
[endpoints.vendor]
base_url = "http://127.0.0.1:{port}/vendor/v1"
[endpoints.local]
base_url = "http://127.0.0.1:{port}/local/v1"
[endpoints.court]
base_url = "http://127.0.0.1:{port}/court/v1"
[aliases.chat]
model = "vendor/old"
[rollout]
{rollout}
"""


class Answered(NamedTuple):
    """What a client got."""

    call: str
    """Key of its record."""
    model: str
    """ENDPOINT/MODEL that answered."""
    message: dict[str, Any]


class Stage:
    """The processes and what they were asked."""

    def __init__(self, folder: Path, url: str, asked: dict[str, list[dict[str, Any]]]) -> None:
        self.folder = folder
        self.url = url
        self.asked = asked
        """Requests by endpoint."""

    def store(self) -> Store:
        return open_store("sqlite:///understudy.db", self.folder)

    def route(self) -> Route:
        with self.store() as store:
            found = store.route("chat")
        assert found is not None
        return found

    def run(self, *arguments: str) -> str:
        """A command of the product; returns what it printed."""
        import subprocess

        done = subprocess.run(
            [sys.executable, "-m", "understudy", *arguments], cwd=self.folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    async def send(self, tasks: Sequence[str], **more: Any) -> list[Answered]:
        async with ClientSession() as session:

            async def one(task: str) -> Answered:
                body = {"model": "chat", "messages": [{"role": "user", "content": task}], **more}
                async with session.post(
                    f"{self.url}/chat/completions", json=body, headers={"x-task-id": task}
                ) as answer:
                    assert answer.status == 200, await answer.text()
                    said = (await answer.json())["choices"][0]["message"]
                    head = answer.headers
                    return Answered(head["x-understudy-call"], head["x-understudy-model"], said)

            return await asyncio.gather(*(one(task) for task in tasks))

    async def until(self, true: Callable[[], bool], seconds: float = 100.0) -> None:
        async with asyncio.timeout(seconds):
            while not true():  # noqa: ASYNC110 - another process fills the store
                await asyncio.sleep(0.2)


def says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


@asynccontextmanager
async def real_trial(folder: Path, rollout: str, scripts: dict[str, Script]) -> AsyncGenerator[Stage]:
    """`understudy up` in ``folder`` with a `[rollout]`, and models by the names of their endpoints."""
    asked: dict[str, list[dict[str, Any]]] = {name: [] for name in scripts}

    async def chat(request: web.Request) -> web.Response:
        name, body = request.match_info["name"], await request.json()
        asked[name].append(body)
        message = scripts[name](body)
        finish = "tool_calls" if message.get("tool_calls") else "stop"
        choice = {"index": 0, "message": message, "finish_reason": finish}
        usage = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
        return web.json_response({"model": body["model"], "choices": [choice], "usage": usage})

    app = web.Application()
    app.router.add_post("/{name}/v1/chat/completions", chat)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
    (folder / "understudy.toml").write_text(CONFIG.format(port=port, rollout=rollout))
    command = [sys.executable, "-m", "understudy", "up", "--json"]
    up = await asyncio.create_subprocess_exec(*command, cwd=folder, stdout=asyncio.subprocess.PIPE)
    try:
        assert up.stdout is not None
        ready = json.loads(await asyncio.wait_for(up.stdout.readline(), 20))
        yield Stage(folder, ready["url"], asked)
    finally:
        up.send_signal(signal.SIGTERM)
        await up.wait()
        await runner.cleanup()


def counted(answers: Sequence[Answered]) -> Counter[str]:
    return Counter(each.model for each in answers)
