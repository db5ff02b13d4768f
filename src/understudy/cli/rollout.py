"""Command group `rollout`."""

from __future__ import annotations

import datetime as dt
import difflib
import getpass
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from understudy import config as configuration
from understudy.cli.options import config_option, json_option, print_json
from understudy.cli.webhook import tell
from understudy.errors import InputError

if TYPE_CHECKING:
    from understudy.config import Alias, Config
    from understudy.rollout.calendar import Entry
    from understudy.rollout.controller import Report
    from understudy.rollout.look import Look
    from understudy.rollout.move import Moved
    from understudy.rollout.own_call import Means
    from understudy.traffic.routes import Route
    from understudy.traffic.store import Store


@click.group()
def rollout() -> None:
    """Move an alias to a candidate, or back."""


BEHIND = 10
"""How much less than a gateway beside it whoever watches over trials insists on the processor: copies and
evidence can wait, clients cannot."""
SILENT_S = 90.0
"""Whoever takes a trial through its course looks at it more often than that (controller.SHOWN_S)."""
REASON = click.option("--reason", default="by hand", show_default=True, help="Kept in the history.")


@rollout.command()
@click.argument("alias", required=False)
@config_option
@json_option
def status(alias: str | None, config_path: Path, as_json: bool) -> None:
    """Where each alias leads now, since when and why; of a trial also its evidence and what it waits for."""
    config = configuration.load(config_path)
    if alias is not None:
        _alias(config, alias)
    from understudy.rollout.terms import in_force

    with _store(config) as store:
        routes = [r for r in in_force(config, store) if alias in (None, r.alias)]
        looks = {r.alias: _look(config, store, r) for r in routes if r.candidate}
        watched = {alias: at for alias, (at, _) in store.looks().items() if alias in looks}
    if as_json:
        shown = [
            (r, {"trial": _plain(looks.get(r.alias)), "looked_at": watched.get(r.alias)}) for r in routes
        ]
        print_json([r._asdict() | more for r, more in shown])
        return
    _show(routes, False)
    for name, look in looks.items():
        _show_look(name, look)
        if look.stage != "held":
            click.echo(f"  {_watched(watched.get(name), time.time())}")


def _watched(at: float | None, now: float) -> str:
    """Whether somebody takes a trial through its course, by when it was last looked at (Unix seconds)."""
    if at is not None and now - at <= SILENT_S:
        return f"looked at {max(0.0, now - at):.0f} s ago by whoever takes it through its course"
    since = "" if at is None else f" for {(now - at) / 60:,.0f} minutes"
    return f"nobody takes it through its course{since}: see rollout.log, or understudy rollout run"


@rollout.command()
@click.argument("alias")
@click.option("--to", "target", required=True, metavar="ENDPOINT/MODEL", help="The model to move to.")
@click.option(
    "--evidence",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The certificate this move rests on. It must verify and pass the model; its SHA-256 is kept.",
)
@click.option(
    "--until-date",
    "until",
    metavar="DATE",
    help="Day (UTC) by which it is to be over, or `retirement`: the model's announced end. Refused where the "
    "alias's traffic is too little for that; held if undecided then.",
)
@click.option("--now", is_flag=True, help="Without a trial: point ALIAS there at once.")
@click.option("--dry-run", is_flag=True, help="Tell the stages, and change nothing.")
@REASON
@config_option
@json_option
def start(
    alias: str,
    target: str,
    evidence: Path | None,
    until: str | None,
    now: bool,
    dry_run: bool,
    reason: str,
    config_path: Path,
    as_json: bool,
) -> None:
    """Put another model on trial for ALIAS: shadow, canary, then promoted or rolled back by itself.

    Every gateway on this store follows within a second or so. `understudy up` takes the trial through its
    course where the config has a [rollout]; else `understudy rollout run` does.
    """
    from understudy.catalog.facts import catalog_of
    from understudy.rollout.move import move
    from understudy.rollout.terms import deadline, fit_to_judge, proven
    from understudy.rollout.trials import Order, begin

    config = configuration.load(config_path)
    initial = _alias(config, alias)
    config.endpoint_of(target)
    proof = proven(evidence, target) if evidence else ""
    settings = config.rollout or configuration.Rollout()
    with _store(config) as store:
        if not now:
            fit_to_judge(config, store, alias, target)
        ends = deadline(config, store, catalog_of(config), alias, until) if until else 0.0
        if dry_run:
            _show_course(settings, target, now, ends, as_json)
            return
        by = getpass.getuser()
        if now:
            moved = move(store, alias, target, by=by, reason=reason, evidence=proof, initial=initial)
        else:
            order = Order(by, reason)
            moved = begin(
                store, alias, target, order, settings, evidence=proof, deadline=ends, initial=initial
            )
    _report(config, moved, as_json)
    if config.rollout is None and not now and not as_json:
        click.echo("there is no [rollout] in the config: keep `understudy rollout run` running")


