"""Commands `models`, `watch` and `plan`."""

from __future__ import annotations

import asyncio
import datetime as dt
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
import msgspec

from understudy import config as configuration
from understudy.cli.catalog_text import print_models, print_plan, print_tiers, print_watch
from understudy.cli.options import config_option, json_option, print_json
from understudy.errors import InputError
from understudy.protocol import PLANNED_ON

if TYPE_CHECKING:
    from understudy.catalog.bindings import Binding
    from understudy.catalog.canary import Reply
    from understudy.catalog.events import Event, WatchReport
    from understudy.catalog.facts import Catalog
    from understudy.catalog.plan import Key
    from understudy.catalog.tokens import Counted
    from understudy.config import Config
    from understudy.traffic.figures import AnsweredBy
    from understudy.traffic.sample import Shapes
    from understudy.traffic.store import Store


DAY_S = 86_400.0
FAILING_S = 30 * 86_400.0
"""An id that was asked for in vain so long ago is forgotten."""


@click.command()
@click.argument("words", nargs=-1)
@config_option
@click.option("--refresh", is_flag=True, help="Ask your endpoints' own lists first, with your keys.")
@click.option("--tiers", is_flag=True, help="Show how your traffic is spread over tiers instead.")
@click.option(
    "--by",
    type=click.Choice(["day", "week", "month"]),
    default="month",
    show_default=True,
    help="Period of --tiers.",
)
@json_option
def models(
    words: tuple[str, ...],
    config_path: Path,
    refresh: bool,
    tiers: bool,
    by: Literal["day", "week", "month"],
    as_json: bool,
) -> None:
    """What models exist, can do, cost, and when they retire.

    WORDS must all occur in the model's id; of a single model every fact is shown with who says so and who
    says otherwise. Your own facts come from the YAML named by [catalog] overlay:

    \b
    models:
      ENDPOINT/MODEL:
        retires: 2026-12-31            # deprecated, released, successor, licence,
        context_window: 8192           # output_limit, inputs: [text, image],
        features: [tools, json_schema] # your whole list: what it omits is lacking
        prices: {input: 0.4, output: 1.6, cached: 0.1, cache_write: 0.5, start: 2026-01-01,
                 tiers: [{above: 200000, input: 0.8, output: 3.2}], batch: {input: 0.2, output: 0.8}}
        hosting: {usd_per_hour: 0.5, tokens_per_s: 900}     # instead of prices
        tokenizer: models/tokenizer.json                    # counts instead of bounds
    """
    config = configuration.load(config_path) if config_path.exists() or refresh or tiers else None
    if config and refresh:
        _refresh(config)
    if config and tiers:
        _show_tiers(config, by, as_json)
        return
    catalog = _catalog(config)
    found = [m for m in catalog if all(word.lower() in m.id.lower() for word in words)]
    if len(words) == 1 and words[0] in catalog:
        found = [m for m in found if m.id == words[0]]
    if not found:
        raise InputError(
            f"no model's id has all of: {' '.join(words)}",
            expected="words like openai, claude or gpt-4.1",
            next_step="understudy models",
        )
    if as_json:
        print_json(found)
        return
    print_models(catalog, found)


@click.command()
@config_option
@click.option(
    "--within",
    type=click.IntRange(min=0),
    default=90,
    show_default=True,
    help="A retirement within so many days is an event.",
)
@click.option(
    "--since",
    type=click.IntRange(min=1),
    default=30,
    show_default=True,
    help="Prices and answering models that changed in so many days are events.",
)
@click.option(
    "--fail-on",
    type=click.Choice(["retirement", "price", "swap", "drift", "fingerprint"]),
    multiple=True,
    default=("retirement", "swap", "drift"),
    show_default=True,
    help="Kinds of events that make the exit code 1; may be repeated.",
)
@click.option("--webhook", help="POST the events there: a URL, env:NAME or file:PATH.")
@click.option("--slack", is_flag=True, help="In the form Slack's incoming webhooks take; alone: print it.")
@click.option(
    "--canary",
    type=click.Path(path_type=Path, dir_okay=False),
    help="JSON Lines of chat requests to ask every alias's model that speaks the OpenAI protocol; the first "
    "answers are kept beside the file.",
)
@json_option
def watch(
    config_path: Path,
    within: int,
    since: int,
    fail_on: tuple[str, ...],
    webhook: str | None,
    slack: bool,
    canary: Path | None,
    as_json: bool,
) -> None:
    """Which of your models are dying, when, and what hangs on them.

    Looks at every alias, weight and fallback, at models on trial, the judge, the drill's candidates, the
    teacher and what you serve; at ids that applications ask for themselves and those that vendors answer
    with; at prices that changed or will; at models swapped behind a name; and at fingerprints that changed
    under the same id, which are sent on only where --fail-on names them. Exits 0 when nothing of the kinds
    of --fail-on happened, 1 otherwise, 2 on bad input: made for cron and CI.
    """
    from understudy.catalog.notify import payload, send, slack_payload

    report = _watched(configuration.load(config_path), within, since, canary)
    news = [e for e in report.events if e.kind != "fingerprint" or e.kind in fail_on]
    if webhook:
        url = configuration.resolve_secret(webhook, config_path.parent) if ":/" not in webhook else webhook
        if news:
            send(url, slack_payload(news) if slack else payload(news, report.at))
    if as_json:
        print_json(report)
    elif slack and not webhook:
        print_json(slack_payload(news))
    else:
        print_watch(report)
    sys.exit(any(e.kind in fail_on for e in report.events))


