"""Following the store: a changed route gives a new table, a revoked key is forgotten, within a second; and
how far the indexer is behind is looked at.

The store is asked in a thread, so a slow disk or database never holds up an answer; while it cannot be
reached the last table stays in force. It ignores who changes routes (rollout).
"""

from __future__ import annotations

import asyncio
import logging

from understudy.config import Config
from understudy.errors import UserError
from understudy.gateway.plane import Plane
from understudy.gateway.routing import Table, build_table
from understudy.traffic.indexer import Indexer
from understudy.traffic.store import Store

POLL_S = 0.5
LAG_S = 2.0
"""How often it is looked how far the indexer is behind: it lists the segments' folder."""

_log = logging.getLogger("understudy.gateway")


async def follow_routes(plane: Plane, config: Config, store: Store) -> None:
    """Poll until cancelled."""
    version = -1
    lag_due = 0.0
    while True:
        try:
            current = await asyncio.to_thread(store.routes_version)
            if current != version:
                rows = await asyncio.to_thread(store.routes)
                staying = await asyncio.to_thread(store.staying)
                _take(plane, build_table(config, plane.table.upstreams, rows, staying, plane.table))
                version = current
            if plane.keys is not None:
                await plane.keys.refresh()
            if plane.loop.time() >= lag_due:
                plane.metrics.index_lag_bytes = await asyncio.to_thread(_lag, config, store)
                lag_due = plane.loop.time() + LAG_S
        except UserError as error:
            _log.warning("routes cannot be read, the last ones stay: %s", error)
        await asyncio.sleep(POLL_S)


def _lag(config: Config, store: Store) -> int:
    return Indexer(config.path(config.store.segments), store).lag_bytes


def _take(plane: Plane, table: Table) -> None:
    plane.table = table
    plane.metrics.route_faults = len(table.faults)
    for fault in table.faults:
        _log.warning("%s", fault)
