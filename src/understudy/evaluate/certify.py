"""Writing a certificate: every number computed from the evidence files of one folder.

`build` reads a folder's `evidence/` and nothing else, so the check (verify) is the same function run again.
It ignores who wrote the evidence, and what a certificate looks like (certificate, report).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from understudy.errors import EvidenceError
from understudy.evaluate import judge as judge_files
from understudy.evaluate.benchmarks import (
    BenchmarkHeader,
    Scored,
    accuracy,
    paired,
)
from understudy.evaluate.certificate import (
    CERTIFICATE,
    EVIDENCE,
    FORMAT,
    OWN_REPORT,
    PAGE,
    PLAN,
    QUESTION,
    WINNER_RULE,
    BenchmarkResult,
    Candidate,
    Certificate,
    EvidenceFile,
    Exposure,
    Fit,
    Model,
    Question,
    Traffic,
    encode,
)
from understudy.evaluate.diversity import Pair, of_benchmarks, of_traffic
from understudy.evaluate.evidence import (
    EXCHANGES,
    ExchangesHeader,
    Lines,
    ProofHeader,
    file_name,
    read_exchanges,
    read_lines,
    sha256_of,
)
from understudy.evaluate.flicker import Flicker, against, faults_of, flicker, read_repeats
from understudy.evaluate.item import Call, Item
from understudy.evaluate.judge import Judged
from understudy.evaluate.needed import needed, shared_blind_spots
from understudy.evaluate.performance import Cost, ModelSheet, cost, read_performance, speed
from understudy.evaluate.proof import Guard, Tokens, score_of, weigh
from understudy.evaluate.report import render
from understudy.evaluate.sequential import Verdict
from understudy.evaluate.task import TaskFigures, of_candidate, of_incumbent
from understudy.evaluate.users import figures, read_marks

TOLERATED_COST = 1.1
"""How many times the incumbent's cost per completed task is tolerated."""


