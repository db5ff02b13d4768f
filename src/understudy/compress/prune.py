"""Carry out a plan: cut heads and channels layer by layer and refit what writes to the residual stream.

Each layer is measured behind the layers already pruned, cut, refitted, and only then passed through, so later
layers learn to live with what earlier ones lost. It ignores how the shape was decided (plan) and healing
(distill).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional

from understudy.compress import plan as plans
from understudy.compress.calibrate import (
    Branch,
    Gram,
    Stream,
    attention_of,
    compare,
    enter,
    feed_forward_of,
    observe,
)
from understudy.compress.corpus import Batch
from understudy.compress.decoder import (
    Layer,
    bias_of,
    extras_of,
    keep_layers,
    layers_of,
    set_linear,
    shape_of,
    write_cross_heads,
    write_ffn_sizes,
    write_shape,
)
from understudy.compress.depth import choose_layers
from understudy.compress.elimination import choose_channels
from understudy.compress.importance import (
    Gated,
    Heads,
    Score,
    choose_heads,
    head_columns,
    refit,
    reread,
)
from understudy.compress.journal import Journal, Note
from understudy.compress.plan import LayerPlan, Plan
from understudy.compress.precision import Precision, matmul_precision
from understudy.compress.progress import Progress, silent
from understudy.compress.streaming import is_streamed
from understudy.compress.taylor import channel_sensitivity
from understudy.compress.width import Refit, Resume, choose_width, narrow
from understudy.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Method(NamedTuple):
    """How indices are chosen and made up for."""

    score: Score = "obs"
    refit: bool = True
    ridge: float = 1e-2
    pull: float = 0.5
    """Share of the stream's lag behind the teacher's that a refit tries to make good. All of it (1) fits the
    calibration text too closely: SmolLM2-135M with 1024 channels has KL 0.416 / 0.374 / 0.394 to its teacher
    on held-out chats for 0 / 0.5 / 1."""
    reread: float = 0.5
    """The same for what reads the stream: q, k, v, gate and up."""
    precision: Precision = "auto"


@torch.no_grad()
def prune(
    model: PreTrainedModel,
    plan: Plan,
    batches: Sequence[Batch],
    method: Method = Method(),  # noqa: B008 -- an immutable tuple
    progress: Progress = silent,
    journal: Journal | None = None,
) -> Plan:
    """Prune ``model`` in place and return the plan with the indices kept.

    Indices already in the plan are applied; otherwise layers are chosen on the untouched model, channels and
    heads on the pruned prefix, and the width last. With a ``journal``, which a streamed model needs to be
    written to, it goes on where an earlier call with the same arguments was interrupted. Raises ModelError
    for a plan made for another shape and for calibration without a token.
    """
    _check(model, plan, batches)
    if journal is None and is_streamed(model):
        raise ValueError("a streamed model is changed in a journal's files")
    with matmul_precision(method.precision):
        run = _Run(model, plan, batches, method, progress, journal)
        done = run.cut_layers()
        width = run.cut_width()
    if plan.ffns or plan.student.cross_heads != plan.student.heads * bool(plan.student.cross_layers):
        pad(model, plan, journal)
    return msgspec.structs.replace(plan, layers=done, width=width)


class _Run:
    """One call of `prune`: its two passes, each of which a journal can take up where it stopped."""

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        batches: Sequence[Batch],
        method: Method,
        progress: Progress,
        journal: Journal | None,
    ) -> None:
        self.model, self.plan, self.batches, self.method = model, plan, batches, method
        self.progress, self.journal = progress, journal
        self.resumed = journal.read() if journal else None
        self.note = self.resumed.note if self.resumed else Note(stage="layers", kept=self._kept())

    def _kept(self) -> list[int]:
        given = [layer.layer for layer in self.plan.layers]
        wanted = self.plan.student
        return given or choose_layers(
            self.model, self.batches, wanted.layers, self.progress, crossing=wanted.cross_layers
        )

    def cut_layers(self) -> list[LayerPlan]:
        """Heads and channels of every layer that stays."""
        layers, kept, plan = layers_of(self.model), self.note.kept, self.plan
        if self.note.stage == "layers":
            self._sweep(layers)
        else:
            self._restore(layers, kept)
        keep_layers(self.model, kept)
        write_shape(self.model, msgspec.structs.replace(plan.student, hidden=plan.teacher.hidden), kept)
        return self.note.done

    def _sweep(self, layers: list[Layer]) -> None:
        method, plan, start = self.method, self.plan, self.note.following
        taylor = channel_sensitivity(self.model, self.batches) if method.score == "taylor" else []
        sweep = _Sweep(plan, method, enter(self.model, self.batches))
        sweep.drifted = any(index not in self.note.kept for index in range(start))
        if self.resumed:
            self._restore(layers, [index for index in self.note.kept if index < start])
            sweep.resume(self.resumed.streams)
        for index, layer in enumerate(layers[start:], start=start):
            with layer.awake():
                self._cut(sweep, index, layer, taylor[index] if taylor else None)
            self.note = msgspec.structs.replace(self.note, following=index + 1)
            if self.journal:
                self.journal.note(self.note, sweep.streams)
            self.progress("prune", index + 1, len(layers), f"layer {index + 1} of {len(layers)}")

    def _restore(self, layers: list[Layer], places: Sequence[int]) -> None:
        """Layers that an earlier call finished cutting."""
        if self.journal:
            self.journal.restore("layers", layers, places)
        for place in places:
            layers[place].regroup(*self.plan.heads(crossing=layers[place].gated))

    def _cut(self, sweep: _Sweep, index: int, layer: Layer, taylor: Tensor | None) -> None:
        if index not in self.note.kept:
            sweep.skip(index, layer)
            return
        place = len(self.note.done)
        given = self.plan.layers[place] if self.plan.layers else None
        done = sweep.layer(index, layer, _Wanted(self.plan.ffn(place), given, taylor))
        self.note = msgspec.structs.replace(self.note, done=[*self.note.done, done])
        if self.journal:
            self.journal.finish("layers", index, layer)

    def cut_width(self) -> list[int]:
        """The hidden width, one set of dimensions for all layers."""
        plan, model = self.plan, self.model
        if plan.student.hidden == plan.teacher.hidden:
            return plan.width or list(range(plan.teacher.hidden))
        width = plan.width or self.note.width or choose_width(model, self.batches, plan.student.hidden)
        narrow(
            model,
            width,
            self.batches,
            Refit(self.method.refit, self.method.ridge, self.method.pull),
            self.progress,
            self._narrowing(width),
        )
        write_shape(model, plan.student, self.note.kept)
        return width

    def _narrowing(self, width: list[int]) -> Resume | None:
        journal = self.journal
        if journal is None:
            return None
        streams: list[list[Tensor]] = []
        if self.note.stage == "width":
            journal.restore("width", layers_of(self.model), range(self.note.following))
            streams = self.resumed.streams if self.resumed else []
        else:
            self.note = msgspec.structs.replace(self.note, stage="width", following=0, width=width)
            journal.note(self.note, [], always=True)
        return Resume(self.note.following, streams, self._narrowed)

    def _narrowed(self, place: int, layer: Layer, streams: Sequence[Stream]) -> None:
        self.note = msgspec.structs.replace(self.note, following=place + 1)
        if self.journal:
            self.journal.finish("width", place, layer)
            self.journal.note(self.note, streams)


def _check(model: PreTrainedModel, plan: Plan, batches: Sequence[Batch]) -> None:
    shape = shape_of(model)
    if shape != plan.teacher:
        raise ModelError(f"the plan is for {plan.teacher}", expected=f"a plan for this model: {shape}")
    plans.check(plan.teacher, plan.student, extras_of(model))
    if plan.layers:
        plans.check_layers(plan)
    if not any(bool(batch.real.any()) for batch in batches):
        raise ModelError("no calibration text", expected="at least one window of tokens")
    last = max(int(batch.tokens.max()) for batch in batches)
    if last >= shape.vocab:
        raise ModelError(
            f"the calibration text holds token {last}, the model has {shape.vocab}",
            expected="tokenizer and model of one checkpoint",
        )


class _Wanted(NamedTuple):
    """What is to become of one layer."""

    ffn: int
    given: LayerPlan | None
    """Indices to apply; None: choose."""
    taylor: Tensor | None
    """Scores of its channels, where that is the method."""


class _Sweep:
    """One pass through the layers, the pruned stream beside the teacher's."""

    def __init__(self, plan: Plan, method: Method, stream: Stream) -> None:
        self.plan, self.method, self.stream = plan, method, stream
        self.teacher = stream.copy() if method.pull else None
        self.drifted = False

    @property
    def streams(self) -> list[Stream]:
        """All that the next layer depends on beside itself."""
        return [self.stream, *([self.teacher] if self.teacher else [])]

    def resume(self, hidden: list[list[Tensor]]) -> None:
        """Take up streams that were noted."""
        for stream, states in zip(self.streams, hidden, strict=True):
            stream.hidden = states

    def skip(self, index: int, layer: Layer) -> None:
        """A layer the student does without."""
        self.drifted = True
        self._arrive(index)
        for attention in (True, False):
            self._advance_teacher(index, layer, attention=attention)

    def layer(self, index: int, layer: Layer, wanted: _Wanted) -> LayerPlan:
        self._arrive(index)
        follows = self.teacher is not None and (layer.gated or not layer.writes_through_norm)
        original = Layer(copy.deepcopy(layer.module), layer.family) if follows else None
        heads = self._attention(index, layer, original, wanted.given)
        channels = self._feed_forward(index, layer, original, wanted)
        return LayerPlan(
            layer=index, channels=channels, heads=heads.query, kv_heads=heads.kv, crossing=layer.gated
        )

    def _attention(self, index: int, layer: Layer, original: Layer | None, given: LayerPlan | None) -> Heads:
        before, after = self.plan.teacher, self.plan.heads(crossing=layer.gated)
        whole = Heads(list(range(before.heads)), list(range(before.kv_heads)))
        self._reread(layer.read_attention, layer.attention_readers, original)
        ahead = self._advance_teacher(index, original, attention=True)
        untouched = after == (before.heads, before.kv_heads)
        if untouched and (layer.family.heads_fixed or not (self.drifted and ahead)):
            self.stream.advance(attention_of(layer), index)
            return whole
        gram = self._seen(layer, layer.o, attention_of(layer), index, ahead)
        heads = (
            whole if untouched else Heads(given.heads, given.kv_heads) if given else self._choose(layer, gram)
        )
        columns = head_columns(heads.query, before.head_dim)
        cut_heads(layer, heads, before.head_dim, self._refit(layer.o, gram, columns))
        write = None if layer.gated else layer.write_attention
        self._go_on(gram, columns, write, attention_of(layer), index)
        return heads

    def _choose(self, layer: Layer, gram: Gram) -> Heads:
        before, (keep, keep_kv) = self.plan.teacher, self.plan.heads(crossing=layer.gated)
        return choose_heads(
            layer.o.weight,
            gram,
            heads=before.heads,
            kv_heads=before.kv_heads,
            keep=keep,
            keep_kv=keep_kv,
            ridge=self.method.ridge,
        )

    def _feed_forward(self, index: int, layer: Layer, original: Layer | None, wanted: _Wanted) -> list[int]:
        self._reread(layer.read_feed_forward, (layer.gate, layer.up), original)
        ahead = self._advance_teacher(index, original, attention=False)
        untouched = wanted.ffn == self.plan.teacher.ffn
        if untouched and not (self.drifted and ahead):
            self.stream.advance(feed_forward_of(layer), index)
            return list(range(self.plan.teacher.ffn))
        gram = self._seen(layer, layer.down, feed_forward_of(layer), index, ahead)
        block = Gated(layer.gate.weight, layer.up.weight, layer.down.weight)
        channels = wanted.given.channels if wanted.given else self._best(block, gram, wanted)
        cut_channels(layer, channels, self._refit(layer.down, gram, channels))
        write = None if layer.gated else layer.write_feed_forward
        self._go_on(gram, channels, write, feed_forward_of(layer), index)
        return channels

    def _best(self, block: Gated, gram: Gram, wanted: _Wanted) -> list[int]:
        how = self.method
        pull = how.pull if self.teacher is not None else 0.0
        return choose_channels(
            how.score, block, gram, wanted.ffn, taylor=wanted.taylor, ridge=how.ridge, pull=pull
        )

    def _seen(
        self, layer: Layer, writer: nn.Linear, branch: Branch, index: int, ahead: list[Tensor] | None
    ) -> Gram:
        """What enters ``writer``. A gated one is asked for less than the stream lacks, and is not pulled."""
        gram = observe(writer, self.stream, branch, index, None if layer.gated else ahead)
        if not gram.tokens:
            raise ModelError(
                f"no calibration chat reaches layer {index}, which reads pictures",
                expected="at least one chat with a picture",
                next_step="give --calibration a file with image_url parts",
            )
        return gram

    def _arrive(self, index: int) -> None:
        for stream in (self.stream, self.teacher):
            if stream is not None:
                stream.arrive(index)

    def _go_on(
        self,
        gram: Gram,
        columns: list[int],
        write: Callable[[Tensor], Tensor] | None,
        branch: Branch,
        index: int,
    ) -> None:
        """Pass through the pruned branch: what it read before is what it reads now, at fewer columns."""
        if gram.inputs and write is not None:
            self.stream.advance_from([x[..., columns] for x in gram.inputs], write)
        else:
            self.stream.advance(branch, index)

    def _advance_teacher(self, index: int, original: Layer | None, *, attention: bool) -> list[Tensor] | None:
        if self.teacher is None or original is None:
            return None
        self.teacher.advance(attention_of(original) if attention else feed_forward_of(original), index)
        return self.teacher.hidden

    def _reread(
        self, read: Callable[[Tensor], Tensor], readers: Sequence[nn.Linear], original: Layer | None
    ) -> None:
        """Turn the readers toward what the teacher's would have read here."""
        if self.teacher is None or original is None or not self.method.reread:
            return
        gram = compare(self.stream, self.teacher, read, self.plan.teacher.hidden)
        if gram.lag.any():
            for reader in readers:
                turned = reread(reader.weight, gram, ridge=self.method.ridge, pull=self.method.reread)
                set_linear(reader, turned, bias_of(reader))

    def _refit(self, writer: nn.Linear, gram: Gram, columns: list[int]) -> Tensor:
        if not self.method.refit:
            return writer.weight[:, columns]
        return refit(writer.weight, gram, columns, ridge=self.method.ridge, pull=self.method.pull)


