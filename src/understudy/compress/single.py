"""One step of the recipe by itself, as the commands `prune` and `fidelity` need it.

Texts come as a function of the tokenizer, for the tokenizer comes with the teacher. It ignores the whole
run (recipe).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from understudy import __version__
from understudy.compress import checkpoint
from understudy.compress import plan as plans
from understudy.compress.allocation import allocate, curves
from understudy.compress.card import loads_in_vllm, model_card
from understudy.compress.corpus import (
    Batch,
    batches,
    fingerprint,
    pack,
    row_length,
    shared_length,
    take,
    windows,
)
from understudy.compress.decoder import (
    Extras,
    Shape,
    extras_of,
    family_of,
    layer_parameters,
    may_share,
    parameters,
    shape_of,
)
from understudy.compress.document import Document
from understudy.compress.fidelity import Fidelity, fidelity, require_same_tokenizer
from understudy.compress.journal import Journal
from understudy.compress.pace import Speed, Track
from understudy.compress.plan import Measured, Plan
from understudy.compress.progress import Progress, silent
from understudy.compress.prune import Method
from understudy.compress.search import Budget, Sample, Search
from understudy.compress.student import student_of
from understudy.errors import InputError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_TOKENS = 2048
"""Tokens per forward pass where no gradient is kept."""
LEAST_TOKENS = 64
"""Fewer tokens of calibration than this say nothing."""

ATTEMPTS = 3
"""Shapes measured on the engine before a latency is given up."""
AXES_TOKENS, PLANS_TOKENS = (6_144, 768), (12_288, 1_536)
"""Tokens that axes, and then the best plans, are measured on: for statistics, and for KL. A refit of n
channels on few more than n tokens fits those alone, and axes without a refit look cheap beside it."""

AXES = ("heads", "kv_heads", "hidden", "layers", "cross_layers", "cross_heads")
"""Sizes that are asked for by name alone; the FFN's may follow from a budget."""

