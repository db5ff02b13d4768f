"""Callers' keys: who may use the gateway, when the config requires a key.

A key is looked up in the store once (which compares in constant time) and then known here by a digest of 256
bits; revoked keys are dropped and changed limits taken up at the next poll, within a second. It ignores how
limits are kept (limits).
"""

from __future__ import annotations

import asyncio
from hashlib import blake2b

from understudy.gateway.limits import Purse, Purses
from understudy.gateway.refusal import Refusal
from understudy.gateway.request import Request
from understudy.traffic.store import Store

KEY_HEADERS = frozenset({b"authorization", b"x-api-key"})
"""Where a caller may show a key, in lower case."""
_KNOWN_KEYS = 10_000
"""Keys remembered at most; beyond it the memory starts anew."""


class KeyRing:
    """Keys seen so far, by hash, and the purses of those that have limits."""

    def __init__(self, store: Store, purses: Purses) -> None:
        self.purses = purses
        self._store = store
        self._ids: dict[bytes, str] = {}

    def known(self, secret: bytes) -> str | None:
        """Id of a key seen before; None when the store must be asked."""
        return self._ids.get(_digest(secret))

    async def look_up(self, secret: bytes) -> str:
        """Id of a key. Raises Refusal (401) for none, a wrong or a revoked one; StoreError."""
        key = await asyncio.to_thread(self._store.lookup_key, secret.decode("latin-1")) if secret else None
        if key is None:
            raise unauthorised(bool(secret))
        await self.purses.learn(key)
        if len(self._ids) >= _KNOWN_KEYS:
            self._ids.clear()
        self._ids[_digest(secret)] = key.id
        return key.id

    def purse(self, caller: str) -> Purse | None:
        """What a key may spend; None when it has no limits."""
        return self.purses.of(caller)

    async def refresh(self) -> None:
        """Forget revoked keys, take up changed limits. Raises StoreError."""
        if not self._ids:
            return
        keys = await asyncio.to_thread(self._store.keys)
        living = {key.id: key for key in keys if key.revoked is None}
        seen = set(self._ids.values())
        self._ids = {digest: name for digest, name in self._ids.items() if name in living}
        for key_id in seen:
            await (self.purses.learn(living[key_id]) if key_id in living else self.purses.forget(key_id))


def _digest(secret: bytes) -> bytes:
    """What a key is known by in this process alone, so the quickest sound hash will do (RFC 7693)."""
    return blake2b(secret, digest_size=32).digest()


def secret_of(request: Request) -> bytes:
    """The key a caller shows: ``Authorization: Bearer`` or ``x-api-key``; empty when there is none."""
    scheme, _, secret = request.header(b"authorization").partition(b" ")
    return secret.strip() if scheme.lower() == b"bearer" else request.header(b"x-api-key")


def unauthorised(shown: bool, *, close: bool = False) -> Refusal:
    """401 for a key that is not good, or (``shown`` false) for none; ``close`` where the body is not read."""
    problem = "the key is not known or was revoked" if shown else "a key is required"
    message = f"{problem}; send an Understudy key as `Authorization: Bearer us-…`"
    headers = ((b"www-authenticate", b"Bearer"),)
    return Refusal(401, "invalid_api_key", message, close=close, headers=headers)