def _changing(name: str, doc: str) -> None:
    """One more command that changes a trial by the function of its name in `rollout.trials`."""

    @rollout.command(name, help=doc)
    @click.argument("alias")
    @REASON
    @config_option
    @json_option
    def change(alias: str, reason: str, config_path: Path, as_json: bool) -> None:
        from understudy.rollout import trials

        changes = {"pause": trials.pause, "resume": trials.resume, "abort": trials.abort}
        config = configuration.load(config_path)
        initial = _alias(config, alias)
        with _store(config) as store:
            moved = changes[name](store, alias, trials.Order(getpass.getuser(), reason), initial)
        _report(config, moved, as_json)

    del change


_changing("pause", "Send every task of ALIAS to its model again; the trial keeps what it has learnt.")
_changing("resume", "Go on with a trial where it was held.")
_changing("abort", "End the trial of ALIAS; without one, put back the route it had before its last move.")


@rollout.command()
@config_option
@json_option
def calendar(config_path: Path, as_json: bool) -> None:
    """By when a trial must begin on each alias to be over a week before its model retires.

    From the alias's traffic of two weeks, the outcomes reported of it and the course of [rollout]; an equal
    candidate is through in time with a probability of 90%.
    """
    from understudy.catalog.facts import catalog_of
    from understudy.rollout.terms import calendar_entry, in_force

    config = configuration.load(config_path)
    with _store(config) as store:
        catalog = catalog_of(config)
        entries = [calendar_entry(config, store, catalog, route) for route in in_force(config, store)]
    if as_json:
        print_json([msgspec.to_builtins(each._asdict()) for each in entries])
        return
    today = dt.datetime.now(dt.UTC).date()
    for each in sorted(entries, key=lambda e: (e.latest_start is None, e.latest_start, e.alias)):
        click.echo(_calendar_line(each, today))


@rollout.command()
@click.option("--once", is_flag=True, help="Look at every trial once, and end.")
@click.option("--every", "every_s", default=2.0, show_default=True, help="Seconds between two looks.")
@config_option
@json_option
def run(once: bool, every_s: float, config_path: Path, as_json: bool) -> None:
    """Take trials through their course, until Ctrl-C; `understudy up` does so where there is a [rollout].

    With --json a line of JSON says when it watches; steps taken are told on standard error, with --once all
    trials on standard output.
    """
    import asyncio

    from understudy.rollout.controller import Controller, watch_over

    config = configuration.load(config_path)
    if not once:
        os.nice(BEHIND)
    with _store(config) as store:
        controller = Controller(store, config, _means_of(config))
        if not once:
            click.echo(json.dumps({"pid": os.getpid()}) if as_json else "watching; Ctrl-C to stop")
        told = partial(_tell, config, as_json, not once)
        with suppress(KeyboardInterrupt):
            asyncio.run(watch_over(controller, told, every_s=every_s, once=once))


@rollout.command()
@click.argument("alias", required=False)
@config_option
@json_option
def history(alias: str | None, config_path: Path, as_json: bool) -> None:
    """Every change of a route (or of all), oldest first."""
    config = configuration.load(config_path)
    if alias is not None:
        _alias(config, alias)
    with _store(config) as store:
        _show(store.route_history(alias), as_json)


def _store(config: Config) -> Store:
    from understudy.traffic.store import open_store

    return open_store(config.store.url, Path(config.root))


def _alias(config: Config, alias: str) -> Alias:
    if alias not in config.aliases:
        close = difflib.get_close_matches(alias, config.aliases, n=1) or sorted(config.aliases)
        raise InputError(
            f"unknown alias {alias!r}",
            expected=f"one of understudy.toml, such as {', '.join(close) or 'none yet'}",
            next_step=f"add [aliases.{alias}] to understudy.toml",
        )
    return config.aliases[alias]


def _calendar_line(each: Entry, today: dt.date) -> str:
    line = f"{each.alias} -> {each.model}: {each.tasks_per_day:,.0f} tasks a day"
    if each.days_needed is not None:
        line += f"; a trial takes {each.tasks_needed:,.0f} tasks, {each.days_needed:,.1f} days"
    if each.latest_start is None or each.retires is None:
        return f"{line}; {each.missing}"
    late = " (late)" if each.latest_start < today else ""
    return f"{line}; retires {each.retires}, begin by {each.latest_start}{late}"


def _means_of(config: Config) -> Callable[[str], Means]:
    from understudy.catalog.facts import catalog_of
    from understudy.catalog.prices import pricer
    from understudy.evaluate.trial import connect
    from understudy.rollout.own_call import Means
    from understudy.traffic.redact import redactor_of

    price = pricer(catalog_of(config), config.endpoints)
    redactor = redactor_of(config.redact, Path(config.root))
    return lambda candidate: Means(partial(connect, config, candidate), price, redactor)


