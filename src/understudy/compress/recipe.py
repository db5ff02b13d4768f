"""`own`: a student from a teacher in one resumable run: plan, prune, measure, heal, measure, save.

Each step leaves a file or folder under ``out``; a step whose output is there is not done again, and a run
whose teacher, texts or settings changed begins anew. A cut of more than `LARGEST_CUT` is made in steps, each
healed before the next. It ignores where chats come from (traffic), GGUF (serve) and whether the student is
good enough (evaluate).
"""

from __future__ import annotations

import copy
import hashlib
import math
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from understudy import __version__
from understudy.compress import checkpoint, distill
from understudy.compress import plan as plans
from understudy.compress.baseline import Baseline, bits_per_byte, measured
from understudy.compress.card import model_card
from understudy.compress.corpus import encode_chat, encode_text, fingerprint, shuffled, take
from understudy.compress.curve import Check, Curve, Point, save_plot
from understudy.compress.decoder import Extras, extras_of, shape_of
from understudy.compress.document import Chat, Document
from understudy.compress.fidelity import Fidelity, fidelity
from understudy.compress.plan import LayerPlan, Plan
from understudy.compress.progress import Progress, silent
from understudy.compress.single import (
    LEAST_TOKENS,
    Sizes,
    batched,
    decided,
    filled,
    most_parameters,
    shared_out,
)
from understudy.compress.student import student_of
from understudy.compress.teacher import LiveTeacher
from understudy.config import Own, resolve_path
from understudy.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST_CUT = 0.4
"""Share of parameters up to which one cut heals well; beyond, prune and heal in steps (arXiv 2407.14679)."""
MEASURED_TOKENS = 8_000
"""Held-out tokens that fidelity is measured on."""
CHECKED_TOKENS = 3_000
"""Tokens of the training texts set aside to choose the best weights by: what is held out proves, and chooses
nothing."""
CHECKED_SHARE = 0.1
"""Most of the training texts that may be set aside so."""
RIGHT: dict[str, float] = {"adapt": 0.7, "adapt_ce": 0.9, "adapt_rest": 0.3}
"""Where right answers are learnt, which the teacher may not know: more of the run, mostly cross-entropy."""


class OwnJob(NamedTuple):
    """What a student is made from."""

    teacher: str
    """Hub id, checkpoint folder, GGUF file or package:NAME/FILE."""
    train: list[Chat]
    held_out: list[Chat]
    out: Path
    """Folder of the run: plan.json, checkpoint/, report.json."""
    settings: Own
    seed: int
    calibration_text: list[str] = []
    """Running text read beside the chats, for calibration and healing."""
    generic: list[Chat] = []
    """Chats that are nobody's traffic, mixed into healing by ``generic_share``."""
    generic_text: list[str] = []
    """Running text mixed in the same way."""
    generic_share: float = 0.25
    """Share of each step's rows taken from the generic texts, where there are any."""
    root: Path = Path()
    """What a relative ``teacher`` or ``baseline`` is relative to."""


