"""The shape for a budget, by measurement: what each axis costs at each size, then the best plans whole.

One pass over the untouched model's layers gathers each one's statistics and carries a few probe tokens
through it as every trial would leave it, cut and refitted. First each axis is tried alone; the damages,
taken to add up, rank all shapes within the budget; the best few are then tried whole, on more tokens, and the
least KL wins.
Trials are cut side by side, no layer knowing what the others lost, so their KL is above what `prune` reaches:
it ranks. It ignores FFN sizes that differ by layer (allocation) and mixtures of experts.

Source: ranking combinations by the sum of single measurements is Puzzle's (arXiv 2411.19146 §4).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import torch
from torch import Tensor

from understudy.compress.calibrate import Gram, Stream, attention_of, enter, feed_forward_of, observe
from understudy.compress.corpus import Batch
from understudy.compress.decoder import Extras, Layer, Shape, body, extras_of, family_of, layers_of, shape_of
from understudy.compress.depth import advance, influence
from understudy.compress.elimination import ranking
from understudy.compress.fidelity import divergence, side_of
from understudy.compress.importance import (
    Gated,
    Heads,
    HeadSearch,
    Score,
    channel_scores,
    head_columns,
    projected,
    refit,
    top,
)
from understudy.compress.losses import Side
from understudy.compress.plan import MULTIPLE, Measured
from understudy.compress.progress import Progress, silent
from understudy.compress.prune import cut_channels, cut_heads
from understudy.compress.width import Narrowing, Refit, drawn, drawn_by
from understudy.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FINALISTS = 3
"""Mixed shapes tried whole."""
POINTS = 2
"""Sizes at which an axis is measured alone."""
LEAST_SHARE = 0.25
"""Smallest share of an axis that is thought of."""
PROMISE = 4.0
"""A width is first tried sliced, for its refit is dear: none has taken away more than three quarters."""
AXES = ("ffn", "heads", "kv_heads", "layers", "hidden")
Rule = Callable[[Gated], Tensor]
"""A score of FFN channels, (n,), by the weights alone."""
Cost = Callable[[Shape], float]
"""What a budget counts: parameters, or seconds a token."""


class Budget(NamedTuple):
    """What a shape may cost at most."""

    cost: Cost
    most: float
    unit: str
    """For messages: ``most`` in words."""


class Sample(NamedTuple):
    """Texts to measure with."""

    text: Sequence[Batch]
    """For statistics."""
    probe: Sequence[Batch]
    """For KL."""


class Search:
    """One model's shapes. What an axis costs alone is measured once for all budgets that are much alike.

    ``start``: the largest shape allowed; an axis on which it is the teacher's is free. Axes are measured on
    ``few`` tokens, the best plans on ``many``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        start: Shape,
        few: Sample,
        many: Sample,
        progress: Progress = silent,
    ) -> None:
        self.axes = Tryout(model, few, progress)
        self.plans = Tryout(model, many, progress, self.axes.rankings)
        self.start, self.teacher = start, self.axes.shape
        self.singles: list[Measured] = []

    def cheapest(self, budget: Budget) -> list[Measured]:
        """Shapes within the budget and single axes, as measured; the first is the one to take.

        Raises InputError when nothing fits.
        """
        teacher = self.teacher
        free = [axis for axis in AXES if getattr(self.start, axis) == getattr(teacher, axis)]
        ladder = _Ladder(teacher, self.start, self.axes.extras, free, budget)
        shapes = ladder.fitting()  # nothing is measured when nothing fits
        self._measure_axes(ladder)
        ranked = sorted(
            shapes, key=lambda shape: (_predicted(teacher, shape, self.singles), -budget.cost(shape))
        )
        alone = [self._alone(axis, shapes, budget) for axis in free]
        best = dict.fromkeys(shape for shape in [*ranked[:FINALISTS], *alone] if shape)
        finalists = self.plans.measure([Trial("plan", shape) for shape in best])
        return [*sorted(finalists, key=lambda found: found.kl), *self.singles]

    def _measure_axes(self, ladder: _Ladder) -> None:
        """Each alone; for a later budget those that it takes more than twice as far as is known."""
        trials = [trial for trial in ladder.singles() if self._share(trial) > 2 * self._known(trial.axis)]
        self.singles += self.axes.measure(trials)
        tried = {found.shape for found in self.singles if not found.sliced}
        widths = ladder.promising_widths(self.singles)
        self.singles += self.axes.measure([trial for trial in widths if trial.shape not in tried])

    def _known(self, axis: str) -> float:
        """The largest share of the axis without which the model was measured."""
        return max((self._share(found) for found in self.singles if found.axis == axis), default=0.0)

    def _share(self, found: Trial | Measured) -> float:
        return _removed(self.teacher, found.shape, found.axis)

    def _alone(self, axis: str, shapes: Sequence[Shape], budget: Budget) -> Shape | None:
        """The largest shape in which this axis pays for everything. Sums of single costs flatter a mix."""
        if not any(found.axis == axis and not found.sliced for found in self.singles):
            return None
        cut = [s for s in shapes if {a for a in AXES if _removed(self.teacher, s, a) > 0} == {axis}]
        return max(cut, key=budget.cost, default=None)


