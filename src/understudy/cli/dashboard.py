"""Command `dashboard`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from understudy import config as configuration
from understudy.cli.options import config_option, json_option

if TYPE_CHECKING:
    from understudy.config import Alias
    from understudy.dashboard.rollouts import Moves, Order
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
    from understudy.rollout import trials
    from understudy.rollout.move import move

    settings = config.rollout or configuration.Rollout()

    def order_of(asked: Order) -> trials.Order:
        return trials.Order(asked.by, asked.reason, asked.version or None)

    def start(store: Store, asked: Order, initial: Alias | None) -> object:
        return trials.begin(store, asked.alias, asked.to, order_of(asked), settings, initial=initial)

    def pause(store: Store, asked: Order, initial: Alias | None) -> object:
        return trials.pause(store, asked.alias, order_of(asked), initial)

    def resume(store: Store, asked: Order, initial: Alias | None) -> object:
        return trials.resume(store, asked.alias, order_of(asked), initial, settings)

    def abort(store: Store, asked: Order, initial: Alias | None) -> object:
        return trials.abort(store, asked.alias, order_of(asked), initial)

    def at_once(store: Store, asked: Order, initial: Alias | None) -> object:
        by, reason, seen = asked.by, asked.reason, asked.version or None
        return move(
            store, asked.alias, asked.to, by=by, reason=reason, initial=initial, expected_version=seen
        )

    return {
        "start": start, "pause": pause, "resume": resume, "abort": abort, "move": at_once, "back": abort,
    }  # fmt: skip


def _say(url: str, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"url": url, "pid": os.getpid()}))
    else:
        click.echo(f"dashboard at {url}; Ctrl-C to stop")
