"""How long work tells how far it is. It ignores who watches: the CLI draws bars, the drill its own."""

from __future__ import annotations

import time
from typing import Protocol


class Progress(Protocol):
    """Told how far a step is; ``note`` is a few words for a person."""

    def __call__(self, step: str, done: int, total: int, note: str = "") -> None: ...


def silent(step: str, done: int, total: int, note: str = "") -> None:
    """Progress that nobody watches."""


class TokenSpeed:
    """Tokens per second of training, pauses for checks left out."""

    def __init__(self) -> None:
        self.tokens, self.seconds, self.since = 0.0, 0.0, time.monotonic()

    def add(self, tokens: float) -> None:
        now = time.monotonic()
        self.tokens, self.seconds, self.since = self.tokens + tokens, self.seconds + now - self.since, now

    def pause(self) -> None:
        self.since = time.monotonic()

    def __str__(self) -> str:
        return f"{self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s"