@click.command()
@click.argument("model")
@config_option
@click.option("--candidate", "candidates", multiple=True, help="Weigh only this model; may be repeated.")
@click.option(
    "--tolerate",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of calls that a candidate may break.",
)
@click.option("--top", type=click.IntRange(min=1), default=15, show_default=True, help="Candidates to print.")
@click.option(
    "--rank",
    "ranks",
    type=click.Choice(["fit", "life", "verified", "peer", "cost", "risk", "score", "latency", "energy"]),
    multiple=True,
    help="Rank by this; may be repeated, the first deciding. [default: fit, life, verified, peer, cost]",
)
@click.option("--days", type=click.FloatRange(min=0, min_open=True), help="Plan on so many days up to now.")
@click.option(
    "--latest",
    type=click.IntRange(min=0),
    default=PLANNED_ON,
    show_default=True,
    help="Plan on the latest so many calls (0: all).",
)
@json_option
def plan(
    model: str,
    config_path: Path,
    candidates: tuple[str, ...],
    tolerate: float,
    top: int,
    ranks: tuple[Key, ...],
    days: float | None,
    latest: int,
    as_json: bool,
) -> None:
    """What could take over from MODEL (an alias or a model id), ranked on your own traffic.

    Costs of a month are those of the calls planned on, by the time they span.
    """
    from understudy.catalog.plan import RANK_BY, latencies_by_model, make_plan
    from understudy.catalog.tiers import parse_rules
    from understudy.catalog.tokens import ratios_by_model

    config = configuration.load(config_path)
    catalog = _catalog(config)
    with _store(config) as store:
        since = time.time() - days * DAY_S if days else None
        incumbent, recorded = _recorded(config, store, model, since, latest)
        latencies = latencies_by_model(catalog, store.latencies())
        named = {facts.id for name in candidates if (facts := catalog.find(name))}
        seen = any("image" in call.modalities for call in recorded.calls)
        calls = partial(_counted, store, model)
        ratios = ratios_by_model(config, catalog, calls, named, pictures_sent=seen)
    made = make_plan(
        catalog,
        incumbent,
        recorded.calls,
        candidates or None,
        now=time.time(),
        tolerance=tolerate,
        rank=ranks or RANK_BY,
        tiers=parse_rules(config.catalog.tiers),
        latencies=latencies,
        ratios=ratios,
    )
    if not recorded.whole:
        first = dt.datetime.fromtimestamp(recorded.calls[0].at, dt.UTC)
        click.echo(f"the latest {len(recorded.calls):,} calls, since {first:%Y-%m-%d %H:%M}Z", err=True)
    if as_json:
        print_json(made)
    else:
        print_plan(made, top)


def _counted(store: Store, model: str) -> Iterator[Counted]:
    """The latest calls of an alias or model with their texts and their vendor's count."""
    from understudy.catalog.tokens import LATEST, Counted

    alias = model if any(use.alias == model for use in store.models()) else None
    target = model if alias is None and "/" in model else None
    latest = store.calls(alias=alias, target=target, ok=True, limit=LATEST, newest_first=True, texts=True)
    for c in latest:
        if c.call.request and c.call.usage and not c.call.usage_estimated:
            request = msgspec.json.decode(c.call.request, type=dict[str, Any])
            yield Counted(request, c.call.usage.prompt_tokens, c.call.target)


def _catalog(config: Config | None) -> Catalog:
    from understudy.catalog.facts import catalog_of, load_catalog

    return load_catalog() if config is None else catalog_of(config)


def _refresh(config: Config) -> None:
    """Read the lists of all endpoints, telling on standard error what they brought."""
    from understudy.catalog.live import LiveEndpoint, refresh

    root = Path(config.root)
    endpoints = [
        LiveEndpoint(name, e.kind, e.base_url, configuration.resolve_secret(e.api_key, root))
        for name, e in config.endpoints.items()
    ]
    for read in refresh(config.path(config.catalog.live), endpoints, dt.datetime.now(dt.UTC).date()):
        told = read.failure or f"{read.endpoint}: {read.models} models, {read.ending} with an announced end"
        gone = f"; no longer listed: {', '.join(read.gone)}" if read.gone else ""
        click.echo(told + gone, err=True)


def _store(config: Config) -> Store:
    from understudy.traffic.store import open_store

    return open_store(config.store.url, Path(config.root))


