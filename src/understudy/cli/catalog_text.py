"""What the commands `models`, `watch` and `plan` print, as text that fits the terminal.

It ignores where the values come from (catalog) and the JSON form, which has all of them.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, groupby, pairwise
from typing import TYPE_CHECKING

import click

from understudy.cli.columns import Column, draw, fold, terminal_width

if TYPE_CHECKING:
    from understudy.catalog.events import WatchReport
    from understudy.catalog.facts import Catalog, ModelFacts
    from understudy.catalog.plan import Candidate, Plan
    from understudy.catalog.tiers import TierUse
    from understudy.catalog.watch import Exposure

FILLS = "█▓▒░·╳"
"""One for each class in a plot, in the rule's order; more classes share the last."""
PLOT = 40
"""Characters of a whole bar."""
TRANSPOSED = 3
"""So many named candidates at most stand side by side, with all there is to say of them."""


def print_models(catalog: Catalog, found: Sequence[ModelFacts]) -> None:
    """One line per model; of a single one every fact with who says so."""
    if len(found) == 1:
        _print_facts(catalog, found[0])
    else:
        _table(_MODELS, [_model_row(catalog, m, time.time()) for m in found])
        click.echo(
            f"{len(found)} of {len(catalog)} models; facts read {catalog.read}; name one to see sources"
        )
    tell_age(catalog.stale_days(dt.datetime.now(dt.UTC).date()))


def print_tiers(used: Sequence[TierUse], rules: Mapping[str, Sequence[str]]) -> None:
    """Shares per period as a table and as bars."""
    _table(_TIERS, [_tier_row(use) for use in used])
    tiers = list(dict.fromkeys([*rules, *(use.tier for use in used)]))
    fills = {tier: FILLS[min(n, len(FILLS) - 1)] for n, tier in enumerate(tiers)}
    for period, uses in groupby(used, key=lambda use: use.period):
        click.echo("")
        _plot(period, list(uses), fills)
    rule = "; ".join(f"{tier}: {' and '.join(conditions)}" for tier, conditions in rules.items())
    click.echo("\n" + "   ".join(f"{fills[t]} {t}" for t in tiers if any(u.tier == t for u in used)))
    _say(f"{rule}. What is not known of a model is left out of the rule")


def print_watch(report: WatchReport) -> None:
    """Every announced end, what else happened, and what is expected of the rest."""
    if report.exposures:
        _table(_WATCH, [_exposure_row(e) for e in report.exposures])
        _say("per month: scaled from the time since the first recorded call")
    else:
        click.echo(f"none of {report.bound} bound models has an announced end")
    for e in report.exposures:
        if e.disputed:
            _say(f"{e.target}: {e.retires} by {e.source}; otherwise: {'; '.join(e.disputed)}")
    for event in report.events:
        if event.kind != "retirement":
            _say(f"{event.severity}: {event.kind}: {event.text}")
    for target, told in report.outlook.items():
        year = told.within(12)
        _say(
            f"{target}: no announced end; retired within a year with probability {year.probability:.0%} "
            f"({year.low:.0%}–{year.high:.0%}, {year.method})"
        )
    if unpriced := [e.target for e in report.exposures if e.usd_per_month is None]:
        _say(f"no price is known of {', '.join(unpriced)}: write `prices` into your overlay")
    if report.unknown:
        _say(f"nothing is known of: {', '.join(report.unknown)}")
    if report.kept:
        _say(f"yours, whatever vendors do: {', '.join(report.kept)}")
    tell_age(report.catalog_stale_days)


def print_plan(made: Plan, top: int) -> None:
    """Candidates best first, what each is best for, what must change, and who was left out and why."""
    _say(_about(made))
    weighed = (made.incumbent, *made.candidates[:top])
    few = [*made.candidates, *made.excluded]
    if len(few) <= TRANSPOSED:
        _sheet((made.incumbent, *few))
    else:
        _table(_PLAN, [_candidate_row(c) for c in weighed])
    more = len(made.candidates) - top
    _say(f"ranked by {made.ranking}" + (f"; {more} more (--top)" if more > 0 else ""))
    _heading("best for", [f"{c.model}: {c.best_use}" for c in made.candidates if c.best_use])
    _heading("what requests must change in", _changes(made.candidates[:top]))
    if unpriced := [c.model for c in weighed if c.usd_per_month is None]:
        _say(f"no price is known of {', '.join(unpriced)}: write `prices` or `hosting` into your overlay")
    _heading("running it yourself", [_hosted(c) for c in weighed if c.usd_per_million_hosted is not None])
    if made.excluded:
        why = ", ".join(f"{r.models} {r.text}" for r in made.reasons)
        _heading(
            f"{len(made.excluded)} do not fit ({why}), the nearest",
            [f"{c.model} ({_reasons(c)})" for c in made.excluded[:5]],
        )
    if made.passed_over:
        why = ", ".join(f"{count} {reason}" for reason, count in made.passed_over.items())
        _say(f"{sum(made.passed_over.values())} were not weighed: {why}")
    locked = f" ({', '.join(made.locked_by)})" if made.locked_by else ""
    _say(
        f"lock-in: {made.lock_in:.0%} of the calls can go to one vendor only{locked}; "
        f"{len(made.candidates)} models of {made.vendors} vendors fit"
    )
    tell_age(made.catalog_stale_days)


