"""What happened to bound models besides their end: prices that moved, and models swapped behind a name.

A swap is seen in recorded traffic: the id that answers is not the one that answered before. Another
``system_fingerprint`` under the same id is told too, quietly: vendors change it often, with no change of the
answers that anybody could see, and serve several at once. It ignores
retirements (watch), canary prompts (canary), and how the news is sent (notify).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Literal

import msgspec

from understudy.catalog.bindings import Answers, Binding, Fingerprinted
from understudy.catalog.facts import Catalog
from understudy.catalog.forecast import Forecast
from understudy.catalog.prices import Rates, rates_at
from understudy.catalog.watch import SEVERITIES, Exposure, Severity
from understudy.catalog.workload import Workload
from understudy.protocol import CallShape

Kind = Literal["retirement", "price", "swap", "drift", "fingerprint"]

DAY_S = 86_400.0
SETTLED_S = 3_600.0
"""Ids seen within so many seconds of the first belong to a target that always had several."""
LARGE = 0.10
"""A price that moves the monthly cost by more than this share is of severity high, a smaller one medium."""


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that a team wants to hear of."""

    kind: Kind
    severity: Severity
    target: str
    """ENDPOINT/MODEL."""
    bindings: tuple[Binding, ...]
    day: str
    """ISO 8601: when it happened, or will."""
    text: str
    """One sentence for a person."""
    before: str = ""
    after: str = ""
    usd_per_month: float | None = None
    """What the calls bound to it cost per month after it, where known."""


class WatchReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one look at all bound models found."""

    at: float
    """Unix seconds."""
    bound: int
    """Targets bound anywhere."""
    unknown: tuple[str, ...]
    """Targets of which the catalog knows nothing."""
    kept: tuple[str, ...] = ()
    """Targets that are files of your own, which nobody can retire."""
    exposures: tuple[Exposure, ...]
    """Every announced end, however far."""
    events: tuple[Event, ...]
    outlook: dict[str, Forecast]
    """Target to what is expected of it, where no end is announced."""
    catalog_read: str
    catalog_stale_days: int


def retirement_events(exposures: Iterable[Exposure], within: int) -> list[Event]:
    """The ends that are due within so many days, or over."""
    return [
        Event(
            kind="retirement",
            severity=e.severity,
            target=e.target,
            bindings=e.bindings,
            day=str(e.retires),
            text=_ending(e),
            after=e.successor,
            usd_per_month=e.usd_per_month,
        )
        for e in exposures
        if e.days_left is not None and e.days_left <= within
    ]


def price_events(
    catalog: Catalog,
    bindings: Iterable[Binding],
    shapes_by_target: Mapping[str, Sequence[CallShape]],
    now: float,
    *,
    since_days: float = 30.0,
    until_days: float = 90.0,
) -> list[Event]:
    """Prices of bound models that changed in the last ``since_days`` or will within ``until_days``.

    Every dated price between the two is looked at, so a cut and a rise that cancel out are both told. ``now``
    is in Unix seconds.
    """
    found: list[Event] = []
    for target, bound in _by_target(bindings).items():
        load = Workload(shapes_by_target.get(target, ()), now)
        days = range(-round(since_days), round(until_days) + 1)
        seen = [(day, rates_at(catalog, target, now + day * DAY_S)) for day in days]
        for (_, before), (day, after) in pairwise(seen):
            if before is not None and after is not None and before.tiers != after.tiers:
                found.append(_price_event(target, tuple(bound), before, after, now + day * DAY_S, load))
    return sorted(found, key=_rank)


def swap_events(
    answers: Iterable[Answers], bindings: Iterable[Binding], now: float, *, since_days: float = 30.0
) -> list[Event]:
    """Targets that another model id than before has answered for, first seen in the last ``since_days``.

    Ids that answered side by side from the start are no swap; an id that only adds its date to the name asked
    for (gpt-4.1 answered by gpt-4.1-2025-04-14) is the first identity, not a change of it.
    """
    by_target: dict[str, list[Answers]] = {}
    for answer in answers:
        if answer.answered_by:
            by_target.setdefault(answer.target, []).append(answer)
    bound = _by_target(bindings)
    found: list[Event] = []
    for target, seen in by_target.items():
        seen.sort(key=lambda a: a.first_at)
        for before, after in pairwise(seen):
            beside_from_the_start = after.first_at - seen[0].first_at < SETTLED_S
            if not beside_from_the_start and now - after.first_at <= since_days * DAY_S:
                found.append(_swap_event(target, tuple(bound.get(target, ())), before, after))
    return sorted(found, key=_rank)


def fingerprint_events(
    seen: Iterable[Fingerprinted], bindings: Iterable[Binding], now: float, *, since_days: float = 30.0
) -> list[Event]:
    """Fingerprints first seen in the last ``since_days`` under a model id that answered before with others:
    one event for all of a target's day (UTC), of severity low. Those of the first hour are no change."""
    by_id: dict[tuple[str, str], list[Fingerprinted]] = {}
    for told in seen:
        by_id.setdefault((told.target, told.answered_by), []).append(told)
    bound = _by_target(bindings)
    found: list[Event] = []
    for (target, _), prints in by_id.items():
        prints.sort(key=lambda f: f.first_at)
        begun = prints[0].first_at + SETTLED_S
        fresh = [f for f in prints if f.first_at >= max(begun, now - since_days * DAY_S)]
        for day, same in groupby(fresh, key=lambda f: _day(f.first_at)):
            found.append(_fingerprint_event(day, list(same), prints, tuple(bound.get(target, ()))))
    return sorted(found, key=_rank)


