"""The gateway as a whole: put together, listening, following routes, reloaded, drained.

`start` runs it inside somebody's event loop; processes that do nothing else are the matter of `processes`. It
ignores what happens on a connection (inbound, relay) and how the store is filled (indexing).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

from understudy.config import Config, resolve_secret
from understudy.errors import AddressError, InputError, StoreError
from understudy.gateway.following import follow_routes
from understudy.gateway.inbound import Inbound
from understudy.gateway.indexing import price_of
from understudy.gateway.keys import KeyRing
from understudy.gateway.limits import Purses
from understudy.gateway.logs import log_call
from understudy.gateway.plane import Plane
from understudy.gateway.recorder import Listener, Recorder
from understudy.gateway.routing import build_table
from understudy.gateway.spans import SpanExporter, exporter_of
from understudy.gateway.upstream import Upstream
from understudy.traffic.redact import redactor_of
from understudy.traffic.segments import SegmentWriter
from understudy.traffic.store import Store, open_store

BACKLOG = 1024
DRAIN_S = 30.0
"""Time given to exchanges in flight when the gateway is stopped."""


class RunningGateway:
    """A gateway that listens. `stop` must be awaited in the loop that started it."""

    def __init__(
        self,
        plane: Plane,
        server: asyncio.Server,
        address: Address,
        store: Store,
        config: Config,
    ) -> None:
        self.host = address.host
        self.port = address.port
        self.plane = plane
        self._server = server
        self._store = store
        self._config = config
        self._following = plane.loop.create_task(follow_routes(plane, config, store))

    @property
    def url(self) -> str:
        """The base URL for a client."""
        return url_of(Address(self.host, self.port))

    async def reload(self, config: Config) -> list[str]:
        """Take up another config without losing a connection; returns what stays as it is until a restart.

        Calls in flight go on where they were sent. Raises as `start` does, and then nothing has changed.
        """
        plane = self.plane
        before = plane.table.upstreams
        upstreams = upstreams_of(config, before)
        keys = plane.keys or keys_of(config, self._store) if config.gateway.require_key else None
        rows = await asyncio.to_thread(self._store.routes)
        staying = await asyncio.to_thread(self._store.staying)
        table = build_table(config, upstreams, rows, staying, plane.table)
        redactor_of(config.redact, config.path("."))
        spans, old_spans = exporter_of(config), plane.spans
        recorder = recorder_of(config, plane.recorder.writer, listeners_of(config, keys, spans))
        self._following.cancel()
        plane.take(config.gateway, table, recorder, keys, spans)
        for name, upstream in before.items():
            if upstreams.get(name) is not upstream:
                upstream.close()
        stay, self._config = fixed_changes(self._config, config), config
        self._following = plane.loop.create_task(follow_routes(plane, config, self._store))
        if old_spans is not None:
            await asyncio.to_thread(old_spans.close)
        return stay

    async def stop(self, grace_s: float = DRAIN_S) -> None:
        """Stop listening, let what is in flight end (for ``grace_s`` seconds), close the record log."""
        self._following.cancel()
        self._server.close()
        await self.plane.drain(grace_s)
        await self.plane.recorder.durable()
        await asyncio.sleep(0)
        self.plane.close()
        await asyncio.to_thread(self.plane.recorder.writer.close)
        await asyncio.gather(self._following, return_exceptions=True)
        if self.plane.keys is not None:
            with contextlib.suppress(StoreError):  # what is not given back counts as spent
                await self.plane.keys.purses.close()
        if self.plane.spans is not None:
            await asyncio.to_thread(self.plane.spans.close)
        await asyncio.to_thread(self._store.close)


class Address(NamedTuple):
    """Where to listen; port 0 takes a free one."""

    host: str
    port: int


def url_of(address: Address) -> str:
    """The base URL for clients of a gateway that listens there."""
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"http://{host}:{address.port}/v1"


def parse_address(listen: str) -> Address:
    """HOST:PORT or [IPV6]:PORT. Raises InputError."""
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise InputError(
            f"cannot listen on {listen!r}",
            expected="HOST:PORT, e.g. 127.0.0.1:8080; port 0 takes a free one",
            next_step="understudy up --listen 127.0.0.1:8080",
        )
    return Address(host.strip("[]"), int(port))


def bind(address: Address, *, shared: bool) -> socket.socket:
    """A bound socket; ``shared`` lets other processes bind the same port. Raises AddressError."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _cannot_listen(address, error) from error
    sock.setblocking(False)
    return sock


