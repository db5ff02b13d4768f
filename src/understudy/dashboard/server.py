"""Running the dashboard on an address: as a task of a running loop, or as a process of its own.

It ignores pages (app).
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path

from aiohttp import web

from understudy.config import Config, Dashboard, resolve_secret
from understudy.dashboard.app import make_app
from understudy.dashboard.calendar import Calendar
from understudy.dashboard.desk import Desk
from understudy.dashboard.guard import is_loopback
from understudy.dashboard.orders import Moves
from understudy.dashboard.sessions import Sessions
from understudy.errors import AddressError, InputError


class RunningDashboard:
    """A dashboard that answers; `stop` ends it."""

    def __init__(self, runner: web.AppRunner, desk: Desk, calendar: Calendar | None, url: str) -> None:
        self._runner = runner
        self._desk = desk
        self._calendar = calendar
        self.url = url
        """Address of the first page, without a slash at the end."""

    async def warm(self) -> None:
        """Read beforehand what the first reader would wait for."""
        await asyncio.to_thread(self._desk.warm)
        if self._calendar is not None:
            await asyncio.to_thread(self._calendar.rows, self._desk)

    async def stop(self) -> None:
        await self._runner.cleanup()
        if self._calendar is not None:
            await asyncio.to_thread(self._calendar.close)
        self._desk.close()


async def start(config: Config, *, moves: Moves | None = None) -> RunningDashboard:
    """Listen on ``[dashboard] listen`` and answer; port 0 takes a free one.

    ``moves`` is what the buttons of the rollouts page do; without it there are none. Raises InputError for an
    address beyond loopback without an admin key, AddressError when it cannot be bound, StoreError.
    """
    settings = config.dashboard or Dashboard()
    host, _, port = settings.listen.rpartition(":")
    key = resolve_secret(settings.admin_key, Path(config.root))
    _refuse_open(settings, host, key)
    desk = Desk(config)
    calendar = Calendar(moves.calendar) if moves else None
    app = make_app(desk, Sessions(key), host, moves, calendar)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0)
    try:
        await runner.setup()
        await web.TCPSite(runner, host.strip("[]"), int(port)).start()
    except (OSError, OverflowError) as error:
        await runner.cleanup()
        desk.close()
        raise AddressError(
            f"cannot listen on {settings.listen}: {error}",
            expected="a free HOST:PORT",
            next_step="understudy dashboard --listen 127.0.0.1:0 takes any free port",
        ) from error
    return RunningDashboard(runner, desk, calendar, f"http://{host}:{runner.addresses[0][1]}")


def serve_dashboard(
    config: Config, ready: Callable[[str], None] | None = None, *, moves: Moves | None = None
) -> None:
    """`start`, call ``ready`` with the URL, and answer until SIGINT or SIGTERM."""
    asyncio.run(_serve(config, ready, moves))


async def _serve(config: Config, ready: Callable[[str], None] | None, moves: Moves | None) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    running = await start(config, moves=moves)
    if ready is not None:
        ready(running.url)
    await running.warm()
    await stopped.wait()
    await running.stop()


def _refuse_open(settings: Dashboard, host: str, key: str) -> None:
    if not key and not is_loopback(host):
        raise InputError(
            f"[dashboard] listen = {settings.listen!r} shows all recorded traffic to whoever reaches it",
            expected="an admin_key, or a loopback address such as 127.0.0.1:8081",
            next_step='admin_key = "env:UNDERSTUDY_ADMIN_KEY" in understudy.toml',
        )
