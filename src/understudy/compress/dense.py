"""From a mixture of experts to an ordinary dense decoder: pool all experts' channels, keep the best, refit.

Layer by layer behind the layers already made dense: the mixture's own router says what each channel adds, the
best channels become one gated block that every token passes, and its down projection is refitted by least
squares to what the mixture would have added. Attention, norms and embeddings are the mixture's. It ignores
the other axes (prune) and healing (distill).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from understudy.compress.calibrate import Gram, Stream, attention_of, compare, enter, feed_forward_of
from understudy.compress.corpus import Batch
from understudy.compress.decoder import Layer, layers_of, mixture_of
from understudy.compress.families import Mixture
from understudy.compress.families.mixture import Expert
from understudy.compress.importance import refit, reread
from understudy.compress.pool import Activation, Choice, Kept, Routed, activations, keep, route
from understudy.compress.precision import Precision, matmul_precision
from understudy.compress.progress import Progress, silent
from understudy.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Pooling(NamedTuple):
    """How channels are chosen and made up for."""

    choice: Choice = "channels"
    refit: bool = True
    """Off: each channel keeps its own down column, scaled by the best single number."""
    ridge: float = 1e-2
    pull: float = 0.5
    """As `prune.Method.pull`."""
    reread: float = 0.5
    """As `prune.Method.reread`."""
    precision: Precision = "auto"


class Dense(NamedTuple):
    """A dense student of a mixture."""

    model: PreTrainedModel
    channels: list[list[int]]
    """Kept in each layer, numbered through its pool; empty lists for averages."""


@torch.no_grad()
def to_dense(
    model: PreTrainedModel,
    ffn: int,
    batches: Sequence[Batch],
    pooling: Pooling = Pooling(),  # noqa: B008 -- an immutable tuple
    progress: Progress = silent,
    given: Mapping[int, Sequence[int]] | None = None,
) -> Dense:
    """A dense decoder with ``ffn`` channels in each layer; ``model`` stays as it is.

    ``given`` channels of a layer are taken as they are. Raises ModelError when the model is no mixture and
    for calibration without a token.
    """
    mixture = mixture_of(model)
    if mixture is None:
        raise ModelError(f"{model.config.model_type!r} routes in no layer", expected="a mixture of experts")
    if not any(bool(batch.real.any()) for batch in batches):
        raise ModelError("no calibration text", expected="at least one window of tokens")
    student = hull(model, mixture, ffn)
    with matmul_precision(pooling.precision):
        sweep = _Sweep(mixture, pooling, enter(model, batches), ffn)
        channels: list[list[int]] = []
        pairs = list(zip(layers_of(model), layers_of(student), strict=True))
        for index, (old, new) in enumerate(pairs):
            channels.append(sweep.layer(index, old, new, (given or {}).get(index, ())))
            progress("dense", index + 1, len(pairs), f"layer {index + 1} of {len(pairs)}")
    return Dense(student, channels)


def hull(model: PreTrainedModel, mixture: Mixture, ffn: int) -> PreTrainedModel:
    """The dense student with everything of the mixture but its feed-forward blocks.

    A bias that only the dense architecture has is 0. Raises ModelError when another weight has no source.
    """
    from transformers import AutoModelForCausalLM

    dtype = next(model.parameters()).dtype
    student = AutoModelForCausalLM.from_config(mixture.dense_config(model, ffn), dtype=dtype).eval()
    known, inside = model.state_dict(), f".{mixture.ffn}."
    for name, weight in student.state_dict().items():
        if inside in name:
            continue
        if name in known and known[name].shape == weight.shape:
            weight.copy_(known[name])
        elif name.endswith(".bias"):
            weight.zero_()
        else:
            raise ModelError(
                f"the mixture has no weight for {name} {tuple(weight.shape)}",
                expected=f"a whole {mixture.name}",
            )
    student.generation_config = model.generation_config
    return student


class _Sweep:
    """One pass through the layers: the student's stream, and the mixture's own beside it."""

    def __init__(self, mixture: Mixture, pooling: Pooling, stream: Stream, ffn: int) -> None:
        self.mixture, self.pooling, self.stream, self.ffn = mixture, pooling, stream, ffn
        self.teacher = stream.copy() if pooling.pull or pooling.reread else None

    def layer(self, index: int, old: Layer, new: Layer, given: Sequence[int]) -> list[int]:
        self._attention(index, old, new)
        routed, turn = route(self.mixture, old, self.stream), self._turn(new.read_feed_forward)
        if self.teacher:
            self.teacher.advance(feed_forward_of(old), index)
        kept = self._keep(old, routed, given)
        turned = Expert(turn(kept.expert.gate), turn(kept.expert.up), kept.expert.down)
        down = self._down(turned, self.mixture.activation(old.module), kept.source, routed, new)
        self.mixture.write(new.module, widened(Expert(turned.gate, turned.up, down), self.ffn, index))
        self.stream.advance(feed_forward_of(new), index)
        return kept.indices

    def _attention(self, index: int, old: Layer, new: Layer) -> None:
        turn = self._turn(new.read_attention)
        for reader in new.attention_readers:
            reader.weight.copy_(turn(reader.weight))
        self.stream.advance(attention_of(new), index)
        if self.teacher:
            self.teacher.advance(attention_of(old), index)

    def _keep(self, old: Layer, routed: Routed, given: Sequence[int]) -> Kept:
        sparse = self.mixture.sparse(old.module)
        choice = self.pooling.choice if sparse else "channels"
        shared = sparse and bool(self.mixture.shared)
        return keep(choice, self.mixture.pool(old.module), routed, self.ffn, shared=shared, given=given)

    def _turn(self, read: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """What turns weights that read the stream here toward what the mixture's would have read."""
        if not self.teacher or not self.pooling.reread:
            return lambda weight: weight
        gram = compare(self.stream, self.teacher, read, self.stream.hidden[0].shape[-1])
        if not gram.lag.any():
            return lambda weight: weight
        ridge, pull = self.pooling.ridge, self.pooling.reread
        return lambda weight: reread(weight, gram, ridge=ridge, pull=pull)

    def _down(self, kept: Expert, act: Activation, source: Tensor, routed: Routed, new: Layer) -> Tensor:
        """The down projection whose outputs for all tokens are closest to the mixture's."""
        sums = self._sums(kept, act, source, routed, new)
        scale = sums.shared / sums.gram.second.diagonal().clamp(min=torch.finfo(torch.float32).tiny)
        start = kept.down * scale.to(kept.down.dtype)
        if not self.pooling.refit:
            return start
        sums.gram.lag -= sums.gram.second @ start.float().T
        everything = list(range(start.shape[1]))
        return refit(start, sums.gram, everything, ridge=self.pooling.ridge, pull=1.0)

    def _sums(self, kept: Expert, act: Activation, source: Tensor, routed: Routed, new: Layer) -> _Sums:
        """Second moments of the dense block's channels, and their products with what they should make."""
        gram = Gram.zeros(len(kept.gate), kept.down.shape[0])
        shared = torch.zeros(len(kept.gate))
        for i, (hidden, real) in enumerate(zip(self.stream.hidden, self.stream.real, strict=True)):
            x = activations(kept, act, new.read_feed_forward(hidden[real]))
            target = routed.output[i]
            if self.teacher and self.pooling.pull:
                behind = (self.teacher.hidden[i] - hidden)[real] - target
                target = target + self.pooling.pull * behind
            gram.add(x.float(), target.float())
            shared += (routed.weights[i] @ source * x.square()).sum(0).float()
        return _Sums(gram, shared)


class _Sums(NamedTuple):
    gram: Gram
    """Of the dense block's channels; its lag holds Σ a·targetᵀ."""
    shared: Tensor
    """Σ g·a² of each channel; over Σ a² it is the best single factor for its down column."""


def widened(expert: Expert, ffn: int, seed: int) -> Expert:
    """The block with channels added up to ``ffn`` that write nothing yet: reading weights drawn like the
    others', down columns of 0, so that healing can put them to use."""
    missing = ffn - len(expert.gate)
    if missing <= 0:
        return expert
    generator = torch.Generator().manual_seed(seed)

    def more(weight: Tensor) -> Tensor:
        noise = torch.randn(missing, weight.shape[1], generator=generator, dtype=weight.dtype)
        return torch.cat([weight, noise * weight.std()])

    down = torch.cat([expert.down, expert.down.new_zeros(len(expert.down), missing)], dim=1)
    return Expert(more(expert.gate), more(expert.up), down)
