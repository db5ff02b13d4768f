"""The indexer beside the gateway: a process of its own, so that filling the store never delays an answer.

It is started with the gateway, started again when it dies, and ends when all records are in the store. In
between it has segments compressed and deleted (traffic.retention). It ignores what indexing does
(traffic.indexer) and what calls cost (catalog.prices).
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
import threading
import time
from multiprocessing.context import SpawnProcess
from multiprocessing.process import BaseProcess

from understudy.catalog.facts import catalog_of
from understudy.catalog.prices import pricer
from understudy.config import Config
from understudy.errors import StoreError
from understudy.gateway import logs
from understudy.traffic.indexer import Indexer
from understudy.traffic.retention import Retention
from understudy.traffic.store import Price, open_store

INTERVAL_S = 0.5
CARE_S = 5.0
"""How often rotated segments are compressed and what is past its time is looked for."""
RESTART_S = 2.0
"""Wait after a failure before the indexer tries again."""
STOP_S = 60.0
"""Longest wait for the last records to enter the store when the gateway stops."""

_log = logging.getLogger("understudy.indexer")


def check_prices(config: Config) -> None:
    """Raises InputError for an overlay, or vendors' lists, that the indexer could not read."""
    if config.catalog.overlay or config.path(config.catalog.live).exists():
        catalog_of(config)


def price_of(config: Config) -> Price:
    """What calls cost by the catalog, vendors' lists and the overlay. Raises InputError."""
    return pricer(catalog_of(config), config.endpoints)


class IndexerProcess:
    """The child process; `start` it, `stop` it after the record log is closed."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._stopping = threading.Event()
        self._process: SpawnProcess | None = None
        self._watch = threading.Thread(target=self._keep_running, name="indexer-watch", daemon=True)

    def start(self) -> None:
        """Start the child and keep it running."""
        self._process = self._spawn()
        self._watch.start()

    def reload(self, config: Config) -> None:
        """Go on by another config: the child ends after its batch and another takes over."""
        self._config = config
        if self._process is not None:
            self._process.terminate()

    def stop(self) -> None:
        """Let the child index what is left, then wait for it; nothing to do when it was never started."""
        if self._process is None:
            return
        self._stopping.set()
        self._watch.join()
        process = self._process
        process.terminate()
        process.join(STOP_S)
        if process.is_alive():
            _log.warning("the indexer did not finish within %g s; it goes on at the next start", STOP_S)
            process.kill()
            process.join()
        self._index_rest()

    def _index_rest(self) -> None:
        """Index what a child left that died, or that ended for another config, before we told it to."""
        config, told = self._config, threading.Event()
        told.set()
        try:
            with open_store(config.store.url, config.path(".")) as store:
                left = Indexer(config.path(config.store.segments), store).lag_bytes
            if left:
                index(config, told)
        except StoreError as error:
            _log.warning("the last records enter the store at the next start: %s", error)

    def _spawn(self) -> SpawnProcess:
        process = multiprocessing.get_context("spawn").Process(
            target=index_until_told, args=(self._config,), name="understudy-indexer", daemon=True
        )
        process.start()
        return process

    def _keep_running(self) -> None:
        while not self._stopping.wait(RESTART_S):
            if self._process is not None and not self._process.is_alive():
                if self._process.exitcode:
                    _log.warning("the indexer ended with code %s; starting it again", self._process.exitcode)
                self._process = self._spawn()


def index_until_told(config: Config) -> None:
    """Index until SIGTERM, or until the gateway is gone; what is left is indexed before the end."""
    logs.set_up(config.telemetry)
    stop = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the gateway tells us
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_orphaned, args=(parent, stop), daemon=True).start()
    while True:
        try:
            index(config, stop)
            return
        except StoreError as error:
            _log.warning("the store cannot be filled, trying again: %s", error)
            if stop.wait(RESTART_S):
                return


def _orphaned(parent: BaseProcess, stop: threading.Event) -> None:
    parent.join()
    stop.set()


def index(config: Config, stop: threading.Event) -> None:
    """Index and take care of segments until ``stop`` is set; what is left is indexed before the end.

    Raises StoreError.
    """
    price = price_of(config)
    segments = config.path(config.store.segments)
    with open_store(config.store.url, config.path(".")) as store:
        indexer = Indexer(segments, store, price)
        retention = Retention(segments, store, config.store)
        while not stop.is_set():
            indexer.run(stop, INTERVAL_S, for_s=CARE_S)
            with contextlib.suppress(FileNotFoundError):  # another indexer of this folder was faster
                retention.run_once(time.time(), stop)
        indexer.run_once()