Texts = Callable[["PreTrainedTokenizerBase"], list[Document]]


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked of a shape; 0 and empty leave it open."""

    params: str = ""
    ffn: int = 0
    heads: int = 0
    kv_heads: int = 0
    hidden: int = 0
    layers: int = 0
    shape: Literal["uniform", "per-layer"] = "uniform"
    experts: int = 0
    cross_layers: int = 0
    cross_heads: int = 0
    latency: float = 0.0
    """Tokens a second to reach."""


class PruneJob(NamedTuple):
    teacher: str
    out: Path
    """Folder of the checkpoint; the plan stands beside it as NAME.plan.json."""
    sizes: Sizes
    plan: Path | None
    """A plan to apply instead."""
    texts: Texts
    tokens: int
    method: Method = Method()
    seed: int = 0
    speed: Speed | None = None
    """What measures tokens a second, where a latency is asked for."""


def prune_only(
    job: PruneJob, show: Callable[[Plan], None], progress: Progress = silent, *, dry_run: bool = False
) -> Plan:
    """Decide, show and save the plan, then carry it out and save the checkpoint.

    A call that was interrupted goes on where it was when the same is asked again. Raises InputError or
    ModelError for sizes, a plan, a teacher or texts that cannot be used.
    """
    loaded = checkpoint.load(job.teacher, stream=job.method.score != "taylor")
    read = cache(lambda: take(job.texts(loaded.reader), job.tokens, job.seed))
    path = job.out.with_name(job.out.name + ".plan.json")

    def decide() -> Plan:
        return plans.load(job.plan) if job.plan else _planned(loaded, job, read, progress)

    if dry_run:
        plan = decide()
        show(plan)
        plans.save(plan, path)
        return plan
    calibration = read()
    texts = batched(calibration, LEAST_TOKENS)  # refused before anything is written
    journal = Journal(job.out.with_name(job.out.name + ".prune"), _identity(job, loaded, calibration))
    plan = journal.plan(decide)
    show(plan)
    plans.save(plan, path)
    model, plan = student_of(loaded.model, plan, texts, job.method, progress, journal)
    plans.save(plan, path)
    facts = [
        f"teacher {loaded.source} ({loaded.digest[:16]})",
        f"calibration {fingerprint(calibration)}, {sum(len(d.tokens) for d in calibration):,} tokens",
        loads_in_vllm(model.config.to_dict()),
    ]
    card = model_card(plan, facts)
    origin: dict[str, Any] = {"licence_from": loaded.folder, "processor": loaded.processor}
    checkpoint.save(model, loaded.tokenizer, job.out, card=card, **origin)
    journal.forget()
    return plan


def _identity(job: PruneJob, loaded: checkpoint.Loaded, calibration: list[Document]) -> str:
    """SHA-256 of everything the student follows from."""
    given = job.plan.read_text() if job.plan else ""
    parts = [__version__, loaded.digest, job.sizes, given, fingerprint(calibration), job.method, job.seed]
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def _planned(
    loaded: checkpoint.Loaded, job: PruneJob, read: Callable[[], list[Document]], progress: Progress
) -> Plan:
    sizes = filled(job.sizes, extras_of(loaded.model))
    plan = decided(shape_of(loaded.model), loaded, sizes, read, progress, job.speed)
    if sizes.shape == "uniform":
        return plan
    return shared_out(loaded.model, plan, read(), most_parameters(sizes, plan), progress)


def filled(sizes: Sizes, extras: Extras) -> Sizes:
    """What is meant where nothing is asked: three quarters of a dense teacher, of a mixture its active width.

    A mixture of which no params, FFN or experts are asked becomes as wide as what one token passes in it.
    """
    if extras.mixed and not (sizes.params or sizes.ffn or sizes.experts):
        return msgspec.structs.replace(sizes, ffn=extras.mixed.active)
    if msgspec.structs.replace(sizes, shape="uniform") == Sizes():
        return msgspec.structs.replace(sizes, params="0.75")
    return sizes


def most_parameters(sizes: Sizes, plan: Plan) -> int:
    """What the student may have in all; 0 where sizes were asked for and no budget."""
    asked = sizes.params and not sizes.ffn
    return plans.wanted_parameters(sizes.params, plan.parameters_before) if asked else 0


def shared_out(
    model: PreTrainedModel, plan: Plan, texts: list[Document], most: int = 0, progress: Progress = silent
) -> Plan:
    """The plan with its FFN channels shared out among the layers by measured damage.

    ``most`` parameters in all are used up where they are given, beyond what rounding a common size down left.
    Raises InputError for a mixture and for fewer layers.
    """
    extras = extras_of(model)
    if extras.mixed:
        raise InputError(
            "a mixture of experts with sizes per layer",
            expected="a dense teacher",
            next_step="prune it to a dense student first, and that one with --shape per-layer",
        )
    if plan.student.layers < plan.teacher.layers:
        raise InputError(
            f"layers = {plan.student.layers} with sizes per layer",
            expected="all layers: how sizes are shared out is measured with each of them in its place",
        )
    found = curves(model, batched(texts, LEAST_TOKENS), progress)
    step = plans.MULTIPLE if plan.student.ffn >= plans.MULTIPLE else 1
    total = plan.student.ffn * plan.student.layers + _left_over(plan, extras, most)
    return plans.per_layer(plan, allocate(found, plan.teacher.ffn, total, step), extras)


def _left_over(plan: Plan, extras: Extras, most: int) -> int:
    """FFN channels that fit into ``most`` parameters beside the plan's."""
    less = msgspec.structs.replace(plan.student, ffn=plan.student.ffn - 1)
    channel = layer_parameters(plan.student, extras) - layer_parameters(less, extras)
    return max(most - plan.parameters_after, 0) // channel


def decided(
    shape: Shape,
    loaded: checkpoint.Loaded,
    sizes: Sizes,
    read: Callable[[], list[Document]] | None = None,
    progress: Progress = silent,
    speed: Speed | None = None,
) -> Plan:
    """The plan for what was asked, or for what is meant where nothing was (`filled`).

    With texts to ``read`` the shape for a budget is measured on them, otherwise it follows from a rule; with
    ``speed`` the budget may be a latency.
    """
    extras = extras_of(loaded.model)
    sizes = filled(sizes, extras)
    given = {axis: getattr(sizes, axis) for axis in AXES}
    fixed = extras.mixed or extras.attention or family_of(loaded.model).host is not None
    if sizes.latency and (fixed or read is None or speed is None or sizes.params or sizes.ffn):
        raise InputError(
            f"latency = {sizes.latency:g} tokens a second",
            expected="a dense text model, texts to measure on, and neither params nor ffn beside it",
        )
    by_rule = not (sizes.params or sizes.latency) or sizes.ffn or sizes.experts or fixed
    if by_rule or read is None:
        return plans.decide(shape, extras, params=sizes.params, ffn=sizes.ffn, experts=sizes.experts, **given)
    start = plans.decide(shape, extras, **given).student
    search = _Planner(loaded.model, start, read(), progress)
    if sizes.latency and speed:
        return search.for_latency(sizes.latency, Track(loaded.model, loaded.tokenizer, speed))
    return search.for_parameters(sizes.params)


