"""The first page: who answers each alias, what is dying, what it costs, how it goes.

Figures come from hourly sums, so a million calls cost nothing to show. It ignores single calls (calls).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import NamedTuple

from markupsafe import Markup

from understudy.catalog.bindings import Level, bindings_of
from understudy.catalog.watch import Exposure, watch
from understudy.dashboard import chart, formats
from understudy.dashboard.chart import Bar
from understudy.dashboard.desk import DAY_S, Binding, Desk, Use, by, total
from understudy.traffic.hours import HOUR_S, Hour

MONTH_DAYS = 30
DAY_HOURS = 24
JUDGEMENTS = 5_000
"""Latest pieces of feedback that are averaged."""


ROLES: dict[Level, str] = {
    "alias": "answers",
    "weight": "answers a share of",
    "fallback": "fallback of",
    "trial": "on trial for",
    "judge": "judge in",
    "candidate": "candidate of",
    "teacher": "teacher in",
    "served": "served by",
    "requested": "asked for as",
    "answering": "answers behind",
}
"""What a model is to the place that names it."""


class AliasRow(NamedTuple):
    """One alias, or a model id that applications ask for without one."""

    name: str
    binding: Binding | None
    answering: list[str]
    """Targets seen in the last month, the busiest first."""
    exposure: Exposure | None
    """The end of who answers now, where one is announced."""
    day: Use
    month: Use


class Said(NamedTuple):
    """What feedback says of one alias by one metric."""

    alias: str
    metric: str
    times: int
    mean: float | None
    """None where no numbers were given."""


class Today(NamedTuple):
    """Everything the page shows."""

    now: float
    rows: list[AliasRow]
    ends: list[Exposure]
    """Every announced end among the bound models, worst first."""
    month_calls: dict[str, Use]
    """Target to what it was used for in the last month."""
    day: Use
    month: Use
    calls_chart: Markup
    spend_chart: Markup
    feedback: list[Said]
    snapshot: dt.date
    stale_days: int
    last_at: float | None
    """Unix seconds of the newest call; None where there is none."""
    gateway: str
    """HOST:PORT applications are pointed at."""
    roles: dict[Level, str] = ROLES


def page(desk: Desk, query: Mapping[str, str]) -> Today:
    """Read the page. Raises StoreError."""
    del query
    now = desk.now()
    month, day = desk.days(MONTH_DAYS), desk.hours(DAY_HOURS)
    bindings = desk.bindings()
    requested = dict.fromkeys((h.alias, h.target) for h in month)
    bound = bindings_of(desk.config, desk.store.routes(), requested)
    ends = watch(desk.catalog, bound, {}, now)
    return Today(
        now=now,
        rows=_rows(bindings, month, day, ends),
        ends=ends,
        month_calls=by("target", month),
        day=total(day),
        month=total(month),
        calls_chart=_calls_chart(day, now),
        spend_chart=_spend_chart(month, now),
        feedback=_feedback(desk),
        snapshot=desk.catalog.read,
        stale_days=desk.catalog.stale_days(dt.datetime.fromtimestamp(now, dt.UTC).date()),
        last_at=_last_at(desk),
        gateway=desk.config.gateway.listen,
    )


def _rows(
    bindings: Mapping[str, Binding], month: list[Hour], day: list[Hour], ends: list[Exposure]
) -> list[AliasRow]:
    ending = {end.target: end for end in ends}
    of_month, of_day = by("alias", month), by("alias", day)
    names = [*bindings, *(name for name in of_month if name not in bindings)]
    rows: list[AliasRow] = []
    for name in names:
        answering = list(by("target", [h for h in month if h.alias == name]))
        bound = bindings.get(name)
        target = bound.model if bound else next(iter(answering), "")
        use, recent = of_month.get(name, Use()), of_day.get(name, Use())
        rows.append(AliasRow(name, bound, answering, ending.get(target), recent, use))
    return rows


def _calls_chart(hours: list[Hour], now: float) -> Markup:
    """Calls per hour, failures on top."""
    last, uses = int(now // HOUR_S), _each(hours, 1)
    bars: list[Bar] = []
    for hour in range(last - 23, last + 1):
        use = uses.get(hour, Use())
        bars.append(Bar(f"{hour % 24:02d}:00", [use.calls - use.failed, use.failed]))
    return chart.bars("Calls per hour, last 24 hours", "calls", bars, ["answered", "failed"], "hour (UTC)")


def _spend_chart(hours: list[Hour], now: float) -> Markup:
    """Money per day, or tokens where nothing has a price."""
    last, uses = int(now // DAY_S), _each(hours, 24)
    days = {day: uses.get(day, Use()) for day in range(last - MONTH_DAYS + 1, last + 1)}
    names = {day: formats.day(day * DAY_S).rsplit(" ", 1)[0] for day in days}
    if any(use.priced for use in days.values()):
        bars = [Bar(names[day], [use.cost_usd]) for day, use in days.items()]
        return chart.bars("Spend per day, last 30 days", "USD", bars, ["spend"], "day (UTC)")
    bars = [Bar(names[day], [use.prompt_tokens, use.completion_tokens]) for day, use in days.items()]
    title = "Tokens per day, last 30 days"
    return chart.bars(title, "tokens", bars, ["prompt", "completion"], "day (UTC)")


def _each(hours: list[Hour], span: int) -> dict[int, Use]:
    """Sums of every ``span`` hours."""
    spans: dict[int, list[Hour]] = {}
    for hour in hours:
        spans.setdefault(hour.hour // span, []).append(hour)
    return {number: total(of_span) for number, of_span in spans.items()}


def _last_at(desk: Desk) -> float | None:
    found = desk.lists.query("SELECT at FROM calls ORDER BY key DESC LIMIT 1")
    return float(found[0][0]) if found else None


def _feedback(desk: Desk) -> list[Said]:
    sql = (
        "SELECT COALESCE(calls.alias, ''), said.metric, COUNT(*), AVG(said.value) "
        "FROM (SELECT call, metric, value FROM feedback ORDER BY key DESC LIMIT ?) AS said "
        "LEFT JOIN calls ON calls.key = said.call GROUP BY 1, 2 ORDER BY 3 DESC, 1, 2 LIMIT 50"
    )
    return [Said(*row) for row in desk.lists.query(sql, (JUDGEMENTS,))]
