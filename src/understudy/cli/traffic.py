"""Command group `traffic`."""

from __future__ import annotations

import datetime as dt
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from understudy import config as configuration
from understudy.cli.options import config_option, json_option, print_json
from understudy.errors import InputError

if TYPE_CHECKING:
    from understudy.config import Config
    from understudy.protocol import Json
    from understudy.traffic.imports import Imported
    from understudy.traffic.store import Store, StoredCall


@click.group()
def traffic() -> None:
    """Import, show and export recorded traffic."""


@traffic.command("import")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--alias", default="", help="Record the calls under this alias instead of the model's name.")
@click.option(
    "--endpoint", default="", help="Endpoint the model ids belong to; otherwise their vendor, where known."
)
@click.option(
    "--batch-input",
    "inputs",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The input file of an OpenAI batch whose output is imported; may be repeated.",
)
@config_option
@json_option
def import_(
    files: tuple[Path, ...],
    alias: str,
    endpoint: str,
    inputs: tuple[Path, ...],
    config_path: Path,
    as_json: bool,
) -> None:
    """Import calls recorded elsewhere: JSONL or a JSON array.

    Takes {"request": …, "response": …}, {"messages": […]}, OpenAI batch output and stored completions, and
    LiteLLM, Langfuse and Helicone logs. "expected" in a line is the right answer. Broken lines are counted
    and listed, the rest is imported; a file imported again adds nothing.
    """
    from understudy.catalog.facts import catalog_of
    from understudy.catalog.prices import pricer
    from understudy.traffic.imports import import_file
    from understudy.traffic.redact import redactor_of

    config = configuration.load(config_path)
    catalog = catalog_of(config)

    def target_of(model: str) -> str:
        facts = catalog.find(model)
        vendor = endpoint or (facts.vendor if facts else "imported")
        return f"{vendor}/{model.removeprefix(vendor + '/')}"

    price = pricer(catalog, config.endpoints)
    redactor = redactor_of(config.redact, Path(config.root))
    with _store(config) as store:
        done = [
            import_file(
                store,
                file,
                alias=alias,
                target_of=target_of,
                price=price,
                inputs=inputs,
                redactor=redactor,
            )
            for file in files
        ]
    if as_json:
        print_json([_imported_json(one) for one in done])
    else:
        _say_imported(done)


@traffic.command()
@click.argument("key", required=False)
@click.option("--alias", help="Only this alias.")
@click.option("--search", metavar="TEXT", help="Only calls whose request or answer has this text.")
@click.option("--failed", is_flag=True, help="Only calls answered with a status of 400 or more.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True)
@config_option
@json_option
def show(
    key: str | None,
    alias: str | None,
    search: str | None,
    failed: bool,
    limit: int,
    config_path: Path,
    as_json: bool,
) -> None:
    """Show the newest calls, or one call with its texts, attempts and feedback."""
    with _store(configuration.load(config_path)) as store:
        if key is not None:
            _show_call(store, key, as_json)
            return
        found = list(
            store.calls(
                alias=alias, search=search, ok=False if failed else None, limit=limit, newest_first=True
            )
        )
        total = store.counts().calls
    if as_json:
        print_json([_call_json(stored) for stored in found])
    else:
        _print_calls(found, total)


@traffic.command()
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True))
@click.option("--format", type=click.Choice(["jsonl", "parquet"]), help="By the file's ending if not given.")
@click.option("--alias", help="Only this alias.")
@click.option("--since", metavar="DATE", help="From this day on, e.g. 2026-01-31 (UTC).")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many calls.")
@config_option
@json_option
def export(
    out: Path,
    format: Literal["jsonl", "parquet"] | None,
    alias: str | None,
    since: str | None,
    limit: int | None,
    config_path: Path,
    as_json: bool,
) -> None:
    """Write recorded calls to OUT (- for standard output) as JSONL or Parquet."""
    from understudy.traffic.exports import export as write

    form = format or ("parquet" if out.suffix == ".parquet" else "jsonl")
    start = None if since is None else _day(since)
    with _store(configuration.load(config_path)) as store:
        if str(out) == "-":
            write(store, sys.stdout.buffer, alias=alias, since=start, limit=limit)
            return
        count = write(store, out, form, alias=alias, since=start, limit=limit)
    if as_json:
        print_json({"path": out, "format": form, "calls": count})
    else:
        click.echo(f"{count:,} calls written to {out}")


