"""`understudy version`."""

from __future__ import annotations

import platform

import click

from understudy import __version__
from understudy.cli.options import json_option, print_json


@click.command()
@json_option
def version(as_json: bool) -> None:
    """Print the version."""
    if as_json:
        print_json({"understudy": __version__, "python": platform.python_version()})
    else:
        click.echo(f"understudy {__version__}")
