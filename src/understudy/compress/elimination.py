"""In which order FFN channels leave when each loss is made up for by the channels that stay.

A score looks at a channel alone; here the least loss *after the refit* decides, and what a channel leaves
behind weighs on the next choice. One factorisation serves all sizes. It ignores whole heads (`HeadSearch`).

Source: Optimal Brain Surgeon (Hassibi & Stork 1993), columns removed in blocks as in ZipLM
(arXiv 2302.04089 §3.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from understudy.compress.calibrate import Gram
from understudy.compress.importance import Gated, Score, channel_scores, damping, inverted, top

ROUNDS = 48
"""All channels would leave in so many rounds; within one, losses are taken to add up."""
LARGEST = 6144
"""Channels beyond which three float64 squares of them are too much memory, and scores decide."""


def choose_channels(
    score: Score,
    block: Gated,
    gram: Gram,
    count: int,
    *,
    taylor: Tensor | None = None,
    ridge: float = 1e-2,
    pull: float = 0.0,
) -> list[int]:
    """The channels to keep, ascending: by elimination for ``obs`` up to `LARGEST`, by score otherwise."""
    size = block.down.shape[1]
    if score != "obs" or size > LARGEST:
        return top(channel_scores(score, block, gram, taylor), count)
    gone = set(leaving(block.down, gram, size - count, ridge=ridge, pull=pull))
    return [channel for channel in range(size) if channel not in gone]


def ranking(block: Gated, gram: Gram) -> list[int]:
    """All channels, the one that is missed least first: what stays at one size stays at any larger one."""
    size = block.down.shape[1]
    if size > LARGEST:
        return channel_scores("obs", block, gram).sort(stable=True).indices.tolist()
    return leaving(block.down, gram, size)


def leaving(weight: Tensor, gram: Gram, count: int, *, ridge: float = 1e-2, pull: float = 0.0) -> list[int]:
    """The first ``count`` columns of W (width, n) to leave, in order.

    With P = (H + Λ)⁻¹, leaving j costs ‖W_:j‖² / P_jj once the others are refitted (`importance.refit`: the
    same ridge Λ and pull); then W −= W_:j P_j: / P_jj and P −= P_:j P_j: / P_jj. float64 inside.
    """
    second = gram.second.double()
    second.diagonal().add_(damping(second.diagonal(), ridge))
    inverse = inverted(second)
    del second
    rest = weight.double()
    if pull:
        rest = rest + pull * (inverse @ gram.lag.double()).T
    order: list[int] = []
    there = torch.ones(len(inverse), dtype=torch.bool)
    size = max(1, len(inverse) // ROUNDS)
    while len(order) < count:
        losses = rest.square().sum(0) / inverse.diagonal()
        losses[~there] = torch.inf
        out = torch.sort(losses, stable=True).indices[: min(size, count - len(order))]
        factor = torch.linalg.cholesky(inverse[out][:, out])
        turn = torch.cholesky_solve(inverse[out], factor)
        rest = rest - rest[:, out] @ turn
        inverse = inverse.addmm(inverse[:, out], turn, alpha=-1)
        there[out] = False
        order += out.tolist()
    return order
