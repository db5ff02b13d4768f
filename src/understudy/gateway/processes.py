"""`understudy up`: the gateway as processes of its own, from the first signal to the last record.

One process, or several that share the port (SO_REUSEPORT) and nothing else; the indexer always apart. A
worker that dies is started again. SIGHUP has the config read again, by all of them, with no connection lost;
a config with a fault changes nothing. It ignores what a gateway does (app).
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection as Pipe
from multiprocessing.context import SpawnProcess
from typing import NamedTuple, cast

import msgspec
import uvloop

from understudy.config import Config
from understudy.errors import UnderstudyError
from understudy.gateway import logs
from understudy.gateway.app import Address, RunningGateway, bind, parse_address, start, upstreams_of, url_of
from understudy.gateway.indexing import IndexerProcess, check_prices
from understudy.traffic.redact import redactor_of
from understudy.traffic.store import open_store

WATCH_S = 1.0
"""How often dead workers are looked for."""

_log = logging.getLogger("understudy.gateway")
_SPAWN = multiprocessing.get_context("spawn")


def up(read: Reader, *, ready: Callable[[str], None] | None = None) -> None:
    """Run the gateway and its indexer until SIGINT or SIGTERM, then drain and index what is left.

    ``read`` gives the config, at the start and at each SIGHUP; it is called in other processes as well, so it
    must be picklable. ``ready`` is told the base URL once connections are taken. Raises ConfigError,
    AddressError, StoreError and InputError before anything listens.
    """
    config = _checked(read())
    logs.set_up(config.telemetry)
    address = parse_address(config.gateway.listen)
    open_store(config.store.url, config.path(".")).close()
    indexer = IndexerProcess(config)
    listener = bind(address, shared=False)
    try:
        if config.gateway.processes == 1:
            indexer.start()
            uvloop.run(_serve(config, listener, ready or _nobody, _Reload(read, indexer.reload)))
        else:
            listener = _share(listener)
            indexer.start()
            workers = _Workers(config, Address(address.host, listener.getsockname()[1]), read, indexer.reload)
            workers.run(ready or _nobody)
    finally:
        listener.close()
        indexer.stop()


Reader = Callable[[], Config]


def _checked(config: Config) -> Config:
    """A config with which a gateway and an indexer can start. Raises InputError."""
    parse_address(config.gateway.listen)
    upstreams_of(config)
    redactor_of(config.redact, config.path("."))
    check_prices(config)
    return config


def _nobody(url: str) -> None:
    del url


def _no_indexer(config: Config) -> None:
    """Of several processes none has the indexer; their parent tells it."""
    del config


class _Reload(NamedTuple):
    """What SIGHUP does to one process."""

    read: Reader
    then: Callable[[Config], None]

    async def into(self, running: RunningGateway) -> None:
        """Read the config again; one with a fault is logged and changes nothing."""
        try:
            config = await asyncio.to_thread(lambda: _checked(self.read()))
            stay = await running.reload(config)
        except UnderstudyError as error:
            _log.error("the config stays as it was: %s", error)
            return
        logs.set_up(config.telemetry)
        _log.info("the config was read again")
        for field in stay:
            _log.warning("%s has changed and is only read at the start: restart to have it", field)
        await asyncio.to_thread(self.then, config)


def _share(listener: socket.socket) -> socket.socket:
    """The same address bound again in a way that workers can share; it was just shown to be free."""
    host, port = listener.getsockname()[:2]
    listener.close()
    return bind(Address(host, port), shared=True)


async def _serve(
    config: Config,
    listener: socket.socket,
    ready: Callable[[str], None],
    reload: _Reload,
    orphaned: int | None = None,
) -> None:
    """One process's gateway until a signal, or until the file descriptor ``orphaned`` becomes readable."""
    running = await start(config, sock=listener)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    reloads: set[asyncio.Task[None]] = set()  # a loop alone would not keep them

    def again() -> None:
        task = loop.create_task(reload.into(running))
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    loop.add_signal_handler(signal.SIGHUP, again)
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    if orphaned is not None:
        loop.add_reader(orphaned, stop.set)
    ready(running.url)
    await stop.wait()
    await running.stop()


class _Workers:
    """Several processes on one port, kept alive."""

    def __init__(
        self, config: Config, address: Address, read: Reader, reload_indexer: Callable[[Config], None]
    ) -> None:
        self._read = read
        self._reload_indexer = reload_indexer
        self._address = address
        self._config = self._with_port(config)
        self._stop = threading.Event()
        self._reload = False
        self._workers: dict[SpawnProcess, Pipe] = {}
        """Each with the pipe on which it says that it is ready."""

    def run(self, ready: Callable[[str], None]) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: self._stop.set())
        signal.signal(signal.SIGHUP, lambda number, frame: setattr(self, "_reload", True))
        for _ in range(self._config.gateway.processes):
            self._start()
        try:
            for pipe in self._workers.values():
                _await_ready(pipe)
            ready(url_of(self._address))
            while not self._stop.wait(WATCH_S):
                if self._reload:
                    self._reload = False
                    self._read_again()
                self._revive()
        finally:
            for worker in self._workers:
                worker.terminate()
            for worker in self._workers:
                worker.join()

    def _with_port(self, config: Config) -> Config:
        """The config with the port that was taken where it asked for any."""
        host = f"[{self._address.host}]" if ":" in self._address.host else self._address.host
        gateway = msgspec.structs.replace(config.gateway, listen=f"{host}:{self._address.port}")
        return msgspec.structs.replace(config, gateway=gateway)

    def _read_again(self) -> None:
        """Have every worker read the config; one with a fault is logged and none is told."""
        try:
            config = _checked(self._read())
        except UnderstudyError as error:
            _log.error("the config stays as it was: %s", error)
            return
        self._config = self._with_port(config)
        logs.set_up(config.telemetry)
        self._reload_indexer(config)
        for worker in self._workers:
            if worker.is_alive() and worker.pid is not None:
                os.kill(worker.pid, signal.SIGHUP)

    def _start(self) -> None:
        ours, theirs = cast(tuple[Pipe, Pipe], _SPAWN.Pipe(duplex=False))
        worker = _SPAWN.Process(
            target=work, args=(self._config, self._read, theirs), name="understudy-gateway"
        )
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


def work(config: Config, read: Reader, pipe: Pipe) -> None:
    """One of several processes; says on ``pipe`` that it is ready (an empty string) or why it is not."""
    logs.set_up(config.telemetry)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to reload
    parent = multiprocessing.parent_process()
    listener = bind(parse_address(config.gateway.listen), shared=True)
    try:
        orphaned = parent.sentinel if parent else None
        reload = _Reload(read, _no_indexer)
        uvloop.run(_serve(config, listener, lambda _: pipe.send(""), reload, orphaned))
    except UnderstudyError as error:
        pipe.send(str(error))