class _PlanModel(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of catalog's Candidate that are used; others are left to the hash."""

    model: str = ""
    share: float | None = None
    misfits: dict[str, int] = {}
    unverified: tuple[str, ...] = ()
    usd_per_month: float | None = None
    retires: str | None = None
    days_left: int | None = None
    context_window: int | None = None
    modalities: tuple[str, ...] = ()
    parameters: int | None = None
    usd_per_million_tokens: float | None = None
    price_source: str = ""


class _Plan(msgspec.Struct, frozen=True, kw_only=True):
    incumbent: _PlanModel = _PlanModel()
    successor: str = ""
    calls: int | None = None
    window_days: float | None = None
    tokens: int | None = None
    completed_tasks: int | None = None
    candidates: tuple[_PlanModel, ...] = ()
    excluded: tuple[_PlanModel, ...] = ()

    def of(self, model: str) -> _PlanModel | None:
        return next((m for m in (*self.candidates, *self.excluded) if m.model == model), None)


Bench = Lines[BenchmarkHeader, Scored]


class _Evidence:
    """Everything read from an evidence folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.question = _decode(folder / QUESTION, Question)
        self.exchanges: Lines[ExchangesHeader, Item] = read_exchanges(folder)
        self.proofs = {
            name: read_lines(folder / file_name(name), ProofHeader, Call) for name in self.question.candidates
        }
        self.benches: list[Bench] = [
            read_lines(path, BenchmarkHeader, Scored) for path in sorted(folder.glob("bench-*.jsonl"))
        ]
        self.repeats = read_repeats(folder)
        self.judgements = judge_files.read_judgements(folder)
        self.users = read_marks(folder)
        self.labels = judge_files.read_labels(folder)
        self.sheets = read_performance(folder)
        self.plan = _decode(folder / PLAN, _Plan) if (folder / PLAN).exists() else _Plan()
        own = folder / OWN_REPORT
        self.own = _plain(_decode(own, dict[str, Any])) if own.exists() else {}

    def planned(self, model: str) -> _PlanModel:
        """What the plan says of a model; nothing when it does not know it."""
        if model == self.question.incumbent:
            return self.plan.incumbent
        return self.plan.of(model) or _PlanModel()

    def sheet(self, model: str) -> ModelSheet:
        """What was measured of a model, with the plan's price where the measurement has none."""
        sheet = self.sheets.get(model, ModelSheet(model=model, modalities=()))
        price = self.planned(model).usd_per_million_tokens
        if price is None or sheet.usd_per_hour is not None or sheet.usd_per_million_input is not None:
            return sheet
        return msgspec.structs.replace(
            sheet,
            usd_per_million_input=price,
            usd_per_million_output=price,
            price_source=self.planned(model).price_source or "plan, over this traffic's mix of tokens",
        )

    def bench(self, suite: str, model: str) -> Bench | None:
        return next((b for b in self.benches if (b.header.suite, b.header.model) == (suite, model)), None)


def _decode(path: Path, kind: Any) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise EvidenceError(str(path), [f"{path.name} cannot be read: {error.strerror}"]) from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise EvidenceError(str(path), [f"{path.name}: {error}"]) from error


def _plain(report: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in report.items() if isinstance(v, str | int | float | bool)}


def build(folder: Path) -> Certificate:
    """The certificate of a folder, every number computed from its ``evidence/``.

    Raises EvidenceError naming file and line when evidence is missing, malformed or contradicts itself.
    """
    found = _Evidence(folder / EVIDENCE)
    faults = _contradictions(found)
    if faults:
        raise EvidenceError(str(folder / EVIDENCE), faults)
    candidates = [_candidate(found, name) for name in found.question.candidates]
    incumbent = _model(found, found.question.incumbent, _incumbent_tokens(candidates))
    winner = _winner(candidates)
    diversity, judged = _diversity(found), _judged(found)
    return Certificate(
        format=FORMAT,
        verdict=_overall(candidates),
        winner=winner.model.name if winner else "",
        winner_rule=WINNER_RULE,
        question=found.question,
        days_left=_days_left(found.question),
        exposure=_exposure(found.plan),
        traffic=_traffic(found),
        incumbent=incumbent,
        incumbent_fit=_fit(found.plan.incumbent),
        candidates=candidates,
        own=found.own,
        next=[
            *needed(candidates, winner, incumbent),
            *shared_blind_spots(found.question, diversity),
            *(line for one in judged if (line := judge_files.plan_for(one))),
        ],
        evidence=_files(found.folder),
        diversity=diversity,
        flicker=_flicker(found, candidates),
        tasks=_tasks(found, candidates),
        users=figures(found.users, found.question.incumbent),
        judged=judged,
    )


def _diversity(found: _Evidence) -> list[Pair]:
    question = found.question
    calls = {name: lines.records for name, lines in found.proofs.items()}
    traffic = of_traffic(question.incumbent, found.exchanges.records, calls)
    arms = [question.incumbent, *question.candidates]
    return traffic + of_benchmarks(found.benches, arms)


def _contradictions(found: _Evidence) -> list[str]:
    faults: list[str] = []
    digest = sha256_of(found.folder / EXCHANGES)
    items = {item.key: item for item in found.exchanges.records}
    if found.exchanges.header.items != len(items):
        faults.append(f"{EXCHANGES}: {len(items)} items, its header says {found.exchanges.header.items}")
    for name, (header, calls) in found.proofs.items():
        file = file_name(name)
        if header.exchanges_sha256 != digest:
            faults.append(f"{file}: made for another {EXCHANGES} (its SHA-256 differs)")
        if header.candidate != name:
            faults.append(f"{file}: holds calls of {header.candidate!r}")
        faults += _unlike(file, items, calls)
    faults += faults_of(found.repeats, items, digest)
    faults += judge_files.faults_of(found.judgements, items, digest)
    for header, lines in found.benches:
        counted = Counter(line.key for line in lines)
        name = file_name(header.model, f"bench-{header.suite}-")
        faults += [f"{name}: item {key} is there {n} times" for key, n in counted.items() if n > 1]
    return faults


def _unlike(file: str, items: Mapping[str, Item], calls: Sequence[Call]) -> list[str]:
    """Calls whose stored score is not what the grader says, unknown items, items called twice."""
    faults: list[str] = []
    counted = Counter(call.key for call in calls)
    faults += [f"{file}: item {key} is there {n} times" for key, n in counted.items() if n > 1]
    for line, call in enumerate(calls, start=2):
        if call.key not in items:
            faults.append(f"{file} line {line}: no item {call.key!r} in {EXCHANGES}")
        elif score_of(items[call.key], call) != call.score:
            graded = score_of(items[call.key], call)
            faults.append(f"{file} line {line}: score {call.score} there, {graded} by its grader")
    return faults


def _candidate(found: _Evidence, name: str) -> Candidate:
    header, calls = found.proofs[name]
    lines = next((j for j in found.judgements if j.header.candidate == name), None)
    items = {item.key: item for item in found.exchanges.records}
    people = judge_files.people(lines, items, found.labels) if lines else None
    preferences = judge_files.preferences(lines.records) if lines else {}
    proof = weigh(header, found.exchanges.records, calls, preferences, people)
    model = _model(found, name, proof.candidate_tokens)
    own = _model(found, found.question.incumbent, proof.incumbent_tokens)
    proof = msgspec.structs.replace(proof, guards=[*proof.guards, *_cost_guard(own.cost, model.cost)])
    return Candidate(
        model=model,
        fit=_fit(found.planned(name)),
        lineage=found.question.lineage.get(name, []),
        proof=proof,
    )


def _cost_guard(incumbent: Cost | None, candidate: Cost | None) -> list[Guard]:
    """Cost per completed task; none where a price is not known."""
    own = incumbent.usd_per_completed_task if incumbent else None
    other = candidate.usd_per_completed_task if candidate else None
    if own is None or other is None:
        return []
    worse = other > TOLERATED_COST * own
    return [Guard(name="cost per completed task", unit="usd", incumbent=own, candidate=other, worse=worse)]


def _incumbent_tokens(candidates: Sequence[Candidate]) -> Tokens | None:
    return candidates[0].proof.incumbent_tokens if candidates else None


def _model(found: _Evidence, name: str, tokens: Tokens | None) -> Model:
    sheet, planned = found.sheet(name), found.planned(name)
    return Model(
        name=name,
        parameters=sheet.parameters or planned.parameters,
        context_length=sheet.context_length or planned.context_window,
        modalities=sheet.modalities or planned.modalities,
        memory_bytes=sheet.memory_bytes,
        file_bytes=sheet.file_bytes,
        benchmarks=_benchmarks(found, name),
        speed=speed(sheet),
        cost=cost(sheet, tokens) if tokens is not None else None,
    )


def _benchmarks(found: _Evidence, model: str) -> dict[str, BenchmarkResult]:
    results: dict[str, BenchmarkResult] = {}
    for bench in found.benches:
        if bench.header.model != model:
            continue
        other = found.bench(bench.header.suite, found.question.incumbent)
        versus = paired(bench.header.suite, other, bench) if other and other is not bench else None
        results[bench.header.suite] = BenchmarkResult(
            accuracy=accuracy(bench.header, bench.records), versus=versus
        )
    return results


def _fit(planned: _PlanModel) -> Fit:
    return Fit(
        share=planned.share,
        misfits=planned.misfits,
        unverified=planned.unverified,
        usd_per_month=planned.usd_per_month,
        retires=planned.retires,
        days_left=planned.days_left,
    )


def _exposure(plan: _Plan) -> Exposure:
    return Exposure(
        calls=plan.calls,
        window_days=plan.window_days,
        tokens=plan.tokens,
        completed_tasks=plan.completed_tasks,
        usd_per_month=plan.incumbent.usd_per_month,
        successor=plan.successor,
    )


def _days_left(question: Question) -> int | None:
    import datetime as dt

    if not question.retires:
        return None
    today = dt.datetime.fromtimestamp(question.created, dt.UTC).date()
    return (dt.date.fromisoformat(question.retires) - today).days


def _traffic(found: _Evidence) -> Traffic:
    items = found.exchanges.records
    return Traffic(
        items=len(items),
        first_at=min(item.at for item in items),
        last_at=max(item.at for item in items),
        tasks=dict(sorted(Counter(item.task for item in items).items())),
        clusters=len({item.cluster or item.key for item in items}),
        graded_by=dict(sorted(Counter(str(item.grader) for item in items).items())),
        by_agreement=sum(item.agreement for item in items),
        exchanges_sha256=sha256_of(found.folder / EXCHANGES),
        sample_sha256=found.question.sample_sha256,
    )


def _overall(candidates: Sequence[Candidate]) -> Verdict:
    verdicts = {candidate.proof.verdict for candidate in candidates}
    return next((v for v in (Verdict.PASS, Verdict.UNDECIDED) if v in verdicts), Verdict.FAIL)


def _winner(candidates: Sequence[Candidate]) -> Candidate | None:
    passed = [c for c in candidates if c.proof.verdict is Verdict.PASS]
    prices = [c.model.cost.usd_per_completed_task if c.model.cost else None for c in passed]
    if passed and all(price is not None for price in prices):
        return passed[prices.index(min(p for p in prices if p is not None))]
    return max(passed, key=lambda c: c.proof.candidate_mean, default=None)


def _files(folder: Path) -> list[EvidenceFile]:
    files = sorted(f for f in folder.rglob("*") if f.is_file() and not f.name.endswith(".part"))
    return [
        EvidenceFile(
            file=f"{EVIDENCE}/{file.relative_to(folder).as_posix()}",
            sha256=sha256_of(file),
            bytes=file.stat().st_size,
            lines=file.read_bytes().count(b"\n"),
        )
        for file in files
    ]


def _flicker(found: _Evidence, candidates: Sequence[Candidate]) -> list[Flicker]:
    items = {item.key: item for item in found.exchanges.records}
    by_model = {lines.header.model: lines for lines in found.repeats}
    own = by_model.get(found.question.incumbent)
    incumbent = flicker(own, items, None) if own else None
    measured = [incumbent] if incumbent else []
    for candidate in candidates:
        name = candidate.model.name
        firsts = {call.key: call for call in found.proofs[name].records}
        again = flicker(by_model[name], items, firsts) if name in by_model else None
        if again is not None:
            measured.append(against(again, incumbent, candidate.proof))
    return measured


def _tasks(found: _Evidence, candidates: Sequence[Candidate]) -> list[TaskFigures]:
    items = {item.key: item for item in found.exchanges.records}
    proofs = [candidate.proof for candidate in candidates]
    calls = {name: {c.key: c for c in lines.records} for name, lines in found.proofs.items()}
    sheet = found.sheet(found.question.incumbent)
    own = [of_incumbent(p, items, calls[p.candidate], sheet) for p in proofs[:1]]
    return own + [of_candidate(p, items, calls[p.candidate], found.sheet(p.candidate)) for p in proofs]


def _judged(found: _Evidence) -> list[Judged]:
    items = {item.key: item for item in found.exchanges.records}
    return [
        judge_files.judged(
            lines, items, {c.key: c for c in found.proofs[lines.header.candidate].records}, found.labels
        )
        for lines in found.judgements
        if lines.header.candidate in found.proofs
    ]


def write(folder: Path) -> Certificate:
    """Build the certificate and write it with its page. Raises EvidenceError as `build` does."""
    encoded = encode(build(folder))
    certificate = msgspec.json.decode(encoded, type=Certificate)
    (folder / CERTIFICATE).write_bytes(encoded)
    (folder / PAGE).write_text(render(certificate, encoded), encoding="utf-8")
    return certificate
