"""How a healing went: every step, every check, and both as a plot.

The plot is one SVG without scripts: distance to the teacher (nats per token, logarithmic) over tokens trained
on. It ignores the loop that fills it (distill) and pages (dashboard has its own).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One optimiser step as it was."""

    step: int
    tokens: int
    """Trained on so far."""
    loss: float
    kl: float
    """Mean KL to the teacher over the tokens the step learnt from."""
    learning_rate: float


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One evaluation on held-out text."""

    step: int
    tokens: int
    kl: float
    """Per token, all tokens."""
    answer_kl: float
    """Per token, the assistant's."""
    answer_nll: float
    """−log of the student's probability of the answers' own tokens, per token."""
    loss: float
    """What the run is to bring down, in the weights of its last stage; the best check's weights are kept."""


class Curve(msgspec.Struct, kw_only=True):
    """The run so far; what is saved of it beside tensors."""

    points: list[Point] = []
    checks: list[Check] = []
    seconds: float = 0.0
    finished: bool = False
    stopped: str = ""
    """Why it ended: tokens | minutes | early."""
    halvings: int = 0
    """How often a check took the student back to its best and halved the rate."""
    chunk: int = 0
    """Rows whose logits exist at once; what memory allowed. 0: not begun."""
    micro: int = 0
    """Rows of text in one forward pass; what memory allowed."""
    notes: list[str] = []
    """What a person should know of the run."""

    @property
    def best(self) -> int:
        """Which check's weights are handed out: the least loss among those no farther from the teacher than
        the run began. The one before training is among them, so healing hands out nothing worse."""
        start = self.checks[0].kl
        near = [0, *(i for i, check in enumerate(self.checks) if check.kl <= start)]
        return min(near, key=lambda i: self.checks[i].loss)

    @property
    def since_best(self) -> int:
        """Checks since the weights that are handed out so far."""
        return len(self.checks) - 1 - self.best

    @property
    def handed_out(self) -> str:
        """Which weights they are, in a sentence."""
        first, kept = self.checks[0], self.checks[self.best]
        if kept is first:
            tried = min((check.kl for check in self.checks[1:]), default=first.kl)
            return (
                f"healing brought nothing: the student stays as it began, KL {first.kl:.4f} on texts set "
                f"aside, {tried:.4f} at best afterwards; more tokens or another rate may"
            )
        return (
            f"the weights after {kept.tokens:,} tokens are kept: KL {first.kl:.4f} → {kept.kl:.4f} on texts "
            "set aside"
        )


WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 56, 52
_COLOURS = ("#9db8cf", "#0072b2", "#d55e00")


class _Line(NamedTuple):
    name: str
    points: Sequence[tuple[float, float]]


def save_plot(curve: Curve, path: Path, title: str = "Distance to the teacher while healing") -> None:
    """The plot as an SVG file, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(plot(curve, title))
    os.replace(partial, path)


def plot(curve: Curve, title: str) -> str:
    """KL over tokens: of each step (a running mean), and of each check."""
    lines = [
        _Line("while training", _smooth([(p.tokens, p.kl) for p in curve.points])),
        _Line("held out", [(c.tokens, c.kl) for c in curve.checks]),
        _Line("held out, answers", [(c.tokens, c.answer_kl) for c in curve.checks]),
    ]
    shown = [_Line(n, [(x, y) for x, y in points if y > 0]) for n, points in lines]
    return _drawn([line for line in shown if line.points], title)


def _smooth(points: Sequence[tuple[float, float]], most: int = 200) -> list[tuple[float, float]]:
    """Means of as many neighbours as leave ``most`` points."""
    size = max(1, math.ceil(len(points) / most))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(g[-1][0], sum(y for _, y in g) / len(g)) for g in groups]


def _drawn(lines: Sequence[_Line], title: str) -> str:
    xs = [x for line in lines for x, _ in line.points] or [0.0, 1.0]
    ys = [math.log10(y) for line in lines for _, y in line.points] or [-1.0, 0.0]
    low, high = math.floor(min(ys) * 10) / 10, math.ceil(max(ys) * 10) / 10 + 1e-9
    right = max(*xs, 1.0)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + x / right * (WIDTH - LEFT - RIGHT)
        return across, TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)

    body = [_text(WIDTH / 2, 22, title, "middle", 15), _text(14, TOP - 10, "KL, nats per token", "start", 12)]
    body.append(_text(WIDTH / 2, HEIGHT - 8, "tokens trained on", "middle", 12))
    for value in _ticks(low, high):
        _, y = place(0, math.log10(value))
        body.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        body.append(_text(LEFT - 8, y + 4, f"{value:g}", "end", 11))
    step = _round(right / 5)
    for value in (step * i for i in range(int(right / step) + 1)):
        x, _ = place(value, low)
        body.append(
            _text(
                x,
                HEIGHT - BOTTOM + 18,
                f"{value / 1000:.0f}k" if right >= 5000 else f"{value:.0f}",
                "middle",
                11,
            )
        )
    for number, line in enumerate(lines):
        at = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(x, math.log10(v)) for x, v in line.points))
        body.append(f'<polyline points="{at}" fill="none" stroke="{_COLOURS[number]}" stroke-width="2"/>')
        x = LEFT + 150 + number * 150
        body.append(f'<path d="M{x} {TOP - 14}h22" stroke="{_COLOURS[number]}" stroke-width="3"/>')
        body.append(_text(x + 28, TOP - 10, line.name, "start", 12))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="sans-serif"><rect width="100%" height="100%" fill="#fff"/>'
        f"{''.join(body)}</svg>\n"
    )


def _round(step: float) -> float:
    """The next larger of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(size * power for size in (1, 2, 5, 10) if size * power >= step)


def _ticks(low: float, high: float) -> list[float]:
    """Round values within two logarithms."""
    values = [m * 10.0**n for n in range(math.floor(low), math.ceil(high) + 1) for m in (1, 1.5, 2, 3, 5, 7)]
    return [v for v in values if low <= math.log10(v) <= high]


def _text(x: float, y: float, text: str, anchor: str, size: int) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="#333">{text}</text>'
    )