class _Planner:
    """The cheapest shape for a budget, measured on these texts."""

    def __init__(
        self, model: PreTrainedModel, start: Shape, documents: list[Document], progress: Progress
    ) -> None:
        self.progress = progress
        self.teacher, self.extras = shape_of(model), extras_of(model)
        samples = (Sample(*(batched(part, 2, model) for part in parts)) for parts in _parts(documents))
        self.search = Search(model, start, *samples, progress=progress)

    def for_parameters(self, params: str) -> Plan:
        wanted = plans.wanted_parameters(params, parameters(self.teacher, self.extras))
        unit = f"{wanted / 1e6:.1f}M parameters"
        found = self.search.cheapest(Budget(self._parameters, wanted, unit))
        return self._plan(found, f"within {unit}")

    def _parameters(self, shape: Shape) -> int:
        return parameters(shape, self.extras)

    def for_latency(self, target: float, track: Track) -> Plan:
        """At least ``target`` tokens a second, as measured; a cost that flatters is put right."""
        pace, most, reached = track.pace(self.progress), 1 / target, 0.0
        for _ in range(ATTEMPTS):
            found = self.search.cheapest(Budget(pace.seconds, most, f"{target:g} tokens a second"))
            reached = track.measure(found[0].shape)
            if reached >= target:
                return self._plan(found, f"at {target:g} tokens a second and more ({reached:.0f} measured)")
            most *= 0.98 * reached / target
        raise InputError(
            f"{target:g} tokens a second: {reached:.0f} reached after {ATTEMPTS} attempts",
            expected="a target that this machine reaches while nothing else runs on it",
        )

    def _plan(self, found: list[Measured], within: str) -> Plan:
        whole = sum(measured.axis == "plan" for measured in found)
        reason = f"the least measured KL of {whole} shapes {within}, {len(found) - whole} tried axis by axis"
        return plans.plan_of(self.teacher, found[0].shape, self.extras, reason, found)


def _parts(documents: list[Document]) -> list[tuple[list[Document], list[Document]]]:
    """For axes, and more for plans: texts for statistics, and others for KL, a quarter at most."""
    (text_tokens, probe_tokens), (more_text, more_probe) = AXES_TOKENS, PLANS_TOKENS
    count, pieces = sum(len(d.tokens) for d in documents), windows(documents, 512)
    probe = take(pieces, min(more_probe, count // 4), 1, share=True)
    chosen = set(map(id, probe))
    text = take([piece for piece in pieces if id(piece) not in chosen], more_text, 0, share=True)
    if not text:
        raise ModelError(
            f"{count} tokens of text", expected="two texts at least", next_step="give more or longer texts"
        )
    few = take(text, text_tokens, 0, share=True), take(probe, probe_tokens, 1, share=True)
    return [few, (text, probe)]


def compare(teacher: str, student: str, texts: Texts, tokens: int, progress: Progress = silent) -> Fidelity:
    """Fidelity of two models named by the user. Raises ModelError when their tokenizers differ."""
    progress("load", 0, 2)
    first = checkpoint.load(teacher)
    progress("load", 1, 2)
    second = checkpoint.load(student)
    progress("load", 2, 2)
    require_same_tokenizer(first.tokenizer, second.tokenizer)
    documents = texts(first.reader)
    if tokens:
        documents = take(documents, tokens, 0)
    return fidelity(first.model, second.model, batched(documents, 2), progress=progress)


def batched(documents: list[Document], least: int, sharing: PreTrainedModel | None = None) -> list[Batch]:
    """Packed batches. Raises ModelError when there are fewer than ``least`` tokens.

    For the model ``sharing``, if it may, a beginning that documents have in common is there once.
    """
    count = sum(len(d.tokens) for d in documents)
    if count < least:
        raise ModelError(
            f"{count} tokens of text", expected=f"at least {least}", next_step="give more or longer texts"
        )
    length = shared_length(documents)
    share = sharing is not None and may_share(sharing, length)
    length = length if share else row_length(documents)
    return list(batches(pack(documents, length, share=share), BATCH_TOKENS))
