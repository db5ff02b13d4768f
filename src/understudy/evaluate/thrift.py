"""Paying for less: answers kept by request hash, calls spaced out, and a purse that is never overdrawn.

Endpoints wrap endpoints here, so whoever asks need not know. It ignores which calls are worth making (replay)
and what they cost (the price is handed in).
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from understudy.endpoint import Endpoint
from understudy.protocol import Answer, Json, Usage

Price = Callable[[Usage], float | None]
"""US dollars of one call; None when nobody knows."""
CACHED = "understudy_cached"
"""Set in the body of an answer that was not paid for again."""


class _Kept(msgspec.Struct, frozen=True, kw_only=True):
    body: Json
    status: int
    ttft_s: float
    total_s: float
    attempts: int


class CachedEndpoint:
    """Asks ``inner`` once for each distinct request; later ones are answered from ``folder``.

    The key is the SHA-256 of route, model and the whole request, so a changed parameter is a new question.
    Times and attempts are those of the call that was made; errors are not kept. A file that cannot be read is
    asked for again.
    """

    def __init__(self, inner: Endpoint, folder: Path) -> None:
        self.name = inner.name
        self._inner = inner
        self._folder = folder

    async def chat(self, request: Mapping[str, Any]) -> Answer:
        return await self._answer("chat", request, self._inner.chat)

    async def complete(self, request: Mapping[str, Any]) -> Answer:
        return await self._answer("complete", request, self._inner.complete)

    async def _answer(
        self,
        route: str,
        request: Mapping[str, Any],
        ask: Callable[[Mapping[str, Any]], Awaitable[Answer]],
    ) -> Answer:
        path = self._path(route, request)
        kept = _read(path)
        if kept is not None:
            body = {**kept.body, CACHED: True}
            return Answer(kept.status, body, kept.ttft_s, kept.total_s, kept.attempts)
        answer = await ask(request)
        _write(path, _Kept(**answer._asdict()))
        return answer

    def _path(self, route: str, request: Mapping[str, Any]) -> Path:
        asked = msgspec.json.encode([route, self.name, dict(request)], order="sorted")
        digest = hashlib.sha256(asked).hexdigest()
        return self._folder / digest[:2] / f"{digest}.json"


def _read(path: Path) -> _Kept | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Kept)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _write(path: Path, kept: _Kept) -> None:
    """Whole or not at all; answers are private, so only the owner may read them."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.touch(mode=0o600)
    part.write_bytes(msgspec.json.encode(kept))
    part.replace(path)


class PacedEndpoint:
    """Starts at most ``per_minute`` calls a minute, evenly spaced, whoever asks side by side.

    ``clock`` (seconds) and ``sleep`` are the event loop's unless given.
    """

    def __init__(
        self,
        inner: Endpoint,
        per_minute: float,
        *,
        clock: Callable[[], float] | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.name = inner.name
        self._inner = inner
        self._gap = 60.0 / per_minute
        self._next = 0.0
        self._clock = clock
        self._sleep = sleep

    async def chat(self, request: Mapping[str, Any]) -> Answer:
        await self._turn()
        return await self._inner.chat(request)

    async def complete(self, request: Mapping[str, Any]) -> Answer:
        await self._turn()
        return await self._inner.complete(request)

    async def _turn(self) -> None:
        now = self._clock() if self._clock else asyncio.get_running_loop().time()
        mine = max(now, self._next)
        self._next = mine + self._gap
        if mine > now:
            await self._sleep(mine - now)


class Purse:
    """Money for one candidate: what is spent, what calls in flight may cost, and whether one more fits."""

    def __init__(self, limit: float, price: Price) -> None:
        self.spent = 0.0
        self._limit = limit
        self._price = price
        self._held: dict[str, float] = {}
        self._reserved = 0.0
        """Sum of what is held."""
        self._dearest = 0.0

    def reserve(self, key: str, expected: Usage | None) -> bool:
        """Hold what a call is expected to cost: the recorded call's tokens at this price, or the dearest call
        so far where that is more. False, holding nothing, when it does not fit."""
        guess = max(self._price(expected or Usage()) or 0.0, self._dearest)
        if self.spent + self._reserved + guess > self._limit:
            return False
        self._held[key] = guess
        self._reserved += guess
        return True

    def charge(self, usd: float) -> None:
        """Count what something besides the calls has cost: the judge."""
        self.spent += usd

    def settle(self, key: str, usage: Usage | None, attempts: int) -> None:
        """Put what a call cost in the place of what was held; every attempt counts as billed. A dearer call
        than any before raises what is held for those in flight."""
        self._reserved -= self._held.pop(key, 0.0)
        paid = (self._price(usage or Usage()) or 0.0) * max(attempts, 1)
        self.spent += paid
        if paid > self._dearest:
            self._dearest = paid
            self._held = {other: max(held, paid) for other, held in self._held.items()}
            self._reserved = math.fsum(self._held.values())