def tell_age(stale_days: int) -> None:
    """A line where the snapshot is old."""
    if stale_days:
        _say(
            f"the catalog's snapshot is {stale_days} days old: prices and dates may have moved; a newer "
            "Understudy brings a newer one, and understudy models --refresh asks your own vendors"
        )


_MODELS = (
    Column("model"),
    Column("context", right=True),
    Column("input", rank=2, least=6),
    Column("$/M in", right=True),
    Column("$/M out", right=True, rank=1),
    Column("parameters", right=True, rank=4),
    Column("retires"),
    Column("successor", rank=3, least=14),
)
_FACTS = (
    Column("fact"),
    Column("value", least=14),
    Column("source", least=18),
    Column("otherwise", least=14),
)
_TIERS = (
    Column("from"),
    Column("tier"),
    Column("calls", right=True),
    Column("%", right=True),
    Column("tokens", right=True),
    Column("%", right=True),
    Column("$", right=True),
    Column("%", right=True),
    Column("models", rank=1, least=16),
)
_WATCH = (
    Column("severity"),
    Column("target", least=16),
    Column("bound by", least=14),
    Column("retires", least=10),
    Column("days", right=True),
    Column("calls/mo", right=True, rank=1),
    Column("tasks/mo", right=True, rank=4),
    Column("tokens/mo", right=True, rank=3),
    Column("$/mo", right=True),
    Column("successor", rank=2, least=12),
)
_PLAN = (
    Column("candidate", least=20),
    Column("tier", rank=6),
    Column("as strong", rank=5),
    Column("fits", right=True),
    Column("$/mo", right=True),
    Column("p10–p90", right=True, rank=2),
    Column("batch", right=True, rank=8),
    Column("$/call", right=True, rank=9),
    Column("$/task", right=True, rank=1),
    Column("$/M tok", right=True, rank=10),
    Column("kWh/mo", right=True, rank=12),
    Column("kg CO2e/mo", right=True, rank=11),
    Column("$/mo uncached", right=True, rank=14),
    Column("s/call", right=True, rank=7),
    Column("ends"),
    Column("licence", rank=13, least=10),
    Column("unverified", rank=4, least=10),
    Column("breaks", rank=3, least=12),
)
_EXPLAINED = {
    "tier": "class by [catalog] tiers",
    "as strong": "as the incumbent, as far as anybody tells",
    "ends": "announced, or its chance within a year",
    "$/M tok": "over this traffic's own mix",
}


def _table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    drawn = draw(columns, rows, terminal_width())
    click.echo(drawn.text)
    if drawn.left_out:
        _say(f"no room for: {', '.join(drawn.left_out)} (a wider terminal or --json has all)")


def _say(text: str) -> None:
    click.echo(fold(text, terminal_width(), "  "))


def _heading(title: str, lines: Sequence[str]) -> None:
    if lines:
        _say(f"{title}:")
        for line in lines:
            click.echo(fold(f"  {line}", terminal_width(), "    "))


