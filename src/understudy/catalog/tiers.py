"""Classes of models (frontier, mid-range, ultra-cheap) and how your own use is spread over them.

The rule is yours (``[catalog] tiers``). A model of which some quantity is unknown is classed by what is known
and says so; one that fits no class, or fits only because nothing is known, is "between" or "unknown". It
ignores how good a model is at your work.
"""

from __future__ import annotations

import datetime as dt
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import msgspec

from understudy.catalog.facts import Catalog, ModelFacts
from understudy.catalog.prices import Rates, rates_at
from understudy.errors import InputError

BETWEEN = "between"
UNKNOWN = "unknown"
"""Of models of which nothing the rule asks is known."""
Step = Literal["day", "week", "month"]

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_NUMBER = r"\d+(?:\.\d+)?"
_CONDITION = re.compile(
    rf"\s*(?:(?P<low>{_NUMBER})\s*(?P<over><=?)\s*)?(?P<name>[a-z_]+)\s*"
    rf"(?:(?P<under>[<>]=?)\s*(?P<high>{_NUMBER}))?\s*"
)


class Condition(NamedTuple):
    """One bound, or two, on a quantity of a model: ``mmlu > 85``, ``0.10 <= usd <= 0.50``."""

    name: str
    """usd, usd_out, context, or a benchmark's first word in small letters."""
    bounds: tuple[tuple[str, float], ...]
    """Comparison and number, the quantity standing on the left."""

    def holds(self, value: float) -> bool:
        return all(_COMPARE[sign](value, bound) for sign, bound in self.bounds)


class Tiered(msgspec.Struct, frozen=True):
    """A model's class."""

    tier: str
    by: tuple[str, ...]
    """Quantities it rests on; a rule asking for more than these was decided on less."""
    without: tuple[str, ...]
    """Quantities the rule asks for and nobody tells."""


class HourLike(Protocol):
    """One hour of one target; a `traffic.hours.Hour` is one."""

    @property
    def hour(self) -> int: ...
    @property
    def target(self) -> str: ...
    @property
    def calls(self) -> int: ...
    @property
    def prompt_tokens(self) -> float: ...
    @property
    def completion_tokens(self) -> float: ...
    @property
    def cost_usd(self) -> float: ...


class TierUse(msgspec.Struct, frozen=True, kw_only=True):
    """What one class had of your traffic in one period."""

    period: str
    """First day (ISO 8601, UTC) of the day, week or month."""
    tier: str
    calls: int
    tokens: float
    usd: float
    """Of the calls that have a price."""
    share_of_calls: float
    """Of the period's, in [0, 1]; likewise those below."""
    share_of_tokens: float
    share_of_usd: float
    models: tuple[str, ...]
    """Targets in it, the busiest first."""


def parse_rules(tiers: Mapping[str, Sequence[str]]) -> dict[str, tuple[Condition, ...]]:
    """The rule of ``[catalog] tiers``. Raises InputError naming the first condition that cannot be read."""
    return {name: tuple(_condition(name, text) for text in texts) for name, texts in tiers.items()}


def tier_of(facts: ModelFacts, rates: Rates | None, rules: Mapping[str, Sequence[Condition]]) -> Tiered:
    """The first class none of whose conditions fails and at least one of which is known to hold."""
    asked = dict.fromkeys(c.name for conditions in rules.values() for c in conditions)
    known = {name: value for name in asked if (value := _quantity(facts, rates, name)) is not None}
    without = tuple(name for name in asked if name not in known)
    if not known:
        return Tiered(UNKNOWN, (), without)
    for tier, conditions in rules.items():
        decided = [c for c in conditions if c.name in known]
        if decided and all(c.holds(known[c.name]) for c in decided):
            return Tiered(tier, tuple(known), without)
    return Tiered(BETWEEN, tuple(known), without)


