"""How long work tells how far it is. It ignores who watches: the CLI draws bars, the drill its own."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told how far a step is; ``note`` is a few words for a person."""

    def __call__(self, step: str, done: int, total: int, note: str = "") -> None: ...


def silent(step: str, done: int, total: int, note: str = "") -> None:
    """Progress that nobody watches."""
