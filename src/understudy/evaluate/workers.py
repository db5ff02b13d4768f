"""Workers that share a queue of calls, and end together.

It ignores what they do: replay, benchmarks and performance hand in a coroutine function.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager

PATIENT = 20_000
"""New objects after which the garbage collector looks through the young ones (Python: 700): what thousands of
calls in flight hold is no garbage, and looking for some among it took a tenth of an evaluation's CPU."""


async def side_by_side(work: Callable[[], Awaitable[None]], count: int) -> None:
    """Run ``count`` (at least one) of ``work`` until all have ended.

    The first error cancels the others and is raised as it is, not inside an ExceptionGroup: callers tell
    users of an EndpointError, not of a group.
    """
    with _patient_collector():
        await _all(work, count)


async def _all(work: Callable[[], Awaitable[None]], count: int) -> None:
    workers = [asyncio.ensure_future(work()) for _ in range(max(1, count))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


@contextmanager
def _patient_collector() -> Generator[None]:
    before = gc.get_threshold()
    if before[0]:  # else somebody has switched it off
        gc.set_threshold(max(before[0], PATIENT), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
