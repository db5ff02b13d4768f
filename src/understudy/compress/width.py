"""The hidden width: one set of dimensions for the whole model, and readers and writers refitted to it.

The narrow model runs beside the wide one. At each norm, readers are refitted so that what they read of the
narrow stream is closest to what they read of the wide one; writers keep their rows and are refitted to
lead the narrow stream back to the wide one's kept dimensions. It ignores heads, channels and layers.

Source: Minitron (arXiv 2407.14679 §2.2) prunes width by one global index set; the readers' refit is ordinary
least squares with a ridge toward dropping the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from understudy.compress.calibrate import (
    Branch,
    Gram,
    Stream,
    attention_of,
    enter,
    feed_forward_of,
    observe,
)
from understudy.compress.corpus import Batch
from understudy.compress.decoder import (
    Layer,
    bias_of,
    body,
    family_of,
    head_weight,
    layers_of,
    narrow_embedding,
    set_linear,
    softcap_of,
)
from understudy.compress.importance import refit, refit_gain, refit_reader, top
from understudy.compress.losses import Head, Side
from understudy.compress.progress import Progress, silent
from understudy.compress.projector import narrowed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Refit(NamedTuple):
    """How the narrow model is fitted; fields as in `prune.Method`."""

    refit: bool
    ridge: float
    pull: float


def choose_width(model: PreTrainedModel, batches: Sequence[Batch], count: int) -> list[int]:
    """The ``count`` dimensions that readers draw most from, ascending."""
    return top(width_scores(model, batches), count)


@torch.no_grad()
def width_scores(model: PreTrainedModel, batches: Sequence[Batch]) -> Tensor:
    """Scores (width,) of dimensions j: Σ over norm sites of E[u_j²]·‖W_:j‖², each site's summing to one; u is
    what the readers W see."""
    stream, scores = enter(model, batches), torch.zeros(head_weight(model).shape[1])
    for index, layer in enumerate(layers_of(model)):
        with layer.awake():
            scores += drawn_by(layer, index, stream)
    return scores + drawn(body(model).norm, (head_weight(model),), stream)


def drawn_by(layer: Layer, index: int, stream: Stream) -> Tensor:
    """A layer's part of `width_scores`; the stream is passed through it."""
    stream.arrive(index)
    scores = drawn(layer.read_attention, [reader.weight for reader in layer.attention_readers], stream)
    stream.advance(attention_of(layer), index)
    scores = scores + drawn(layer.read_feed_forward, (layer.gate.weight, layer.up.weight), stream)
    stream.advance(feed_forward_of(layer), index)
    return scores


def drawn(read: Callable[[Tensor], Tensor], readers: Sequence[Tensor], stream: Stream) -> Tensor:
    """How much of each dimension's power the readers of one norm take in, (width,), summing to one."""
    pairs = zip(stream.hidden, stream.real, strict=True)
    power = cast(Tensor, sum(read(hidden[real]).float().square().sum(0) for hidden, real in pairs))
    drawn = power * cast(Tensor, sum(weight.square().sum(0) for weight in readers))
    return drawn / drawn.sum().clamp(min=torch.finfo(torch.float32).tiny)


@torch.no_grad()
def narrow(
    model: PreTrainedModel,
    keep: list[int],
    batches: Sequence[Batch],
    how: Refit,
    progress: Progress = silent,
    resume: Resume | None = None,
) -> None:
    """Keep these dimensions of the hidden stream, in place; the configuration is the caller's to write.

    With ``resume``, layers before its place are narrow already, and each further one is handed to it.
    """
    apply = narrowed(model, keep, batches, how.ridge)
    sweep = Narrowing(keep, how, enter(model, batches), family_of(model).gain_offset)
    layers, start = layers_of(model), 0
    if resume and resume.streams:
        start = resume.place
        sweep.wide.hidden, sweep.thin.hidden = resume.streams
    for index, layer in enumerate(layers[start:], start=start):
        with layer.awake():
            sweep.layer(index, layer)
            if resume:
                resume.finished(index, layer, [sweep.wide, sweep.thin])
        progress("width", index + 1, len(layers))
    sweep.finish(model)
    apply(model)


class Resume(NamedTuple):
    """Where an interrupted narrowing goes on, and who is told of every layer that is done."""

    place: int
    streams: list[list[Tensor]]
    """The wide and the narrow stream in front of that layer; empty at the beginning."""
    finished: Callable[[int, Layer, Sequence[Stream]], None]


class _Branches(NamedTuple):
    """One residual branch of a layer, narrow and wide."""

    layer: Layer
    original: Layer
    of: Callable[[Layer], Branch]
    place: int
    """Of the layer."""


