"""What could take over from an alias's model, weighed on its latest calls.

Weighing every model of the catalog takes a while, so a plan is kept for some minutes; the page says how old
it is. It ignores how plans are made (catalog.plan).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

from understudy.catalog.plan import Candidate, Latency, Plan, make_plan
from understudy.catalog.tiers import parse_rules
from understudy.dashboard.desk import Binding, Desk, total

LATEST = 10_000
"""Calls weighed: the newest."""
MONTH_DAYS = 30
KEPT_S = 300.0
MOST_KEPT = 20
LISTED = 25

_LOCK = threading.Lock()


class PlanPage(NamedTuple):
    """The page."""

    now: float
    bindings: list[Binding]
    chosen: Binding | None
    plan: Plan | None
    month_calls: int
    """Answered calls of this alias in the last 30 days."""
    listed: int = LISTED
    latest: int = LATEST

    def usd_per_month(self, candidate: Candidate) -> float | None:
        """What a month costs. Where only the latest calls were weighed, their cost is that of one call, times
        the calls of a month: they may span less than a day."""
        if self.plan is None or self.plan.calls < self.latest or candidate.usd_per_call is None:
            return candidate.usd_per_month
        return candidate.usd_per_call * self.month_calls


class Plans:
    """Plans made lately, by alias, target and tolerance."""

    def __init__(self) -> None:
        self._made: OrderedDict[tuple[str, str], Plan] = OrderedDict()

    def page(self, desk: Desk, query: Mapping[str, str]) -> PlanPage:
        """The plan for ``query["alias"]``, or for the first alias there is. Raises StoreError."""
        bindings = desk.bindings()
        chosen = bindings.get(query.get("alias", ""))
        if chosen is None and "alias" not in query:
            chosen = next(iter(bindings.values()), None)
        plan = self._plan(desk, chosen, "fresh" in query) if chosen else None
        alias = chosen.alias if chosen else ""
        use = total([hour for hour in desk.hours(MONTH_DAYS) if hour.alias == alias])
        return PlanPage(desk.now(), list(bindings.values()), chosen, plan, use.calls - use.failed)

    def _plan(self, desk: Desk, chosen: Binding, fresh: bool) -> Plan:
        asked = (chosen.alias, chosen.model)
        with _LOCK:  # of many readers at once, one makes the plan
            kept = self._made.get(asked)
            if kept is None or fresh or desk.now() - kept.made_at > KEPT_S:
                shapes = desk.store.shapes(alias=chosen.alias, latest=LATEST)
                rules = parse_rules(desk.config.catalog.tiers)
                kept = make_plan(
                    desk.catalog,
                    chosen.model,
                    shapes,
                    now=desk.now(),
                    tiers=rules,
                    latencies=_latencies(desk),
                )
                self._made[asked] = kept
                while len(self._made) > MOST_KEPT:
                    self._made.popitem(last=False)
            return kept


def _latencies(desk: Desk) -> dict[str, Latency]:
    """How fast each target has been, by the model behind it."""
    return {
        facts.id if (facts := desk.catalog.find(timed.target)) else timed.target: Latency(
            timed.ttft_s, timed.total_s, timed.tokens_per_s, timed.calls
        )
        for timed in desk.store.latencies()
    }
