"""Verdicts from scores already at hand: a CSV or JSONL of item, cluster, model, score.

Each candidate score is treated as if it cost a call, in an order drawn from the seed; the scores beyond the
stopping point serve only to report the true difference. It ignores how scores were made (grade, replay).

Clusters: the order is drawn by us, so the test over these items is exact however items depend on each
other, and single items are drawn by default (``unit="item"``). ``unit="cluster"`` draws whole clusters, which
costs more and is right when a conversation can only be replayed whole. What the seen scores suggest about
*other* clusters is `generalise`, with a cluster-robust error.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from understudy.errors import InputError
from understudy.evaluate.doubt import blind_scores
from understudy.evaluate.sequential import (
    Design,
    Draws,
    Interval,
    Outcome,
    SequentialTest,
    Unit,
    Verdict,
    shuffled,
)

LISTED = 10
"""Broken lines listed by name; the rest are counted."""


class Row(NamedTuple):
    """One line of a score file."""

    item: str
    cluster: str
    model: str
    score: float


class Table(NamedTuple):
    """Scores by model and item."""

    scores: dict[str, dict[str, float]]
    """model -> item -> score in [0, 1]."""
    clusters: dict[str, str]
    """item -> cluster; its own name where the file gives none."""
    broken: list[str]
    """Lines left out, each with its number and why (only with ``skip_broken``)."""

    @property
    def models(self) -> list[str]:
        return sorted(self.scores)


class Generalisation(msgspec.Struct, frozen=True, kw_only=True):
    """What the seen scores suggest about calls not recorded: an ordinary estimate, not a sequential one."""

    difference: float
    low: float
    high: float
    clusters: int
    """Clusters seen; below about 20 the error is itself uncertain."""


class Study(msgspec.Struct, frozen=True, kw_only=True):
    """One verdict from a score file."""

    incumbent: str
    candidate: str
    verdict: Verdict
    calls: int
    """Candidate scores looked at until the verdict."""
    items: int
    """Items scored for both models."""
    difference: float
    """Estimate of candidate - incumbent at the verdict."""
    interval: tuple[float, float]
    level: float
    """Probability with which the interval covers, whenever one stops."""
    difference_all: float
    """The truth over all items, which a paid evaluation would not know."""
    e_pass: float | None
    """None: the null has become impossible."""
    e_fail: float | None
    margin: float
    alpha: float
    beta: float
    seed: int
    unit: Draws
    clusters: int
    unpaired: int
    """Items scored for only one of the two; left out."""
    future: Generalisation | None = None
    doubts: list[str] = []
    """Why a PASS was withheld; none where it was not."""


class Repeated(msgspec.Struct, frozen=True, kw_only=True):
    """One ordered pair under many orders."""

    incumbent: str
    candidate: str
    verdict: Verdict
    """The most frequent one."""
    verdicts: dict[str, int]
    calls: float
    """Mean."""
    items: int
    share: float
    """Mean calls over items."""
    difference: float
    """Mean of the estimates at the verdict."""
    interval: tuple[float, float]
    """Mean bounds."""
    covered: float
    """Share of orders whose interval held the truth."""
    difference_all: float
    false_pass: float
    """Share of PASS although the candidate is worse by the margin or more."""
    false_fail: float
    """Share of FAIL although the candidate is at least as good."""
    margin: float
    alpha: float
    beta: float
    seed: int
    """Of the first order; the others follow."""
    repeats: int
    unit: Draws
    clusters: int
    unpaired: int


def read(path: Path, *, skip_broken: bool = False) -> Table:
    """Scores from a CSV (with a header) or JSONL file.

    Raises InputError for a file that cannot be read, lacks a column or has broken lines; these are
    counted and the first are listed. ``skip_broken`` leaves them out instead and keeps the list.
    """
    text = _text(path)
    lines = _jsonl(text) if path.suffix in (".jsonl", ".ndjson", ".json") else _csv(path, text)
    table = Table({}, {}, [])
    for number, parsed in lines:
        fault = parsed if isinstance(parsed, str) else _enter(table, parsed)
        if fault:
            table.broken.append(f"line {number}: {fault}")
    if table.broken and not skip_broken:
        raise _broken(path, table.broken)
    if len(table.scores) < 2:
        raise InputError(
            f"{path}: scores of {len(table.scores)} model(s)",
            expected="at least two models on the same items",
        )
    return table


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}", expected="a CSV or JSONL file of scores") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}", expected="a text file") from error


def _csv(path: Path, text: str) -> Iterator[tuple[int, Row | str]]:
    reader = csv.reader(io.StringIO(text))
    header = next(reader, [])
    missing = {"item", "model", "score"} - set(header)
    if missing:
        raise InputError(
            f"{path}: no column {', '.join(sorted(missing))} in the header {','.join(header)[:80]!r}",
            expected="item,cluster,model,score",
        )
    for values in reader:
        if len(values) == len(header):
            yield reader.line_num, _row(dict(zip(header, values, strict=True)))
        elif values:
            yield reader.line_num, f"{len(values)} fields, expected {len(header)}"


def _jsonl(text: str) -> Iterator[tuple[int, Row | str]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield number, _row(msgspec.json.decode(line, type=dict[str, Any]))
        except msgspec.MsgspecError as error:
            yield number, f"not a JSON object: {error}"


def _row(values: Mapping[str, Any]) -> Row | str:
    item, model = str(values.get("item") or ""), str(values.get("model") or "")
    if not item or not model:
        return "item or model is empty"
    try:
        score = float(values["score"])
    except (KeyError, TypeError, ValueError):
        return f"score {values.get('score')!r} is not a number"
    if not 0.0 <= score <= 1.0:
        return f"score {score} is not in [0, 1]"
    return Row(item, str(values.get("cluster") or ""), model, score)


def _enter(table: Table, row: Row) -> str:
    scores = table.scores.setdefault(row.model, {})
    if row.item in scores:
        return f"item {row.item!r} of {row.model!r} was already scored above"
    cluster = table.clusters.setdefault(row.item, row.cluster or row.item)
    if cluster != (row.cluster or row.item):
        return f"item {row.item!r} is in cluster {row.cluster!r} here and in {cluster!r} above"
    scores[row.item] = row.score
    return ""


def _broken(path: Path, broken: Sequence[str]) -> InputError:
    listed = "\n".join(f"  {line}" for line in broken[:LISTED])
    more = f"\n  and {len(broken) - LISTED} more" if len(broken) > LISTED else ""
    return InputError(
        f"{path}: {len(broken)} broken line(s)\n{listed}{more}",
        expected="item,cluster,model,score with a score in [0, 1], each item once per model",
        next_step="mend them, or leave them out with --skip-broken",
    )


class _Paired(NamedTuple):
    """Both models' scores on the items they share, as units to draw."""

    incumbent: dict[str, float]
    candidate: dict[str, float]
    members: dict[str, list[str]]
    """unit -> its items."""
    units: dict[str, Unit]
    unpaired: int

    @property
    def difference(self) -> float:
        return (math.fsum(self.candidate.values()) - math.fsum(self.incumbent.values())) / len(self.incumbent)


