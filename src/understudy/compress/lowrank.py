"""Healing with low-rank corrections alone: W + s·B·A, for machines that cannot hold an optimiser's states.

Every projection of the decoder's layers gets A (rank, in) at random and B (out, rank) of zeros, so the
student begins as it was; only these are trained, and at the end they are added into W, so what is saved is a
plain checkpoint. It ignores which tokens are learnt (distill).

Source: arXiv 2106.09685 §4.1 (LoRA).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from understudy.compress.decoder import bias_of, layers_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCALE = 2.0
"""s; the rate that suits a rank then suits others."""


class Corrected(nn.Module):
    """A frozen projection and its correction; stands where the projection stood."""

    def __init__(self, plain: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.plain = plain.requires_grad_(False)
        weight = plain.weight
        drawn = torch.randn(rank, plain.in_features, generator=generator) / math.sqrt(plain.in_features)
        # what a per-layer size filled up with zeros must stay zero: no correction reads it
        drawn[:, ~weight.detach().ne(0).any(0).to(drawn.device)] = 0
        self.a = nn.Parameter(drawn.to(weight))
        self.b = nn.Parameter(weight.new_zeros(plain.out_features, rank))

    @property
    def weight(self) -> Tensor:
        """For code that looks at a projection's form."""
        return self.plain.weight

    @property
    def bias(self) -> Tensor | None:
        return bias_of(self.plain)

    @property
    def in_features(self) -> int:
        return self.plain.in_features

    @property
    def out_features(self) -> int:
        return self.plain.out_features

    def forward(self, states: Tensor) -> Tensor:
        return self.plain(states) + SCALE * ((states @ self.a.T) @ self.b.T)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The projection with the correction added into it."""
        self.plain.weight.addmm_(self.b, self.a, alpha=SCALE)
        return self.plain


def correct(model: PreTrainedModel, rank: int, seed: int) -> None:
    """Freeze the model and give every projection of its layers a correction to train, in place."""
    cast(nn.Module, model).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parent, name, child in list(_projections(model)):
        setattr(parent, name, Corrected(child, rank, generator))


def merge(model: PreTrainedModel) -> None:
    """Add every correction into its projection and put the projections back."""
    for layer in layers_of(model):
        for parent in list(layer.module.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, Corrected):
                    setattr(parent, name, child.merged())


def _projections(model: PreTrainedModel) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for layer in layers_of(model):
        for parent in layer.module.modules():
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear):
                    yield parent, name, child
