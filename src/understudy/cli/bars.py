"""Progress on standard error: a bar for every step of a long command, with the time it still takes."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from understudy.compress.progress import Progress


def tells() -> bool:
    """Under torchrun the first process alone speaks."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def bars() -> Generator[Progress]:
    """Progress on standard error: a bar per step with the time it still takes."""
    if not tells():
        from understudy.compress.progress import silent

        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:10}"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True)) as shown:

        def show(step: str, done: int, total: int, note: str = "") -> None:
            if step not in tasks:
                tasks[step] = shown.add_task(step, total=total, note=note)
            shown.update(tasks[step], completed=done, total=total, note=note)

        yield show