def _pair(table: Table, incumbent: str, candidate: str, unit: Draws) -> _Paired:
    for model in (incumbent, candidate):
        if model not in table.scores:
            raise InputError(f"no scores of {model!r}", expected="one of: " + ", ".join(table.models))
    a, b = table.scores[incumbent], table.scores[candidate]
    shared = [item for item in a if item in b]
    if not shared:
        raise InputError(
            f"{incumbent!r} and {candidate!r} share no item", expected="scores on the same items"
        )
    members: dict[str, list[str]] = defaultdict(list)
    for item in shared:
        members[table.clusters[item] if unit == "cluster" else item].append(item)
    units = {key: Unit(math.fsum(a[i] for i in items), len(items)) for key, items in members.items()}
    return _Paired(
        {i: a[i] for i in shared},
        {i: b[i] for i in shared},
        dict(members),
        units,
        len(a) + len(b) - 2 * len(shared),
    )


class _Run(NamedTuple):
    outcome: Outcome
    seen: list[str]
    """Items, in the order asked."""


def _decide(paired: _Paired, design: Design, order: Sequence[str]) -> _Run:
    test = SequentialTest(list(paired.units.values()), design)
    seen: list[str] = []
    for key in order:
        items = paired.members[key]
        seen.extend(items)
        if test.observe(paired.units[key], math.fsum(paired.candidate[i] for i in items)) != "UNDECIDED":
            break
    outcome = test.outcome()
    if outcome.verdict is Verdict.PASS and _doubts(paired, design):
        outcome = outcome._replace(verdict=Verdict.UNDECIDED)
    return _Run(outcome, seen)


def _doubts(paired: _Paired, design: Design) -> list[str]:
    line = blind_scores(list(paired.incumbent.values()), design.margin)
    return [line] if line else []


