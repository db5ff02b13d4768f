"""What each key may still spend in this process: shares drawn from the store ahead of need.

Calls are counted before they begin, tokens and money when they are over. So of requests no more than the
limit are ever let through, by however many processes; of tokens and money the limit is exceeded by the calls
that were in flight when it was reached, and by no others. A process holds back from the others at most a
sixteenth of what was left (traffic.allowances). Memory grows with the keys that have limits. It ignores who
shows a key (keys) and what a call costs: prices arrive as a function.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping

from understudy.errors import StoreError
from understudy.gateway.refusal import Refusal
from understudy.traffic.allowances import KINDS, Kind, Limits, period_of
from understudy.traffic.keys import Key
from understudy.traffic.record import Call
from understudy.traffic.store import Price, Store

LOW = 0.5
"""The next share is drawn when this part of the last one is left."""
RETRY_S = 1.0
"""Where nothing was left the store is asked again after this long: another process may have given back."""

_WORDS: dict[Kind, str] = {
    "requests_per_minute": "requests a minute",
    "tokens_per_minute": "tokens a minute",
    "usd_per_day": "US dollars a day",
    "usd_per_month": "US dollars a month",
}
_log = logging.getLogger("understudy.gateway")
_now: Callable[[], float] = time.time


class _Share:
    """What is left of one limit's share; negative when calls spent more than was drawn."""

    def __init__(self, kind: Kind, limit: float) -> None:
        self.kind: Kind = kind
        self.limit = limit
        self.left = 0.0
        self.drawn = 0.0
        self.period = period_of(kind, 0.0)
        self.empty_until = 0.0
        """Nothing was left when the store was last asked, and it is not asked before this."""

    def roll(self, now: float) -> None:
        """Into the period that holds ``now``; what was overspent is owed by it."""
        if not self.period.begins_at <= now < self.period.ends_at:
            self.period = period_of(self.kind, now)
            self.left, self.drawn, self.empty_until = min(self.left, 0.0), 0.0, 0.0

    @property
    def suffices(self) -> bool:
        return self.left >= 1 if self.kind == "requests_per_minute" else self.left > 0

    def wanted(self, now: float) -> bool:
        """Whether more will be needed soon and may be there."""
        return self.left < self.drawn * LOW and now >= self.empty_until


