"""Plots as SVG made on the server: bars over time and lines, with axes, units and a legend.

Series differ in colour (Okabe and Ito's palette, told apart by colour-blind readers) and in outline or dash,
and the style sheet gives both, for light, dark and paper. It ignores everything larger than that: no scripts,
no zoom; the numbers stand in a table beneath.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

from understudy.dashboard.formats import short

WIDTH, HEIGHT = 480, 236
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 44, 46
_INNER_W, _INNER_H = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
_EMPTY = '<text class="tick" x="{x}" y="{y}" text-anchor="middle">nothing yet</text>'


class Bar(NamedTuple):
    """One place on the axis, and what is stacked there."""

    label: str
    values: Sequence[float]


class Mark(NamedTuple):
    """A threshold: a horizontal line with its name."""

    name: str
    value: float


class Line(NamedTuple):
    """One series of points by rising x."""

    name: str
    points: Sequence[tuple[float, float]]


def bars(title: str, unit: str, columns: Sequence[Bar], series: Sequence[str], x_label: str) -> Markup:
    """Stacked bars; ``series`` names what is stacked, from the bottom."""
    top = max((sum(column.values) for column in columns), default=0.0)
    whole = all(value == int(value) for column in columns for value in column.values)
    ticks = nice_ticks(0.0, max(top, 4.0) if whole and top else top)
    y = _scale(0.0, ticks[-1], HEIGHT - BOTTOM, TOP)
    step = _INNER_W / max(1, len(columns))
    body: list[str] = []
    for place, column in enumerate(columns):
        base = 0.0
        for number, value in enumerate(column.values):
            if value > 0:
                at, high = y(base + value), y(base) - y(base + value)
                body.append(
                    f'<rect class="fill{number}" x="{LEFT + place * step + step * 0.12:.1f}" y="{at:.1f}" '
                    f'width="{step * 0.76:.1f}" height="{max(high, 0.5):.1f}"/>'
                )
            base += value
    every = max(1, math.ceil(len(columns) / 6))
    body += [
        _tick_below(LEFT + (place + 0.5) * step, column.label)
        for place, column in enumerate(columns)
        if place % every == 0
    ]
    legend = [_legend("fill", n, name) for n, name in enumerate(series)] if len(series) > 1 else []
    names = [column.label for column in columns]
    table = _table(
        title, x_label, [(n, [c.values[s] for c in columns]) for s, n in enumerate(series)], names, unit
    )
    axis = _y_axis(ticks, y, [short(tick) for tick in ticks])
    inner = [*axis, *body, *([] if top else [_EMPTY.format(x=WIDTH / 2, y=HEIGHT / 2)])]
    return _figure(title, unit, x_label, inner, legend, table)


def lines(
    title: str,
    unit: str,
    series: Sequence[Line],
    x_label: str,
    *,
    marks: Sequence[Mark] = (),
    logarithmic: bool = False,
) -> Markup:
    """Lines over a number. A ``logarithmic`` axis shows powers of ten from 0.001 to a hundred times the
    highest of ``marks``: what lies beyond is drawn at its edge, where it decides nothing more."""
    if logarithmic:
        most = 100 * max((mark.value for mark in marks), default=1e12)
        series = [line._replace(points=[(x, _log(y, most)) for x, y in line.points]) for line in series]
        marks = [mark._replace(value=_log(mark.value, most)) for mark in marks]
    points = [point for line in series for point in line.points]
    # a mark's name stands above its line, so there must be room above the highest
    above = [mark.value + (0.6 if logarithmic else 0.0) for mark in marks]
    xs, ys = [x for x, _ in points] or [0.0], [y for _, y in points] + above or [0.0]
    y_ticks, x_ticks = nice_ticks(min(ys), max(ys)), nice_ticks(min(xs), max(xs))
    x = _scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    y = _scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    body = [_tick_below(x(value), short(value)) for value in x_ticks if min(xs) <= value <= max(xs)]
    for _, value in marks:
        body.append(f'<path class="mark" d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}"/>')
    for number, line in enumerate(series):
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line.points)
        body.append(f'<polyline class="line{number}" points="{path}"/>')
    for name, value in marks:  # on top of the lines, or these would cross them out
        body.append(f'<text class="tick" x="{LEFT + 5}" y="{y(value) - 4:.1f}">{escape(name)}</text>')
    legend = [_legend("line", n, line.name) for n, line in enumerate(series)]
    named = [_power(tick) if logarithmic else short(tick) for tick in y_ticks]
    inner = [
        *_y_axis(y_ticks, y, named),
        *body,
        *([] if points else [_EMPTY.format(x=WIDTH / 2, y=HEIGHT / 2)]),
    ]
    return _figure(title, unit, x_label, inner, legend, "")


def _log(value: float, most: float) -> float:
    return math.log10(min(max(value, 1e-3), most))


def _power(exponent: float) -> str:
    """Ten to a whole exponent, in at most three signs."""
    if 0 <= exponent <= 2:
        return f"{10 ** int(exponent)}"
    return "10" + f"{exponent:g}".translate(str.maketrans("-0123456789.", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹·"))


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round values from at or below ``low`` to at or above ``high``, in steps of 1, 2 or 5 times ten^n."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(size * power for size in (1, 2, 5, 10, 20) if span / (size * power) <= most)
    first = math.floor(low / step)
    return [n * step for n in range(first, math.ceil(round((low + span) / step, 9)) + 1)]


class _scale:  # noqa: N801 - called like the function it stands for
    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.span, self.start, self.length = low, (high - low) or 1.0, start, end - start

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / self.span * self.length


def _y_axis(ticks: Sequence[float], y: _scale, names: Sequence[str]) -> list[str]:
    rows: list[str] = []
    for value, name in zip(ticks, names, strict=True):
        rows.append(f'<path class="grid" d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}"/>')
        where = f'x="{LEFT - 6}" y="{y(value) + 4:.1f}"'
        rows.append(f'<text class="tick" {where} text-anchor="end">{escape(name)}</text>')
    return rows


def _tick_below(x: float, label: str) -> str:
    anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"  # within the picture also at its edge
    where = f'x="{min(x, WIDTH - RIGHT + 8):.1f}" y="{HEIGHT - BOTTOM + 19}"'
    return f'<text class="tick" {where} text-anchor="{anchor}">{escape(label)}</text>'


def _legend(kind: str, number: int, name: str) -> str:
    return f'<span class="key {kind}{number}">{escape(name)}</span>'


def _figure(
    title: str, unit: str, x_label: str, inner: Sequence[str], legend: Sequence[str], table: str
) -> Markup:
    x, y = LEFT + _INNER_W / 2, HEIGHT - 6
    return Markup(  # noqa: S704 - every text was escaped where it was put in
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<div class="legend">{"".join(legend)}</div>'
        f'<svg viewBox="0 {TOP - 27} {WIDTH} {HEIGHT - TOP + 27}" role="img" aria-label="{escape(title)}">'
        f'<text class="unit" x="{LEFT}" y="{TOP - 10}">{escape(unit)}</text>{"".join(inner)}'
        f'<text class="unit" x="{x}" y="{y}" text-anchor="middle">{escape(x_label)}</text>'
        f"</svg>{table}</figure>"
    )


def _table(
    title: str, x_label: str, series: Sequence[tuple[str, Sequence[float]]], names: Sequence[str], unit: str
) -> str:
    heads = "".join(f'<th scope="col" class="num">{escape(name)} ({escape(unit)})</th>' for name, _ in series)
    rows = "".join(
        f'<tr><th scope="row">{escape(label)}</th>'
        + "".join(f'<td class="num">{short(values[place])}</td>' for _, values in series)
        + "</tr>"
        for place, label in enumerate(names)
    )
    head = f'<thead><tr><th scope="col">{escape(x_label)}</th>{heads}</tr></thead>'
    table = f"<table>{head}<tbody>{rows}</tbody></table>"
    label = f"Numbers: {title}"
    return (
        f'<details><summary>Numbers</summary><div class="wide" tabindex="0" role="group" '
        f'aria-label="{escape(label)}">{table}</div></details>'
    )
