"""Hidden-state matching: the student's stream beside its teacher's at a few depths.

loss = Σ over tokens and depths of ‖P·h_student − h_teacher‖² / ‖h_teacher‖², with one projection P a depth,
learnt with the student and thrown away with the run. P begins as the identity on the dimensions both have. It
ignores which tokens count (distill) and what is matched at the head (losses).

Source: arXiv 1910.01108 §2 (DistilBERT's cosine loss), arXiv 1909.10351 §3 (TinyBERT's projections).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from understudy.compress.decoder import layers_of, states_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from understudy.compress.corpus import Batch


def depths(layers: int, count: int) -> list[int]:
    """``count`` decoder layers spread evenly, the last among them: what a student of any depth has too."""
    count = min(count, layers)
    return [round((i + 1) * layers / count) - 1 for i in range(count)]


def states_behind(
    model: PreTrainedModel, batch: Batch, layers: Sequence[int]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Final states, and the stream behind each of ``layers``, at predicting positions, (targets, width)."""
    kept: dict[int, Tensor] = {}
    modules = layers_of(model)

    def keep(index: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            kept[index] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [modules[index].module.register_forward_hook(keep(index)) for index in layers]
    try:
        final = states_of(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return final[batch.predicts], tuple(kept[index][batch.predicts] for index in layers)


class Matching(nn.Module):
    """The projections, one a depth, each (teacher width, student width)."""

    def __init__(self, depths: int, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.projections = nn.ParameterList(torch.eye(teacher_width, student_width) for _ in range(depths))

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Weighted sum over tokens, mean over depths; states (targets, width), ``weights`` (targets,)."""
        total = weights.new_zeros(())
        for projection, own, states in zip(self.projections, student, teacher, strict=True):
            wanted = states.to(own.dtype)
            lengths = wanted.square().sum(-1).clamp_min(torch.finfo(own.dtype).tiny)
            miss = (own @ cast(Tensor, projection).T - wanted).square().sum(-1)
            total = total + (weights * miss / lengths).sum()
        return total / max(len(self.projections), 1)
