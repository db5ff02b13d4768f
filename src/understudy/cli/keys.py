"""Command group `keys`: who may use the gateway under `[gateway] require_key`.

It ignores how a key is checked (gateway.keys) and kept (traffic.store: hashed, never in clear).
"""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import TYPE_CHECKING

import click

from understudy import config as configuration
from understudy.cli.options import config_option, json_option, print_json
from understudy.errors import InputError

if TYPE_CHECKING:
    from understudy.config import Config
    from understudy.traffic.store import Key, Store


@click.group()
def keys() -> None:
    """Make, list and revoke the keys that callers show to the gateway."""


@keys.command()
@click.argument("name")
@config_option
@json_option
def create(name: str, config_path: Path, as_json: bool) -> None:
    """Make a key for NAME (a team, an application) and print its secret, this once."""
    config = configuration.load(config_path)
    with _store(config) as store:
        made = store.create_key(name)
    if as_json:
        print_json({**made.key._asdict(), "secret": made.secret})
        return
    click.echo(made.secret)
    click.echo(f"key {made.key.id} for {name}; the secret is shown only now", err=True)
    if not config.gateway.require_key:
        click.echo("  next: set require_key = true in [gateway] so that callers must show a key", err=True)


@keys.command("list")
@config_option
@json_option
def list_(config_path: Path, as_json: bool) -> None:
    """List every key ever made, oldest first."""
    with _store(configuration.load(config_path)) as store:
        found = store.keys()
    if as_json:
        print_json([key._asdict() for key in found])
        return
    for key in found:
        click.echo(_line(key))
    if not found:
        click.echo("no keys; next: understudy keys create NAME")


@keys.command()
@click.argument("key_id", metavar="ID")
@config_option
@json_option
def revoke(key_id: str, config_path: Path, as_json: bool) -> None:
    """End the key ID; running gateways refuse it within a second."""
    with _store(configuration.load(config_path)) as store:
        if not store.revoke_key(key_id):
            raise InputError(
                f"no living key {_id_shown(key_id)}",
                expected="the id of a key that was not revoked before",
                next_step="understudy keys list",
            )
    if as_json:
        print_json({"id": key_id, "revoked": True})
    else:
        click.echo(f"key {key_id} is revoked")


def _store(config: Config) -> Store:
    from understudy.traffic.store import open_store

    return open_store(config.store.url, Path(config.root))


def _line(key: Key) -> str:
    state = "living" if key.revoked is None else f"revoked {_when(key.revoked)}"
    return f"{key.id}  {_when(key.created)}  {state}  {key.name}"


def _when(at: float) -> str:
    return dt.datetime.fromtimestamp(at).astimezone().isoformat(" ", "seconds")


def _id_shown(key_id: str) -> str:
    """The id as a message may repeat it: a whole secret given by mistake must not reach a log."""
    return repr(key_id) if len(key_id) <= 12 else f"{key_id[:4]!r}…"
