"""The certificate: what it holds, how it is written down, and which files stand beside it.

It ignores how its numbers come about (certify) and what it looks like (report): keep its own SHA-256, which
the page names and `understudy verify` prints, where it cannot be changed.

A folder holds:
    certificate.json, certificate.html
    evidence/question.json        what is asked, of whom, which versions (write_question)
    evidence/exchanges.jsonl      held-out items, the incumbent's answers (evidence.write_exchanges)
    evidence/CANDIDATE.jsonl      a candidate's calls                    (replay.prove)
    evidence/bench-SUITE-MODEL.jsonl                                     (benchmarks.run)
    evidence/repeats-MODEL.jsonl  the same questions asked again         (flicker.measure)
    evidence/judged-CANDIDATE.jsonl  what a judge prefers              (judge.judge_pairs)
    evidence/labels.jsonl         what people prefer                     (understudy label)
    evidence/users.jsonl          what users had to put up with         (users.write_marks)
    evidence/performance.json     speed samples, memory, prices          (performance.write_performance)
    evidence/plan.json            catalog's plan, as it was              (the drill)
    evidence/own-report.json      how the own model was made             (the drill)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import msgspec

from understudy.evaluate.benchmarks import (
    Accuracy,
    PairedDifference,
)
from understudy.evaluate.diversity import Pair
from understudy.evaluate.flicker import Flicker
from understudy.evaluate.judge import Judged
from understudy.evaluate.performance import Cost, Speed
from understudy.evaluate.proof import Proof
from understudy.evaluate.sequential import Verdict
from understudy.evaluate.task import TaskFigures
from understudy.evaluate.users import UserFigures
from understudy.protocol import Json

FORMAT = "understudy-certificate/3"
"""The format that is built and verified. Before 3 a verdict mixed likeness to the incumbent with right
answers: such certificates are refused, for their rule is no longer held to be right."""
CERTIFICATE = "certificate.json"
PAGE = "certificate.html"
EVIDENCE = "evidence"
QUESTION = "question.json"
PLAN = "plan.json"
OWN_REPORT = "own-report.json"
DIGITS = 10
"""Significant digits of a number: enough to tell any change, too few to see a math library's last bit."""


class Question(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`evidence/question.json`: what is asked, written before the proof."""

    alias: str
    incumbent: str
    """ENDPOINT/MODEL that retires."""
    candidates: list[str]
    """ENDPOINT/MODEL in the order tried."""
    created: float
    """Unix seconds."""
    retires: str = ""
    """ISO date, or empty."""
    reason: str = ""
    """Where the date comes from."""
    lineage: dict[str, list[str]] = {}
    """Candidate -> the steps it was made by, one line each."""
    sample_sha256: str = ""
    """`traffic.sample.sample_hash` of the held-out exchanges."""
    seeds: dict[str, int] = {}
    """Every seed used, by name."""
    versions: dict[str, str] = {}
    """Program -> version."""
    fallbacks: list[str] = []
    """ENDPOINT/MODEL the alias falls back on, in order."""


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """What the plan says of a model on this traffic."""

    share: float | None = None
    """Share of recorded calls it could answer at all."""
    misfits: dict[str, int] = {}
    """Reason -> calls that break."""
    unverified: tuple[str, ...] = ()
    usd_per_month: float | None = None
    retires: str | None = None
    days_left: int | None = None


class BenchmarkResult(msgspec.Struct, frozen=True, kw_only=True):
    """One benchmark of one model, and its paired difference from the incumbent where both were run."""

    accuracy: Accuracy
    versus: PairedDifference | None = None


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the benchmark table."""

    name: str
    parameters: int | None
    context_length: int | None
    modalities: tuple[str, ...]
    memory_bytes: int | None
    file_bytes: int | None
    benchmarks: dict[str, BenchmarkResult]
    """By suite."""
    speed: Speed | None
    cost: Cost | None
    """On the asked items of the (first) proof."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One candidate: how it fits, what was proven, what it is."""

    model: Model
    fit: Fit
    lineage: list[str]
    proof: Proof


class Traffic(msgspec.Struct, frozen=True, kw_only=True):
    """The held-out sample."""

    items: int
    first_at: float
    last_at: float
    tasks: dict[str, int]
    clusters: int
    graded_by: dict[str, int]
    """Grader -> items."""
    by_agreement: int
    """Items without a known right answer, graded by agreement with the incumbent."""
    exchanges_sha256: str
    sample_sha256: str


class Exposure(msgspec.Struct, frozen=True, kw_only=True):
    """What hangs on the incumbent, from the plan."""

    calls: int | None = None
    window_days: float | None = None
    tokens: int | None = None
    completed_tasks: int | None = None
    usd_per_month: float | None = None
    successor: str = ""


class EvidenceFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file every number rests on."""

    file: str
    sha256: str
    bytes: int
    lines: int


class Certificate(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`certificate.json`."""

    format: str
    verdict: Verdict
    """PASS if a candidate passed; else UNDECIDED if one is; else FAIL."""
    winner: str
    """The candidate to move to, or empty."""
    winner_rule: str
    question: Question
    days_left: int | None
    """From the day of the certificate to the retirement."""
    exposure: Exposure
    traffic: Traffic
    incumbent: Model
    incumbent_fit: Fit
    candidates: list[Candidate]
    own: dict[str, Any]
    """How the own model was made: the plain fields of its report."""
    next: list[str]
    """What would be needed next."""
    evidence: list[EvidenceFile]
    diversity: list[Pair] = []
    """Where any two arms fail together, on the traffic and on each benchmark."""
    flicker: list[Flicker] = []
    """Each model against itself, where repeats were asked for; the incumbent first."""
    tasks: list[TaskFigures] = []
    """Completion and cost per completed task on the asked items: the incumbent on those of the first
    candidate, then every candidate."""
    users: list[UserFigures] = []
    """What users of the recorded traffic had to put up with, by who answered them; the incumbent first."""
    judged: list[Judged] = []
    """What the judge says of each candidate, and what is known of the judge, where one was asked."""


WINNER_RULE = (
    "of the candidates that pass: the lowest cost per completed task where all have a price, "
    "else the best mean score; the earlier one when equal"
)


def write_question(folder: Path, question: Question) -> Path:
    """``folder/evidence/question.json``; ``folder`` is the certificate's."""
    path = folder / EVIDENCE / QUESTION
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(question), indent=1) + b"\n")
    return path


def encode(certificate: Certificate) -> bytes:
    """`certificate.json`: numbers rounded to DIGITS significant digits, keys in the order of the structs."""
    plain = rounded(msgspec.to_builtins(certificate))
    return msgspec.json.format(msgspec.json.encode(plain), indent=1) + b"\n"


def rounded(value: Any) -> Any:
    """Floats within plain values, rounded to DIGITS significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in cast(Json, value).items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in cast(Sequence[Any], value)]
    return value
