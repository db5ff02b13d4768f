"""Calibration: second moments of what enters a projection, one layer at a time.

The hidden states of all calibration rows are kept and carried forward layer by layer, so only one layer's
statistics exist at once, and every layer is seen behind the layers already pruned. It ignores what the
statistics are used for.

Source: the layer-at-a-time forward is GPTQ's (arXiv 2210.17323 §4); statistics on the compressed prefix with
targets from the untouched model follow GPTAQ (arXiv 2504.02692).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from understudy.compress.corpus import Batch
from understudy.compress.decoder import Layer, body, states_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Call = Mapping[str, Any]
"""Keyword arguments a decoder layer is called with: mask, positions, rotary tables."""
Branch = Callable[[Tensor, Call], Tensor]
"""One residual branch: (rows, length, width) and its call -> what it adds, same shape."""


BLOCKS, LEAST_BLOCK = 4, 128
"""Blocks along each side of a sum of squares, and the least size that is worth a product of its own."""
KEEP_BYTES = 256 << 20
"""Most memory spent on remembering what entered one projection; beyond, it is computed twice."""


@dataclass
class Gram:
    """Sums over tokens of what enters a projection, all fp32."""

    tokens: int
    second: Tensor
    """Σ x xᵀ, (n, n)."""
    first: Tensor
    """Σ x, (n,)."""
    absolute: Tensor
    """Σ |x|, (n,)."""
    lag: Tensor
    """Σ x dᵀ, (n, width): d is how far the stream has fallen behind the teacher's."""
    inputs: list[Tensor] = field(default_factory=list[Tensor])
    """x itself batch by batch, padding included, so that the branch need not be computed again; empty when
    all of it would take more than `KEEP_BYTES`."""

    @classmethod
    def zeros(cls, size: int, width: int) -> Gram:
        return cls(0, torch.zeros(size, size), torch.zeros(size), torch.zeros(size), torch.zeros(size, width))

    def add(self, x: Tensor, lag: Tensor | None) -> None:
        """``x`` (tokens, n), ``lag`` (tokens, width)."""
        self.tokens += len(x)
        _add_square(self.second, x)
        self.first += x.sum(0)
        self.absolute += x.abs().sum(0)
        if lag is not None:
            self.lag += x.T @ lag


def _add_square(total: Tensor, x: Tensor) -> None:
    """``total`` (n, n) += xᵀx. Blocks below the diagonal are mirror images: 6 of 16 products are saved."""
    size = max(math.ceil(x.shape[1] / BLOCKS), LEAST_BLOCK)
    parts, places = x.split(size, dim=1), torch.arange(x.shape[1]).split(size)
    for i, left in enumerate(parts):
        for j, right in enumerate(parts[i:], start=i):
            product = left.T @ right
            rows, columns = (slice(int(at[0]), int(at[-1]) + 1) for at in (places[i], places[j]))
            total[rows, columns] += product
            if j > i:
                total[columns, rows] += product.T


@dataclass
class Stream:
    """All batches' hidden states at one depth, and how each layer is to be called."""

    hidden: list[Tensor]
    """(rows, length, width) each."""
    calls: list[list[Call]]
    """Per batch, per layer."""
    real: list[Tensor]
    """bool (rows, length) each: not padding."""
    between: list[dict[int, Tensor]] = field(default_factory=list[dict[int, Tensor]])
    """Per batch, what enters the stream beside the layers, in front of the layer of that number: features of
    pictures, where a family adds them at several depths."""

    @property
    def tokens(self) -> int:
        return sum(int(r.sum()) for r in self.real)

    def arrive(self, layer: int) -> None:
        """Take in what enters in front of a layer; once, before anything of the layer is looked at."""
        for i, added in enumerate(self.between):
            if layer in added:
                self.hidden[i] = self.hidden[i] + added[layer]

    def advance(self, branch: Branch, layer: int) -> None:
        """Add a residual branch to every batch."""
        for i, hidden in enumerate(self.hidden):
            self.hidden[i] = hidden + branch(hidden, self.calls[i][layer])

    def advance_from(self, inputs: Sequence[Tensor], write: Callable[[Tensor], Tensor]) -> None:
        """Add the end of a residual branch, ``write``, given what enters it."""
        for i, hidden in enumerate(self.hidden):
            self.hidden[i] = hidden + write(inputs[i])

    def copy(self) -> Stream:
        return Stream(list(self.hidden), self.calls, self.real, self.between)


