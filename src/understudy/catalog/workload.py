"""Recorded calls as planning weighs them: sorted and summed once, then asked by every model.

Five thousand models over a hundred thousand calls would be half a billion looks at single calls; sums of
products and bisection make it a few per model. It ignores texts, and everything about models.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from math import fsum, sqrt
from operator import attrgetter, mul
from typing import NamedTuple

import msgspec

from understudy.catalog.prices import Rates, Sums, is_detailed, sums_of
from understudy.protocol import CallShape, Modality, Usage

MONTH_S = 86_400 * 30.44
"""A twelfth of a year, in seconds."""
Z90 = 1.2816
"""90th percentile of the standard normal distribution."""
_PLAIN, _CACHED, _SAID = (Sums._fields.index(name) for name in ("plain", "cached", "said"))
_NOTHING = frozenset[str]()
LEAST_BLOCKS = 5
"""Blocks of time below which their spread says nothing."""


class Group:
    """Calls that need the same modalities and features."""

    def __init__(self, modalities: frozenset[Modality], features: frozenset[str], calls: Sequence[CallShape]):
        self.modalities = modalities
        self.features = features
        self._sizes = sorted(
            (c.usage.prompt_tokens + c.usage.completion_tokens, c.usage.completion_tokens, c.max_tokens)
            for c in calls
        )
        self._needs = [total for total, _, _ in self._sizes]
        self._answers: dict[float, tuple[list[float], list[float]]] = {}

    def __len__(self) -> int:
        return len(self._sizes)

    def too_long(self, context: float, bound: float) -> int:
        """Calls whose prompt and answer, ``bound`` times as many tokens as recorded, exceed ``context``."""
        return len(self) - bisect_right(self._needs, context / bound)

    def too_verbose(self, limit: float, bound: float) -> int:
        """Calls whose answer, or the limit they ask for, exceeds what a model writes at most."""
        _, rising = self._answers_of(bound)
        return len(self) - bisect_right(rising, limit)

    def too_either(self, context: float, limit: float, bound: float) -> int:
        """Calls that break for at least one of the two reasons, each counted once."""
        beside, _ = self._answers_of(bound)
        long = beside[bisect_right(self._needs, context / bound) :]
        return len(long) + self.too_verbose(limit, bound) - sum(need > limit for need in long)

    def _answers_of(self, bound: float) -> tuple[list[float], list[float]]:
        """What each answer needs, beside the calls' whole needs, and rising. What was written may take more
        tokens elsewhere; the limit asked for is sent as it is."""
        if bound not in self._answers:
            beside = [said * bound if said * bound > asked else asked for _, said, asked in self._sizes]
            self._answers[bound] = (beside, sorted(beside))
        return self._answers[bound]


class Broken(NamedTuple):
    """Calls of a group that are too long for a model."""

    calls: int
    """Each counted once."""
    reasons: dict[str, int]
    """context and output to the calls that break for it."""


def _broken(group: Group, context: int, limit: int, bound: float) -> Broken:
    reasons: dict[str, int] = {}
    if context:
        reasons["context"] = group.too_long(context, bound)
    if limit:
        reasons["output"] = group.too_verbose(limit, bound)
    both = all(reasons.values()) and len(reasons) == 2
    return Broken(group.too_either(context, limit, bound) if both else sum(reasons.values()), reasons)


class Ledger:
    """Some calls, in order of their prompts' length, as columns of tokens by price.

    What they cost at a price is one sum of products: `quantities` are kept for each set of tiers asked for.
    """

    def __init__(self, prompts: Sequence[int], columns: Sequence[Sequence[int]]) -> None:
        self._prompts = prompts
        self._columns = columns
        self._quantities: dict[tuple[int, ...], tuple[int, ...]] = {}

    def part(self, places: Sequence[int]) -> Ledger:
        """The calls at these places, which rise."""
        columns = [list(map(column.__getitem__, places)) if column else column for column in self._columns]
        return Ledger(list(map(self._prompts.__getitem__, places)), columns)

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def tokens(self) -> int:
        return sum(self.quantities(())[:-1])

    def quantities(self, bounds: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens by price (`Sums`) in each tier, the first below ``bounds[0]``; the number of calls last."""
        if bounds not in self._quantities:
            edges = [0, *(bisect_right(self._prompts, bound) for bound in bounds), len(self)]
            summed = [sum(column[a:b]) for a, b in pairwise(edges) for column in self._columns]
            self._quantities[bounds] = (*summed, len(self))
        return self._quantities[bounds]

    def usd(self, rates: Rates) -> float:
        """What all calls together cost: the sum of `prices.charge` over them."""
        return sum(map(mul, self.quantities(_bounds(rates)), _row(rates)))


