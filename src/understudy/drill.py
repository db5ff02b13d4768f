"""A whole retirement, rehearsed: incumbent, record, plan, own, serve, prove, certify, move.

Reads top to bottom as the story it is. Each step leaves its output in the drill's folder and is skipped when
that output is there, so an interrupted drill goes on where it stopped. It ignores how a step is done: that is
the rooms' business; here they are put in order and handed plain values.
"""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, AsyncExitStack, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec

from understudy import __version__
from understudy import config as configuration
from understudy.catalog.bindings import Binding
from understudy.catalog.facts import Catalog, catalog_of
from understudy.catalog.plan import Plan, make_plan
from understudy.catalog.prices import rates_at
from understudy.catalog.watch import Exposure, watch
from understudy.child import call, peak_memory, running
from understudy.endpoint import HttpEndpoint
from understudy.errors import InputError
from understudy.evaluate import benchmarks, replay
from understudy.evaluate.certificate import CERTIFICATE, Certificate, Question, write_question
from understudy.evaluate.certify import write as certify_folder
from understudy.evaluate.judge import refuse_kin
from understudy.evaluate.performance import (
    ModelSheet,
    Sample,
    measure,
    read_performance,
    speed,
    write_performance,
)
from understudy.evaluate.proof import Proof
from understudy.evaluate.trial import connect, judge_of, price_of
from understudy.evaluate.users import marks_of, write_marks
from understudy.evaluate.verify import verify
from understudy.protocol import Answer
from understudy.rollout.move import move
from understudy.serve.gguf_file import read_header
from understudy.traffic.sample import Exchange, Split, chats, exchanges, sample_hash, shapes, split
from understudy.traffic.store import Store, open_store

MEASURED_REQUESTS = 32
"""Recorded requests timed for each model."""

S = TypeVar("S", bound=msgspec.Struct)


class Audience(Protocol):
    """Who watches the drill."""

    def begins(self, number: int, title: str) -> None: ...

    def ends(self, summary: str, *, skipped: bool) -> None: ...

    def progress(self, step: str, done: int, total: int, note: str = "") -> None: ...


class Step(NamedTuple):
    """One act of the drill."""

    title: str
    output: str
    """File in the drill's folder; the step is done when it is there."""
    run: Callable[[Drill], None]
    summary: Callable[[Drill], str]
    """One line, read from the output."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a drill ended."""

    certificate: Path
    page: Path
    moved_to: str
    """ENDPOINT/MODEL that answers the alias now."""
    steps: dict[str, str]
    """Title to its summary."""


class Drill:
    """The stage: the config, the folder of this run and what the steps share."""

    def __init__(self, config_path: Path, audience: Audience) -> None:
        self.config_path = config_path
        self.config = configuration.load(config_path)
        self.audience = audience
        self.alias = self.config.drill.alias
        if not self.alias:
            raise InputError(
                "the config names no alias to rehearse",
                expected='alias = "NAME" in [drill]',
                next_step="understudy init shows every field",
            )
        self.out = self.config.path(self.config.drill.out)
        self.evidence = self.out / "evidence"
        self.evidence.mkdir(parents=True, exist_ok=True)

    @property
    def incumbent(self) -> str:
        """ENDPOINT/MODEL that answers the alias before the drill."""
        return self.config.aliases[self.alias].model

    @property
    def candidates(self) -> list[str]:
        return self.config.drill.candidates

    @cached_property
    def store(self) -> Store:
        return open_store(self.config.store.url, self.config.path("."))

    @cached_property
    def split(self) -> Split:
        """The incumbent's recorded answers; equal prompts stay on one side."""
        until = self.read("recorded.json", Recorded).until if (self.out / "recorded.json").exists() else None
        own = [
            e
            for e in exchanges(self.store, self.alias)
            if e.target == self.incumbent and (until is None or e.at <= until)
        ]
        return split(own, self.config.evaluate.held_out)

    @cached_property
    def catalog(self) -> Catalog:
        return catalog_of(self.config)

    def serving(self) -> AbstractContextManager[Any]:
        """`understudy serve` beside the block, if the config has models of its own to serve."""
        if not self.config.serve.models:
            return nullcontext()
        return running("serve", ["serve", "--config", str(self.config_path)], self.out / "logs" / "serve.log")

    def gateway(self) -> AbstractContextManager[dict[str, Any]]:
        """`understudy up` beside the block; when the block is left, every record is in the store."""
        return running("up", ["up", "--config", str(self.config_path)], self.out / "logs" / "gateway.log")

    def endpoint(self, target: str) -> HttpEndpoint:
        """The client of ENDPOINT/MODEL."""
        return connect(self.config, target)

    def own_weights(self, target: str) -> Path | None:
        """The file our own serve app answers ENDPOINT/MODEL from; None for a model served elsewhere."""
        endpoint, model = self.config.endpoint_of(target)
        ours = self.config.serve.listen in endpoint.base_url
        path = self.config.serve.models.get(model)
        return self.config.path(path) if ours and path else None

    def write(self, name: str, value: object) -> None:
        """A step's output, whole or not at all: it is what marks the step as done."""
        path = self.out / name
        draft = path.with_name(path.name + ".new")
        draft.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2))
        draft.replace(path)

    def read(self, name: str, kind: type[S]) -> S:
        return msgspec.json.decode((self.out / name).read_bytes(), type=kind)


