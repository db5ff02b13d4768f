"""Command `dashboard`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click
import msgspec

from understudy import config as configuration
from understudy.cli.options import config_option, json_option


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
    from understudy.dashboard.rollouts import Moves
    from understudy.dashboard.server import serve_dashboard
    from understudy.rollout.move import move, roll_back

    config = msgspec.structs.replace(config, dashboard=settings)
    serve_dashboard(config, lambda url: _say(url, as_json), moves=Moves(move, roll_back))


def _say(url: str, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"url": url, "pid": os.getpid()}))
    else:
        click.echo(f"dashboard at {url}; Ctrl-C to stop")