def study(
    table: Table, incumbent: str, candidate: str, design: Design, *, seed: int, unit: Draws = "item"
) -> Study:
    """The verdict on ``candidate``. Raises InputError for a model that is not in the table."""
    paired = _pair(table, incumbent, candidate, unit)
    outcome, seen = _decide(paired, design, shuffled(paired.units, seed))
    clusters = {table.clusters[item] for item in paired.incumbent}
    differences = [(table.clusters[i], paired.candidate[i] - paired.incumbent[i]) for i in seen]
    return Study(
        incumbent=incumbent,
        candidate=candidate,
        verdict=outcome.verdict,
        calls=outcome.calls,
        items=outcome.items,
        difference=outcome.difference,
        interval=(outcome.interval.low, outcome.interval.high),
        level=outcome.interval.level,
        difference_all=paired.difference,
        e_pass=finite(outcome.e_pass),
        e_fail=finite(outcome.e_fail),
        margin=design.margin,
        alpha=design.alpha,
        beta=design.beta,
        seed=seed,
        unit=unit,
        clusters=len(clusters),
        unpaired=paired.unpaired,
        future=generalise(differences, outcome.interval),
        doubts=_doubts(paired, design) if outcome.verdict is Verdict.UNDECIDED else [],
    )


def repeated(
    table: Table,
    incumbent: str,
    candidate: str,
    design: Design,
    *,
    seed: int,
    repeats: int,
    unit: Draws = "item",
) -> Repeated:
    """The same pair under ``repeats`` orders, seeds ``seed``, ``seed + 1``, …"""
    paired = _pair(table, incumbent, candidate, unit)
    runs = [_decide(paired, design, shuffled(paired.units, seed + r)).outcome for r in range(repeats)]
    truth, verdicts = paired.difference, Counter(str(run.verdict) for run in runs)
    calls = math.fsum(run.calls for run in runs) / repeats
    worse, as_good = truth <= -design.margin, truth >= 0.0
    return Repeated(
        incumbent=incumbent,
        candidate=candidate,
        verdict=Verdict(verdicts.most_common(1)[0][0]),
        verdicts=dict(verdicts),
        calls=calls,
        items=len(paired.incumbent),
        share=calls / len(paired.incumbent),
        difference=math.fsum(run.difference for run in runs) / repeats,
        interval=(
            math.fsum(run.interval.low for run in runs) / repeats,
            math.fsum(run.interval.high for run in runs) / repeats,
        ),
        covered=sum(run.interval.low <= truth <= run.interval.high for run in runs) / repeats,
        difference_all=truth,
        false_pass=verdicts["PASS"] / repeats if worse else 0.0,
        false_fail=verdicts["FAIL"] / repeats if as_good else 0.0,
        margin=design.margin,
        alpha=design.alpha,
        beta=design.beta,
        seed=seed,
        repeats=repeats,
        unit=unit,
        clusters=len({table.clusters[item] for item in paired.incumbent}),
        unpaired=paired.unpaired,
    )


def all_pairs(
    table: Table, design: Design, *, seed: int, repeats: int, unit: Draws = "item"
) -> Iterator[Repeated]:
    """`repeated` for every ordered pair of models, in alphabetical order."""
    for incumbent, candidate in itertools.permutations(table.models, 2):
        yield repeated(table, incumbent, candidate, design, seed=seed, repeats=repeats, unit=unit)


def generalise(differences: Iterable[tuple[str, float]], like: Interval) -> Generalisation | None:
    """Mean difference with a cluster-robust interval from (cluster, difference) pairs; None below 2 clusters.

    Liang & Zeger's sandwich for a mean: residuals are summed within clusters before they are squared. The
    level is that of ``like``. Early stopping makes the mean optimistic: read it beside the verdict.
    """
    pairs = list(differences)
    mean = math.fsum(d for _, d in pairs) / max(len(pairs), 1)
    sums: dict[str, float] = defaultdict(float)
    for cluster, difference in pairs:
        sums[cluster] += difference - mean
    count = len(sums)
    if count < 2:
        return None
    variance = math.fsum(s * s for s in sums.values()) * count / (count - 1) / len(pairs) ** 2
    half = _normal_quantile((1.0 + like.level) / 2.0) * math.sqrt(variance)
    return Generalisation(difference=mean, low=mean - half, high=mean + half, clusters=count)


def _normal_quantile(p: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(p)


def finite(value: float) -> float | None:
    """JSON has no infinity: None stands for a null that has become impossible."""
    return value if math.isfinite(value) else None