class Trial(NamedTuple):
    """A shape to measure."""

    axis: str
    """The only axis on which it differs from the teacher, or ``plan``."""
    shape: Shape
    sliced: bool = False
    """Cut without a refit."""
    score: Score | Rule = "obs"
    """Of FFN channels."""


class _Ladder:
    """Which shapes there are."""

    def __init__(self, teacher: Shape, start: Shape, extras: Extras, free: list[str], budget: Budget) -> None:
        self.teacher, self.start, self.extras = teacher, start, extras
        self.free, self.budget = free, budget

    def sizes(self, axis: str) -> list[int]:
        """From the teacher's down; an axis that is not free has one."""
        most = getattr(self.start, axis)
        if axis not in self.free:
            return [most]
        step = self._step(axis)
        least = max(step, math.ceil(LEAST_SHARE * most))
        return [most, *(size for size in range(most - 1, least - 1, -1) if size % step == 0)]

    def _step(self, axis: str) -> int:
        if axis == "ffn":
            return min(MULTIPLE, self.start.ffn)
        if axis == "hidden":
            heads = self.start.heads if self.extras.heads_divide_width else 1
            steps = (math.lcm(multiple, heads) for multiple in (MULTIPLE, 32, 8, 1))
            return next((step for step in steps if 8 * step <= self.start.hidden), self.start.hidden)
        return self.start.kv_heads if axis == "heads" else 1

    def shapes(self) -> Iterator[Shape]:
        """All of them but for the FFN's size, which follows from the budget."""
        axes = [axis for axis in AXES if axis not in ("ffn", "heads")]
        for sizes in itertools.product(*(self.sizes(axis) for axis in axes)):
            for shape in self._with_heads(dict(zip(axes, sizes, strict=True))):
                if not self.extras.heads_divide_width or shape.hidden % shape.heads == 0:
                    yield shape

    def _with_heads(self, sizes: dict[str, int]) -> Iterator[Shape]:
        """As many query heads for each KV head; a number that was named stays."""
        kv_heads, least = sizes["kv_heads"], LEAST_SHARE * self.start.heads
        free = [group * kv_heads for group in range(self.teacher.group, 0, -1)]
        for heads in free if "heads" in self.free else [self.start.heads]:
            if heads in free and least <= heads <= self.start.heads:
                yield msgspec.structs.replace(self.start, heads=heads, **sizes)

    def fitting(self) -> list[Shape]:
        """Every shape within the budget, with as many channels as it allows. Raises InputError for none."""
        found = [largest for shape in self.shapes() if (largest := self._largest(shape)) is not None]
        if not found:
            least = min(self.budget.cost(self._smallest(shape)) for shape in self.shapes())
            raise InputError(
                f"{self.budget.unit} cannot be reached: the smallest shape costs "
                f"{least / self.budget.most:.2f} times as much",
                expected=f"a budget that keeps at least {LEAST_SHARE:.0%} of each axis",
                next_step="ask for more, or name sizes yourself: --ffn, --heads, --layers, --hidden",
            )
        return found

    def _smallest(self, shape: Shape) -> Shape:
        return msgspec.structs.replace(shape, ffn=self.sizes("ffn")[-1])

    def _largest(self, shape: Shape) -> Shape | None:
        """Sizes are tried by halving: the cost rises with them."""
        sizes = self.sizes("ffn")[::-1]
        shapes = [msgspec.structs.replace(shape, ffn=size) for size in sizes]
        low, high = 0, len(shapes)
        while low < high:
            middle = (low + high) // 2
            low, high = (
                (middle + 1, high) if self.budget.cost(shapes[middle]) <= self.budget.most else (low, middle)
            )
        return shapes[low - 1] if low else None

    def singles(self) -> list[Trial]:
        """Each free axis alone, at sizes up to where it would pay the budget by itself; widths sliced."""
        return [
            Trial(axis, self._alone(axis, size), sliced=axis == "hidden")
            for axis in self.free
            for size in self._points(axis)
        ]

    def promising_widths(self, measured: Sequence[Measured]) -> list[Trial]:
        """Widths to try with a refit: those that could still come cheaper than the dearest FFN needed."""
        rates = [_rate(self.teacher, found) for found in measured if found.axis == "ffn"]
        widths = [found for found in measured if found.axis == "hidden"]
        worth = [w for w in widths if not rates or _rate(self.teacher, w) < PROMISE * max(rates)]
        return [Trial("hidden", w.shape) for w in worth]

    def _alone(self, axis: str, size: int) -> Shape:
        shape = msgspec.structs.replace(self.teacher, **{axis: size})
        if axis == "kv_heads":
            shape = msgspec.structs.replace(shape, heads=size * self.teacher.group)
        return shape

    def _points(self, axis: str) -> list[int]:
        sizes = [size for size in self.sizes(axis)[1:] if self._possible(self._alone(axis, size))]
        within = [s for s in sizes if self.budget.cost(self._alone(axis, s)) > self.budget.most]
        sizes = sizes[: len(within) + 1]
        count = min(len(sizes), POINTS if axis == "ffn" else 2 if axis in ("heads", "layers") else 1)
        # the last pays the whole budget, the first is a fair share of it; other axes only ever pay a part
        last = len(sizes) if axis == "ffn" else max(1, math.ceil(len(sizes) / 3))
        return sorted(
            {sizes[math.ceil(last * (k + 1) / count) - 1] for k in range(count)} if count else set()
        )

    def _possible(self, shape: Shape) -> bool:
        return not self.extras.heads_divide_width or shape.hidden % shape.heads == 0


