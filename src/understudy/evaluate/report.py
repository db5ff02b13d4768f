"""The certificate as a page: one self-contained HTML file, no external resource.

Everything shown is taken from the certificate and escaped; recorded text is hostile input. The one script is
our own, filters what is on the page, and is let through by its hash alone; without it nothing is missing.
Plots are drawn here as coordinates and become inline SVG in the template. It ignores how numbers came about
(certificate).
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from understudy.evaluate.benchmarks import Accuracy
from understudy.evaluate.certificate import Certificate, Model
from understudy.evaluate.metrics import RESTS_ON
from understudy.evaluate.proof import Guard, Proof
from understudy.evaluate.sequential import Verdict

TEMPLATES = Path(__file__).parent / "templates"
NOTHING = "–"


class Tick(NamedTuple):
    """A mark on an axis."""

    at: float
    label: str


class EPlot(NamedTuple):
    """The e-value path in the coordinates of its SVG (y grows downwards)."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    passing: str
    """Points of the PASS path, as an SVG polyline takes them."""
    failing: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    pass_line: Tick
    fail_line: Tick


class Bar(NamedTuple):
    """An interval on the scale of differences, in the coordinates of its SVG."""

    low: float
    high: float
    estimate: float
    margin: float
    zero: float


class Row(NamedTuple):
    """One row of the table of models; a cell's second line stands after a line break."""

    name: str
    cells: list[str]
    note: str = ""


def script_hash() -> str:
    """SHA-256 of the page's one script in base64, as a content-security policy names it."""
    return base64.b64encode(hashlib.sha256(_script().encode()).digest()).decode()


def _script() -> str:
    return (TEMPLATES / "filter.js").read_text(encoding="utf-8")


