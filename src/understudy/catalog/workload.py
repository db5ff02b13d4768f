"""Recorded calls as planning weighs them: sorted and summed once, then asked by every model.

Five thousand models over a hundred thousand calls would be half a billion looks at single calls; sums and
bisection make it a few per model. It ignores texts, and everything about models.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate
from math import sqrt
from statistics import stdev

import msgspec

from understudy.catalog.prices import Rates, Sums, sums_of, tier_usd
from understudy.protocol import CallShape, Modality

MONTH_S = 86_400 * 30.44
"""A twelfth of a year, in seconds."""
Z90 = 1.2816
"""90th percentile of the standard normal distribution."""


class Group:
    """Calls that need the same modalities and features."""

    def __init__(self, modalities: frozenset[Modality], features: frozenset[str], calls: Sequence[CallShape]):
        self.modalities = modalities
        self.features = features
        self.calls = sorted(calls, key=lambda c: c.usage.total_tokens)
        self._needs = [c.usage.total_tokens for c in self.calls]
        self._answers: dict[float, list[float]] = {}
        self._broken: dict[tuple[float, float, float], int] = {}

    def too_long(self, context: float, bound: float) -> int:
        """Calls whose prompt and answer, ``bound`` times as many tokens as recorded, exceed ``context``."""
        return len(self.calls) - bisect_right(self._needs, context / bound)

    def too_verbose(self, limit: float, bound: float) -> int:
        """Calls whose answer, or the limit they ask for, exceeds what a model writes at most."""
        if bound not in self._answers:
            self._answers[bound] = sorted(_answer_need(c, bound) for c in self.calls)
        return len(self.calls) - bisect_right(self._answers[bound], limit)

    def too_either(self, context: float, limit: float, bound: float) -> int:
        """Calls that break for at least one of the two reasons, each counted once."""
        asked = (context, limit, bound)
        if asked not in self._broken:
            long = self.calls[bisect_right(self._needs, context / bound) :]
            both = sum(_answer_need(c, bound) > limit for c in long)
            self._broken[asked] = len(long) + self.too_verbose(limit, bound) - both
        return self._broken[asked]


class Ledger:
    """Some calls in order of their prompts' length, with running sums: what they cost at a price is a few
    multiplications for each of its tiers."""

    def __init__(self, entries: Sequence[tuple[int, Sums]]) -> None:
        self._prompts = [prompt for prompt, _ in entries]
        self._running = list(accumulate((sums for _, sums in entries), _plus, initial=Sums(*[0] * 7)))

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def tokens(self) -> int:
        return sum(self._running[-1])

    def usd(self, rates: Rates) -> float:
        """What all calls together cost: the sum of `prices.charge` over them."""
        bounds = [bisect_right(self._prompts, tier.above) for tier in rates.tiers[1:]]
        ends = [*bounds, len(self._prompts)]
        total = rates.per_call * len(self._prompts)
        start = 0
        for tier, end in zip(rates.tiers, ends, strict=True):
            if end > start:
                total += tier_usd(_minus(self._running[end], self._running[start]), tier)
            start = end
        return total


class Workload:
    """What an alias's calls amount to. ``now`` (Unix seconds) ends the window that began with the first."""

    def __init__(self, shapes: Iterable[CallShape], now: float) -> None:
        self.calls = sorted(shapes, key=lambda c: c.usage.prompt_tokens)
        self._entries = [(c.usage.prompt_tokens, sums_of(c.usage)) for c in self.calls]
        self._all = Ledger(self._entries)
        self.groups = _groups(self.calls)
        self._first = min((c.at for c in self.calls), default=now)
        self.window_s = max(now - self._first, 86_400.0)
        """At least a day: a burst of a minute says nothing of a month."""

    def __len__(self) -> int:
        return len(self.calls)

    @property
    def tokens(self) -> int:
        return self._all.tokens

    @property
    def months(self) -> float:
        return self.window_s / MONTH_S

    @cached_property
    def completed_tasks(self) -> int:
        """Tasks somebody called completed; a call without a task id is a task of its own."""
        named = {c.task for c in self.calls if c.completed and c.task}
        return len(named) + sum(bool(c.completed) and not c.task for c in self.calls)

    @cached_property
    def tasks(self) -> int:
        """Tasks seen, counted likewise."""
        return len({c.task for c in self.calls if c.task}) + sum(not c.task for c in self.calls)

    def usd(self, rates: Rates) -> float:
        """What all calls together cost: the sum of `prices.charge` over them."""
        return self._all.usd(rates)

    def usd_uncached(self, rates: Rates) -> float:
        """The same if nothing had been read from or written to a cache."""
        tiers = tuple(msgspec.structs.replace(t, cached=t.input, cache_write=t.input) for t in rates.tiers)
        return self._all.usd(msgspec.structs.replace(rates, tiers=tiers))

    def usd_batched(self, rates: Rates, batch: Rates) -> float:
        """The same if the calls that do not stream (nobody watches their answers grow) went by batch."""
        return self._all.usd(rates) - self._patient.usd(rates) + self._patient.usd(batch)

    @property
    def batchable(self) -> float:
        """Share of calls that do not stream."""
        return len(self._patient) / len(self.calls) if self.calls else 0.0

    def usd_band(self, rates: Rates) -> tuple[float, float] | None:
        """The 10th and 90th percentile of a month's cost, from the traffic's own variation.

        The window is cut into up to 20 blocks of at least a day; a month is the sum of as many, taken as
        independent, so its spread is that of the blocks times the root of their number (normal
        approximation). None below five blocks: too few to know how days differ.
        """
        if len(self._blocks) < 5:
            return None
        costs = [block.usd(rates) for block in self._blocks]
        blocks = len(costs) / self.months
        middle, spread = sum(costs) / len(costs) * blocks, stdev(costs) * sqrt(blocks)
        return max(0.0, middle - Z90 * spread), middle + Z90 * spread

    @cached_property
    def _blocks(self) -> list[Ledger]:
        """The calls by block of time, empty ones included."""
        count = min(20, int(self.window_s // 86_400))
        if count < 5:
            return []
        length = self.window_s / count
        parted: list[list[tuple[int, Sums]]] = [[] for _ in range(count)]
        for call, entry in zip(self.calls, self._entries, strict=True):
            parted[min(count - 1, max(0, int((call.at - self._first) // length)))].append(entry)
        return [Ledger(part) for part in parted]

    @cached_property
    def _patient(self) -> Ledger:
        waiting = (e for c, e in zip(self.calls, self._entries, strict=True) if "stream" not in c.features)
        return Ledger(list(waiting))

    @cached_property
    def _minutes(self) -> list[tuple[int, int]]:
        """Tokens and calls of each minute, the busiest first."""
        minutes: dict[int, list[int]] = {}
        for call in self.calls:
            sums = minutes.setdefault(int(call.at // 60), [0, 0])
            sums[0] += call.usage.total_tokens
            sums[1] += 1
        return sorted(((tokens, calls) for tokens, calls in minutes.values()), reverse=True)

    @property
    def peak_tokens_per_minute(self) -> int:
        return self._minutes[0][0] if self._minutes else 0

    def too_fast(self, tokens_per_minute: float) -> int:
        """Calls in minutes that hold more tokens than a vendor allows."""
        return sum(calls for tokens, calls in self._minutes if tokens > tokens_per_minute)

    def needing(self, feature: str) -> int:
        """Calls that use a feature; ``max_tokens`` stands for a limit, ``any`` for all."""
        if feature == "any":
            return len(self.calls)
        return self._uses.get(feature, 0)

    @cached_property
    def _uses(self) -> dict[str, int]:
        uses = {"max_tokens": sum(bool(c.max_tokens) for c in self.calls)}
        for group in self.groups:
            for feature in group.features:
                uses[feature] = uses.get(feature, 0) + len(group.calls)
        return uses

    @cached_property
    def answer_tokens(self) -> int:
        return sum(c.usage.completion_tokens for c in self.calls)


def _plus(a: Sums, b: Sums) -> Sums:
    # written out: this runs once for each recorded call
    return Sums(a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4], a[5] + b[5], a[6] + b[6])


def _minus(a: Sums, b: Sums) -> Sums:
    return Sums(a[0] - b[0], a[1] - b[1], a[2] - b[2], a[3] - b[3], a[4] - b[4], a[5] - b[5], a[6] - b[6])


def _answer_need(call: CallShape, bound: float) -> float:
    # what was written may take more tokens elsewhere; the limit asked for is sent as it is
    return max(call.usage.completion_tokens * bound, call.max_tokens)


def _groups(calls: Iterable[CallShape]) -> list[Group]:
    grouped: dict[tuple[frozenset[Modality], frozenset[str]], list[CallShape]] = {}
    for call in calls:
        grouped.setdefault((call.modalities, call.features), []).append(call)
    return [Group(modalities, features, same) for (modalities, features), same in grouped.items()]