def tiers_over_time(
    catalog: Catalog,
    hours: Iterable[HourLike],
    rules: Mapping[str, Sequence[Condition]],
    now: float,
    step: Step = "month",
) -> list[TierUse]:
    """Your calls, tokens and spend by period and class, periods in order, classes in the rule's order.

    A model is classed by its price at ``now`` (Unix seconds), not by what it cost then: a cut in price must
    not look like a change of model.
    """
    order = [*rules, BETWEEN, UNKNOWN]
    sums: dict[tuple[str, str], list[float]] = {}
    busy: dict[tuple[str, str], dict[str, int]] = {}
    tiers: dict[str, str] = {}
    for hour in hours:
        if hour.target not in tiers:
            tiers[hour.target] = target_tier(catalog, hour.target, rules, now).tier
        place = (_period(hour.hour, step), tiers[hour.target])
        told = (hour.calls, hour.prompt_tokens + hour.completion_tokens, hour.cost_usd)
        sums[place] = [a + b for a, b in zip(sums.get(place, [0, 0.0, 0.0]), told, strict=True)]
        models = busy.setdefault(place, {})
        models[hour.target] = models.get(hour.target, 0) + hour.calls
    whole = {p: _plus(s for (q, _), s in sums.items() if q == p) for p, _ in sums}
    return [
        _use(place, sums[place], whole[place[0]], busy[place])
        for place in sorted(sums, key=lambda p: (p[0], order.index(p[1])))
    ]


def target_tier(
    catalog: Catalog, target: str, rules: Mapping[str, Sequence[Condition]], now: float
) -> Tiered:
    """The class of an ENDPOINT/MODEL or VENDOR/MODEL."""
    facts = catalog.find(target)
    if facts is None:
        return tier_of(ModelFacts(id=target), None, rules)
    return tier_of(facts, rates_at(catalog, target, now), rules)


def _condition(tier: str, text: str) -> Condition:
    found = _CONDITION.fullmatch(text)
    if found is None or not (found["low"] or found["high"]):
        raise InputError(
            f"[catalog] tiers: {tier}: {text!r}",
            expected='a condition like "mmlu > 85" or "0.10 <= usd <= 0.50"',
            next_step="correct it in understudy.toml",
        )
    bounds: list[tuple[str, float]] = []
    if found["low"]:
        bounds.append((found["over"].replace("<", ">"), float(found["low"])))
    if found["high"]:
        bounds.append((found["under"], float(found["high"])))
    return Condition(found["name"], tuple(bounds))


def _quantity(facts: ModelFacts, rates: Rates | None, name: str) -> float | None:
    if name in ("usd", "usd_out"):
        return None if rates is None else getattr(rates.tiers[0], "input" if name == "usd" else "output")
    if name == "context":
        return facts.context_window.value if facts.context_window else None
    scores = [fact.value for benchmark, fact in facts.scores.items() if benchmark.split()[0].lower() == name]
    return scores[0] if scores else None


def _period(hour: int, step: Step) -> str:
    day = dt.datetime.fromtimestamp(hour * 3600, dt.UTC).date()
    if step == "month":
        return str(day.replace(day=1))
    return str(day - dt.timedelta(days=day.weekday()) if step == "week" else day)


def _plus(rows: Iterable[Sequence[float]]) -> list[float]:
    return [sum(column) for column in zip(*rows, strict=True)]


def _use(
    place: tuple[str, str], own: Sequence[float], whole: Sequence[float], busy: dict[str, int]
) -> TierUse:
    shares = [part / total if total else 0.0 for part, total in zip(own, whole, strict=True)]
    return TierUse(
        period=place[0],
        tier=place[1],
        calls=int(own[0]),
        tokens=own[1],
        usd=own[2],
        share_of_calls=shares[0],
        share_of_tokens=shares[1],
        share_of_usd=shares[2],
        models=tuple(sorted(busy, key=lambda t: (-busy[t], t))),
    )