def _watched(config: Config, within: int, since: int, canary: Path | None) -> WatchReport:
    """Everything `watch` has to tell."""
    from understudy.catalog.events import (
        WatchReport,
        fingerprint_events,
        price_events,
        retirement_events,
        swap_events,
    )
    from understudy.catalog.forecast import forecast
    from understudy.catalog.watch import watch as exposures

    now, catalog = time.time(), _catalog(config)
    with _store(config) as store:
        answers, prints = store.answered_by(), store.fingerprints()
        bindings = _bound(config, catalog, store, answers, now)
        # what answers for a target has the target's calls
        recorded = {b.target: b.name if b.level == "answering" else b.target for b in bindings}
        shapes = {target: store.shapes(target=name, latest=PLANNED_ON) for target, name in recorded.items()}
    ending = exposures(catalog, bindings, shapes, now)
    events = retirement_events(ending, within)
    events += price_events(catalog, bindings, shapes, now, since_days=since)
    events += swap_events(answers, bindings, now, since_days=since)
    events += fingerprint_events(prints, bindings, now, since_days=since)
    if canary:
        events += _canaries(config, canary, bindings, now)
    found = {b.target: facts for b in bindings if (facts := catalog.find(b.target))}
    kept = {b.target for b in bindings if b.kept}
    outlook = {
        target: told
        for target, facts in found.items()
        if target not in kept and (told := forecast(catalog, facts, now))
    }
    return WatchReport(
        at=now,
        bound=len({b.target for b in bindings}),
        unknown=tuple(sorted({b.target for b in bindings} - set(found) - kept)),
        kept=tuple(sorted(kept)),
        exposures=tuple(ending),
        events=tuple(events),
        outlook=outlook,
        catalog_read=str(catalog.read),
        catalog_stale_days=catalog.stale_days(dt.datetime.now(dt.UTC).date()),
    )


def _bound(
    config: Config, catalog: Catalog, store: Store, answers: Sequence[AnsweredBy], now: float
) -> list[Binding]:
    """Every place that names a model. Ids asked for in vain count where the catalog knows the model: it may
    have been retired already."""
    from understudy.catalog.bindings import answering, bindings_of

    asked = [(use.alias, use.target) for use in store.models()]
    for hour in store.hours(since=now - FAILING_S):
        target = hour.target or hour.alias
        if hour.failed and catalog.find(target):
            asked.append((hour.alias, target))
    bindings = bindings_of(config, store.routes(), asked)
    return [*bindings, *answering(catalog, bindings, answers)]


def _canaries(config: Config, path: Path, bindings: Sequence[Binding], now: float) -> list[Event]:
    """Ask every alias's model the canary prompts; the first round is kept, later ones are held against it."""
    from understudy.catalog.canary import drift_events, load_replies, read_prompts, save_replies

    prompts, kept = read_prompts(path), path.with_suffix(".answers.jsonl")
    before = load_replies(kept)
    known = {(r.target, r.prompt) for r in before}
    asked = dict.fromkeys(b.target for b in bindings if b.level in ("alias", "weight"))
    after = asyncio.run(_ask(config, list(asked), prompts, now))
    save_replies(kept, [*before, *(r for r in after if (r.target, r.prompt) not in known)])
    return drift_events(before, after, bindings)


async def _ask(config: Config, targets: Sequence[str], prompts: Sequence[Any], now: float) -> list[Reply]:
    from understudy.catalog.canary import ask
    from understudy.endpoint import http_endpoint

    replies: list[Reply] = []
    for target in targets:
        endpoint, model = config.endpoint_of(target)
        key = configuration.resolve_secret(endpoint.api_key, Path(config.root))
        async with http_endpoint(target, endpoint, model, api_key=key) as client:
            replies += await ask(client, prompts, now, times=2)
    return replies


def _show_tiers(config: Config, by: Literal["day", "week", "month"], as_json: bool) -> None:
    from understudy.catalog.tiers import parse_rules, tiers_over_time

    rules = parse_rules(config.catalog.tiers)
    with _store(config) as store:
        used = tiers_over_time(_catalog(config), store.days(), rules, time.time(), by)
    if as_json:
        print_json(used)
        return
    print_tiers(used, config.catalog.tiers)


def _recorded(
    config: Config, store: Store, model: str, since: float | None, latest: int
) -> tuple[str, Shapes]:
    """The model to replace and its calls: those of an alias, or those a target answered."""
    from understudy.traffic.sample import shapes

    route = store.route(model)
    if route or model in config.aliases:
        incumbent = route.model if route else config.aliases[model].model
        found = shapes(store, model, since=since, latest=latest)
    else:
        incumbent = model
        targets = {u.target for u in store.models() if model in (u.target, u.target.partition("/")[2])}
        if not targets:
            raise _unrecorded(model)
        found = shapes(store, targets=sorted(targets), since=since, latest=latest)
    if not found.calls:
        raise _unrecorded(model, " in that time" if since else "")
    return incumbent, found


def _unrecorded(model: str, when: str = "") -> InputError:
    return InputError(
        f"no answered call of {model!r} is recorded{when}",
        expected="an alias, ENDPOINT/MODEL or model id with traffic",
        next_step="understudy up, or understudy traffic import FILE",
    )