def cut_channels(layer: Layer, keep: list[int], down: Tensor) -> None:
    """Keep FFN channels ``keep``; ``down`` (width, |keep|) is their writing weight."""
    for reader in (layer.gate, layer.up):
        _keep_rows(reader, keep)
    set_linear(layer.down, down, bias_of(layer.down))


def pad(model: PreTrainedModel, plan: Plan, journal: Journal | None = None) -> None:
    """Fill layers of different sizes up with zero channels and zero groups of heads, so that they are one
    standard checkpoint again.

    The sizes are noted in the configuration as `ffn_per_layer`, which GGUF export leaves the padding out by,
    and `cross_attention_heads`.
    """
    student = plan.student
    for place, layer in enumerate(layers_of(model)):
        with layer.awake():
            _pad(layer.down, (layer.gate, layer.up), student.ffn)
            if layer.gated:
                _pad(layer.o, (layer.q,), student.heads * student.head_dim)
                _pad(None, (layer.k, layer.v), student.kv_heads * student.head_dim)
                layer.regroup(student.heads, student.kv_heads)
            if journal:
                journal.finish("padded", place, layer)
    if plan.ffns:
        write_ffn_sizes(model, plan.ffns)
    if student.cross_layers:
        write_cross_heads(model, student.cross_heads)