class Purse:
    """The shares of one key. It belongs to the event loop; only the store is asked in threads."""

    def __init__(self, key: Key, store: Store) -> None:
        self.key = key
        self._store = store
        self._shares = {kind: _Share(kind, key.limits.of(kind)) for kind in KINDS if key.limits.of(kind)}
        self._drawing = asyncio.Lock()
        self._refilling: asyncio.Task[None] | None = None

    def admit(self) -> bool:
        """Count a call if its key may make one; False when the store must be asked first (`ask`)."""
        now = _now()
        for share in self._shares.values():
            share.roll(now)
            if not share.suffices:
                return False
        if "requests_per_minute" in self._shares:
            self._shares["requests_per_minute"].left -= 1
        self._refill(now)
        return True

    async def ask(self) -> None:
        """Count a call, drawing what it needs. Raises Refusal: 429, or 503 for a store out of reach."""
        async with self._drawing:
            while not self.admit():
                share = next(share for share in self._shares.values() if not share.suffices)
                if _now() < share.empty_until:
                    raise self._refusal(share)
                try:
                    await self._draw(share)
                except StoreError as error:
                    message = f"the key's limits cannot be checked: {error.value}"
                    raise Refusal(503, "store_unreachable", message) from error

    def charge(self, spent: Mapping[Kind, float]) -> None:
        """Take what a call turned out to spend."""
        now = _now()
        for kind, amount in spent.items():
            if kind in self._shares:
                self._shares[kind].roll(now)
                self._shares[kind].left -= amount
        self._refill(now)

    async def give_back(self) -> None:
        """Return what was drawn and not spent, enter what was overspent. Raises StoreError."""
        async with self._drawing:
            for share in self._shares.values():
                share.roll(_now())
                owed, share.left, share.drawn = -share.left, 0.0, 0.0
                if owed:
                    await self._from_store(share, limit=0.0, owed=owed)

    def _refill(self, now: float) -> None:
        """Draw in the background what will be needed soon, so that calls seldom wait for the store."""
        if self._refilling is None and any(share.wanted(now) for share in self._shares.values()):
            self._refilling = asyncio.get_running_loop().create_task(self._draw_wanted())

    async def _draw_wanted(self) -> None:
        try:
            async with self._drawing:
                for share in self._shares.values():
                    if share.wanted(_now()):
                        await self._draw(share)
        except StoreError as error:
            _log.warning("nothing can be drawn for the limits of key %s: %s", self.key.id, error)
        finally:
            self._refilling = None

    async def _draw(self, share: _Share) -> None:
        """One draw; calls may go on spending meanwhile, and the period may end."""
        period, owed = share.period, max(0.0, -share.left)
        drawn = await self._from_store(share, limit=share.limit, owed=owed)
        share.left += owed
        if share.period == period:
            share.left += drawn
            share.drawn = drawn
            share.empty_until = 0.0 if drawn else _now() + RETRY_S

    async def _from_store(self, share: _Share, *, limit: float, owed: float) -> float:
        place = (self.key.id, share.kind, share.period.number)
        return await asyncio.to_thread(self._store.draw, *place, limit=limit, owed=owed)

    def _refusal(self, share: _Share) -> Refusal:
        wait = max(1, math.ceil(share.period.ends_at - _now()))
        limit = f"{share.limit:,.2f}".rstrip("0").rstrip(".")
        return Refusal(
            429,
            "budget_exceeded" if share.kind.startswith("usd") else "rate_limit_exceeded",
            f"the key {self.key.id} ({self.key.name}) has used up its {limit} {_WORDS[share.kind]}; "
            f"there is more in {wait} s",
            param=share.kind,
            headers=((b"retry-after", b"%d" % wait),),
        )


class Purses:
    """The purses of keys that have limits; ``price`` is made when the first limit in money is met."""

    def __init__(self, store: Store, price: Callable[[], Price]) -> None:
        self._store = store
        self._make_price = price
        self._price: Price | None = None
        self._purses: dict[str, Purse] = {}
        self.unpriced = 0
        """Calls under a limit in money whose model has no price: they counted as nothing."""

    def of(self, key_id: str) -> Purse | None:
        """The purse of a key; None for one without limits."""
        return self._purses.get(key_id)

    async def learn(self, key: Key) -> None:
        """Take notice of a living key's limits. Raises StoreError."""
        if self._price is None and (key.limits.usd_per_day or key.limits.usd_per_month):
            self._price = await asyncio.to_thread(self._make_price)
        known = self._purses.get(key.id)
        if (known.key.limits if known else Limits()) == key.limits:
            return
        if key.limits == Limits():
            del self._purses[key.id]
        else:
            self._purses[key.id] = Purse(key, self._store)
        if known is not None:
            await known.give_back()

    async def forget(self, key_id: str) -> None:
        """The key was revoked. Raises StoreError."""
        purse = self._purses.pop(key_id, None)
        if purse is not None:
            await purse.give_back()

    def charge(self, call: Call) -> None:
        """Take what a finished call spent from its key's purse."""
        purse = self._purses.get(call.caller)
        if purse is None or call.usage is None:
            return
        spent: dict[Kind, float] = {"tokens_per_minute": call.usage.total_tokens}
        if purse.key.limits.usd_per_day or purse.key.limits.usd_per_month:
            spent["usd_per_day"] = spent["usd_per_month"] = self._cost(call)
        purse.charge(spent)

    def _cost(self, call: Call) -> float:
        cost = self._price(call) if self._price else None
        self.unpriced += cost is None
        return cost.usd if cost else 0.0

    async def close(self) -> None:
        """Give everything back. Raises StoreError."""
        for key_id in list(self._purses):
            await self.forget(key_id)
