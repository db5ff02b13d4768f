"""Whether an upstream is worth asking: after failures in a row it rests, then one call tries it.

Each process learns for itself. It ignores what a failure is and who else may answer (relay).
"""

from __future__ import annotations


class Breaker:
    """The state of one upstream; times are loop time, in seconds."""

    def __init__(self, break_after: int = 0, rest_s: float = 10.0) -> None:
        self._break_after = break_after
        self._rest_s = rest_s
        self._failures = 0
        self._rests_until = 0.0

    def settings(self, break_after: int, rest_s: float) -> None:
        """Go by other settings; what was learnt stays."""
        self._break_after, self._rest_s = break_after, rest_s

    def admits(self, now: float) -> bool:
        """Whether to ask it. After a rest only one caller is told yes; its call decides how it goes on."""
        if not self._broken:
            return True
        if now < self._rests_until:
            return False
        self._rests_until = now + self._rest_s
        return True

    def rests(self, now: float) -> bool:
        """Whether it is passed over now."""
        return self._broken and now < self._rests_until

    def answered(self) -> None:
        """It answered, if only to refuse: it is alive."""
        self._failures = 0

    def failed(self, now: float) -> None:
        """It could not be reached, failed, or said nothing in time."""
        self._failures += 1
        if self._broken:
            self._rests_until = now + self._rest_s

    @property
    def _broken(self) -> bool:
        return 0 < self._break_after <= self._failures