def _pad(writer: nn.Linear | None, readers: Sequence[nn.Linear], most: int) -> None:
    """Zero rows behind the readers', and zero columns behind the writer's, up to ``most``."""
    for reader in readers:
        bias, more = bias_of(reader), most - reader.out_features
        padded = None if bias is None else functional.pad(bias, (0, more))
        set_linear(reader, functional.pad(reader.weight, (0, 0, 0, more)), padded)
    if writer is not None:
        set_linear(writer, functional.pad(writer.weight, (0, most - writer.in_features)), bias_of(writer))


def cut_heads(layer: Layer, heads: Heads, head_dim: int, out: Tensor) -> None:
    """Keep ``heads``; ``out`` (width, |query|·head_dim) is their writing weight."""
    query, kv = head_columns(heads.query, head_dim), head_columns(heads.kv, head_dim)
    for reader, rows in ((layer.q, query), (layer.k, kv), (layer.v, kv)):
        _keep_rows(reader, rows)
    set_linear(layer.o, out, bias_of(layer.o))
    layer.regroup(len(heads.query), len(heads.kv))


def _keep_rows(reader: nn.Linear, rows: list[int]) -> None:
    bias = bias_of(reader)
    set_linear(reader, reader.weight[rows], None if bias is None else bias[rows])
