"""Tables that fit the terminal: what has no room is left out by rank and named, never cut.

It ignores what the cells mean, colours, and characters that are wider than one column.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence
from textwrap import wrap
from typing import NamedTuple

GAP = "  "
PIPE_WIDTH = 240
"""Of what is no terminal: a pipe has no width of its own, and lines may be as long as they are."""


class Column(NamedTuple):
    """How one column behaves."""

    title: str
    right: bool = False
    """Set flush right, as numbers are."""
    rank: int = 0
    """0: always shown; of the others the highest is left out first."""
    least: int = 0
    """Folded down to so many characters; 0: never folded."""


class Drawn(NamedTuple):
    """A table as text."""

    text: str
    left_out: tuple[str, ...]
    """Titles of columns that had no room."""


def terminal_width() -> int:
    """Columns of the terminal, or `PIPE_WIDTH`."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPE_WIDTH


def draw(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> Drawn:
    """The rows under their titles in at most ``width`` characters, if the columns of rank 0 leave it.

    A column of which every cell is empty is left out without a word.
    """
    shown = [n for n in range(len(columns)) if any(row[n] for row in rows)]
    natural = {n: max(len(cell) for cell in (columns[n].title, *(row[n] for row in rows))) for n in shown}
    left_out: list[str] = []
    while _total(_least(columns[n], natural[n]) for n in shown) > width:
        optional = [n for n in shown if columns[n].rank]
        if not optional:
            break
        dropped = max(optional, key=lambda n: columns[n].rank)
        shown.remove(dropped)
        left_out.append(columns[dropped].title)
    widths = _share_out({n: (_least(columns[n], natural[n]), natural[n]) for n in shown}, width)
    lines = _lines([columns[n].title for n in shown], columns, widths)
    lines.append(GAP.join("─" * widths[n] for n in shown))
    for row in rows:
        lines += _lines([row[n] for n in shown], columns, widths)
    return Drawn("\n".join(lines), tuple(left_out))


def fold(text: str, width: int, indent: str = "") -> str:
    """A paragraph in lines of at most ``width`` characters, those after the first indented."""
    return "\n".join(wrap(text, max(20, width), subsequent_indent=indent, break_on_hyphens=False)) or text


def _total(widths: Iterable[int]) -> int:
    return sum(width + len(GAP) for width in widths) - len(GAP)


def _least(column: Column, natural: int) -> int:
    return min(natural, max(column.least, len(column.title))) if column.least else natural


def _share_out(ends: dict[int, tuple[int, int]], width: int) -> dict[int, int]:
    """Widths between the least and the natural one, the spare room given to folded columns in turn."""
    widths = {n: least for n, (least, _) in ends.items()}
    spare = width - _total(widths.values())
    while spare > 0 and (folded := [n for n, (_, natural) in ends.items() if widths[n] < natural]):
        for n in folded[:spare]:
            widths[n] += 1
        spare = width - _total(widths.values())
    return widths


def _lines(cells: Sequence[str], columns: Sequence[Column], widths: dict[int, int]) -> list[str]:
    """The lines of one row; a folded cell has several."""
    parts = [
        wrap(cell, widths[n]) or [""] if columns[n].least else [cell]
        for n, cell in zip(widths, cells, strict=True)
    ]
    lines: list[str] = []
    for at in range(max(map(len, parts))):
        texts = [part[at] if at < len(part) else "" for part in parts]
        padded = [
            text.rjust(widths[n]) if columns[n].right else text.ljust(widths[n])
            for n, text in zip(widths, texts, strict=True)
        ]
        lines.append(GAP.join(padded).rstrip())
    return lines