def drill(config_path: Path, audience: Audience) -> Outcome:
    """Run every step that is not done yet.

    Raises whatever the rooms raise for what a user can put right; run it again to go on from there.
    """
    stage = Drill(config_path, audience)
    summaries: dict[str, str] = {}
    for number, step in enumerate(STEPS, start=1):
        audience.begins(number, step.title)
        skipped = (stage.out / step.output).exists()
        if not skipped:
            step.run(stage)
        summaries[step.title] = step.summary(stage)
        audience.ends(summaries[step.title], skipped=skipped)
    moved = stage.read("moved.json", Moved)
    return Outcome(
        certificate=stage.out / "certificate.json",
        page=stage.out / "certificate.html",
        moved_to=moved.after,
        steps=summaries,
    )


# 1. Incumbent


class Incumbent(msgspec.Struct, frozen=True, kw_only=True):
    """The model that answers today."""

    target: str
    answered_by: str
    """The id it gives itself."""
    answer: str
    """To the question whether it is there."""
    retires: str
    """Day (ISO 8601); empty when nobody has announced one."""


async def _ask(endpoint: HttpEndpoint, question: str) -> Answer:
    async with endpoint:
        return await endpoint.chat(
            {"messages": [{"role": "user", "content": question}], "max_tokens": 16, "temperature": 0}
        )


def meet_incumbent(stage: Drill) -> None:
    with stage.serving():
        answer = asyncio.run(_ask(stage.endpoint(stage.incumbent), "Are you there? Answer yes or no."))
    facts = stage.catalog.find(stage.incumbent)
    retires = facts.retires.value.isoformat() if facts and facts.retires else ""
    answered_by = str(answer.body.get("model", ""))
    stage.write(
        "incumbent.json",
        Incumbent(target=stage.incumbent, answered_by=answered_by, answer=answer.text, retires=retires),
    )


def _incumbent_line(stage: Drill) -> str:
    found = stage.read("incumbent.json", Incumbent)
    return f"{found.target} answers; " + (
        f"it retires on {found.retires}" if found.retires else "no retirement announced"
    )


# 2. Record


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """The traffic the rest of the drill rests on."""

    calls: int
    streamed: int
    with_right_answer: int
    tasks: dict[str, int]
    """Tag task=… to calls."""
    until: float
    """Unix seconds of the last call: what is recorded later is not part of this drill."""
    sample_sha256: str


def record(stage: Drill) -> None:
    if stage.config.drill.workload:
        with stage.serving(), stage.gateway() as gateway:
            _run_workload(stage, gateway["url"], stage.out / "workload.done")
    sample = [*stage.split.train, *stage.split.held_out]
    if not sample:
        raise InputError(
            f"nothing recorded of {stage.alias!r} answered by {stage.incumbent}",
            expected="recorded chat calls",
            next_step="send traffic through `understudy up`, or name a command in [drill].workload",
        )
    stage.write("recorded.json", _recorded(sample))


def _run_workload(stage: Drill, url: str, done: Path, **more: str) -> None:
    environment = {
        "OPENAI_BASE_URL": url,
        "OPENAI_API_KEY": "unused",
        "UNDERSTUDY_ALIAS": stage.alias,
        "UNDERSTUDY_WORKLOAD_DONE": str(done.resolve()),
        **more,
    }
    call(stage.config.drill.workload, folder=Path(stage.config.root).resolve(), environment=environment)


def _recorded(sample: list[Exchange]) -> Recorded:
    tasks = sorted(e.tags.get("task", "") for e in sample)
    return Recorded(
        calls=len(sample),
        streamed=sum(bool(e.request.get("stream")) for e in sample),
        with_right_answer=sum(e.expected is not None for e in sample),
        tasks={task or "untagged": tasks.count(task) for task in dict.fromkeys(tasks)},
        until=max(e.at for e in sample),
        sample_sha256=sample_hash(sample),
    )


