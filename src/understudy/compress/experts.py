"""Fewer experts: a mixture that stays one, the experts that matter least taken out layer by layer.

Each layer is judged behind the layers already cut, by REAP's score or by routed mass; the router loses the
rows of the experts that go and shares their tokens out among the others by itself. Weights that stay are not
touched. It ignores the dense student (dense).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from understudy.compress.calibrate import attention_of, enter, feed_forward_of
from understudy.compress.corpus import Batch
from understudy.compress.decoder import Layer, extras_of, layers_of, mixture_of
from understudy.compress.families import Mixture
from understudy.compress.importance import top
from understudy.compress.pool import Choice, expert_scores, route
from understudy.compress.progress import Progress, silent
from understudy.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def keep_experts(
    model: PreTrainedModel,
    count: int,
    batches: Sequence[Batch],
    choice: Choice = "reap",
    progress: Progress = silent,
    given: Sequence[Sequence[int]] = (),
) -> list[list[int]]:
    """Leave ``count`` routed experts in each routing layer of ``model``, in place; returns those kept.

    ``given`` ones are taken as they are; a layer that doesn't route keeps none and loses none. The router's
    groups stay equal. Raises ModelError when the model is no mixture.
    """
    mixture, mixed = mixture_of(model), extras_of(model).mixed
    if mixture is None or mixed is None:
        raise ModelError(f"{model.config.model_type!r} routes in no layer", expected="a mixture of experts")
    stream, kept, layers = enter(model, batches), list[list[int]](), layers_of(model)
    for index, layer in enumerate(layers):
        stream.advance(attention_of(layer), index)
        chosen: list[int] = []
        if mixture.sparse(layer.module):
            scores = torch.tensor(expert_scores(choice, route(mixture, layer, stream)), dtype=torch.float64)
            routed = scores[: len(scores) - bool(mixture.shared)]
            chosen = list(given[index]) if given else _best(routed, count, mixed.groups)
            cut_experts(mixture, layer, chosen)
        kept.append(chosen)
        stream.advance(feed_forward_of(layer), index)
        progress("experts", index + 1, len(layers), f"layer {index + 1} of {len(layers)}")
    setattr(mixture.config(model), mixture.count_key, count)
    return kept


def _best(scores: torch.Tensor, count: int, groups: int) -> list[int]:
    """As many experts of each group."""
    size = len(scores) // groups
    return [
        g * size + e for g in range(groups) for e in top(scores[g * size : (g + 1) * size], count // groups)
    ]


def cut_experts(mixture: Mixture, layer: Layer, keep: Sequence[int]) -> None:
    """Take all other experts out of a routing layer."""
    at = list(keep)
    stacked = cast(Any, layer.module.get_submodule(mixture.experts))
    router = cast(Any, layer.module.get_submodule(mixture.router))
    for holder, name in ((stacked, "gate_up_proj"), (stacked, "down_proj"), (router, "weight")):
        old = cast("nn.Parameter", getattr(holder, name))
        setattr(holder, name, nn.Parameter(old.detach()[at].clone(), requires_grad=old.requires_grad))
    if hasattr(router, "e_score_correction_bias"):
        router.e_score_correction_bias = router.e_score_correction_bias[at].clone()
    stacked.num_experts = router.num_experts = len(at)