def _rate(teacher: Shape, found: Measured) -> float:
    """KL for each share of the axis that is gone."""
    return found.kl / max(1 - getattr(found.shape, found.axis) / getattr(teacher, found.axis), 1e-9)


def _predicted(teacher: Shape, shape: Shape, singles: Sequence[Measured]) -> float:
    """The sum of what its axes cost alone; an axis that nothing is known of costs infinitely much."""
    return sum(_alone(teacher, shape, axis, singles) for axis in AXES)


def _alone(teacher: Shape, shape: Shape, axis: str, singles: Sequence[Measured]) -> float:
    """Log KL is a straight line in the log of the share removed, between measurements and beyond; KL is in
    proportion to that share where there is one point."""
    removed = _removed(teacher, shape, axis)
    if removed <= 0:
        return 0.0
    known = {_removed(teacher, m.shape, axis): m.kl for m in singles if m.axis == axis and not m.sliced}
    points = sorted((share, max(kl, 1e-9)) for share, kl in known.items())
    if not points:
        return math.inf
    if len(points) == 1:
        return points[0][1] * removed / points[0][0]
    after = next((i for i, (share, _) in enumerate(points) if share >= removed), len(points) - 1)
    (low, kl_low), (high, kl_high) = points[max(after, 1) - 1], points[max(after, 1)]
    slope = max(math.log(kl_high / kl_low) / math.log(high / low), 1.0)
    return kl_high * (removed / high) ** slope


