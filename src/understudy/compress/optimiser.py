"""AdamW with states in fp32 or bf16, and clipping, for parameters that may be sharded.

bf16 states halve what the optimiser keeps. They suffice because β₂ = 0.95: a mean that moves by a twentieth a
step is not lost in eight bits of mantissa, as it is at 0.999. It ignores schedules (distill).

Source: arXiv 1711.05101 (AdamW); torch.optim.AdamW for the fp32 states.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from understudy.compress.processes import Processes, is_sharded, local

BETAS = (0.9, 0.95)
EPSILON = 1e-8
States = Literal["fp32", "bf16"]


def adamw(
    parameters: Sequence[nn.Parameter], rate: float, decay: float, states: States
) -> torch.optim.Optimizer:
    """Sharded parameters and whole ones in groups of their own: fused kernels take one kind at a time."""
    kinds = [[p for p in parameters if is_sharded(p) is sharded] for sharded in (True, False)]
    groups: list[dict[str, Any]] = [{"params": kind} for kind in kinds if kind]
    if states == "bf16":
        return SmallAdamW(groups, rate, decay)
    return torch.optim.AdamW(groups, lr=rate, betas=BETAS, weight_decay=decay, eps=EPSILON, fused=True)


class SmallAdamW(torch.optim.Optimizer):
    """AdamW whose means are kept in bf16 and worked on in fp32."""

    def __init__(self, groups: list[dict[str, Any]], rate: float, decay: float) -> None:
        super().__init__(groups, {"lr": rate, "weight_decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] -- no closure
        for group in self.param_groups:
            for parameter in cast(list[nn.Parameter], group["params"]):
                if parameter.grad is not None:
                    self._one(parameter, parameter.grad, group["lr"], group["weight_decay"])

    def _one(self, parameter: nn.Parameter, gradient: Tensor, rate: float, decay: float) -> None:
        kept = cast(dict[str, Tensor], self.state[parameter])
        if not kept:
            kept["step"] = torch.zeros(())
            for name in ("exp_avg", "exp_avg_sq"):
                kept[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        kept["step"] += 1
        count, weight, slope = float(kept["step"]), local(parameter), local(gradient).float()
        first = local(kept["exp_avg"]).float().lerp_(slope, 1 - BETAS[0])
        second = local(kept["exp_avg_sq"]).float().lerp_(slope.square(), 1 - BETAS[1])
        local(kept["exp_avg"]).copy_(first)
        local(kept["exp_avg_sq"]).copy_(second)
        scale = second.div_(1 - BETAS[1] ** count).sqrt_().add_(EPSILON)
        weight.mul_(1 - rate * decay)
        weight.addcdiv_(first, scale, value=-rate / (1 - BETAS[0] ** count))


@torch.no_grad()
def clip(parameters: Sequence[nn.Parameter], most: float, peers: Processes) -> float:
    """Scale all gradients so that their common norm is at most ``most``; returns the norm before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    # squared in Python's float64: no tensor is copied
    here = sum(float(local(g).norm()) ** 2 for g in gradients if is_sharded(g))
    everywhere = sum(float(g.norm()) ** 2 for g in gradients if not is_sharded(g))
    norm = math.sqrt(peers.summed([here])[0] + everywhere)
    if norm > most:
        for gradient in gradients:
            local(gradient).mul_(most / norm)
    return norm
