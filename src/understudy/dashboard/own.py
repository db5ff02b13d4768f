"""Models of your own: what was cut, how far the student is from its teacher, how it healed, its lineage.

`_Report` names the fields of compress's report that are shown; nothing of that room is imported, for that
would bring torch. It ignores how models are made (compress) and whether they are good enough (evaluations).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from markupsafe import Markup

from understudy.dashboard import chart, evaluations
from understudy.dashboard.chart import Line
from understudy.dashboard.desk import Desk
from understudy.evaluate.certificate import Model

REPORT = "report.json"
MOST_BYTES = 64 << 20
"""A report larger than this is not one."""


class Fidelity(msgspec.Struct, frozen=True):
    """A student beside its teacher on held-out chats."""

    tokens: int
    kl: float
    """Nats per token."""
    kl_se: float
    agreement: float
    """Share of tokens on which both would say the same."""
    teacher_perplexity: float
    student_perplexity: float
    student_perplexity_se: float


class _Point(msgspec.Struct, frozen=True):
    tokens: int
    loss: float
    kl: float


class _Check(msgspec.Struct, frozen=True):
    tokens: int
    kl: float
    answer_kl: float


class Report(msgspec.Struct, frozen=True):
    """How a student came about."""

    teacher: str
    parameters_before: int
    parameters_after: int
    calibration_tokens: int
    training_tokens: int
    stopped: str
    """Why healing ended: tokens | minutes | early."""
    seed: int
    before: Fidelity
    """Pruned and refitted, not healed."""
    after: Fidelity
    """Healed."""
    points: list[_Point]
    checks: list[_Check]
    seconds: dict[str, float]
    """Wall-clock of each step."""
    checkpoint: str
    lineage: list[str]
    """Where the student comes from, a line for each step."""

    @property
    def kept(self) -> float:
        """Share of the teacher's parameters."""
        return self.parameters_after / self.parameters_before if self.parameters_before else 0.0

    @property
    def gap_closed(self) -> float:
        """Share of the untrained KL that healing removed."""
        return 1 - self.after.kl / self.before.kl if self.before.kl else 0.0


class Entry(NamedTuple):
    """One report found."""

    folder: str
    """Relative to the config's folder."""
    written_at: float
    report: Report | None
    fault: str
    """Why it cannot be read; empty when it can."""
    charts: list[Markup]
    rivals: list[Model]
    """The models of the certificate beside it, the incumbent first: benchmarks, size and cost."""


class Own(NamedTuple):
    """The page."""

    now: float
    entries: list[Entry]
    """Newest first; behind them what cannot be read."""


def page(desk: Desk, query: Mapping[str, str]) -> Own:
    """Every report in an own-model folder of the drill or beside the config."""
    del query
    entries = [_entry(desk, path) for path in _found(desk)]
    return Own(desk.now(), sorted(entries, key=lambda e: (e.report is None, -e.written_at, e.folder)))


def _found(desk: Desk) -> Iterator[Path]:
    root, seen = Path(desk.config.root), dict[Path, Path]()
    for folder in (desk.config.path(desk.config.drill.out), root):
        for pattern in (f"*/{REPORT}", f"*/*/{REPORT}"):
            for path in folder.glob(pattern):
                seen.setdefault(path.resolve(), path)
    return iter(seen.values())


def _entry(desk: Desk, path: Path) -> Entry:
    report, fault, written = None, "", 0.0
    try:
        written = path.stat().st_mtime
        if path.stat().st_size > MOST_BYTES:
            fault = "too large to be one"
        else:
            report = msgspec.json.decode(path.read_bytes(), type=Report)
    except OSError as error:
        fault = error.strerror or type(error).__name__
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        fault = f"not a report of this version: {error}"
    root, folder = Path(desk.config.root).resolve(), path.resolve().parent
    shown = str(folder.relative_to(root)) if folder.is_relative_to(root) else folder.name
    charts = _charts(report) if report else []
    return Entry(shown, written, report, fault, charts, _rivals(folder) if report else [])


def _rivals(folder: Path) -> list[Model]:
    """Who the student was measured beside, by the certificate in its folder or the one above."""
    found = evaluations.read_in(folder) or evaluations.read_in(folder.parent)
    return [found.incumbent, *(candidate.model for candidate in found.candidates)] if found else []


def _charts(report: Report) -> list[Markup]:
    """KL and loss against tokens trained on."""
    lines = [
        Line("while training", _thinned([(p.tokens, p.kl) for p in report.points])),
        Line("set aside", [(c.tokens, c.kl) for c in report.checks]),
        Line("set aside, answers only", [(c.tokens, c.answer_kl) for c in report.checks]),
    ]
    losses = [Line("loss", _thinned([(p.tokens, p.loss) for p in report.points]))]
    return [
        chart.lines(
            "Distance to the teacher while healing", "KL, nats per token", lines, "tokens trained on"
        ),
        chart.lines("Loss while healing", "loss", losses, "tokens trained on"),
    ]


def _thinned(points: Sequence[tuple[float, float]], most: int = 300) -> Sequence[tuple[float, float]]:
    return points[:: max(1, len(points) // most)]