def _removed(teacher: Shape, shape: Shape, axis: str) -> float:
    """Share of an axis that is gone; of query heads, those beyond what goes with whole groups."""
    if axis == "heads":
        return 1 - shape.group / teacher.group
    return 1 - getattr(shape, axis) / getattr(teacher, axis)


@dataclass
class _Run:
    """A trial under way: its probe tokens so far."""

    trial: Trial
    stream: Stream
    dropped: frozenset[int] = frozenset()
    narrowing: Narrowing | None = None
    keep: list[int] = field(default_factory=list[int])


class Tryout:
    """The untouched model, its statistics, and the probe's true end."""

    def __init__(
        self,
        model: PreTrainedModel,
        sample: Sample,
        progress: Progress = silent,
        rankings: dict[int, list[int]] | None = None,
    ) -> None:
        self.model, self.progress = model, progress
        self.text, self.probe = sample
        self.shape, self.extras = shape_of(model), extras_of(model)
        self.influence: list[float] = []
        self.width = torch.zeros(self.shape.hidden)
        self.teacher = self._look()
        self.rankings: dict[int, list[int]] = {} if rankings is None else rankings
        """By layer: in which order its channels leave. It takes the longest, so it is found once."""

    @torch.no_grad()
    def _look(self) -> Side:
        """The teacher's own pass over the probe: its end, each layer's influence, each dimension's weight."""
        stream = enter(self.model, self.probe)
        for index, layer in enumerate(layers_of(self.model)):
            before = stream.copy()
            with layer.awake():
                self.width += drawn_by(layer, index, stream)
            self.influence.append(influence(before, stream))
        self.width += drawn(body(self.model).norm, (family_of(self.model).head(self.model).weight,), stream)
        return side_of(self.model, self._ends(stream))

    def _ends(self, stream: Stream) -> Tensor:
        norm = body(self.model).norm
        return torch.cat([norm(h)[b.predicts] for h, b in zip(stream.hidden, self.probe, strict=True)])

    @torch.no_grad()
    def measure(self, trials: Sequence[Trial]) -> list[Measured]:
        """KL of each trial, all in one pass."""
        if not trials:
            return []
        text, layers = enter(self.model, self.text), layers_of(self.model)
        runs = [self._start(trial) for trial in trials]
        for index, layer in enumerate(layers):
            text.arrive(index)
            with layer.awake():
                cutter = _Cutter(layer, text, index, self.shape, self.rankings)
                for run in runs:
                    self._step(run, cutter, index)
                cutter.go_on()
            self.progress("shape", index + 1, len(layers), f"{len(trials)} shapes")
        return [self._found(run) for run in runs]

    def _start(self, trial: Trial) -> _Run:
        run = _Run(trial, enter(self.model, self.probe), self._dropped(trial.shape.layers))
        if trial.shape.hidden < self.shape.hidden:
            run.keep = top(self.width, trial.shape.hidden)
            text = [] if trial.sliced else self.text  # a slice needs no statistics
            mixed = enter(self.model, [*text, *self.probe])
            mixed.real[len(text) :] = [torch.zeros_like(b.real) for b in self.probe]
            offset = family_of(self.model).gain_offset
            run.narrowing = Narrowing(run.keep, Refit(not trial.sliced, 1e-2, 0.5), mixed, offset)
        return run

    def _dropped(self, layers: int) -> frozenset[int]:
        order = sorted(range(self.shape.layers), key=lambda index: self.influence[index])
        return frozenset(order[: self.shape.layers - layers])

    def _step(self, run: _Run, cutter: _Cutter, index: int) -> None:
        if index in run.dropped:
            return
        layer = cutter.cut(run.trial)
        if run.narrowing is None:
            advance(run.stream, layer, index)
        else:
            run.narrowing.layer(index, layer)

    def _found(self, run: _Run) -> Measured:
        if run.narrowing is None:
            end = side_of(self.model, self._ends(run.stream))
        else:
            none = [] if run.trial.sliced else [torch.zeros_like(b.real) for b in self.text]
            end = run.narrowing.end(self.model, [*none, *(b.predicts for b in self.probe)])
        trial = run.trial
        return Measured(
            axis=trial.axis, shape=trial.shape, kl=divergence(self.teacher, end), sliced=trial.sliced
        )