def _recorded_line(stage: Drill) -> str:
    found = stage.read("recorded.json", Recorded)
    tasks = ", ".join(f"{count} {task}" for task, count in found.tasks.items())
    answered = f"{found.streamed} streamed, {found.with_right_answer} with the right answer"
    return f"{found.calls} calls ({answered}): {tasks}"


# 3. Watch and plan


def watch_and_plan(stage: Drill) -> None:
    now = time.time()
    asked = shapes(stage.store, stage.alias).calls
    bindings = [Binding(stage.alias, stage.incumbent, "alias")]
    stage.write("watch.json", watch(stage.catalog, bindings, {stage.incumbent: asked}, now))
    stage.write("evidence/plan.json", make_plan(stage.catalog, stage.incumbent, asked, now=now))


def _plan_line(stage: Drill) -> str:
    plan = stage.read("evidence/plan.json", Plan)
    exposures = msgspec.json.decode((stage.out / "watch.json").read_bytes(), type=list[Exposure])
    days = f"{exposures[0].days_left} days left; " if exposures and exposures[0].days_left is not None else ""
    cheapest = next((c for c in plan.candidates if c.usd_per_month is not None), None)
    return f"{days}{len(plan.candidates)} models fit this traffic, {len(plan.excluded)} do not" + (
        f"; first: {cheapest.model} at ${cheapest.usd_per_month:.2f} a month" if cheapest else ""
    )


# 4. Own


def make_own(stage: Drill) -> None:
    from understudy.compress.recipe import OwnJob, own

    job = OwnJob(
        teacher=stage.config.own.teacher,
        root=Path(stage.config.root),
        train=chats(stage.split.train, right=stage.config.own.answers == "right"),
        held_out=chats(stage.split.held_out),
        out=stage.out / "own",
        settings=stage.config.own,
        seed=stage.config.evaluate.seed,
    )
    report = own(job, stage.audience.progress)
    stage.write("evidence/own-report.json", report)


class Made(msgspec.Struct, frozen=True, kw_only=True):
    """What the story tells of `compress.recipe.OwnReport`; read without importing torch."""

    parameters_before: int
    parameters_after: int
    before: Healing
    after: Healing
    lineage: list[str]


class Healing(msgspec.Struct, frozen=True, kw_only=True):
    """Distance to the teacher on held-out chats."""

    kl: float
    """KL(teacher‖student) in nats per token."""


def _own_line(stage: Drill) -> str:
    made = stage.read("evidence/own-report.json", Made)
    before, after = made.parameters_before, made.parameters_after
    return (
        f"{before / 1e6:.1f}M → {after / 1e6:.1f}M parameters (−{1 - after / before:.1%}); "
        f"KL to the teacher {made.before.kl:.3f} pruned, {made.after.kl:.3f} healed"
    )


# 5. Serve


def serve_students(stage: Drill) -> None:
    from understudy.serve.export import export_gguf

    for target in stage.candidates:
        weights = stage.own_weights(target)
        if weights and weights.suffix == ".gguf" and not weights.exists():
            # the kind stands in the file's name, as is usual: student-q8_0.gguf
            export_gguf(stage.out / "own" / "checkpoint", weights, weights.stem.rpartition("-")[2])
    models = (stage.incumbent, *stage.candidates)
    sheets: list[ModelSheet] = []
    for target in models:
        sheets.append(_priced(stage, _sheet(stage, target)))
        stage.audience.progress("measure", len(sheets), len(models), target)
    write_performance(stage.evidence, sheets)


def _sheet(stage: Drill, target: str) -> ModelSheet:
    """Speed and memory of one model; alone in a process of its own where the weights are ours."""
    weights = stage.own_weights(target)
    requests = [e.request for e in stage.split.held_out[:MEASURED_REQUESTS]]
    side_by_side = stage.config.evaluate.concurrency
    if weights is None:
        timed = asyncio.run(_timed(stage.endpoint(target), requests, side_by_side))
        return ModelSheet(model=target, samples=timed.samples, wall_s=timed.wall_s, concurrency=side_by_side)
    name = target.partition("/")[2]
    arguments = ["serve", "--model", f"{name}={weights}", "--listen", "127.0.0.1:0"]
    with running("serve", arguments, stage.out / "logs" / f"measure-{name}.log") as served:
        endpoint = HttpEndpoint(target, served["url"], name, timeout_s=600.0)
        timed = asyncio.run(_timed(endpoint, requests, side_by_side))
        memory = peak_memory(served["pid"])
    return ModelSheet(
        model=target,
        parameters=read_header(weights).parameters if weights.suffix == ".gguf" else None,
        context_length=stage.config.serve.context,
        memory_bytes=memory,
        file_bytes=weights.stat().st_size,
        samples=timed.samples,
        wall_s=timed.wall_s,
        concurrency=side_by_side,
    )


