"""`understudy label`: two answers, one key."""

from __future__ import annotations

from pathlib import Path

import click

KEYS = {"1": 1.0, "2": 0.0, "0": 0.5}
"""Preference for whatever stands first."""


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--candidate", help="ENDPOINT/MODEL; the first of the evaluation by default.")
@click.option("--most", type=click.IntRange(1), default=50, show_default=True, help="Pairs to show.")
def label(folder: Path, candidate: str | None, most: int) -> None:
    """Compare answers of an evaluation in FOLDER: 1 or 2 for the better one, 0 for a tie, s skips, q ends.

    Who wrote which is not shown, and the order is drawn per pair. Each key is saved at once; at the end the
    certificate is written anew.
    """
    from understudy.evaluate.certificate import EVIDENCE, write
    from understudy.evaluate.label import Labelling

    labelling = Labelling(folder / EVIDENCE, candidate)
    done = 0
    for shown in labelling.open_pairs():
        if done == most:
            break
        click.echo(
            f"\n[{done + 1}] {shown.prompt}\n\n--- 1 ---\n{shown.first}\n\n--- 2 ---\n{shown.second}\n"
        )
        key = _key()
        if key == "q":
            break
        if key in KEYS:
            labelling.save(shown, KEYS[key])
            done += 1
    click.echo(f"{done} labelled, {labelling.count} in all: {labelling.path}")
    if done:
        write(folder)


def _key() -> str:
    while True:
        click.echo("1, 2, 0 tie, s skip, q quit: ", nl=False)
        key = click.getchar().lower()
        click.echo(key)
        if key in (*KEYS, "s", "q"):
            return key