def render(certificate: Certificate, encoded: bytes) -> str:
    """The page of a certificate; ``encoded`` is `certificate.json`, whose SHA-256 the page names."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(points=points, share=share, usd=usd, count=count, day=day, e_value=e_value)
    script = _script()
    return environment.get_template("certificate.html").render(
        certificate=certificate,
        script=script,
        script_hash=script_hash(),
        rests_on=RESTS_ON,
        digest=hashlib.sha256(encoded).hexdigest(),
        title=_title(certificate),
        sentence=_sentence(certificate),
        models=_models(certificate),
        columns=[certificate.incumbent.name, *(c.model.name for c in certificate.candidates)],
        e_plot=e_plot,
        bar=bar,
        meaning=_meaning,
        task_cost=task_cost,
        guard=guard,
    )


_DIGEST = re.compile(r'<meta name="certificate-sha256" content="([0-9a-f]{64})">')


def digest_on(page: str) -> str:
    """SHA-256 of the certificate a page names; empty when it names none."""
    found = _DIGEST.search(page)
    return found[1] if found else ""


def _title(certificate: Certificate) -> str:
    names = [candidate.model.name for candidate in certificate.candidates]
    who = certificate.winner or (names[0] if len(names) == 1 else "a candidate")
    return f"Can {who} take over from {certificate.question.incumbent}?"


_ANSWER = {
    Verdict.PASS: "Yes, on this traffic.",
    Verdict.FAIL: "No, not as it is.",
    Verdict.UNDECIDED: "The evidence does not say yet.",
}


def _sentence(certificate: Certificate) -> str:
    return _ANSWER[certificate.verdict]


def _meaning(proof: Proof) -> str:
    """The verdict in a sentence, with the numbers that carry it."""
    who, margin = proof.candidate, f"{100 * proof.margin:g} points"
    asked = f"{proof.calls:,} of {proof.items:,} held-out questions"
    if proof.doubts:
        return " ".join(proof.doubts)
    if proof.verdict is Verdict.PASS and _is_likeness(proof):
        return (
            f"{who} answers as the incumbent does, within {margin}. {asked} settled that;"
            f" {_wrong(proof.alpha)}. Whether those answers are right nobody has said."
        )
    if proof.verdict is Verdict.PASS:
        return f"{who} is not worse by {margin} or more. {asked} settled that; {_wrong(proof.alpha)}."
    if proof.verdict is Verdict.FAIL and proof.calls == proof.items:
        return f"{who} was asked all {proof.items:,} held-out questions and is not within {margin}."
    if proof.verdict is Verdict.FAIL:
        return f"{who} is worse than the incumbent. {asked} settled that; {_wrong(proof.beta)}."
    if _is_likeness(proof):
        return f"{who}: all that {asked} tell is how like the incumbent it answers; that alone is no verdict."
    return f"{who}: after {asked} neither “within {margin}” nor “worse” could be ruled out."


def _is_likeness(proof: Proof) -> bool:
    """Whether all that stands for the verdict is agreement with the incumbent."""
    leading = next(m for m in proof.metrics if m.name == proof.leading)
    return leading.basis in ("agreement", "structure")


def _wrong(rate: float) -> str:
    return f"such a claim is wrong at most {rate:.0%} of the time"


def _models(certificate: Certificate) -> list[Row]:
    """Rows of the table of models; those that nobody has a value for are left out."""
    models = [certificate.incumbent, *(c.model for c in certificate.candidates)]
    fits = [certificate.incumbent_fit, *(c.fit for c in certificate.candidates)]
    suites = list(dict.fromkeys(suite for model in models for suite in model.benchmarks))
    rows = [
        Row("Parameters", [_parameters(m.parameters) for m in models]),
        *(Row(_SUITE_NAMES.get(s, s), [_accuracy(m, s) for m in models], _metric(models, s)) for s in suites),
        Row("Context length", [_number(m.context_length, " tokens") for m in models]),
        Row("Modalities", [", ".join(m.modalities) or NOTHING for m in models]),
        Row("Calls it can take", [NOTHING if f.share is None else share(f.share) for f in fits]),
        Row(
            "Throughput",
            [_rate(m.speed.tokens_per_s if m.speed else None) for m in models],
            "prompts and answers, all calls",
        ),
        Row("Generation", [_rate(m.speed.generation_tokens_per_s if m.speed else None) for m in models]),
        Row("Latency, median", [seconds(m.speed.p50_s) if m.speed else NOTHING for m in models]),
        Row("Latency, 95%", [seconds(m.speed.p95_s) if m.speed else NOTHING for m in models]),
        Row("Memory", [_bytes(m.memory_bytes) for m in models]),
        Row("File", [_bytes(m.file_bytes) for m in models]),
        Row(
            "Cost per million tokens",
            [usd(m.cost.usd_per_million_tokens if m.cost else None) for m in models],
        ),
        Row("Cost per 1,000 completed tasks", [usd(task_cost(m)) for m in models]),
        Row("Price taken from", [(m.cost.source if m.cost else "") or NOTHING for m in models]),
    ]
    return [row for row in rows if any(cell != NOTHING for cell in row.cells)]


_SUITE_NAMES = {
    "mmlu": "MMLU",
    "hellaswag": "HellaSwag",
    "arc_easy": "ARC easy",
    "arc_challenge": "ARC challenge",
    "piqa": "PIQA",
    "boolq": "BoolQ",
    "winogrande": "WinoGrande",
}


def _accuracy(model: Model, suite: str) -> str:
    result = model.benchmarks.get(suite)
    if result is None:
        return NOTHING
    figure: Accuracy = result.accuracy
    text = f"{100 * figure.accuracy:.1f} ± {100 * figure.stderr:.1f}"
    if result.versus is None:
        return text
    versus = result.versus
    return f"{text}\n{points(versus.difference)} ({points(versus.low)} to {points(versus.high)})"


def _metric(models: Sequence[Model], suite: str) -> str:
    figures = [m.benchmarks[suite].accuracy for m in models if suite in m.benchmarks]
    return f"{figures[0].metric}, {figures[0].items:,} of {figures[0].population:,} items"


def points(difference: float) -> str:
    """A difference of scores in points of 100, signed."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def share(value: float) -> str:
    return f"{100 * value:.1f}%"


