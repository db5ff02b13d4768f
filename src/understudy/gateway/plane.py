"""What all connections of one gateway process share: routes, recorder, counters, limits, and the clock.

Deadlines are plain numbers looked at a few times a second, so that waiting costs the hot path nothing. It
ignores protocols (inbound, upstream) and what an exchange does (relay).
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from understudy.config import Gateway
from understudy.gateway.keys import KeyRing
from understudy.gateway.limits import Purse
from understudy.gateway.metrics import Metrics
from understudy.gateway.recorder import Recorder
from understudy.gateway.refusal import Refusal
from understudy.gateway.routing import Table
from understudy.gateway.spans import SpanExporter

SWEEP_S = 0.1
"""How often deadlines of exchanges are looked at, at least."""
SLOW_SWEEP_S = 1.0
"""How often idle connections are looked at."""


class InFlight(Protocol):
    """An exchange, as the sweep sees it."""

    def tick(self, now: float) -> None:
        """Look at the deadlines (``now``: loop time)."""
        ...

    def stop(self) -> None:
        """The process ends and cannot wait any longer: give up and keep the record."""
        ...


class Client(Protocol):
    """A client's connection, as the sweep sees it."""

    def tick(self, now: float) -> None: ...
    def drain(self) -> None:
        """Close as soon as nothing is in flight."""
        ...

    def abort(self) -> None:
        """Close at once."""
        ...


class Plane:
    """The shared state of one process; it belongs to one event loop."""

    def __init__(
        self,
        settings: Gateway,
        table: Table,
        recorder: Recorder,
        keys: KeyRing | None,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.settings = settings
        self.table = table
        self.recorder = recorder
        self.keys = keys
        """None where no key is required."""
        self.spans: SpanExporter | None = None
        """None where no collector is told."""
        self.loop = loop
        self.metrics = Metrics()
        self.exchanges: set[InFlight] = set()
        self.clients: set[Client] = set()
        self.draining = False
        self._timer: asyncio.TimerHandle | None = None
        self._next_slow_sweep = 0.0

    def start(self) -> None:
        """Begin sweeping."""
        self._timer = self.loop.call_later(self._interval_s, self._sweep)

    def take(
        self,
        settings: Gateway,
        table: Table,
        recorder: Recorder,
        keys: KeyRing | None,
        spans: SpanExporter | None,
    ) -> None:
        """Go on with what another config says; every exchange looks here, so those in flight follow."""
        self.settings, self.table, self.recorder, self.keys = settings, table, recorder, keys
        self.spans = spans

    @property
    def _interval_s(self) -> float:
        settings = self.settings
        limits = (settings.first_byte_timeout_s, settings.idle_timeout_s, settings.total_timeout_s)
        return max(0.01, min(SWEEP_S, min(limits) / 4))

    def close(self) -> None:
        """Stop sweeping and close every connection."""
        if self._timer is not None:
            self._timer.cancel()
        for client in list(self.clients):
            client.abort()
        for upstream in self.table.upstreams.values():
            upstream.close()

    async def drain(self, grace_s: float) -> None:
        """Let what is in flight end; after ``grace_s`` seconds give up on the rest."""
        self.draining = True
        for client in list(self.clients):
            client.drain()
        deadline = self.loop.time() + grace_s
        while self.exchanges and self.loop.time() < deadline:  # noqa: ASYNC110 - an event would cost each call
            await asyncio.sleep(0.01)
        for exchange in list(self.exchanges):
            exchange.stop()

    async def counted(self, purse: Purse) -> None:
        """Ask for a call's share of its key's limits. Raises Refusal."""
        try:
            await purse.ask()
        except Refusal as refusal:
            self.metrics.refused_by_limit[refusal.param or "unknown"] += 1
            raise

    def metrics_text(self) -> bytes:
        """The Prometheus page."""
        now = self.loop.time()
        self.metrics.resting = {name: u.breaker.rests(now) for name, u in self.table.upstreams.items()}
        self.metrics.unpriced = self.keys.purses.unpriced if self.keys else 0
        self.metrics.spans = (self.spans.sent, self.spans.dropped) if self.spans else (0, 0)
        self.metrics.connections_opened = sum(u.opened for u in self.table.upstreams.values())
        return self.metrics.text(len(self.exchanges), len(self.clients), self.recorder.writer)

    def _sweep(self) -> None:
        now = self.loop.time()
        for exchange in list(self.exchanges):
            exchange.tick(now)
        if now >= self._next_slow_sweep:
            self._next_slow_sweep = now + SLOW_SWEEP_S
            for client in list(self.clients):
                client.tick(now)
            for upstream in self.table.upstreams.values():
                upstream.sweep(now)
        self._timer = self.loop.call_later(self._interval_s, self._sweep)
