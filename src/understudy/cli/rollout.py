"""Command group `rollout`."""

from __future__ import annotations

import datetime as dt
import difflib
import getpass
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from understudy import config as configuration
from understudy.cli.options import config_option, json_option, print_json
from understudy.errors import InputError

if TYPE_CHECKING:
    from understudy.config import Alias, Config
    from understudy.rollout.move import Moved
    from understudy.traffic.store import Route, Store


@click.group()
def rollout() -> None:
    """Move an alias to a candidate, or back."""


@rollout.command()
@click.argument("alias", required=False)
@config_option
@json_option
def status(alias: str | None, config_path: Path, as_json: bool) -> None:
    """Where each alias leads now, since when and why."""
    config = configuration.load(config_path)
    if alias is not None:
        _alias(config, alias)
    with _store(config) as store:
        routes = _in_force(config, store)
    _show([route for route in routes if alias in (None, route.alias)], as_json)


@rollout.command()
@click.argument("alias")
@click.option("--to", "target", required=True, metavar="ENDPOINT/MODEL", help="The model to move to.")
@click.option(
    "--evidence",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The certificate this move rests on; its SHA-256 goes into the history.",
)
@click.option("--reason", default="moved by hand", show_default=True, help="Kept in the history.")
@config_option
@json_option
def start(
    alias: str, target: str, evidence: Path | None, reason: str, config_path: Path, as_json: bool
) -> None:
    """Point ALIAS at another model; every gateway on this store follows within a second or so."""
    from understudy.rollout.move import move

    config = configuration.load(config_path)
    initial = _alias(config, alias)
    config.endpoint_of(target)
    with _store(config) as store:
        moved = move(
            store,
            alias,
            target,
            by=getpass.getuser(),
            reason=reason,
            evidence=_named(evidence) if evidence else "",
            initial=initial,
        )
    _report(moved, as_json)


@rollout.command()
@click.argument("alias")
@click.option("--reason", default="rolled back by hand", show_default=True, help="Kept in the history.")
@config_option
@json_option
def abort(alias: str, reason: str, config_path: Path, as_json: bool) -> None:
    """Put back the route that ALIAS had before its last move."""
    from understudy.rollout.move import roll_back

    config = configuration.load(config_path)
    _alias(config, alias)
    with _store(config) as store:
        moved = roll_back(store, alias, by=getpass.getuser(), reason=reason)
    _report(moved, as_json)


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


def _in_force(config: Config, store: Store) -> list[Route]:
    """Routes of the store, and for aliases never changed what the config says, as version 0."""
    from understudy.rollout.move import CONFIG
    from understudy.traffic.store import Route

    stored = store.routes()
    return [
        stored.get(name)
        or Route(name, 0, a.model, tuple(a.fallback), "promoted", 0.0, CONFIG, "never changed", "")
        for name, a in config.aliases.items()
    ]


def _named(evidence: Path) -> str:
    return f"{evidence} sha256:{hashlib.sha256(evidence.read_bytes()).hexdigest()}"


def _report(moved: Moved, as_json: bool) -> None:
    if as_json:
        print_json({"changed": moved.changed, "was": moved.was._asdict(), "now": moved.now._asdict()})
    elif moved.changed:
        proof = f"on {moved.now.evidence}" if moved.now.evidence else "without evidence"
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
        when = dt.datetime.fromtimestamp(route.changed_at).astimezone().isoformat(" ", "seconds")
        fallback = f" (then {', '.join(route.fallback)})" if route.fallback else ""
        since = (
            f"{route.stage} {when} by {route.changed_by}: {route.reason}" if route.version else route.reason
        )
        evidence = f" [{route.evidence}]" if route.evidence else ""
        click.echo(f"{route.alias} v{route.version} -> {route.model}{fallback}; {since}{evidence}")
    if not routes:
        click.echo("no route was ever changed")