class Narrowing:
    """The wide and the narrow stream, side by side."""

    def __init__(self, keep: list[int], how: Refit, wide: Stream, offset: float) -> None:
        self.keep, self.how, self.wide, self.offset = keep, how, wide, offset
        between = [{i: added[..., keep] for i, added in of.items()} for of in wide.between]
        self.thin = Stream([hidden[..., keep] for hidden in wide.hidden], wide.calls, wide.real, between)

    def layer(self, index: int, layer: Layer) -> None:
        original, family = Layer(copy.deepcopy(layer.module), layer.family), layer.family
        self.wide.arrive(index)
        self.thin.arrive(index)
        self._norm(layer.norm(family.attention_norm), original.read_attention)
        self._read(layer.read_attention, layer.attention_readers, original.read_attention)
        self._write(_Branches(layer, original, attention_of, index), layer.o, family.attention_post_norm)
        self._norm(layer.norm(family.ffn_norm), original.read_feed_forward)
        self._read(layer.read_feed_forward, (layer.gate, layer.up), original.read_feed_forward)
        self._write(_Branches(layer, original, feed_forward_of, index), layer.down, family.ffn_post_norm)

    def end(self, model: PreTrainedModel, at: Sequence[Tensor]) -> Side:
        """What the narrow model says at ``at``, bool (rows, length) each; the model stays as it is."""
        norm, head = copy.deepcopy(body(model).norm), family_of(model).head(model)
        tied = head.weight is body(model).embed_tokens.weight
        self._norm(norm, body(model).norm)
        weight = head.weight[:, self.keep]
        if not tied:
            head = copy.deepcopy(head)
            self._read(norm, (head,), body(model).norm)
            weight = head.weight
        ends = [norm(h)[there] for h, there in zip(self.thin.hidden, at, strict=True)]
        return Side(torch.cat(ends), Head(weight.detach(), softcap_of(model)))

    def finish(self, model: PreTrainedModel) -> None:
        """The final norm, the output matrix and the embedding."""
        norm, head = body(model).norm, family_of(model).head(model)
        original, tied = copy.deepcopy(norm), head.weight is body(model).embed_tokens.weight
        self._norm(norm, original)
        if not tied:
            self._read(norm, (head,), original)
        factor = narrow_embedding(model, self.keep)
        if tied:
            norm.weight = nn.Parameter((norm.weight + self.offset) / factor - self.offset)

    def _norm(self, norm: Any, original: Callable[[Tensor], Tensor]) -> None:
        """A norm of the stream, its gain fitted to what the wide one's kept dimensions are."""
        gain = self._plain(norm)
        power, product = torch.zeros(len(gain)), torch.zeros(len(gain))
        for thin, wide, real in zip(self.thin.hidden, self.wide.hidden, self.thin.real, strict=True):
            plain = norm(thin[real])
            power += plain.square().sum(0)
            product += (plain * original(wide[real])[:, self.keep]).sum(0)
        self._set_gain(norm, gain, power, product)

    def _plain(self, norm: Any) -> Tensor:
        """Cut a norm and take its gain away, which is returned."""
        gain = (norm.weight[self.keep] + self.offset).detach()
        norm.weight = nn.Parameter(torch.ones_like(gain) - self.offset)
        return gain

    def _set_gain(self, norm: Any, gain: Tensor, power: Tensor, product: Tensor) -> None:
        fitted = refit_gain(gain, power, product, ridge=self.how.ridge) if self.how.refit else gain
        norm.weight = nn.Parameter(fitted - self.offset)

    def _read(
        self,
        read: Callable[[Tensor], Tensor],
        readers: Sequence[nn.Linear],
        original: Callable[[Tensor], Tensor],
    ) -> None:
        width = len(self.keep)
        if not self.how.refit:
            for reader in readers:
                set_linear(reader, reader.weight[:, self.keep], bias_of(reader))
            return
        gram = Gram.zeros(width, readers[0].in_features)
        for thin, wide, real in zip(self.thin.hidden, self.wide.hidden, self.thin.real, strict=True):
            gram.add(read(thin[real]).float(), original(wide[real]).float())
        for reader in readers:
            weight = refit_reader(reader.weight, gram, self.keep, ridge=self.how.ridge)
            set_linear(reader, weight, bias_of(reader))

    def _write(self, at: _Branches, writer: nn.Linear, post_norm: str) -> None:
        """Cut and refit what ends a branch, and pass both streams through it."""
        bias, branch = bias_of(writer), at.of(at.layer)
        set_linear(writer, writer.weight[self.keep], None if bias is None else bias[self.keep])
        before = [hidden[..., self.keep] for hidden in self.wide.hidden]
        self.wide.advance(at.of(at.original), at.place)
        ahead = [hidden[..., self.keep] for hidden in self.wide.hidden]
        if post_norm:
            self._post_norm(at.layer.norm(post_norm), branch, at.place, before, ahead)
        elif self.how.refit and not at.layer.gated:
            gram = observe(writer, self.thin, branch, at.place, ahead)
            columns = list(range(writer.in_features))
            weight = refit(writer.weight, gram, columns, ridge=self.how.ridge, pull=self.how.pull)
            set_linear(writer, weight, bias_of(writer))
        self.thin.advance(branch, at.place)

    def _post_norm(
        self, norm: Any, branch: Branch, index: int, before: list[Tensor], ahead: list[Tensor]
    ) -> None:
        """The norm on a branch's output, whose rms is now over fewer dimensions."""
        gain = self._plain(norm)
        power, product = torch.zeros(len(gain)), torch.zeros(len(gain))
        for i, hidden in enumerate(self.thin.hidden):
            real = self.thin.real[i]
            plain, own = branch(hidden, self.thin.calls[i][index])[real], (ahead[i] - before[i])[real]
            wanted = own + self.how.pull * (ahead[i][real] - hidden[real] - own)
            power += plain.square().sum(0)
            product += (plain * wanted).sum(0)
        self._set_gain(norm, gain, power, product)