class _Timed(NamedTuple):
    samples: list[Sample]
    wall_s: float


async def _timed(endpoint: HttpEndpoint, requests: list[dict[str, Any]], concurrency: int) -> _Timed:
    async with endpoint:
        await measure(endpoint, requests[:1])  # the first call loads the model
        return _Timed(*await measure(endpoint, requests, concurrency=concurrency))


def _priced(stage: Drill, sheet: ModelSheet) -> ModelSheet:
    """With the list price, or what an hour of the machine costs."""
    facts = stage.catalog.find(sheet.model)
    if facts and facts.hosting:
        fact = facts.hosting
        source = f"${fact.value.usd_per_hour} an hour ({fact.source}) at the measured throughput"
        return msgspec.structs.replace(sheet, usd_per_hour=fact.value.usd_per_hour, price_source=source)
    rates = rates_at(stage.catalog, sheet.model, time.time())
    if rates is None:
        return sheet
    return msgspec.structs.replace(
        sheet,
        usd_per_million_input=rates.tiers[0].input,
        usd_per_million_output=rates.tiers[0].output,
        price_source=rates.source,
    )


def _served_line(stage: Drill) -> str:
    sheets = read_performance(stage.evidence)
    return "; ".join(
        f"{name} {(sheet.parameters or 0) / 1e6:.0f}M, {figures.tokens_per_s or 0:,.0f} tokens/s"
        for name, sheet in sheets.items()
        if (figures := speed(sheet))
    )


# 6. Prove


class Proven(msgspec.Struct, frozen=True, kw_only=True):
    """Verdict and paid calls of each candidate."""

    verdicts: dict[str, str]
    calls: dict[str, int]
    items: int


def prove_candidates(stage: Drill) -> None:
    if stage.config.evaluate.judge:
        refuse_kin(stage.config.evaluate.judge, [stage.incumbent, *stage.candidates])
    _write_question(stage)
    write_marks(stage.evidence, marks_of(exchanges(stage.store, stage.alias, only_ok=False)))
    with stage.serving():
        proofs = [asyncio.run(_prove(stage, target)) for target in stage.candidates]
        for target in (stage.incumbent, *stage.candidates):
            asyncio.run(_benchmark(stage, target))
    proven = Proven(
        verdicts={p.candidate: p.verdict.value for p in proofs},
        calls={p.candidate: p.calls for p in proofs},
        items=len(stage.split.held_out),
    )
    stage.write("proven.json", proven)


def _write_question(stage: Drill) -> None:
    if (stage.evidence / "question.json").exists():
        return
    facts = stage.catalog.find(stage.incumbent)
    retires = facts.retires if facts else None
    settings = stage.config.evaluate
    question = Question(
        alias=stage.alias,
        incumbent=stage.incumbent,
        candidates=stage.candidates,
        created=time.time(),
        retires=retires.value.isoformat() if retires else "",
        reason=f"{retires.source}, read {retires.read}" if retires else "",
        fallbacks=stage.config.aliases[stage.alias].fallback,
        lineage={target: _lineage(stage, target) for target in stage.candidates},
        sample_sha256=sample_hash(stage.split.held_out),
        seeds={"order": settings.seed, "benchmarks": settings.seed},
        versions={"understudy": __version__, "python": platform.python_version()},
    )
    write_question(stage.out, question)


def _lineage(stage: Drill, target: str) -> list[str]:
    weights = stage.own_weights(target)
    if weights is None:
        return []
    made = stage.read("evidence/own-report.json", Made)
    return [*made.lineage, f"exported as {weights.name}"]


async def _prove(stage: Drill, target: str) -> Proof:
    def shown(p: replay.Progress) -> None:
        note = f"{target}: e(pass) {p.e_pass:.3g}, e(fail) {p.e_fail:.3g}"
        stage.audience.progress("prove", p.calls, p.items, note)

    async with stage.endpoint(target) as candidate, AsyncExitStack() as stack:
        return await replay.prove(
            candidate,
            stage.split.held_out,
            stage.config.evaluate,
            evidence=stage.evidence,
            candidates=len(stage.candidates),
            progress=shown,
            price=price_of(stage.config, target) if stage.config.evaluate.budget_usd else None,
            judge=await judge_of(stage.config, stage.config.evaluate, stack),
        )


