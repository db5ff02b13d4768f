"""Command `drill`."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import click

from understudy.cli.options import config_option, json_option, print_json

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


@click.command()
@config_option
@json_option
def drill(config_path: Path, as_json: bool) -> None:
    """Rehearse a whole retirement: record, watch, plan, own, serve, prove, certify, move.

    Steps that are done are skipped; after Ctrl-C the same command goes on where it stopped.
    """
    from understudy import drill as story

    with _Terminal() as audience:
        outcome = story.drill(config_path, audience)
    if as_json:
        print_json(outcome)
        return
    click.echo(f"\ncertificate: {outcome.page}")
    click.echo(f"check it:    understudy verify {outcome.certificate}")


class _Terminal:
    """Shows the drill on standard error: a line a step, a bar while it works."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(stderr=True, highlight=False)
        columns = (
            TextColumn("   {task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._bars: Progress = Progress(*columns, console=self.console, transient=True)
        self._tasks: dict[str, TaskID] = {}
        self._begun = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clear()

    def begins(self, number: int, title: str) -> None:
        self._begun = time.monotonic()
        self.console.print(f"[bold]{number}  {title}[/bold]")

    def ends(self, summary: str, *, skipped: bool) -> None:
        self._clear()
        took = "done before" if skipped else f"{time.monotonic() - self._begun:.0f} s"
        self.console.print(f"   [dim]{took}[/dim] · ", end="")
        self.console.print(summary, markup=False, soft_wrap=True)

    def progress(self, step: str, done: int, total: int, note: str = "") -> None:
        # bars live only while there is something to show: a step's child may want the terminal for itself
        if step not in self._tasks:
            self._bars.start()
            self._tasks[step] = self._bars.add_task(step, total=total, note=note)
        self._bars.update(self._tasks[step], completed=done, total=total, note=note)

    def _clear(self) -> None:
        if not self._tasks:
            return
        self._bars.stop()
        for task in self._tasks.values():
            self._bars.remove_task(task)
        self._tasks.clear()