class OwnReport(msgspec.Struct, frozen=True, kw_only=True):
    """How a student came about; all of it JSON."""

    understudy: str
    """Version that made it."""
    teacher: str
    teacher_hash: str
    """SHA-256 of the teacher's files, or hub:COMMIT."""
    parameters_before: int
    parameters_after: int
    plan: Plan
    calibration_hash: str
    """SHA-256 of the calibration tokens."""
    calibration_tokens: int
    training_hash: str
    training_tokens: int
    """Seen in healing, epochs counted again."""
    stopped: str
    """Why healing ended: tokens | minutes | early."""
    seed: int
    before: Fidelity
    """Pruned and refitted (after the last cut), not healed; on held-out chats."""
    after: Fidelity
    """Healed; on the same chats."""
    points: list[Point]
    checks: list[Check]
    seconds: dict[str, float]
    """Wall-clock of each step."""
    checkpoint: str
    lineage: list[str]
    """Where the student comes from, a line for each step."""
    bits_per_byte: float = 0.0
    """Of the held-out answers, under the student."""
    teacher_bits_per_byte: float = 0.0
    baseline: Baseline | None = None
    """The best model of this size off the shelf, as the user named it; None: none was named."""
    notes: list[str] = []
    """What a person should know of the healing."""

    @property
    def beside_baseline(self) -> str:
        """How the student compares with a model off the shelf, in a sentence."""
        own = f"{self.bits_per_byte:.3f} bits per byte of the held-out answers"
        if self.baseline is None:
            return f"{own}; no off-the-shelf model of this size was named to compare with (--baseline MODEL)"
        better = "better" if self.bits_per_byte < self.baseline.bits_per_byte else "WORSE"
        return (
            f"{own}, {better} than off the shelf: {self.baseline.model} "
            f"({self.baseline.parameters / 1e6:.1f}M parameters) has {self.baseline.bits_per_byte:.3f}"
        )

    @property
    def gap_closed(self) -> float:
        """Share of the untrained KL that healing removed."""
        return 1 - self.after.kl / self.before.kl if self.before.kl else 0.0


def own(job: OwnJob, progress: Progress = silent) -> OwnReport:
    """Make the student, or go on where an earlier run stopped, or return the report that is already there.

    Raises ModelError or InputError for a teacher, a budget or texts that cannot be used.
    """
    identity = _identity(job)
    finished = _finished(job.out, identity)
    if finished is not None:
        return finished
    _begin(job.out, identity)
    return _Steps(job, progress).run()


def _identity(job: OwnJob) -> str:
    """SHA-256 over everything the student follows from, so that a changed job is never taken for finished."""
    path = resolve_path(job.teacher, job.root)
    weights = checkpoint.digest_of(path) if path.exists() else "hub"
    parts = [job.teacher, weights, job.train, job.held_out, job.calibration_text, job.settings, job.seed]
    if job.generic or job.generic_text:
        parts += [job.generic, job.generic_text, job.generic_share]
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


class _Job(msgspec.Struct):
    """job.json."""

    identity: str


def _finished(out: Path, identity: str) -> OwnReport | None:
    job, report = out / "job.json", out / "report.json"
    if not (job.exists() and report.exists() and (out / "checkpoint").is_dir()):
        return None
    if msgspec.json.decode(job.read_bytes(), type=_Job).identity != identity:
        return None
    return msgspec.json.decode(report.read_bytes(), type=OwnReport)


def _begin(out: Path, identity: str) -> None:
    """Clear away what another job left, then claim the folder."""
    out.mkdir(parents=True, exist_ok=True)
    job = out / "job.json"
    if not job.exists() or msgspec.json.decode(job.read_bytes(), type=_Job).identity != identity:
        for name in ("report.json", "plan.json", "before.json", "curve.svg"):
            (out / name).unlink(missing_ok=True)
        for folder in (out / "pruned", out / "heal", out / "checkpoint", *out.glob("step-[0-9]*")):
            shutil.rmtree(folder, ignore_errors=True)
    job.write_bytes(msgspec.json.encode(_Job(identity)))


class _Texts(NamedTuple):
    train: list[Document]
    checked: list[Document]
    """Set aside from training, and from calibration, to choose the best weights by."""
    measured: list[Document]
    calibration: list[Document]
    generic: list[Document]


class _Before(msgspec.Struct, kw_only=True):
    """before.json: what is known once pruning is done."""

    fidelity: Fidelity
    seconds: dict[str, float]


