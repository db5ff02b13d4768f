"""The upstreams gateway tests talk to."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from faulty_upstream import FaultyUpstream


@pytest.fixture
async def upstream() -> AsyncIterator[FaultyUpstream]:
    server = FaultyUpstream()
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def second() -> AsyncIterator[FaultyUpstream]:
    server = FaultyUpstream()
    await server.start()
    yield server
    await server.stop()