def _fingerprint_event(
    day: str, new: Sequence[Fingerprinted], seen: Sequence[Fingerprinted], bindings: tuple[Binding, ...]
) -> Event:
    first, before = new[0], seen[seen.index(new[0]) - 1]
    calls = sum(f.calls for f in new)
    names = f"fingerprint {first.fingerprint}" if len(new) == 1 else f"{len(new)} new fingerprints"
    return Event(
        kind="fingerprint",
        severity="low",
        target=first.target,
        bindings=bindings,
        day=day,
        text=f"{first.target}: {names} since {day} ({calls:,} calls), before {before.fingerprint}, under the "
        f"same id {first.answered_by}; vendors change it often",
        before=before.fingerprint,
        after=", ".join(f.fingerprint for f in new),
    )


def _day(at: float) -> str:
    return str(dt.datetime.fromtimestamp(at, dt.UTC).date())


def _by_target(bindings: Iterable[Binding]) -> dict[str, list[Binding]]:
    by_target: dict[str, list[Binding]] = {}
    for binding in bindings:
        by_target.setdefault(binding.target, []).append(binding)
    return by_target


def _ending(exposure: Exposure) -> str:
    left = exposure.days_left or 0
    when = (
        f"retires on {exposure.retires}, in {left} days" if left > 0 else f"was retired on {exposure.retires}"
    )
    then = f"; the vendor names {exposure.successor}" if exposure.successor else ""
    return f"{exposure.target} {when}{then}"


def _price_event(
    target: str, bindings: tuple[Binding, ...], before: Rates, after: Rates, at: float, load: Workload
) -> Event:
    old, new = (f"${r.tiers[0].input:g} in, ${r.tiers[0].output:g} out" for r in (before, after))
    day = after.start or _day(at)
    usd, was = (load.usd(r) / load.months if len(load) else None for r in (after, before))
    change = (usd - was) / was if usd is not None and was else _list_change(before, after)
    return Event(
        kind="price",
        severity="high" if abs(change) > LARGE else "medium",
        target=target,
        bindings=bindings,
        day=day,
        text=f"{target}: {'dearer' if change > 0 else 'cheaper'} by {abs(change):.0%} from {day}: "
        f"{old} → {new} per million tokens",
        before=old,
        after=new,
        usd_per_month=usd,
    )


def _list_change(before: Rates, after: Rates) -> float:
    """Change of the input and output price taken together: all that is known without traffic."""
    old, new = (r.tiers[0].input + r.tiers[0].output for r in (before, after))
    return (new - old) / old if old else 0.0


def _swap_event(target: str, bindings: tuple[Binding, ...], before: Answers, after: Answers) -> Event:
    day = _day(after.first_at)
    ended = after.first_at > before.last_at
    beside = "" if ended else f", beside {before.answered_by}"
    return Event(
        kind="swap",
        severity="high",
        target=target,
        bindings=bindings,
        day=day,
        text=f"{target}: answered by {after.answered_by} since {day} ({after.calls:,} calls){beside}; "
        f"before by {before.answered_by}",
        before=before.answered_by,
        after=after.answered_by,
    )


def _rank(event: Event) -> tuple[int, str, str]:
    return (SEVERITIES.index(event.severity), event.day, event.target)
