"""`understudy label`: two answers, one key."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from understudy.cli.options import json_option, print_json, say

if TYPE_CHECKING:
    from understudy.evaluate.label import Labelling

KEYS = {"1": 1.0, "2": 0.0, "0": 0.5}
"""Preference for whatever stands first."""


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--candidate", help="ENDPOINT/MODEL; the first of the evaluation by default.")
@click.option("--most", type=click.IntRange(1), default=50, show_default=True, help="Pairs to show.")
@click.option("--web", is_flag=True, help="In a browser on this machine instead of the terminal.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0, show_default=True, help="With --web; 0: any."
)
@json_option
def label(folder: Path, candidate: str | None, most: int, web: bool, port: int, as_json: bool) -> None:
    """Compare answers of an evaluation in FOLDER: 1 or 2 for the better one, 0 for a tie, s skips, q ends.

    Who wrote which is not shown, and the order is drawn per pair. Each key is saved at once; at the end the
    certificate is written anew.
    """
    from understudy.evaluate.certificate import EVIDENCE
    from understudy.evaluate.certify import write
    from understudy.evaluate.label import Labelling

    labelling = Labelling(folder / EVIDENCE, candidate)
    done = _in_browser(labelling, most, port) if web else _in_terminal(labelling, most, err=as_json)
    if done:
        write(folder)
    if as_json:
        print_json({"labelled": done, "in_all": labelling.count, "file": labelling.path})
    else:
        click.echo(f"{done} labelled, {labelling.count} in all: {labelling.path}")


def _in_browser(labelling: Labelling, most: int, port: int) -> int:
    import asyncio

    from understudy.evaluate.label_page import LabelPage, serve

    async def session() -> int:
        page = LabelPage(labelling, most)
        await serve(page, port, _say_where)
        return page.done

    before = labelling.count
    try:
        return asyncio.run(session())
    except KeyboardInterrupt:
        return labelling.count - before


def _say_where(url: str) -> None:
    click.echo(f"open {url} (Finish there, or Ctrl-C here)", err=True)


def _in_terminal(labelling: Labelling, most: int, *, err: bool) -> int:
    done = 0
    for shown in labelling.open_pairs():
        if done == most:
            break
        say(
            f"\n[{done + 1}] {shown.prompt}\n\n--- 1 ---\n{shown.first}\n\n--- 2 ---\n{shown.second}\n",
            err=err,
        )
        key = _key(err=err)
        if key == "q":
            break
        if key in KEYS:
            labelling.save(shown, KEYS[key])
            done += 1
    return done


def _key(*, err: bool) -> str:
    while True:
        click.echo("1, 2, 0 tie, s skip, q quit: ", nl=False, err=err)
        key = click.getchar().lower()
        click.echo(key, err=err)
        if key in (*KEYS, "s", "q"):
            return key
