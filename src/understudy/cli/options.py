"""Options that several commands share, and the one way each that commands print JSON and words of others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

F = TypeVar("F", bound=Callable[..., Any])


def config_option(command: F) -> F:
    """``--config PATH`` as ``config_path``."""
    return click.option(
        "--config",
        "config_path",
        type=click.Path(path_type=Path, dir_okay=False),
        default=Path("understudy.toml"),
        show_default=True,
        help="The config file.",
    )(command)


def json_option(command: F) -> F:
    """``--json`` as ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")(command)


def plain(text: str) -> str:
    """Without control characters: what a model, a server or a file says must not drive the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)


def say(text: str, *, err: bool = False) -> None:
    """Print a text that may hold words of others."""
    click.echo(plain(text), err=err)


def print_json(value: object) -> None:
    """One JSON document on standard output. Structs, named tuples, dataclasses and paths are taken."""
    click.echo(_escaped(msgspec.json.format(msgspec.json.encode(value, enc_hook=_encode), indent=2).decode()))


def print_json_line(value: object) -> None:
    """The same on one line."""
    click.echo(_escaped(msgspec.json.encode(value, enc_hook=_encode).decode()))


def _escaped(document: str) -> str:
    """The same JSON without control characters.

    RFC 8259 asks to escape those below U+0020 alone; terminals also obey DEL, C1 (U+009B begins a sequence)
    and directions of writing.
    """
    hostile = {ord(c): _escape(c) for c in set(document) if not c.isprintable() and c != "\n"}
    return document.translate(hostile)


def _escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))


def _encode(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(type(value).__name__)