def _store(config: Config) -> Store:
    from understudy.traffic.store import open_store

    return open_store(config.store.url, Path(config.root))


def _day(text: str) -> float:
    try:
        return dt.datetime.fromisoformat(text).replace(tzinfo=dt.UTC).timestamp()
    except ValueError as error:
        raise InputError(f"--since {text}: {error}", expected="a day such as 2026-01-31") from error


def _imported_json(done: Imported) -> Json:
    return {**done._asdict(), "path": str(done.path), "listed": [f._asdict() for f in done.listed]}


def _say_imported(done: Sequence[Imported]) -> None:
    for one in done:
        forms = ", ".join(f"{count:,} {form}" for form, count in one.forms.items())
        known = f", {one.known:,} known already" if one.known else ""
        said = f", {one.feedback:,} feedback" if one.feedback else ""
        click.echo(f"{one.path}: {one.calls:,} calls imported{known}{said} ({forms})")
        for fault in one.listed:
            click.echo(f"  line {fault.line}: {fault.reason}", err=True)
        if one.faults:
            more = f"; the first {len(one.listed)} are listed" if one.faults > len(one.listed) else ""
            click.echo(f"  {one.faults:,} lines left out{more}", err=True)


def _call_json(stored: StoredCall) -> Json:
    import msgspec

    call: Any = msgspec.to_builtins(msgspec.structs.replace(stored.call, request=b"", response=b""))
    cost = stored.cost._asdict() if stored.cost else None
    shape = {"modalities": sorted(stored.shape.modalities), "features": sorted(stored.shape.features)}
    call["tpot_s"] = stored.call.tpot_s
    return {**call, "cost": cost, "prompt_hash": stored.shape.prompt_hash, **shape}


def _show_call(store: Store, key: str, as_json: bool) -> None:
    stored = store.call(key)
    if stored is None:
        raise InputError(
            f"no call {key!r}", expected="a key from the list", next_step="understudy traffic show"
        )
    said = store.feedback([key])
    request, response = (_readable(b) for b in (stored.call.request, stored.call.response))
    whole = {**_call_json(stored), "feedback": said, "request": request, "response": response}
    if as_json:
        print_json(whole)
        return
    for name, value in whole.items():
        if value not in (None, "", [], {}):
            click.echo(f"{name}: {_plain(value)}")


def _readable(body: bytes) -> object:
    """JSON as JSON, anything else (and what is nested too deeply to be printed) as text."""
    import msgspec

    try:
        value = msgspec.json.decode(body) if body else None
        msgspec.json.encode([value])  # it is printed one level further down
        return value
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return body.decode("utf-8", "replace")


def _plain(value: object) -> str:
    import msgspec

    if isinstance(value, str):
        return value
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


def _print_calls(found: Sequence[StoredCall], total: int) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("at", "key", "alias", "target", "status", "tokens in", "out", "seconds", "$"):
        table.add_column(name, no_wrap=name in ("at", "key"))
    for call, cost, _ in found:
        when = dt.datetime.fromtimestamp(call.at).astimezone().isoformat(" ", "seconds")
        usage = call.usage
        table.add_row(
            when,
            call.key,
            call.alias,
            call.target,
            str(call.status),
            _number(usage.prompt_tokens if usage else None, ","),
            _number(usage.completion_tokens if usage else None, ","),
            _number(call.total_s, ".2f"),
            _number(cost.usd if cost else None, ".2g"),
        )
    console = Console() if sys.stdout.isatty() else Console(width=240)
    console.print(table)
    click.echo(f"{len(found):,} of {total:,} calls; one in full: understudy traffic show KEY")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"
