"""Teachers: whoever says what the student should have said, as a `Signal` at the predicting positions.

`LiveTeacher` is an open model in this process; `RecordedTeacher` is a black box of which only the answers are
known; `targets.CachedTeacher` reads what was captured before. A loop that has one need not know which. It
ignores losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from understudy.compress.corpus import Batch, Row, collate
from understudy.compress.decoder import head_weight, may_share, softcap_of
from understudy.compress.matching import states_behind
from understudy.compress.signal import Dense, Head, Signal, Sparse

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from understudy.compress.processes import Processes

CACHE_BYTES = 512 << 20


class Teacher(Protocol):
    """Whoever gives a signal of packed rows."""

    @property
    def exact(self) -> bool:
        """Whether it gives whole distributions, of whatever text: any divergence, any temperature."""
        ...

    def signal(self, keys: Sequence[int], rows: Sequence[Row]) -> Signal:
        """What it says at the rows' predicting positions, in `corpus.collate` order.

        ``keys`` name the rows: the same key must always come with the same row.
        """
        ...

    def may_share(self, length: int) -> bool:
        """Whether rows of this length may share beginnings."""
        ...


class _States(NamedTuple):
    """Of one row: final states and those behind the matched layers, each (targets, width)."""

    final: Tensor
    layers: tuple[Tensor, ...]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.final, *self.layers))


class LiveTeacher:
    """An open model, its states remembered up to ``cache_bytes``; among several processes each holds a part.

    A head product turns states into exact logits, so what is kept of a row is its states, in bf16 (2·width
    bytes a token), and rows seen again in a later epoch cost no teacher forward. ``layers`` names decoder
    layers whose outputs are kept too, for matching.
    """

    exact = True

    def __init__(
        self, model: PreTrainedModel, cache_bytes: int = CACHE_BYTES, layers: Sequence[int] = ()
    ) -> None:
        self.model = model
        self.head = Head(head_weight(model).detach(), softcap_of(model))
        self.layers = tuple(layers)
        self._cache: dict[int, _States] = {}
        self._free = cache_bytes
        self._peers: Processes | None = None

    def join(self, peers: Processes) -> None:
        """Spread it over the processes as the student is; every one of them must then ask as often."""
        peers.shard(self.model)
        self._peers = peers
        self.head = Head(head_weight(self.model).detach(), self.head.softcap)

    def may_share(self, length: int) -> bool:
        return may_share(self.model, length)

    def signal(self, keys: Sequence[int], rows: Sequence[Row]) -> Dense:
        known = [self._cache.get(key) for key in keys]
        missing = [i for i, states in enumerate(known) if states is None]
        if self._forward(needed=bool(missing)):
            missing = missing or [0]
            fresh = self._fresh([rows[i] for i in missing])
            for i, states in zip(missing, fresh, strict=True):
                known[i] = states
                self._remember(keys[i], states)
        found = [states for states in known if states is not None]
        layers = zip(*(states.layers for states in found), strict=True)
        return Dense(
            torch.cat([s.final for s in found]), self.head, tuple(torch.cat(part) for part in layers)
        )

    def _forward(self, *, needed: bool) -> bool:
        """Whether to run the model; where it is spread that is a meeting, held if one process needs it."""
        if self._peers is None or self._peers.size == 1:
            return needed
        return self._peers.summed([float(needed)])[0] > 0

    def unremembered(self, batch: Batch) -> Dense:
        """The signal of a batch that will not come again."""
        final, layers = self._states(batch)
        return Dense(final, self.head, layers)

    def _fresh(self, rows: Sequence[Row]) -> list[_States]:
        final, layers = self._states(collate(rows).to(self.head.weight.device))
        sizes = [row.targets for row in rows]
        parts = zip(*(states.split(sizes) for states in (final, *layers)), strict=True)
        return [_States(first, tuple(others)) for first, *others in parts]

    @torch.no_grad()
    def _states(self, batch: Batch) -> _States:
        final, layers = states_behind(self.model, batch, self.layers)
        return _States(final.to(torch.bfloat16), tuple(states.to(torch.bfloat16) for states in layers))

    def _remember(self, key: int, states: _States) -> None:
        """First come, first kept: with shuffled epochs every row is as likely to return as any other."""
        if key not in self._cache and states.bytes <= self._free:
            self._cache[key] = _States(states.final.clone(), tuple(t.clone() for t in states.layers))
            self._free -= states.bytes


class RecordedTeacher:
    """A black box: its recorded answers are all it says, each one sample of what it would have said.

    Forward KL from one sample is cross-entropy on it: sequence-level distillation (arXiv 1606.07947 §3.2).
    """

    exact = False

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def may_share(self, length: int) -> bool:
        """It sees no rows at all."""
        del length
        return True

    def signal(self, keys: Sequence[int], rows: Sequence[Row]) -> Sparse:
        del keys
        batch = collate(rows)
        labels, said = batch.labels[batch.predicts], batch.answers[batch.predicts]
        nothing = torch.zeros(len(labels))
        return Sparse(labels[:, None], torch.ones(len(labels), 1), nothing, nothing, said, self.vocab)