async def _benchmark(stage: Drill, target: str) -> None:
    settings = stage.config.evaluate
    for suite in settings.benchmarks:
        folder = stage.config.path(settings.benchmark_folder)
        drawn = benchmarks.draw(suite, folder, items=settings.benchmark_items, seed=settings.seed)

        def shown(done: int, total: int, suite: str = suite) -> None:
            stage.audience.progress(suite, done, total, target)

        async with stage.endpoint(target) as model:
            await benchmarks.run(
                model, suite, drawn, evidence=stage.evidence, seed=settings.seed, progress=shown
            )


def _proven_line(stage: Drill) -> str:
    proven = stage.read("proven.json", Proven)
    return "; ".join(
        f"{target}: {verdict} after {proven.calls[target]} of {proven.items} calls"
        for target, verdict in proven.verdicts.items()
    )


# 7. Certify


def certify(stage: Drill) -> None:
    certify_folder(stage.out)
    _enter_benchmarks(stage)


def _enter_benchmarks(stage: Drill) -> None:
    """The student's card repeats the certificate's table."""
    from understudy.compress.card import Benchmark, enter_benchmarks

    found, folder = _certificate(stage), stage.out / "own" / "checkpoint"
    teacher = found.incumbent.benchmarks
    student = next((c.model.benchmarks for c in found.candidates if c.lineage), {})
    rows = [
        Benchmark(suite, s.items, t.accuracy, t.stderr, s.accuracy, s.stderr)
        for suite in student
        if suite in teacher
        for s, t in [(student[suite].accuracy, teacher[suite].accuracy)]
    ]
    if rows and folder.is_dir():
        enter_benchmarks(folder, rows)


def _certificate(stage: Drill) -> Certificate:
    return stage.read(CERTIFICATE, Certificate)


def _certified_line(stage: Drill) -> str:
    digest = verify(stage.out / CERTIFICATE)
    return (
        f"verdict {_certificate(stage).verdict.value}; recomputed from its evidence; SHA-256 {digest[:16]}…"
    )


# 8. Move


class Moved(msgspec.Struct, frozen=True, kw_only=True):
    """Where the alias pointed and points."""

    before: str
    after: str
    reason: str
    answered_by: str
    """ENDPOINT/MODEL that answered a request sent after the move."""


def move_alias(stage: Drill) -> None:
    found = _certificate(stage)
    reason = f"verdict {found.verdict.value} in {CERTIFICATE}"
    after = found.winner or stage.incumbent
    if found.winner:
        initial = stage.config.aliases[stage.alias]
        evidence = str(stage.out / CERTIFICATE)
        move(stage.store, stage.alias, after, by="drill", reason=reason, evidence=evidence, initial=initial)
    with stage.serving(), stage.gateway() as gateway:
        _ask_once_more(stage, gateway["url"])
    last = next(iter(stage.store.calls(alias=stage.alias, newest_first=True, limit=1)))
    stage.write(
        "moved.json",
        Moved(before=stage.incumbent, after=after, reason=reason, answered_by=last.call.target),
    )


def _ask_once_more(stage: Drill, url: str) -> None:
    if stage.config.drill.workload:
        _run_workload(stage, url, stage.out / "after-move.done", UNDERSTUDY_WORKLOAD_REQUESTS="1")
        return
    request = stage.split.held_out[0].request
    asyncio.run(_replayed(HttpEndpoint("gateway", url, stage.alias), request))


async def _replayed(endpoint: HttpEndpoint, request: dict[str, Any]) -> None:
    async with endpoint:
        await endpoint.chat(request)


def _moved_line(stage: Drill) -> str:
    moved = stage.read("moved.json", Moved)
    what = f"moved to {moved.after}" if moved.after != moved.before else f"stays with {moved.before}"
    return f"{stage.alias} {what} ({moved.reason}); the next request was answered by {moved.answered_by}"


STEPS: tuple[Step, ...] = (
    Step("Incumbent", "incumbent.json", meet_incumbent, _incumbent_line),
    Step("Record", "recorded.json", record, _recorded_line),
    Step("Watch and plan", "evidence/plan.json", watch_and_plan, _plan_line),
    Step("Own", "evidence/own-report.json", make_own, _own_line),
    Step("Serve", "evidence/performance.json", serve_students, _served_line),
    Step("Prove", "proven.json", prove_candidates, _proven_line),
    Step("Certify", "certificate.html", certify, _certified_line),
    Step("Move", "moved.json", move_alias, _moved_line),
)