class _Cutter:
    """One untouched layer, cut to whatever sizes are asked; what two trials share is computed once."""

    def __init__(
        self, layer: Layer, text: Stream, index: int, shape: Shape, rankings: dict[int, list[int]]
    ) -> None:
        self.layer, self.text, self.index, self.shape = layer, text, index, shape
        self.rankings = rankings
        self.mixed = observe(layer.o, text, attention_of(layer), index)
        self._pass(self.mixed, layer.write_attention, attention_of(layer))
        self.channels = observe(layer.down, text, feed_forward_of(layer), index)
        self._outs: dict[tuple[int, int], tuple[Heads, Tensor]] = {}
        self._downs: dict[object, tuple[list[int], Tensor]] = {}

    def go_on(self) -> None:
        """Pass the text through the layer as it was."""
        self._pass(self.channels, self.layer.write_feed_forward, feed_forward_of(self.layer))

    def _pass(self, gram: Gram, write: Callable[[Tensor], Tensor], branch: Callable[..., Tensor]) -> None:
        if gram.inputs:
            self.text.advance_from(gram.inputs, write)
        else:
            self.text.advance(branch, self.index)

    def cut(self, trial: Trial) -> Layer:
        """A copy of the layer with the trial's heads and channels."""
        shape, refitted = trial.shape, not trial.sliced or trial.axis == "hidden"
        cut = Layer(copy.deepcopy(self.layer.module), self.layer.family)
        if (shape.heads, shape.kv_heads) != (self.shape.heads, self.shape.kv_heads):
            heads, out = self._heads(shape)
            cut_heads(cut, heads, self.shape.head_dim, out)
        if shape.ffn != self.shape.ffn:
            cut_channels(cut, *self._ffn(shape.ffn, trial.score, refitted=refitted))
        return cut

    def _heads(self, shape: Shape) -> tuple[Heads, Tensor]:
        key, weight = (shape.heads, shape.kv_heads), self.layer.o.weight
        if key not in self._outs:
            heads = self._subsets.choose(*key)
            columns = head_columns(heads.query, self.shape.head_dim)
            self._outs[key] = heads, refit(weight, self.mixed, columns)
        return self._outs[key]

    @cached_property
    def _subsets(self) -> HeadSearch:
        return HeadSearch(self.layer.o.weight, self.mixed, self.shape.heads, self.shape.kv_heads)

    @cached_property
    def _product(self) -> Tensor:
        return projected(self.layer.down.weight, self.channels)

    def _ffn(self, size: int, score: Score | Rule, *, refitted: bool) -> tuple[list[int], Tensor]:
        key = size, score, refitted
        if key not in self._downs:
            block = Gated(self.layer.gate.weight, self.layer.up.weight, self.layer.down.weight)
            kept = self._kept(block, size, score)
            down = (
                refit(block.down, self.channels, kept, product=self._product)
                if refitted
                else block.down[:, kept]
            )
            self._downs[key] = kept, down
        return self._downs[key]

    def _kept(self, block: Gated, size: int, score: Score | Rule) -> list[int]:
        if callable(score):
            return top(score(block), size)
        if score == "obs":
            return sorted(self._leaving[self.shape.ffn - size :])
        return top(channel_scores(score, block, self.channels), size)

    @property
    def _leaving(self) -> list[int]:
        """All channels, the one that is missed least first."""
        if self.index not in self.rankings:
            block = Gated(self.layer.gate.weight, self.layer.up.weight, self.layer.down.weight)
            self.rankings[self.index] = ranking(block, self.channels)
        return self.rankings[self.index]
