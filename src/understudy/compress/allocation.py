"""How many FFN channels each layer keeps when layers may differ: the least predicted KL for the same total.

For each layer alone, the error its branch would have left after the refit is computed for several sizes from
one set of statistics, and the KL to the untouched model is measured with half of its channels; the KL of any
other size is taken to be in proportion to its error, and the layers' to add up. Dynamic programming spends
the budget. It ignores heads, width and layers.

Source: choosing blocks by single-block scores under a budget is Puzzle's (arXiv 2411.19146 §4).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from understudy.compress.calibrate import Gram, Stream, enter, feed_forward_of, observe
from understudy.compress.corpus import Batch
from understudy.compress.decoder import Layer, body, layers_of
from understudy.compress.depth import advance, first_batches
from understudy.compress.elimination import ranking
from understudy.compress.fidelity import divergence, side_of
from understudy.compress.importance import Gated, damage, refit
from understudy.compress.progress import Progress, silent
from understudy.compress.prune import cut_channels
from understudy.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

STEPS = 8
"""A layer's damage is computed at each eighth of its channels."""
Curve = list[float]
"""Predicted KL with 0, 1, … `STEPS` eighths of a layer's channels kept."""


@torch.no_grad()
def curves(model: PreTrainedModel, batches: Sequence[Batch], progress: Progress = silent) -> list[Curve]:
    """Each layer's curve, measured on the untouched model."""
    layers, stream, probe = layers_of(model), enter(model, batches), _Probe(model, batches)
    found: list[Curve] = []
    for index, layer in enumerate(layers):
        with layer.awake():
            found.append(_curve(layer, index, stream, probe))
        progress("shape", index + 1, len(layers))
    return found


def _curve(layer: Layer, index: int, stream: Stream, probe: _Probe) -> Curve:
    """One layer's curve; the stream is passed through it."""
    stream.arrive(index)
    stream.advance(layer.attention, index)
    gram = observe(layer.down, stream, feed_forward_of(layer), index)
    order = _order(layer, gram)
    errors = [1.0, *(damage(layer.down.weight, gram, kept) for kept in order[1:-1]), 0.0]
    half = probe.loss(index, gram, order[STEPS // 2])
    if gram.inputs and not layer.gated:
        stream.advance_from(gram.inputs, layer.write_feed_forward)
    else:
        stream.advance(feed_forward_of(layer), index)
    return [half * error / max(errors[STEPS // 2], 1e-12) for error in errors]


def _order(layer: Layer, gram: Gram) -> list[list[int]]:
    """The channels kept at each eighth; every set holds the smaller ones."""
    block = Gated(layer.gate.weight, layer.up.weight, layer.down.weight)
    order = ranking(block, gram)
    return [sorted(order[len(order) - len(order) * step // STEPS :]) for step in range(STEPS + 1)]


class _Probe:
    """The untouched model on a few tokens, layer by layer, and what its end becomes with one layer cut."""

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch]) -> None:
        self.model, self.layers, self.batches = model, layers_of(model), first_batches(batches)
        self.stream, self.at = enter(model, self.batches), 0
        whole = self.stream.copy()
        for index, layer in enumerate(self.layers):
            advance(whole, layer, index)
        self.teacher = side_of(model, self._ends(whole.hidden))

    def loss(self, index: int, gram: Gram, kept: list[int]) -> float:
        """KL with these channels of layer ``index``, refitted. Layers are asked for in ascending order."""
        for place in range(self.at, index):
            advance(self.stream, self.layers[place], place)
        self.at = index
        cut = Layer(copy.deepcopy(self.layers[index].module), self.layers[index].family)
        cut_channels(cut, kept, refit(cut.down.weight, gram, kept))
        end = self.stream.copy()
        for place, layer in enumerate([cut, *self.layers[index + 1 :]], start=index):
            advance(end, layer, place)
        return divergence(self.teacher, side_of(self.model, self._ends(end.hidden)))

    def _ends(self, hidden: Sequence[Tensor]) -> Tensor:
        norm = body(self.model).norm
        return torch.cat([norm(h)[b.predicts] for h, b in zip(hidden, self.batches, strict=True)])


def allocate(found: Sequence[Curve], ffn: int, total: int, step: int) -> list[int]:
    """Sizes of least predicted KL: multiples of ``step`` from ``step`` to ``ffn``, ``total`` at most in sum.

    Raises InputError when not even ``step`` channels a layer fit.
    """
    units, most = total // step, ffn // step
    if units < len(found):
        raise InputError(
            f"{total} FFN channels over {len(found)} layers", expected=f"at least {step} in each layer"
        )
    # best[u]: (predicted KL, sizes in units) of the layers so far with u units in all
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for curve in found:
        costs = {size: _between(curve, size / most) for size in range(1, most + 1)}
        following: dict[int, tuple[float, list[int]]] = {}
        for spent, (loss, sizes) in best.items():
            for size, cost in costs.items():
                now = spent + size
                if now <= units and (now not in following or loss + cost < following[now][0]):
                    following[now] = (loss + cost, [*sizes, size])
        best = following
    return [size * step for size in min(best.values())[1]]


def _between(curve: Curve, share: float) -> float:
    place = share * STEPS
    low = min(int(place), STEPS - 1)
    return curve[low] + (place - low) * (curve[low + 1] - curve[low])
