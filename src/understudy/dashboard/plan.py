"""What could take over from an alias's model, weighed on its latest calls.

Weighing every model of the catalog takes a while, so a plan is kept for some minutes; the page says how old
it is. It ignores how plans are made (catalog.plan).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import msgspec

from understudy.catalog.plan import KEYS, RANK_BY, Candidate, Key, Plan, latencies_by_model, make_plan
from understudy.catalog.tiers import parse_rules
from understudy.catalog.tokens import LATEST as COUNTED
from understudy.catalog.tokens import Counted, ratios_by_model
from understudy.dashboard.desk import Binding, Desk, total

LATEST = 10_000
"""Calls weighed: the newest."""
MONTH_DAYS = 30
KEPT_S = 300.0
MOST_KEPT = 20
LISTED = 20

_LOCK = threading.Lock()


class PlanPage(NamedTuple):
    """The page."""

    now: float
    bindings: list[Binding]
    chosen: Binding | None
    plan: Plan | None
    month_calls: int
    """Answered calls of this alias in the last 30 days."""
    rank: str = RANK_BY[0]
    """What decides first; the usual order decides what it leaves open."""
    ranks: tuple[str, ...] = tuple(KEYS)
    listed: int = LISTED
    latest: int = LATEST

    def usd_per_month(self, candidate: Candidate) -> float | None:
        """What a month costs. Where only the latest calls were weighed, their cost is that of one call, times
        the calls of a month: they may span less than a day."""
        if self.plan is None or self.plan.calls < self.latest or candidate.usd_per_call is None:
            return candidate.usd_per_month
        return candidate.usd_per_call * self.month_calls


class Plans:
    """Plans made lately, by alias, target and what they are ranked by first."""

    def __init__(self) -> None:
        self._made: OrderedDict[tuple[str, str, Key], Plan] = OrderedDict()

    def page(self, desk: Desk, query: Mapping[str, str]) -> PlanPage:
        """The plan for ``query["alias"]``, or for the first alias there is. Raises StoreError."""
        bindings = desk.bindings()
        chosen = bindings.get(query.get("alias", ""))
        if chosen is None and "alias" not in query:
            chosen = next(iter(bindings.values()), None)
        rank = query.get("rank", "")
        rank = rank if rank in KEYS else RANK_BY[0]
        plan = self._plan(desk, chosen, rank, "fresh" in query) if chosen else None
        alias = chosen.alias if chosen else ""
        use = total([hour for hour in desk.days(MONTH_DAYS) if hour.alias == alias])
        return PlanPage(desk.now(), list(bindings.values()), chosen, plan, use.calls - use.failed, rank)

    def _plan(self, desk: Desk, chosen: Binding, rank: Key, fresh: bool) -> Plan:
        asked = (chosen.alias, chosen.model, rank)
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
                    rank=_order(rank),
                    latencies=latencies_by_model(desk.catalog, desk.store.latencies()),
                    ratios=ratios_by_model(
                        desk.config,
                        desk.catalog,
                        partial(_counted, desk, chosen.alias),
                        pictures_sent=any("image" in call.modalities for call in shapes),
                    ),
                )
                self._made[asked] = kept
                while len(self._made) > MOST_KEPT:
                    self._made.popitem(last=False)
            return kept


def _order(first: Key) -> tuple[Key, ...]:
    return (first, *(key for key in RANK_BY if key != first))


def _counted(desk: Desk, alias: str) -> Iterator[Counted]:
    """The latest calls of an alias with their texts and their vendor's count."""
    for c in desk.store.calls(alias=alias, ok=True, limit=COUNTED, newest_first=True, texts=True):
        if c.call.request and c.call.usage and not c.call.usage_estimated:
            request = msgspec.json.decode(c.call.request, type=dict[str, Any])
            yield Counted(request, c.call.usage.prompt_tokens, c.call.target)
