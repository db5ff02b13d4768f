"""How much the loss would change without each FFN channel, to first order: a peer's score, for comparison.

Source: LLM-Pruner (arXiv 2305.11627 §3.2, element-wise first order): Σ |w·∂L/∂w| over all of a channel's
weights, L the mean cross-entropy of the calibration text. It needs one backward pass and memory for all
gradients, which our own score does without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from understudy.compress.corpus import Batch
from understudy.compress.decoder import Layer, head_weight, layers_of, softcap_of
from understudy.compress.fidelity import final_hidden

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 8_192
"""Calibration tokens the gradient is taken over."""


def channel_sensitivity(model: PreTrainedModel, batches: Sequence[Batch]) -> list[Tensor]:
    """Scores (ffn,) of each decoder layer's channels."""
    seen = 0
    with torch.enable_grad():
        for batch in batches:
            _loss(model, batch).backward()
            seen += int(batch.real.sum())
            if seen >= TOKENS:
                break
    scores = [_of(layer) for layer in layers_of(model)]
    model.zero_grad(set_to_none=True)
    return scores


def _loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    logits = final_hidden(model, batch) @ head_weight(model).T
    cap = softcap_of(model)
    logits = torch.tanh(logits / cap) * cap if cap else logits
    return functional.cross_entropy(logits, batch.labels[batch.predicts])


def _of(layer: Layer) -> Tensor:
    rows = [_change(linear.weight).sum(1) for linear in (layer.gate, layer.up)]
    return rows[0] + rows[1] + _change(layer.down.weight).sum(0)


def _change(weight: Tensor) -> Tensor:
    return (weight * cast(Any, weight.grad)).abs().detach()
