"""The teacher's side of distillation: its final hidden states at the predicting positions.

A head product turns them into exact logits, so what is kept of a row of text is its hidden states, in bf16
(2·width bytes a token), and rows seen again in a later epoch cost no teacher forward. It ignores losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from understudy.compress.corpus import Row, collate
from understudy.compress.decoder import head_weight, softcap_of
from understudy.compress.fidelity import final_hidden
from understudy.compress.losses import Head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CACHE_BYTES = 512 << 20


class LiveTeacher:
    """An open model in this process, its states remembered up to ``cache_bytes``."""

    def __init__(self, model: PreTrainedModel, cache_bytes: int = CACHE_BYTES) -> None:
        self.model = model
        self.head = Head(head_weight(model).detach(), softcap_of(model))
        self._cache: dict[int, Tensor] = {}
        self._free = cache_bytes

    @torch.no_grad()
    def hidden(self, keys: Sequence[int], rows: Sequence[Row]) -> Tensor:
        """States at the rows' predicting positions, (targets, width), bf16, in `corpus.collate` order.

        ``keys`` name the rows: the same key must always come with the same row.
        """
        known = [self._cache.get(key) for key in keys]
        missing = [i for i, states in enumerate(known) if states is None]
        if missing:
            fresh = final_hidden(self.model, collate([rows[i] for i in missing])).to(torch.bfloat16)
            parts = fresh.split([rows[i].targets for i in missing])
            for i, states in zip(missing, parts, strict=True):
                known[i] = states
                self._remember(keys[i], states)
        return torch.cat([states for states in known if states is not None])

    def _remember(self, key: int, states: Tensor) -> None:
        """First come, first kept: with shuffled epochs every row is as likely to return as any other."""
        size = states.numel() * states.element_size()
        if size <= self._free:
            self._cache[key] = states.clone()
            self._free -= size