def _cannot_listen(address: Address, error: OSError) -> AddressError:
    used = error.errno == errno.EADDRINUSE
    return AddressError(
        f"cannot listen on {address.host}:{address.port}: {error.strerror or error}",
        expected="a free port" if used else "an address of this machine",
        next_step="stop the other program or use --listen HOST:PORT"
        if used
        else "use --listen 127.0.0.1:8080",
    )


def upstreams_of(config: Config, known: Mapping[str, Upstream] | None = None) -> dict[str, Upstream]:
    """Every endpoint of the config with its secret; one of the ``known`` where nothing about it has changed.

    Raises InputError for a missing secret.
    """
    upstreams: dict[str, Upstream] = {}
    for name, endpoint in config.endpoints.items():
        secret = resolve_secret(endpoint.api_key, config.path("."))
        upstream = (known or {}).get(name)
        if upstream is None or upstream.made_of != (endpoint, secret):
            upstream = Upstream(name, endpoint, secret)
        upstream.breaker.settings(config.gateway.break_after, config.gateway.rest_s)
        upstreams[name] = upstream
    return upstreams


def recorder_of(config: Config, writer: SegmentWriter, listeners: Sequence[Listener]) -> Recorder:
    """The recorder that a config asks for. Raises InputError for a salt that is not there."""
    without_texts = [name for name, alias in config.aliases.items() if alias.record == "metadata"]
    return Recorder(
        writer,
        config.gateway.record,
        without_texts=without_texts,
        redactor=redactor_of(config.redact, config.path(".")),
        told=listeners,
    )


def listeners_of(config: Config, keys: KeyRing | None, spans: SpanExporter | None) -> list[Listener]:
    """Who is told of each finished call, beside the record log."""
    told: list[Listener] = []
    if keys is not None:
        told.append(lambda call, _: keys.purses.charge(call))
    if spans is not None:
        told.append(lambda call, done: spans.tell(call, done.traceparent))
    if config.telemetry.log_calls:
        told.append(lambda call, _: log_call(call))
    return told


def keys_of(config: Config, store: Store) -> KeyRing:
    """The callers' keys, with what they may spend."""
    return KeyRing(store, Purses(store, lambda: price_of(config)))


def fixed_changes(before: Config, after: Config) -> list[str]:
    """Fields that differ and are read at the start alone."""
    fields = (
        "gateway.listen",
        "gateway.processes",
        "store.url",
        "store.segments",
        "store.on_full",
        "dashboard",
    )
    return [field for field in fields if attrgetter(field)(before) != attrgetter(field)(after)]


async def start(config: Config, *, sock: socket.socket | None = None) -> RunningGateway:
    """Run a gateway in this event loop; it records to segments but indexes nothing (`indexing` does).

    ``sock`` is a bound socket to listen on in place of `[gateway] listen`. Raises AddressError, StoreError
    and InputError.
    """
    upstreams = upstreams_of(config)
    redactor_of(config.redact, config.path("."))
    spans = exporter_of(config)
    store = open_store(config.store.url, config.path("."))
    table = build_table(config, upstreams, store.routes(), store.staying())
    listener = sock or bind(parse_address(config.gateway.listen), shared=False)
    writer = SegmentWriter(
        config.path(config.store.segments),
        strict=config.gateway.record == "strict",
        on_full=config.store.on_full,
    )
    loop = asyncio.get_running_loop()
    keys = keys_of(config, store) if config.gateway.require_key else None
    recorder = recorder_of(config, writer, listeners_of(config, keys, spans))
    plane = Plane(config.gateway, table, recorder, keys, loop)
    plane.spans = spans
    server = await loop.create_server(lambda: Inbound(plane), sock=listener, backlog=BACKLOG)
    plane.start()
    host, port = listener.getsockname()[:2]
    return RunningGateway(plane, server, Address(host, port), store, config)
