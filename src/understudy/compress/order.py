"""Which rows each step learns from: shuffled epochs, own and generic texts by their ratio.

Everything follows from the seed and a step's number, so that a resumed run reads what it would have read. It
ignores what the rows hold (corpus).
"""

from __future__ import annotations

from understudy.compress.corpus import shuffled


class Order:
    """Which rows each step learns from: shuffled epochs, own and generic texts by their ratio."""

    def __init__(self, own: int, generic: int, per_step: int, share: float, seed: int) -> None:
        share = share if generic and own else float(generic > 0)
        first = round(per_step * (1 - share))
        self._parts = [_Epochs(0, own, first, seed)] if own else []
        if generic:
            self._parts.append(_Epochs(own, generic, per_step - first, seed + 1))

    def step(self, number: int) -> list[int]:
        """Indices of the rows of a step, counted from 0; generic ones come behind the own."""
        return [index for part in self._parts for index in part.step(number)]


class _Epochs:
    def __init__(self, first: int, rows: int, per_step: int, seed: int) -> None:
        self.first, self.rows, self.per_step, self.seed = first, rows, per_step, seed
        self._orders: dict[int, list[int]] = {}

    def step(self, number: int) -> list[int]:
        start = number * self.per_step
        return [self.first + self._at(i) for i in range(start, start + self.per_step)]

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self.rows)
        if epoch not in self._orders:
            # a step may straddle two
            self._orders = {e: order for e, order in self._orders.items() if e >= epoch - 1}
            self._orders[epoch] = shuffled(range(self.rows), self.seed * 1_000_003 + epoch)
        return self._orders[epoch][place]
