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
    click.echo(msgspec.json.format(msgspec.json.encode(value, enc_hook=_encode), indent=2).decode())


def _encode(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(type(value).__name__)
