"""Which bound models are dying, when, and what hangs on them.

It ignores where models are bound (bindings), what could take over (plan) and how the news is sent (notify).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import msgspec

from understudy.catalog.bindings import Binding
from understudy.catalog.facts import Catalog, ModelFacts
from understudy.catalog.prices import rates_at
from understudy.catalog.workload import Workload
from understudy.protocol import CallShape

Severity = Literal["retired", "critical", "high", "medium", "low", "announced"]

SEVERITIES: tuple[Severity, ...] = ("retired", "critical", "high", "medium", "low", "announced")
"""Worst first. ``announced``: the vendor said it will end but not when."""
_WITHIN_DAYS: tuple[tuple[int, Severity], ...] = (
    (0, "retired"),
    (30, "critical"),
    (90, "high"),
    (180, "medium"),
)


class Exposure(msgspec.Struct, frozen=True, kw_only=True):
    """A bound model with an end, and what hangs on it."""

    target: str
    model: str
    """Its id in the catalog."""
    bindings: tuple[Binding, ...]
    severity: Severity
    retires: dt.date | None
    days_left: int | None
    source: str
    """Who says so, and when it was read."""
    disputed: tuple[str, ...]
    """What other sources say, where they differ."""
    successor: str
    """What the vendor names; empty when it names nothing."""
    calls: int
    """Recorded, all in all."""
    calls_per_month: float
    tokens_per_month: float
    tasks_per_month: float
    usd_per_month: float | None
    """At today's price; None when no price is known."""


def watch(
    catalog: Catalog,
    bindings: Iterable[Binding],
    shapes_by_target: Mapping[str, Sequence[CallShape]],
    now: float,
) -> list[Exposure]:
    """Every bound model that has an announced end, worst first.

    ``shapes_by_target`` are the recorded calls each target answered; monthly figures are extrapolated from
    the time since its first call (at least a day). ``now`` is in Unix seconds.
    """
    by_target: dict[str, list[Binding]] = {}
    for binding in bindings:
        by_target.setdefault(binding.target, []).append(binding)
    found = [
        _exposure(catalog, facts, target, tuple(bound), shapes_by_target.get(target, ()), now)
        for target, bound in by_target.items()
        if (facts := catalog.find(target)) and facts.ending
    ]
    return sorted(found, key=_rank)


def severity(days_left: int | None) -> Severity:
    """How urgent a retirement is; None for one without a date."""
    if days_left is None:
        return "announced"
    for days, word in _WITHIN_DAYS:
        if days_left <= days:
            return word
    return "low"


def days_until(day: dt.date, now: float) -> int:
    """Whole days from ``now`` (Unix seconds, UTC) until ``day``; negative when it is past."""
    return (day - dt.datetime.fromtimestamp(now, dt.UTC).date()).days


def _exposure(
    catalog: Catalog,
    facts: ModelFacts,
    target: str,
    bindings: tuple[Binding, ...],
    shapes: Sequence[CallShape],
    now: float,
) -> Exposure:
    ends, told = facts.retires, facts.ending
    assert told is not None, "only models with an end are exposed"
    left = days_until(ends.value, now) if ends else None
    load = Workload(shapes, now)
    rates = rates_at(catalog, facts.id, now)
    return Exposure(
        target=target,
        model=facts.id,
        bindings=bindings,
        severity=severity(left),
        retires=ends.value if ends else None,
        days_left=left,
        source=f"{told.source}, read {told.read}",
        disputed=tuple(
            f"{c.value} ({c.source}, read {c.read})" for c in told.claims if c.value != told.value
        ),
        successor=facts.successor.value if facts.successor else "",
        calls=len(load),
        calls_per_month=len(load) / load.months,
        tokens_per_month=load.tokens / load.months,
        tasks_per_month=load.tasks / load.months,
        usd_per_month=None if rates is None else load.usd(rates) / load.months,
    )


def _rank(exposure: Exposure) -> tuple[int, int, int, str]:
    left = exposure.days_left if exposure.days_left is not None else 10**6
    return (SEVERITIES.index(exposure.severity), left, -exposure.calls, exposure.target)