class _Recorder(nn.Module):
    """Stands in for a decoder layer: passes the stream on and keeps what the layer was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None
        self.call: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **call: Any) -> Tensor:
        self.hidden, self.call = hidden_states, call
        return hidden_states


@torch.no_grad()
def enter(model: PreTrainedModel, batches: Sequence[Batch]) -> Stream:
    """The stream in front of the first layer.

    The model's own forward prepares masks and rotary tables while recorders stand in for its layers, so each
    family's rules (sliding windows, local rotary bases) are kept without being known here.
    """
    decoder = body(model)
    layers = decoder.layers
    recorders = [_Recorder() for _ in layers]
    stream = Stream([], [], [])
    decoder.layers = nn.ModuleList(recorders)
    try:
        for batch in batches:
            for recorder in recorders:
                recorder.hidden, recorder.call = None, {}
            states_of(model, batch)
            stream.hidden.append(cast(Tensor, recorders[0].hidden).float())
            stream.calls.append([r.call for r in recorders])
            stream.real.append(batch.real)
            stream.between.append(_additions(recorders))
    finally:
        decoder.layers = layers
    return stream


def _additions(recorders: Sequence[_Recorder]) -> dict[int, Tensor]:
    """What changed between recorders, which themselves change nothing."""
    found: dict[int, Tensor] = {}
    before = recorders[0].hidden
    for place, recorder in enumerate(recorders):
        if recorder.hidden is not None and before is not None and recorder.hidden is not before:
            found[place] = (recorder.hidden - before).float()
        before = recorder.hidden if recorder.hidden is not None else before
    return found


@contextmanager
def inputs_of(linear: nn.Linear) -> Generator[list[Tensor]]:
    """Whatever enters ``linear`` while the context is open, newest last."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])

    handle = linear.register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def observe(
    writer: nn.Linear, stream: Stream, branch: Branch, layer: int, ahead: Sequence[Tensor] | None = None
) -> Gram:
    """Statistics at the input of ``writer``, the projection that ends ``branch``.

    ``ahead``: the teacher's hidden states behind this branch, batch by batch; with them the lag is summed:
    d = teacher − (stream + branch), what this writer could make good beside its own pruning.
    """
    gram = Gram.zeros(writer.in_features, writer.out_features)
    kept = sum(h.shape[:-1].numel() for h in stream.hidden) * writer.in_features * 4 <= KEEP_BYTES
    with inputs_of(writer) as seen:
        for i, hidden in enumerate(stream.hidden):
            out = branch(hidden, stream.calls[i][layer])
            if not seen:  # a layer that this batch passes by
                kept = False
                continue
            real = stream.real[i]
            lag = (ahead[i] - hidden - out)[real] if ahead is not None else None
            x = seen.pop()
            gram.add(x[real].float(), lag)
            if kept:
                gram.inputs.append(x)
    if not kept:
        gram.inputs.clear()
    return gram


@torch.no_grad()
def compare(stream: Stream, teacher: Stream, read: Callable[[Tensor], Tensor], width: int) -> Gram:
    """Statistics of what readers see: x of the stream, and its lag d = teacher's x − x, (n, n)."""
    gram = Gram.zeros(width, width)
    for hidden, ahead, real in zip(stream.hidden, teacher.hidden, stream.real, strict=True):
        x = read(hidden[real]).float()
        gram.add(x, read(ahead[real]).float() - x)
    return gram


def attention_of(layer: Layer) -> Branch:
    return layer.attention


def feed_forward_of(layer: Layer) -> Branch:
    return layer.feed_forward