class _Steps:
    """The run; each method is one step."""

    def __init__(self, job: OwnJob, progress: Progress) -> None:
        self.job, self.out, self.progress = job, job.out, progress
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []

    def run(self) -> OwnReport:
        with self._timed("load"):
            self.loaded = checkpoint.load(self.job.teacher, self.job.root)
            self.texts = self._texts()
        plan, student = self._pruned()
        before = self._before(student)
        curve = self._heal(student, self.out / "heal")
        after = self._measured(student)
        report = self._report(plan, before, curve, after)
        return self._save(student, self._beside(student, report, curve), curve)

    @contextmanager
    def _timed(self, step: str) -> Generator[None]:
        started = time.monotonic()
        self.progress(step, 0, 1)
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + time.monotonic() - started
        self.progress(step, 1, 1)

    def _texts(self) -> _Texts:
        tokenizer, job = self.loaded.reader, self.job
        train = [encode_chat(tokenizer, chat) for chat in job.train]
        train += [encode_text(tokenizer, text) for text in job.calibration_text]
        held_out = [encode_chat(tokenizer, chat) for chat in job.held_out]
        count = sum(len(d.tokens) for d in train)
        if count < LEAST_TOKENS or not held_out:
            raise ModelError(
                f"{count} tokens to calibrate on and {len(held_out)} held-out chats",
                expected=f"at least {LEAST_TOKENS} tokens and one held-out chat",
                next_step="record more traffic, or give a calibration text",
            )
        # what calibration read is near its teacher by construction: a check on it finds every step harmful
        aside = take(train, round(min(CHECKED_TOKENS, CHECKED_SHARE * count)), job.seed + 1)
        chosen = set(map(id, aside))
        rest = [d for d in train if id(d) not in chosen]
        calibration = take(rest, job.settings.calibration_tokens, job.seed, share=True)
        generic = [encode_chat(tokenizer, chat) for chat in job.generic]
        generic += [encode_text(tokenizer, text) for text in job.generic_text]
        measured = take(held_out, MEASURED_TOKENS, job.seed)
        return _Texts(rest, aside, measured, calibration, generic)

    def _pruned(self) -> tuple[Plan, PreTrainedModel]:
        folder, path = self.out / "pruned", self.out / "plan.json"
        if folder.is_dir() and path.exists():
            return plans.load(path), checkpoint.load(folder).model
        settings = self.job.settings
        asked = Sizes(
            params=settings.params, ffn=settings.ffn, heads=settings.heads, experts=settings.experts
        )
        sizes = filled(asked, extras_of(self.loaded.model))
        with self._timed("shape"):
            read = self.texts.calibration
            shape = shape_of(self.loaded.model)
            wanted = decided(shape, self.loaded, sizes, lambda: read, self.progress)
        plans.save(wanted, path)
        model, plan = self._halfway(wanted)
        last = _onward(plan, wanted, extras_of(model)) if plan else wanted
        last = msgspec.structs.replace(last, reason=wanted.reason)
        if settings.shape == "per-layer":
            with self._timed("shape"):
                last = shared_out(model, last, read, most_parameters(sizes, wanted), self.progress)
        student, done = self._cut(model, last)
        plan = plans_joined(plan, done) if plan else done
        plan = msgspec.structs.replace(plan, reason=last.reason, measured=wanted.measured)
        plans.save(plan, path)
        checkpoint.save(student, self.loaded.tokenizer, folder, **self._origin())
        return plan, student

    def _halfway(self, wanted: Plan) -> tuple[PreTrainedModel, Plan | None]:
        """The teacher, or where the cut is large what it came to after all steps but the last."""
        model, plan = self.loaded.model, None
        count = _steps(wanted)
        for number in range(1, count):
            folder = self.out / f"step-{number}"
            if not (folder / "healed").is_dir():
                self._one_step(model, plan, _between(wanted, number / count, extras_of(model)), folder)
            plan = plans.load(folder / "plan.json")
            self.notes.append(f"cut to {plan.student} and healed before the cut went on")
            model = checkpoint.load(folder / "healed").model
        return model, plan

    def _one_step(self, model: PreTrainedModel, before: Plan | None, wanted: Plan, folder: Path) -> None:
        """Prune to an intermediate shape, heal, and keep both the model and the plan that led there."""
        last = _onward(before, wanted, extras_of(model)) if before else wanted
        student, done = self._cut(model, last)
        self._heal(student, folder / "heal")
        plans.save(plans_joined(before, done) if before else done, folder / "plan.json")
        checkpoint.save(student, self.loaded.tokenizer, folder / "healed", **self._origin())
        distill.forget(folder / "heal")

    def _cut(self, model: PreTrainedModel, plan: Plan) -> tuple[PreTrainedModel, Plan]:
        with self._timed("prune"):
            texts = batched(self.texts.calibration, LEAST_TOKENS, sharing=model)
            return student_of(copy.deepcopy(model), plan, texts, progress=self.progress)

    def _before(self, student: PreTrainedModel) -> Fidelity:
        path = self.out / "before.json"
        if path.exists():
            before = msgspec.json.decode(path.read_bytes(), type=_Before)
            self.seconds = before.seconds | self.seconds
            return before.fidelity
        found = self._measured(student)
        path.write_bytes(msgspec.json.encode(_Before(fidelity=found, seconds=self.seconds)))
        return found

    def _measured(self, student: PreTrainedModel) -> Fidelity:
        with self._timed("fidelity"):
            texts = batched(self.texts.measured, 2)
            return fidelity(self.loaded.model, student, texts, progress=self.progress)

    def _heal(self, student: PreTrainedModel, state: Path) -> Curve:
        """One healing; the tokens and minutes of the whole run are shared among its steps."""
        count = _steps(plans.load(self.out / "plan.json"))
        settings = distill.Settings(
            tokens=max(self.job.settings.distil_tokens // count, 1),
            minutes=self.job.settings.minutes / count,
            learning_rate=self.job.settings.learning_rate,
            lora=self.job.settings.lora,
            seed=self.job.seed,
            generic=self.job.generic_share if self.texts.generic else 0.0,
        )
        if self.job.settings.answers == "right":
            settings = msgspec.structs.replace(settings, **RIGHT)
        corpus = distill.Corpus(self.texts.train, self.texts.checked, self.texts.generic)
        teacher = LiveTeacher(self.loaded.model)
        curve = distill.heal(student, teacher, corpus, settings, state, self.progress)
        self.seconds["heal"] = self.seconds.get("heal", 0.0) + curve.seconds
        return curve

    def _beside(self, student: PreTrainedModel, report: OwnReport, curve: Curve) -> OwnReport:
        """The report with what it compares to."""
        with self._timed("baseline"):
            # `take` shuffles documents as this shuffles chats
            chats = shuffled(self.job.held_out, self.job.seed)[: len(self.texts.measured)]
            own, teacher = (
                bits_per_byte(model, self.texts.measured, chats) for model in (student, self.loaded.model)
            )
            name = self.job.settings.baseline
            found = measured(checkpoint.load(name, self.job.root), chats) if name else None
        return msgspec.structs.replace(
            report,
            bits_per_byte=own,
            teacher_bits_per_byte=teacher,
            baseline=found,
            notes=[*self.notes, *curve.notes],
            seconds={step: round(seconds, 2) for step, seconds in self.seconds.items()},
        )

    def _report(self, plan: Plan, before: Fidelity, curve: Curve, after: Fidelity) -> OwnReport:
        return OwnReport(
            understudy=__version__,
            teacher=self.loaded.source,
            teacher_hash=self.loaded.digest,
            parameters_before=plan.parameters_before,
            parameters_after=plan.parameters_after,
            plan=plan,
            calibration_hash=fingerprint(self.texts.calibration),
            calibration_tokens=sum(len(d.tokens) for d in self.texts.calibration),
            training_hash=fingerprint(self.texts.train),
            training_tokens=curve.points[-1].tokens if curve.points else 0,
            stopped=curve.stopped,
            seed=self.job.seed,
            before=before,
            after=after,
            points=curve.points,
            checks=curve.checks,
            seconds={step: round(seconds, 2) for step, seconds in self.seconds.items()},
            checkpoint=str(self.out / "checkpoint"),
            lineage=self._lineage(plan, curve),
        )

    def _lineage(self, plan: Plan, curve: Curve) -> list[str]:
        count = sum(len(d.tokens) for d in self.texts.calibration)
        trained = curve.points[-1].tokens if curve.points else 0
        return [
            f"teacher {self.loaded.source} ({self.loaded.digest[:16]})",
            f"pruned to {plan.student} on {count:,} calibration tokens",
            f"healed on {trained:,} tokens of its teacher's distribution, seed {self.job.seed}",
        ]

    def _origin(self) -> dict[str, Any]:
        """What a student's folder takes over from its teacher's: licence and processor."""
        return {"licence_from": self.loaded.folder, "processor": self.loaded.processor}

    def _save(self, student: PreTrainedModel, report: OwnReport, curve: Curve) -> OwnReport:
        """The checkpoint first, the report last: a report means that all of it is there."""
        save_plot(curve, self.out / "curve.svg")
        checkpoint.save(
            student,
            self.loaded.tokenizer,
            self.out / "checkpoint",
            card=model_card(report.plan, _lines(report)),
            **self._origin(),
        )
        (self.out / "report.json").write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1))
        distill.forget(self.out / "heal")
        for folder in (self.out / "pruned", *self.out.glob("step-[0-9]*")):
            shutil.rmtree(folder, ignore_errors=True)
        return report


