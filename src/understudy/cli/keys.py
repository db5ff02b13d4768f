"""Command group `keys`: who may use the gateway under `[gateway] require_key`.

It ignores how a key is checked (gateway.keys) and kept (traffic.store: hashed, never in clear).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from understudy import config as configuration
from understudy.cli.options import config_option, json_option, print_json
from understudy.errors import InputError

if TYPE_CHECKING:
    from understudy.config import Config
    from understudy.traffic.allowances import Limits
    from understudy.traffic.keys import Key
    from understudy.traffic.store import Store

F = TypeVar("F", bound=Callable[..., Any])
_OPTIONS = (
    ("requests_per_minute", int, "Most requests in a calendar minute."),
    ("tokens_per_minute", int, "Most tokens (prompt and completion) in a calendar minute."),
    ("usd_per_day", float, "Most US dollars in a day (UTC), by the catalog's prices."),
    ("usd_per_month", float, "Most US dollars in a month (UTC), by the catalog's prices."),
)


def _limit_options(command: F) -> F:
    """``--limit-…`` for each kind of limit, as ``limits``: what was given."""
    for kind, number, text in reversed(_OPTIONS):
        name = "--limit-" + kind.replace("_", "-")
        least = click.IntRange(min=0) if number is int else click.FloatRange(min=0)
        command = click.option(name, kind, type=least, help=f"{text} 0: no limit.")(command)
    return command


@click.group()
def keys() -> None:
    """Make, limit, list and revoke the keys that callers show to the gateway."""


@keys.command()
@click.argument("name")
@_limit_options
@config_option
@json_option
def create(name: str, config_path: Path, as_json: bool, **given: float | None) -> None:
    """Make a key for NAME (a team, an application) and print its secret, this once.

    Limits hold for all gateway processes together. A call over one is answered with 429 and Retry-After; of
    tokens and money, calls in flight when the limit is reached are still answered to their end.
    """
    config = configuration.load(config_path)
    with _store(config) as store:
        made = store.create_key(name, _limits(given))
    if as_json:
        print_json({**_shown(made.key), "secret": made.secret})
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
        print_json([_shown(key) for key in found])
        return
    for key in found:
        click.echo(_line(key))
    if not found:
        click.echo("no keys; next: understudy keys create NAME")


@keys.command()
@click.argument("key_id", metavar="ID")
@_limit_options
@config_option
@json_option
def limit(key_id: str, config_path: Path, as_json: bool, **given: float | None) -> None:
    """Change limits of the key ID; those not named stay. Running gateways follow within a second."""
    with _store(configuration.load(config_path)) as store:
        before = store.key(key_id)
        if before is None or not store.limit_key(key_id, _limits(given, before.limits)):
            raise _no_such_key(key_id)
        changed = before._replace(limits=_limits(given, before.limits))
    if as_json:
        print_json(_shown(changed))
    else:
        click.echo(_line(changed))


@keys.command()
@click.argument("key_id", metavar="ID")
@config_option
@json_option
def revoke(key_id: str, config_path: Path, as_json: bool) -> None:
    """End the key ID; running gateways refuse it within a second."""
    with _store(configuration.load(config_path)) as store:
        if not store.revoke_key(key_id):
            raise _no_such_key(key_id)
    if as_json:
        print_json({"id": key_id, "revoked": True})
    else:
        click.echo(f"key {key_id} is revoked")


def _store(config: Config) -> Store:
    from understudy.traffic.store import open_store

    return open_store(config.store.url, Path(config.root))


def _no_such_key(key_id: str) -> InputError:
    return InputError(
        f"no living key {_id_shown(key_id)}",
        expected="the id of a key that was not revoked before",
        next_step="understudy keys list",
    )


def _limits(given: dict[str, float | None], now: Limits | None = None) -> Limits:
    from understudy.traffic.allowances import Limits

    changes: dict[str, Any] = {kind: most for kind, most in given.items() if most is not None}
    return (now or Limits())._replace(**changes)


def _shown(key: Key) -> dict[str, Any]:
    return {**key._asdict(), "limits": key.limits._asdict()}


def _line(key: Key) -> str:
    state = "living" if key.revoked is None else f"revoked {_when(key.revoked)}"
    limits = ", ".join(
        f"{most:,} {kind.replace('_', ' ')}" for kind, most in key.limits._asdict().items() if most
    )
    return f"{key.id}  {_when(key.created)}  {state}  {key.name}" + (f"  ({limits})" if limits else "")


def _when(at: float) -> str:
    return dt.datetime.fromtimestamp(at).astimezone().isoformat(" ", "seconds")


def _id_shown(key_id: str) -> str:
    """The id as a message may repeat it: a whole secret given by mistake must not reach a log."""
    return repr(key_id) if len(key_id) <= 12 else f"{key_id[:4]!r}…"