def _sheet(candidates: Sequence[Candidate]) -> None:
    """Few candidates side by side: one column each, with all there is to say."""
    cells = [_candidate_row(c) for c in candidates]
    rows = [
        [column.title, *(row[n] for row in cells)]
        for n, column in enumerate(_PLAN[1:], 1)
        if any(row[n] for row in cells)
    ]
    width = max(12, (terminal_width() - 12) // len(candidates) - 2)
    titles = [Column(row[0], least=min(width, 40)) for row in cells]
    _table((Column(""), *titles), rows)
    told = [f"{title}: {why}" for title, why in _EXPLAINED.items() if any(row[0] == title for row in rows)]
    _say("; ".join(told))


def _model_row(catalog: Catalog, m: ModelFacts, now: float) -> list[str]:
    from understudy.catalog.prices import rates_at

    rates = rates_at(catalog, m.id, now)
    first = rates.tiers[0] if rates else None
    disputed = " (disputed)" if m.retires and m.retires.disputed else ""
    return [
        m.id,
        f"{m.context_window.value:,}" if m.context_window else "",
        ", ".join(sorted(m.inputs.value)) if m.inputs else "",
        f"{first.input:g}" if first else "",
        f"{first.output:g}" if first else "",
        _parameters(m),
        f"{m.retires.value}{disputed}" if m.retires else "",
        m.successor.value if m.successor else "",
    ]


def _parameters(m: ModelFacts) -> str:
    """With ~ before what is an outsider's estimate."""
    if m.parameters is None:
        return ""
    return f"{'~' if m.parameters.estimated else ''}{m.parameters.value / 1e9:.3g}B"


def _print_facts(catalog: Catalog, m: ModelFacts) -> None:
    from understudy.catalog.facts import RULE
    from understudy.catalog.sheet import sheet

    names = f" (also {', '.join(m.names)})" if m.names else ""
    click.echo(f"{m.id}{names}")
    _table(_FACTS, sheet(catalog, m, time.time()))
    _say(f"where sources disagree: {RULE}")


def _tier_row(use: TierUse) -> list[str]:
    return [
        use.period,
        use.tier,
        f"{use.calls:,}",
        f"{use.share_of_calls:.0%}",
        f"{use.tokens:,.0f}",
        f"{use.share_of_tokens:.0%}",
        money(use.usd),
        f"{use.share_of_usd:.0%}",
        ", ".join(use.models[:3]) + (" …" if len(use.models) > 3 else ""),
    ]


def _plot(period: str, uses: Sequence[TierUse], fills: Mapping[str, str]) -> None:
    """One bar each for a period's calls, tokens and spend, in parts of the whole."""
    for n, (name, share) in enumerate(_SHARES.items()):
        # rounded where they end, so that the bar is as long as the shares add up to
        ends = [round(PLOT * end) for end in accumulate((getattr(u, share) for u in uses), initial=0.0)]
        bar = "".join(fills[u.tier] * (b - a) for u, (a, b) in zip(uses, pairwise(ends), strict=True))
        click.echo(f"{period if n == 0 else '':10}  {name:6}  {bar}")


_SHARES = {"calls": "share_of_calls", "tokens": "share_of_tokens", "$": "share_of_usd"}


def _exposure_row(e: Exposure) -> list[str]:
    return [
        e.severity,
        e.target,
        ", ".join(f"{b.name} ({b.level})" for b in e.bindings),
        str(e.retires or "not said") + (" (disputed)" if e.disputed else ""),
        "" if e.days_left is None else str(e.days_left),
        f"{e.calls_per_month:,.0f}",
        f"{e.tasks_per_month:,.0f}",
        f"{e.tokens_per_month:,.0f}",
        money(e.usd_per_month),
        e.successor,
    ]


def _about(made: Plan) -> str:
    inc = made.incumbent
    end = f"retires {inc.retires} ({inc.days_left} days)" if inc.retires else "no announced end"
    named = f", its vendor names {made.successor}" if made.successor else ""
    return (
        f"{inc.model}: {end}{named}; {made.calls:,} calls, {made.tokens:,} tokens in {made.window_days:.1f} "
        f"days, at most {made.peak_tokens_per_minute:,} a minute; {made.batchable:.0%} could go by batch"
    )


def _candidate_row(c: Candidate) -> list[str]:
    return [
        c.model,
        c.tier,
        {None: "?", True: "yes", False: "no"}[c.peer],
        f"{c.share:.1%}",
        money(c.usd_per_month),
        f"{money(c.usd_low)}–{money(c.usd_high)}" if c.usd_low is not None else "",
        money(c.usd_per_month_batch) if c.usd_per_month_batch is not None else "",
        money(c.usd_per_call),
        money(c.usd_per_task),
        money(c.usd_per_million_tokens),
        _range(c.kwh_per_month),
        _range(c.kg_co2e_per_month),
        money(c.usd_per_month_uncached),
        f"{c.latency.total_s:.2f}" if c.latency else "",
        _end(c),
        c.licence,
        ", ".join(c.unverified),
        _reasons(c),
    ]


def _changes(candidates: Iterable[Candidate]) -> list[str]:
    """Each change once, with the calls it meets and whom it concerns."""
    concerned: dict[tuple[str, str, int], dict[str, list[str]]] = {}
    for c in candidates:
        for change in c.changes:
            told = concerned.setdefault((change.kind, change.text, change.calls), {})
            told.setdefault(change.source, []).append(c.model)
    return [
        f"{kind}: {text} ({calls:,} call{'s' * (calls != 1)}): "
        + "; ".join(f"{', '.join(models)} (by {source})" for source, models in told.items())
        for (kind, text, calls), told in concerned.items()
    ]


def _hosted(c: Candidate) -> str:
    return (
        f"{c.model}: ${money(c.usd_per_million_hosted)} per million answer tokens, from your price of an "
        "hour and your measured tokens per second"
    )


def _end(c: Candidate) -> str:
    """The announced day, or what is expected."""
    if c.retires or c.forecast is None:
        return str(c.retires or "?")
    return f"{c.forecast.within(12).probability:.0%}/year"


def _range(ends: tuple[float, float] | None) -> str:
    if ends is None:
        return ""
    low, high = (money(end) for end in ends)
    return low if low == high else f"{low}–{high}"


def _reasons(c: Candidate) -> str:
    if c.misfits:
        return ", ".join(f"{word}: {calls:,} call{'s' * (calls != 1)}" for word, calls in c.misfits.items())
    return f"retired {c.retires}" if c.days_left is not None and c.days_left <= 0 else ""


def money(usd: float | None) -> str:
    """Two digits behind the point, or as many as show two figures of a small amount."""
    if usd is None:
        return "?"
    if usd >= 1 or usd == 0:
        return f"{usd:,.2f}"
    return f"{usd:.2f}" if usd >= 0.1 else f"{usd:.2g}"
