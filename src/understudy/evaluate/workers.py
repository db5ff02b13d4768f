"""Workers that share a queue of calls, and end together.

It ignores what they do: replay, benchmarks and performance hand in a coroutine function.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


async def side_by_side(work: Callable[[], Awaitable[None]], count: int) -> None:
    """Run ``count`` (at least one) of ``work`` until all have ended.

    The first error cancels the others and is raised as it is, not inside an ExceptionGroup: callers tell
    users of an EndpointError, not of a group.
    """
    workers = [asyncio.ensure_future(work()) for _ in range(max(1, count))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
