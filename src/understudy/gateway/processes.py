"""`understudy up`: the gateway as processes of its own, from the first signal to the last record.

One process, or several that share the port (SO_REUSEPORT) and nothing else; the indexer always apart. A
worker that dies is started again. It ignores what a gateway does (app).
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import signal
import socket
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection as Pipe
from multiprocessing.context import SpawnProcess
from typing import cast

import msgspec
import uvloop

from understudy.config import Config
from understudy.errors import UnderstudyError
from understudy.gateway.app import Address, bind, parse_address, start, upstreams_of, url_of
from understudy.gateway.indexing import IndexerProcess, check_prices
from understudy.gateway.routing import check_supported
from understudy.traffic.redact import redactor_of
from understudy.traffic.store import open_store

WATCH_S = 1.0
"""How often dead workers are looked for."""

_log = logging.getLogger("understudy.gateway")
_SPAWN = multiprocessing.get_context("spawn")


def up(config: Config, *, ready: Callable[[str], None] | None = None) -> None:
    """Run the gateway and its indexer until SIGINT or SIGTERM, then drain and index what is left.

    ``ready`` is told the base URL once connections are taken. Raises AddressError, StoreError and InputError
    before anything listens.
    """
    check_supported(config)
    upstreams_of(config)
    redactor_of(config.redact, config.path("."))
    address = parse_address(config.gateway.listen)
    check_prices(config)
    open_store(config.store.url, config.path(".")).close()
    indexer = IndexerProcess(config)
    listener = bind(address, shared=False)
    try:
        if config.gateway.processes == 1:
            indexer.start()
            uvloop.run(_serve(config, listener, ready or _nobody))
        else:
            listener = _share(listener)
            indexer.start()
            _Workers(config, Address(address.host, listener.getsockname()[1])).run(ready or _nobody)
    finally:
        listener.close()
        indexer.stop()


def _nobody(url: str) -> None:
    del url


def _share(listener: socket.socket) -> socket.socket:
    """The same address bound again in a way that workers can share; it was just shown to be free."""
    host, port = listener.getsockname()[:2]
    listener.close()
    return bind(Address(host, port), shared=True)


async def _serve(
    config: Config, listener: socket.socket, ready: Callable[[str], None], orphaned: int | None = None
) -> None:
    """One process's gateway until a signal, or until the file descriptor ``orphaned`` becomes readable."""
    running = await start(config, sock=listener)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    if orphaned is not None:
        loop.add_reader(orphaned, stop.set)
    ready(running.url)
    await stop.wait()
    await running.stop()


class _Workers:
    """Several processes on one port, kept alive."""

    def __init__(self, config: Config, address: Address) -> None:
        host = f"[{address.host}]" if ":" in address.host else address.host
        gateway = msgspec.structs.replace(config.gateway, listen=f"{host}:{address.port}")
        self._config = msgspec.structs.replace(config, gateway=gateway)
        self._address = address
        self._stop = threading.Event()
        self._workers: dict[SpawnProcess, Pipe] = {}
        """Each with the pipe on which it says that it is ready."""

    def run(self, ready: Callable[[str], None]) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: self._stop.set())
        for _ in range(self._config.gateway.processes):
            self._start()
        try:
            for pipe in self._workers.values():
                _await_ready(pipe)
            ready(url_of(self._address))
            while not self._stop.wait(WATCH_S):
                self._revive()
        finally:
            for worker in self._workers:
                worker.terminate()
            for worker in self._workers:
                worker.join()

    def _start(self) -> None:
        ours, theirs = cast(tuple[Pipe, Pipe], _SPAWN.Pipe(duplex=False))
        worker = _SPAWN.Process(target=work, args=(self._config, theirs), name="understudy-gateway")
        worker.start()
        theirs.close()
        self._workers[worker] = ours

    def _revive(self) -> None:
        for worker in [worker for worker in self._workers if not worker.is_alive()]:
            _log.warning(
                "gateway process %s ended with code %s; starting another", worker.pid, worker.exitcode
            )
            self._workers.pop(worker).close()
            self._start()


def _await_ready(pipe: Pipe) -> None:
    try:
        said = pipe.recv()
    except EOFError:
        said = "a gateway process ended before it was ready; its traceback is above"
    if said:
        raise UnderstudyError(said)


def work(config: Config, pipe: Pipe) -> None:
    """One of several processes; says on ``pipe`` that it is ready (an empty string) or why it is not."""
    parent = multiprocessing.parent_process()
    listener = bind(parse_address(config.gateway.listen), shared=True)
    try:
        orphaned = parent.sentinel if parent else None
        uvloop.run(_serve(config, listener, lambda _: pipe.send(""), orphaned))
    except UnderstudyError as error:
        pipe.send(str(error))