def _steps(plan: Plan) -> int:
    """How many cuts of at most `LARGEST_CUT` it takes; a mixture is cut at once."""
    if plan.teacher.experts or plan.removed <= LARGEST_CUT:
        return 1
    return math.ceil(math.log(1 - plan.removed) / math.log(1 - LARGEST_CUT))


def _between(wanted: Plan, share: float, extras: Extras) -> Plan:
    """A shape on the way: FFN channels by equal ratios and layers by equal numbers; heads and width wait for
    the last cut."""
    start, end = wanted.teacher, wanted.student
    ffn = round(start.ffn * (end.ffn / start.ffn) ** share)
    step = plans.MULTIPLE if end.ffn % plans.MULTIPLE == 0 else 1
    layers = round(start.layers + (end.layers - start.layers) * share)
    return plans.decide(start, extras, ffn=max(ffn // step * step, end.ffn), layers=layers)


def _onward(before: Plan, wanted: Plan, extras: Extras) -> Plan:
    """The plan from where a step ended to a shape further on."""
    to = wanted.student
    return plans.decide(
        before.student,
        extras,
        ffn=to.ffn,
        heads=to.heads,
        kv_heads=to.kv_heads,
        hidden=to.hidden,
        layers=to.layers,
        cross_layers=to.cross_layers,
        cross_heads=to.cross_heads,
    )


def plans_joined(first: Plan, second: Plan) -> Plan:
    """Two cuts as one: indices of the second looked up in what the first kept."""
    return msgspec.structs.replace(
        second,
        teacher=first.teacher,
        parameters_before=first.parameters_before,
        layers=[_looked_up(first.layers[kept.layer], kept) for kept in second.layers],
        width=[first.width[i] for i in second.width]
        if first.width and second.width
        else second.width or first.width,
    )


def _looked_up(first: LayerPlan, second: LayerPlan) -> LayerPlan:
    return LayerPlan(
        layer=first.layer,
        channels=[first.channels[i] for i in second.channels],
        heads=[first.heads[i] for i in second.heads],
        kv_heads=[first.kv_heads[i] for i in second.kv_heads],
        crossing=second.crossing,
    )


def _lines(report: OwnReport) -> list[str]:
    """The facts of a report for the model card."""
    return [
        *report.lineage,
        f"understudy {report.understudy}",
        f"calibration {report.calibration_hash}, training texts {report.training_hash}",
        f"before healing: {report.before}",
        f"after healing:  {report.after}",
        report.beside_baseline,
        *report.notes,
    ]