def _look(config: Config, store: Store, route: Route) -> Look:
    """The evidence of a trial, read anew."""
    from understudy.rollout.controller import Trial, fold_in
    from understudy.rollout.look import look_at

    settings = config.rollout or configuration.Rollout()
    trial = Trial(store, route, settings)
    fold_in(store, [(route, trial)], time.time())
    return look_at(route, trial.standing, settings)


def _plain(look: Look | None) -> Any:
    return msgspec.to_builtins(look)


def _show_look(alias: str, look: Look) -> None:
    copies = f"{look.replays} replayed, {look.copies} copies"
    done = f"{copies}, {look.tasks} tasks, {look.tasks_with_outcome} with an outcome"
    bets = f"evidence for no worse {look.e_no_worse:.3g}, for worse {look.e_worse:.3g}"
    click.echo(f"{alias}: {look.candidate} at {look.share:.0%}; {done}")
    click.echo(f"  outcomes: difference {look.difference:+.3f}; {bets}")
    if look.judge:
        trouble = f"; {look.judge_trouble}" if look.judge_trouble else ""
        money = f"${look.judge_usd:.2f} of ${look.judge_usd_most:.2f}"
        click.echo(f"  judge {look.judge}: {look.judged} tasks of the candidate scored, {money}{trouble}")
    for name, guard in look.guards.items():
        tolerated = f"{guard.tolerated:.0%} tolerated"
        click.echo(f"  {name}: {guard.rate:.1%}, {tolerated}, e-value {guard.e_value:.3g}")
    for missing in look.waits_for:
        click.echo(f"  waits for {missing}")


def _show_course(
    settings: configuration.Rollout, target: str, now: bool, deadline: float, as_json: bool
) -> None:
    stages: list[dict[str, Any]] = [{"stage": "promoted"}]
    if not now:
        canary = [
            {"stage": "canary", "share": share, "tasks": tasks}
            for share, tasks in zip(settings.shares, settings.tasks, strict=True)
        ]
        replay = [{"stage": "replay", "calls": settings.replay_tasks}] if settings.replay_tasks else []
        shadow = [{"stage": "shadow", "copies": settings.shadow_tasks}] if settings.shadow_tasks else []
        stages = [*replay, *shadow, *canary, *stages]
    judge = settings.judge if not now else ""
    if as_json:
        told = {"judge": judge, "judge_usd": settings.judge_usd} if judge else {}
        print_json({"candidate": target, "deadline": deadline or None, "stages": stages, **told})
        return
    for stage in stages:
        click.echo(" ".join([str(stage["stage"]), *(f"{k} {v}" for k, v in stage.items() if k != "stage")]))
    if judge:
        click.echo(f"judged by {judge} where nobody else says, for ${settings.judge_usd:g} at most")
    click.echo("nothing was changed")


def _tell(config: Config, as_json: bool, aside: bool, report: Report) -> None:
    """Say a step, and tell the webhook."""
    route = report.route
    body = {"source": "understudy rollout", "route": route._asdict(), "waits_for": report.missing}
    waits = "".join(f"\n  waits for {missing}" for missing in report.missing)
    text = msgspec.json.encode(body).decode() if as_json else _line(route) + waits
    click.echo(text, err=aside)
    if not report.missing:
        tell(config, route)


def _report(config: Config, moved: Moved, as_json: bool) -> None:
    if moved.changed:
        tell(config, moved.now)
    if as_json:
        print_json({"changed": moved.changed, "was": moved.was._asdict(), "now": moved.now._asdict()})
    elif moved.changed:
        proof = f"on {moved.now.evidence}" if moved.now.evidence else "without evidence"
        if trial := moved.now.candidate:
            click.echo(f"{moved.now.alias}: {trial} {moved.now.stage} {proof}; version {moved.now.version}")
            return
        how = "rolled back" if moved.now.stage == "rolled_back" else f"moved {proof}"
        click.echo(
            f"{moved.now.alias}: {moved.was.model} -> {moved.now.model}, {how}; version {moved.now.version}"
        )
        if moved.now.stage == "promoted":
            click.echo(f"to undo: understudy rollout abort {moved.now.alias}")
    else:
        click.echo(f"{moved.now.alias}: already at {moved.now.model}, version {moved.now.version}")


def _show(routes: Sequence[Route], as_json: bool) -> None:
    if as_json:
        print_json([route._asdict() for route in routes])
        return
    for route in routes:
        click.echo(_line(route))
    if not routes:
        click.echo("no route was ever changed")


def _line(route: Route) -> str:
    when = dt.datetime.fromtimestamp(route.changed_at).astimezone().isoformat(" ", "seconds")
    fallback = f" (then {', '.join(route.fallback)})" if route.fallback else ""
    trial = f"; on trial: {route.candidate} at {route.share:.0%}" if route.candidate else ""
    since = f"{route.stage} {when} by {route.changed_by}: {route.reason}" if route.version else route.reason
    evidence = f" [{route.evidence}]" if route.evidence else ""
    return f"{route.alias} v{route.version} -> {route.model}{fallback}{trial}; {since}{evidence}"
