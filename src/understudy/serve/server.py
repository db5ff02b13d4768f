"""Running the app on an address: as a task of a running loop, or as a process of its own.

It ignores routes (app) and how models are loaded (models).
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path

from aiohttp import web

from understudy.config import Serve
from understudy.errors import AddressError
from understudy.serve.app import make_app
from understudy.serve.models import Models


class RunningServe:
    """A server that answers; `stop` ends it and unloads its models."""

    def __init__(self, runner: web.AppRunner, models: Models, url: str) -> None:
        self._runner = runner
        self.models = models
        self.url = url
        """Base URL for clients, up to and including ``/v1``."""

    async def stop(self) -> None:
        await self._runner.cleanup()


async def start(settings: Serve, root: Path) -> RunningServe:
    """Listen and answer; models are loaded when first asked for. Port 0 takes a free one.

    ``root`` is the folder that relative model paths start from. Raises AddressError when the address cannot
    be bound, InputError when a model's package is not installed.
    """
    host, _, port = settings.listen.rpartition(":")
    # without handler_cancellation aiohttp lets a handler run on when its client has gone
    models = Models(settings, root)
    runner = web.AppRunner(make_app(models), access_log=None, handler_cancellation=True, shutdown_timeout=2.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, host.strip("[]"), int(port)).start()
    except (OSError, OverflowError) as error:
        await runner.cleanup()
        raise AddressError(
            f"cannot listen on {settings.listen}: {error}",
            expected="a free HOST:PORT",
            next_step="understudy serve --listen 127.0.0.1:0 takes any free port",
        ) from error
    bound = runner.addresses[0][1]
    return RunningServe(runner, models, f"http://{host}:{bound}/v1")


def serve(settings: Serve, root: Path, ready: Callable[[str], None] | None = None) -> None:
    """`start`, call ``ready`` with the URL, and answer until SIGINT or SIGTERM."""
    asyncio.run(_serve(settings, root, ready))


async def _serve(settings: Serve, root: Path, ready: Callable[[str], None] | None) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    running = await start(settings, root)
    if ready is not None:
        ready(running.url)
    await stopped.wait()
    await running.stop()
