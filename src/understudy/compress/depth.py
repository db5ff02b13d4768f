"""Which decoder layers to drop: one at a time, the one whose absence moves the predictions least.

Each round shortlists the layers that change the stream's direction least and measures, for each, the KL to
the untouched model on a few calibration tokens with that layer skipped too. It ignores making up for the
loss: the sweep of `prune` refits the layers that stay.

Source: block influence is ShortGPT's (arXiv 2403.03853 §3.1); measuring the output in its stead follows
SLEB (arXiv 2402.09025).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from understudy.compress.calibrate import Stream, enter
from understudy.compress.corpus import Batch
from understudy.compress.decoder import Layer, body, layers_of
from understudy.compress.fidelity import divergence, side_of
from understudy.compress.progress import Progress, silent
from understudy.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHORTLIST = 8
"""Layers measured in each round."""
MEASURED_TOKENS = 2048
"""Calibration tokens, padding included, that the choice is measured on."""


@torch.no_grad()
def choose_layers(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    count: int,
    progress: Progress = silent,
    *,
    crossing: int = 0,
) -> list[int]:
    """The ``count`` layers to keep, ascending, ``crossing`` of them such as read pictures.

    Raises ModelError where some of these are to go and no text has a picture.
    """
    layers = layers_of(model)
    total, reading = len(layers) - count, [i for i, layer in enumerate(layers) if layer.gated]
    if not total:
        return list(range(count))
    blind = len(reading) - crossing
    if blind:
        batches = [batch for batch in batches if any(batch.media)]
    if not batches:
        raise ModelError(
            "no picture among the calibration texts, so layers that read pictures cannot be compared",
            expected="chats with pictures",
            next_step="give --calibration a file with image_url parts",
        )
    search = _Search(model, first_batches(batches))
    left = {True: blind, False: total - blind}
    for done in range(total):
        progress("layers", done, total)
        kinds = {kind for kind, number in left.items() if number}
        left[search.drop_one([i for i in search.kept if (i in reading) in kinds]) in reading] -= 1
    progress("layers", total, total)
    return search.kept


def first_batches(batches: Sequence[Batch]) -> list[Batch]:
    """The first batches, cut so that about `MEASURED_TOKENS` remain."""
    chosen: list[Batch] = []
    room = MEASURED_TOKENS
    for batch in batches:
        rows = min(len(batch.tokens), max(1, room // batch.tokens.shape[1]))
        if room <= 0:
            break
        chosen.append(batch.first(rows))
        room -= rows * batch.tokens.shape[1]
    return chosen


class _Search:
    """The layers still there, and the stream in front of each of them."""

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch]) -> None:
        self.model, self.layers, self.batches = model, layers_of(model), batches
        self.start = enter(model, batches)
        self.kept = list(range(len(self.layers)))
        self.teacher = side_of(model, self._ends(self._states()[-1]))

    def drop_one(self, among: Sequence[int]) -> int:
        """Drop the best of these layers, and say which it was."""
        states = self._states()
        moved = [influence(a, b) for a, b in itertools.pairwise(states)]
        places = [place for place, index in enumerate(self.kept) if index in among]
        order = sorted(places, key=lambda place: moved[place])[:SHORTLIST]
        return self.kept.pop(min(order, key=lambda place: self._loss(place, states[place])))

    def _states(self) -> list[Stream]:
        """The stream in front of each kept layer and behind the last."""
        states = [self.start.copy()]
        for index in self.kept:
            states.append(self._through(states[-1].copy(), [index]))
        return states

    def _through(self, stream: Stream, indices: Sequence[int]) -> Stream:
        for index in indices:
            advance(stream, self.layers[index], index)
        return stream

    def _loss(self, place: int, state: Stream) -> float:
        end = self._through(state.copy(), self.kept[place + 1 :])
        return divergence(self.teacher, side_of(self.model, self._ends(end)))

    def _ends(self, stream: Stream) -> Tensor:
        norm = body(self.model).norm
        return torch.cat([norm(h)[b.predicts] for h, b in zip(stream.hidden, self.batches, strict=True)])


def advance(stream: Stream, layer: Layer, index: int) -> None:
    """Pass the stream through a whole layer."""
    with layer.awake():
        stream.arrive(index)
        stream.advance(layer.attention, index)
        stream.advance(layer.feed_forward, index)


def influence(before: Stream, after: Stream) -> float:
    """1 − the mean cosine between what enters a layer and what leaves it."""
    pairs = zip(before.hidden, after.hidden, before.real, strict=True)
    cosines = [torch.cosine_similarity(a[real], b[real], dim=-1) for a, b, real in pairs]
    return 1 - float(torch.cat(cosines).mean())