def usd(value: float | None) -> str:
    """US dollars with three significant digits."""
    if value is None:
        return NOTHING
    if value == 0:
        return "$0"
    digits = max(2, 2 - math.floor(math.log10(abs(value))))
    return f"${value:,.{digits}f}"


def task_cost(model: Model) -> float | None:
    """US dollars per 1,000 completed tasks: one alone is often too small to read."""
    each = model.cost.usd_per_completed_task if model.cost else None
    return None if each is None else 1000.0 * each


def count(value: int | None) -> str:
    return NOTHING if value is None else f"{value:,}"


def day(at: float) -> str:
    return dt.datetime.fromtimestamp(at, dt.UTC).strftime("%-d %B %Y")


def e_value(value: float | None) -> str:
    if value is None:
        return "beyond doubt"
    return f"{value:,.1f}" if value >= 0.1 else f"{value:.1g}"


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.1 else f"{1000 * value:.0f} ms"


def guard(value: float, entry: Guard) -> str:
    if entry.unit == "usd":
        return usd(value)
    return seconds(value) if entry.unit == "seconds" else share(value)


def _number(value: int | None, unit: str) -> str:
    return NOTHING if value is None else f"{value:,}{unit}"


def _rate(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f} tokens/s"


def _parameters(value: int | None) -> str:
    if value is None:
        return NOTHING
    return f"{value / 1e9:.2f} B" if value >= 1e9 else f"{value / 1e6:.1f} M"


def _bytes(value: int | None) -> str:
    if value is None:
        return NOTHING
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def e_plot(proof: Proof) -> EPlot:
    """Both e-value paths on a logarithmic axis, with the thresholds that decide."""
    width, height, left, right, top, bottom = 480.0, 250.0, 46.0, 468.0, 14.0, 214.0
    pass_at, fail_at = proof.candidates / proof.alpha, 1.0 / proof.beta
    highest = math.log10(max(pass_at, fail_at)) + 0.45
    seen = [v for p in proof.path for v in (p.e_pass, p.e_fail) if v is not None]
    lowest = max(-3.0, min([-1.0, *(math.log10(v) for v in seen if v > 0)]))
    last = max(proof.path[-1].calls if proof.path else 0, 1)

    def x(calls: float) -> float:
        return round(left + (right - left) * calls / last, 1)

    def y(value: float | None) -> float:
        power = highest if value is None else math.log10(max(value, 1e-300))
        return round(
            bottom - (bottom - top) * (min(max(power, lowest), highest) - lowest) / (highest - lowest), 1
        )

    def line(pick: Sequence[float | None]) -> str:
        ends = zip([0, *(p.calls for p in proof.path)], [1.0, *pick], strict=True)
        return " ".join(f"{x(calls)},{y(value)}" for calls, value in ends)

    powers = range(math.ceil(lowest), math.floor(highest) + 1)
    return EPlot(
        width,
        height,
        left,
        right,
        top,
        bottom,
        line([p.e_pass for p in proof.path]),
        line([p.e_fail for p in proof.path]),
        [Tick(x(c), f"{c:,}") for c in _round_steps(last)],
        [Tick(y(10.0**p), f"{10.0**p:g}") for p in powers],
        Tick(y(pass_at), f"pass at {pass_at:g}"),
        Tick(y(fail_at), f"fail at {fail_at:g}"),
    )


def _round_steps(last: int) -> list[int]:
    """About five round numbers from 0 to ``last``."""
    rough = max(last / 5.0, 1.0)
    power = 10.0 ** math.floor(math.log10(rough))
    step = int(next(m * power for m in (1, 2, 5, 10) if m * power >= rough))
    return list(range(0, last + 1, step))


def bar(proof: Proof, low: float, high: float, estimate: float) -> Bar:
    """An interval in a box of 200 units, scaled to show the proof's own interval and three margins."""
    reach = max(3.0 * proof.margin, abs(proof.interval[0]), abs(proof.interval[1]))

    def x(value: float) -> float:
        return round(100.0 + 96.0 * min(max(value / reach, -1.0), 1.0), 1)

    return Bar(x(low), x(high), x(estimate), x(-proof.margin), x(0.0))