class Workload:
    """What an alias's calls amount to. ``now`` (Unix seconds) ends the window that began with the first."""

    def __init__(self, shapes: Iterable[CallShape], now: float) -> None:
        self.calls = sorted(shapes, key=attrgetter("usage.prompt_tokens"))
        usages = [call.usage for call in self.calls]
        self._all = Ledger([u.prompt_tokens for u in usages], _columns(usages))
        self.groups = _groups(self.calls)
        self._lengths: dict[tuple[int, int, float], list[Broken]] = {}
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
        return self.usd(msgspec.structs.replace(rates, tiers=tuple(t.uncached for t in rates.tiers)))

    def usd_said(self, rates: Rates) -> float:
        """What the answers alone cost."""
        return self.usd(
            msgspec.structs.replace(rates, tiers=tuple(t.unasked for t in rates.tiers), per_call=0.0)
        )

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
        if len(self._blocks) < LEAST_BLOCKS:
            return None
        bounds, row = _bounds(rates), _row(rates)
        costs = [sum(map(mul, block.quantities(bounds), row)) for block in self._blocks]
        blocks, mean = len(costs) / self.months, fsum(costs) / len(costs)
        deviation = sqrt(fsum((cost - mean) ** 2 for cost in costs) / (len(costs) - 1))
        middle, spread = mean * blocks, deviation * sqrt(blocks)
        return max(0.0, middle - Z90 * spread), middle + Z90 * spread

    @cached_property
    def _blocks(self) -> list[Ledger]:
        """The calls by block of time, empty ones included."""
        count = min(20, int(self.window_s // 86_400))
        if count < LEAST_BLOCKS:
            return []
        length, first = self.window_s / count, self._first
        parted: list[list[int]] = [[] for _ in range(count)]
        for place, call in enumerate(self.calls):
            # the last moment, and what a clock that ran ahead dates after it, belong to the last block
            parted[min(int((call.at - first) / length), count - 1)].append(place)
        return [self._all.part(places) for places in parted]

    @cached_property
    def _patient(self) -> Ledger:
        return self._all.part([n for n, call in enumerate(self.calls) if "stream" not in call.features])

    @cached_property
    def _minutes(self) -> list[tuple[int, int]]:
        """Tokens and calls of each minute, in no order."""
        tokens: dict[int, int] = {}
        calls: dict[int, int] = {}
        for call in self.calls:
            minute = int(call.at // 60)
            tokens[minute] = tokens.get(minute, 0) + call.usage.total_tokens
            calls[minute] = calls.get(minute, 0) + 1
        return list(zip(tokens.values(), calls.values(), strict=True))

    @property
    def peak_tokens_per_minute(self) -> int:
        return max((tokens for tokens, _ in self._minutes), default=0)

    def too_fast(self, tokens_per_minute: float) -> int:
        """Calls in minutes that hold more tokens than a vendor allows."""
        return sum(calls for tokens, calls in self._minutes if tokens > tokens_per_minute)

    def lengths(self, context: int, limit: int, bound: float) -> list[Broken]:
        """What of each group is too long for a model; 0 stands for a limit that nobody tells."""
        asked = (context, limit, bound)
        if asked not in self._lengths:
            self._lengths[asked] = [_broken(group, *asked) for group in self.groups]
        return self._lengths[asked]

    def needing(self, feature: str) -> int:
        """Calls that use a feature, or send one of `CallShape.parameters`; ``max_tokens`` stands for a limit,
        ``no_max_tokens`` and ``no_temperature`` for none."""
        if feature == "no_max_tokens":
            return len(self.calls) - self._uses["max_tokens"]
        return self._uses.get(feature, 0)

    @cached_property
    def _uses(self) -> dict[str, int]:
        uses = {"max_tokens": sum(bool(c.max_tokens) for c in self.calls)}
        for group in self.groups:
            for feature in group.features:
                uses[feature] = uses.get(feature, 0) + len(group)
        for sent, count in self._sent.items():
            for parameter in sent or ():
                uses[parameter] = uses.get(parameter, 0) + count
        sending = self.sending("temperature", "temperature=1")
        return uses | {"no_temperature": len(self.calls) - sending - self.untold}

    def sending(self, *parameters: str) -> int:
        """Calls that send one of these at least."""
        return sum(
            count for sent, count in self._sent.items() if not (sent or _NOTHING).isdisjoint(parameters)
        )

    @property
    def untold(self) -> int:
        """Calls of which nobody kept what they send."""
        return self._sent[None]

    @cached_property
    def _sent(self) -> Counter[frozenset[str] | None]:
        return Counter(call.parameters for call in self.calls)

    @cached_property
    def answer_tokens(self) -> int:
        return sum(c.usage.completion_tokens for c in self.calls)


def _columns(usages: Sequence[Usage]) -> list[Sequence[int]]:
    """Tokens of each call by price, in the order of `Sums`; an empty column where all are zero."""
    columns = [[0] * len(usages) for _ in Sums._fields]
    columns[_PLAIN] = [max(0, u.prompt_tokens - u.cached_tokens) for u in usages]
    columns[_CACHED] = [u.cached_tokens for u in usages]
    columns[_SAID] = [u.completion_tokens for u in usages]
    for place, usage in enumerate(usages):
        if is_detailed(usage):
            for column, tokens in zip(columns, sums_of(usage), strict=True):
                column[place] = tokens
    return [column if any(column) else () for column in columns]


def _bounds(rates: Rates) -> tuple[int, ...]:
    return tuple(tier.above for tier in rates.tiers[1:])


def _row(rates: Rates) -> list[float]:
    """USD for one of each of `Ledger.quantities`."""
    return [usd / 1e6 for tier in rates.tiers for usd in tier.row] + [rates.per_call]


def _groups(calls: Iterable[CallShape]) -> list[Group]:
    grouped: dict[tuple[frozenset[Modality], frozenset[str]], list[CallShape]] = {}
    for call in calls:
        grouped.setdefault((call.modalities, call.features), []).append(call)
    return [Group(modalities, features, same) for (modalities, features), same in grouped.items()]
