"""Command `dashboard`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import click
import msgspec

from understudy import config as configuration
from understudy.cli.options import config_option, json_option
from understudy.cli.webhook import tell

if TYPE_CHECKING:
    from understudy.catalog.facts import Catalog
    from understudy.config import Alias
    from understudy.dashboard.orders import Act, Moves, Order, Proof, Terms
    from understudy.rollout.move import Moved
    from understudy.traffic.store import Store


@click.command()
@config_option
@click.option("--listen", metavar="HOST:PORT", help="Instead of [dashboard] listen; port 0 takes a free one.")
@json_option
def dashboard(config_path: Path, listen: str | None, as_json: bool) -> None:
    """Show traffic, models, plans, evaluations and rollouts in a browser, until Ctrl-C.

    With --json one line of JSON says when it listens, and where.
    """
    config = configuration.load(config_path)
    settings = config.dashboard or configuration.Dashboard()
    if listen:
        settings = msgspec.structs.replace(settings, listen=listen)
    from understudy.dashboard.server import serve_dashboard

    config = msgspec.structs.replace(config, dashboard=settings)
    serve_dashboard(config, lambda url: _say(url, as_json), moves=moves_of(config))


def moves_of(config: configuration.Config) -> Moves:
    """What the dashboard's buttons do, by the rollout room's functions."""
    from understudy.dashboard.calendar import Row
    from understudy.dashboard.orders import Moves, Terms
    from understudy.rollout import terms, trials
    from understudy.rollout.move import move

    settings = config.rollout or configuration.Rollout()

    def order_of(asked: Order) -> trials.Order:
        return trials.Order(asked.by, asked.reason, asked.version or None)

    def start(store: Store, asked: Order, on: Terms, initial: Alias | None) -> Moved:
        order, evidence, deadline = order_of(asked), on.evidence, on.deadline
        return trials.begin(
            store,
            asked.alias,
            asked.to,
            order,
            settings,
            evidence=evidence,
            deadline=deadline,
            initial=initial,
        )

    def pause(store: Store, asked: Order, on: Terms, initial: Alias | None) -> Moved:
        return trials.pause(store, asked.alias, order_of(asked), initial)

    def resume(store: Store, asked: Order, on: Terms, initial: Alias | None) -> Moved:
        return trials.resume(store, asked.alias, order_of(asked), initial, settings)

    def abort(store: Store, asked: Order, on: Terms, initial: Alias | None) -> Moved:
        return trials.abort(store, asked.alias, order_of(asked), initial)

    def at_once(store: Store, asked: Order, on: Terms, initial: Alias | None) -> Moved:
        by, reason, seen = asked.by, asked.reason, asked.version or None
        return move(
            store, asked.alias, asked.to, by=by, reason=reason, evidence=on.evidence, initial=initial,
            expected_version=seen,
        )  # fmt: skip

    def checked(store: Store, catalog: Catalog, asked: Order, proof: Proof | None) -> Terms:
        if asked.do == "start":
            terms.fit_to_judge(config, store, asked.alias, asked.to)
        evidence = terms.proven(proof.path, asked.to, proof.shown) if proof else ""
        until = terms.deadline(config, store, catalog, asked.alias, asked.until) if asked.until else 0.0
        return Terms(evidence, until)

    def calendar(store: Store, catalog: Catalog) -> list[Row]:
        routes = terms.in_force(config, store)
        return [Row(*terms.calendar_entry(config, store, catalog, route)) for route in routes]

    acts = {"start": start, "pause": pause, "resume": resume, "abort": abort, "move": at_once, "back": abort}
    return Moves({name: _told(config, act) for name, act in acts.items()}, checked, calendar)


def _told(config: configuration.Config, act: Callable[[Store, Order, Terms, Alias | None], Moved]) -> Act:
    """The act, of which the webhook hears; nobody who pressed a button waits for that."""

    def does(store: Store, asked: Order, on: Terms, initial: Alias | None) -> object:
        moved = act(store, asked, on, initial)
        if moved.changed:
            Thread(target=tell, args=(config, moved.now), daemon=True).start()
        return moved

    return does


def _say(url: str, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"url": url, "pid": os.getpid()}))
    else:
        click.echo(f"dashboard at {url}; Ctrl-C to stop")
