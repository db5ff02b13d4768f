"""A regular expression that somebody else wrote, on a text that a model wrote, within a second.

Python's engine backtracks: `(a+)+$` on thirty letters takes minutes, and a text can be made to cost that.
What takes longer than SECONDS has not matched. It ignores patterns of our own: those do not backtrack far.

Source: signal.setitimer; the engine of `re` looks for signals while it runs (CPython, _sre).
"""

from __future__ import annotations

import re
import signal
import threading
from functools import lru_cache
from types import FrameType

from understudy.errors import InputError

SECONDS = 1.0
MOST_CHARACTERS = 100_000
"""Where no signal can be had (another thread, another system) longer texts are not searched at all."""


class _OutOfTimeError(Exception):
    pass


@lru_cache(maxsize=512)
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"not a regular expression: {pattern[:200]!r}: {error}") from error


def found(pattern: str, text: str) -> bool:
    """Whether ``pattern`` matches anywhere in ``text``. Raises InputError for what is no pattern."""
    search = _compiled(pattern)
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        return len(text) <= MOST_CHARACTERS and search.search(text) is not None
    before = signal.signal(signal.SIGALRM, _end)
    try:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        return search.search(text) is not None
    except _OutOfTimeError:
        return False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def _end(number: int, frame: FrameType | None) -> None:
    raise _OutOfTimeError
