"""The catalog, with what this team uses of it.

It ignores what could take over from a model (plan).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import NamedTuple

from markupsafe import Markup

from understudy.catalog.facts import ModelFacts
from understudy.catalog.prices import Rates, rates_at
from understudy.catalog.sheet import Row, sheet
from understudy.catalog.tiers import BETWEEN, UNKNOWN, TierUse, parse_rules, tiers_over_time
from understudy.catalog.watch import Severity, days_until, severity
from understudy.dashboard import chart
from understudy.dashboard.chart import Bar
from understudy.dashboard.desk import Desk, Use, by, total

MONTH_DAYS = 30
TIER_DAYS = 91
LISTED = 50


class OwnUse(NamedTuple):
    """One target that answered in the last month."""

    target: str
    facts: ModelFacts | None
    use: Use
    share: float
    """Of all calls, in [0, 1]."""
    rates: Rates | None
    days_left: int | None
    severity: Severity | None


class Entry(NamedTuple):
    """One model of the catalog."""

    facts: ModelFacts
    rates: Rates | None
    days_left: int | None
    severity: Severity | None
    share: float


class Models(NamedTuple):
    """The page."""

    used: list[OwnUse]
    total: Use
    entries: list[Entry]
    matching: int
    """Models the filter leaves; ``entries`` are the first of them."""
    known: int
    vendors: list[str]
    sought: str
    vendor: str
    ending: bool
    """Only models with an announced end."""
    tiers: list[TierUse]
    """By week, classes in the rule's order."""
    tiers_charts: list[Markup]
    """Shares of calls, of tokens and of spend."""
    rule: str
    """Of the tiers, in the config's words."""
    sheet: list[Row]
    """Every fact with its sources, where one model is sought."""
    read: dt.date
    stale_days: int


def page(desk: Desk, query: Mapping[str, str]) -> Models:
    """Read the page. Raises StoreError, InputError for a faulty overlay."""
    now = desk.now()
    hours = desk.days(MONTH_DAYS)
    everything = total(hours)
    used = [_own(desk, target, use, everything.calls, now) for target, use in by("target", hours).items()]
    shares: dict[str, float] = {}
    for own in used:
        if own.facts:
            shares[own.facts.id] = shares.get(own.facts.id, 0.0) + own.share
    rules = parse_rules(desk.config.catalog.tiers)
    tiers = tiers_over_time(desk.catalog, desk.days(TIER_DAYS), rules, now, "week")
    sought, vendor, ending = query.get("q", "").strip(), query.get("vendor", ""), "ending" in query
    if sought in desk.catalog:  # a whole id is that model, not those whose ids go on after it
        matching = [m for m in desk.catalog if m.id == sought]
    else:
        matching = [m for m in desk.catalog if _matches(m, sought.lower(), vendor, ending)]
    matching.sort(key=lambda m: (-shares.get(m.id, 0.0), _turn(m, now) if ending else _gone(m, now), m.id))
    return Models(
        used=used,
        total=everything,
        entries=[_entry(desk, m, shares.get(m.id, 0.0), now) for m in matching[:LISTED]],
        matching=len(matching),
        known=len(desk.catalog),
        vendors=sorted({m.vendor for m in desk.catalog}),
        sought=sought,
        vendor=vendor,
        ending=ending,
        tiers=tiers,
        tiers_charts=[_tiers_chart(tiers, [*rules, BETWEEN, UNKNOWN], *what) for what in _SHARES],
        rule="; ".join(f"{tier}: {' and '.join(told)}" for tier, told in desk.config.catalog.tiers.items()),
        sheet=sheet(desk.catalog, matching[0], now) if len(matching) == 1 else [],
        read=desk.catalog.read,
        stale_days=desk.catalog.stale_days(dt.datetime.fromtimestamp(now, dt.UTC).date()),
    )


_SHARES = (
    ("Calls by tier, per week", "% of calls", attrgetter("share_of_calls")),
    ("Tokens by tier, per week", "% of tokens", attrgetter("share_of_tokens")),
    ("Spend by tier, per week", "% of spend", attrgetter("share_of_usd")),
)


def _tiers_chart(
    tiers: list[TierUse], names: list[str], title: str, unit: str, share: Callable[[TierUse], float]
) -> Markup:
    """Each week's shares by class; classes nobody used are left out, at most five are told apart."""
    used = [name for name in names if any(t.tier == name for t in tiers)][:5]
    weeks: dict[str, dict[str, float]] = {}
    for use in tiers:
        weeks.setdefault(use.period, {})[use.tier] = 100 * share(use)
    columns = [Bar(week[5:], [shares.get(name, 0.0) for name in used]) for week, shares in weeks.items()]
    return chart.bars(title, unit, columns, used, "week from (UTC)")


def _own(desk: Desk, target: str, use: Use, calls: int, now: float) -> OwnUse:
    facts = desk.catalog.find(target)
    rates = rates_at(desk.catalog, facts.id, now) if facts else None
    days = _days_left(facts, now)
    return OwnUse(target, facts, use, use.calls / calls if calls else 0.0, rates, days, _word(days))


def _entry(desk: Desk, facts: ModelFacts, share: float, now: float) -> Entry:
    days = _days_left(facts, now)
    return Entry(facts, rates_at(desk.catalog, facts.id, now), days, _word(days), share)


def _matches(facts: ModelFacts, sought: str, vendor: str, ending: bool) -> bool:
    named = any(sought in name.lower() for name in (facts.id, *facts.names))
    return named and vendor in ("", facts.vendor) and not (ending and facts.retires is None)


def _gone(facts: ModelFacts, now: float) -> bool:
    """What nobody can call any more is named last."""
    days = _days_left(facts, now)
    return days is not None and days < 0


def _turn(facts: ModelFacts, now: float) -> int:
    """The nearest end first, then what is gone, the latest first."""
    days = _days_left(facts, now)
    assert days is not None, "only models with an end are ordered by it"
    return days if days >= 0 else 10**6 - days


def _days_left(facts: ModelFacts | None, now: float) -> int | None:
    return days_until(facts.retires.value, now) if facts and facts.retires else None


def _word(days: int | None) -> Severity | None:
    return None if days is None else severity(days)
