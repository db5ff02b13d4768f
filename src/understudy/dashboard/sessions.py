"""Who is signed in, and the tokens that tie a form to the page it was on.

A session is 256 random bits in a cookie; only those that gave the admin key are remembered here, so leaving
or restarting ends them. It ignores HTTP (guard).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable

LIFETIME_S = 12 * 3600.0
MOST_SESSIONS = 1000
MOST_FAILURES = 10
FAILURE_WINDOW_S = 60.0
"""After so many wrong keys from one address within a minute, it has to wait."""
MOST_ADDRESSES = 1000


class Sessions:
    """Sessions of one dashboard. ``admin_key`` empty: nobody needs to sign in."""

    def __init__(self, admin_key: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.needed = bool(admin_key)
        self._key = _digest(admin_key)
        self._secret = secrets.token_bytes(32)
        self._until: OrderedDict[str, float] = OrderedDict()
        self._failures: OrderedDict[str, list[float]] = OrderedDict()
        self._clock = clock

    def new(self) -> str:
        """An id for a visitor who has none."""
        return secrets.token_urlsafe(32)

    def may_read(self, session: str) -> bool:
        """Whether this visitor may see the pages."""
        return not self.needed or self._until.get(session, 0.0) > self._clock()

    def sign_in(self, key: str) -> str | None:
        """A new session for the right key, else None. Keys are compared in constant time."""
        if not self.needed or not hmac.compare_digest(_digest(key), self._key):
            return None
        session = self.new()
        self._until[session] = self._clock() + LIFETIME_S
        while len(self._until) > MOST_SESSIONS:
            self._until.popitem(last=False)
        return session

    def sign_out(self, session: str) -> None:
        self._until.pop(session, None)

    def failed(self, address: str) -> None:
        """Remember a wrong key."""
        self._failures.setdefault(address, []).append(self._clock())
        self._failures.move_to_end(address)
        while len(self._failures) > MOST_ADDRESSES:
            self._failures.popitem(last=False)

    def must_wait(self, address: str) -> bool:
        """Whether too many wrong keys came from there of late."""
        since = self._clock() - FAILURE_WINDOW_S
        recent = [at for at in self._failures.get(address, ()) if at > since]
        if not recent:
            self._failures.pop(address, None)
        else:
            self._failures[address] = recent
        return len(recent) >= MOST_FAILURES

    def form_token(self, session: str) -> str:
        """What a form of this session must carry; nobody else can compute it."""
        return hmac.new(self._secret, session.encode(), hashlib.sha256).hexdigest()

    def form_is_ours(self, session: str, token: str) -> bool:
        return hmac.compare_digest(self.form_token(session).encode(), token.encode("utf-8", "replace"))


def _digest(key: str) -> bytes:
    # equal lengths, so that comparing tells nothing of the key's own
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()
