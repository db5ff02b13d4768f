"""A mixture's layer as a pool of channels: what each channel and each expert adds, and which of them to keep.

Statistics are sums over the calibration tokens that were routed to an expert, behind the pruned prefix. It
ignores how the kept channels are made up for (dense) and what stays a mixture (experts).

Sources: expert scores by REAP, arXiv 2510.13999 (mean of g·‖E(x)‖ over an expert's tokens); averaging experts
weighed by how often they are chosen follows M-SMoE, arXiv 2310.01334, without its alignment of channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from understudy.compress.calibrate import Stream
from understudy.compress.decoder import Layer
from understudy.compress.families import Mixture
from understudy.compress.families.mixture import Expert
from understudy.compress.importance import top

Choice = Literal["channels", "mass", "reap", "average"]
"""What is kept: the best channels of all experts; whole experts by routed mass or REAP score, the last in
part; or averages of experts."""
Activation = Callable[[Tensor], Tensor]


@dataclass
class Routed:
    """Sums over the calibration tokens of one layer, fp32; lists run over experts."""

    tokens: int
    power: list[Tensor]
    """Σ (g·a)² of each channel, (channels,): g the router's weight, a the channel's activation."""
    mass: list[float]
    """Σ g."""
    length: list[float]
    """Σ g·‖E(x)‖."""
    calls: list[int]
    """Tokens routed to the expert."""
    weights: list[Tensor]
    """g batch by batch, (tokens, experts); 0 where not routed."""
    output: list[Tensor]
    """What the branch adds batch by batch, (tokens, width)."""

    @classmethod
    def zeros(cls, pool: Sequence[Expert]) -> Routed:
        none = [0.0] * len(pool)
        return cls(0, [torch.zeros(len(e.gate)) for e in pool], none, none.copy(), [0] * len(pool), [], [])


@torch.no_grad()
def route(mixture: Mixture, layer: Layer, stream: Stream) -> Routed:
    """Pass the stream through a layer's experts and sum what they do. Padding is left out."""
    pool, act = mixture.pool(layer.module), mixture.activation(layer.module)
    sums = Routed.zeros(pool)
    for hidden, real in zip(stream.hidden, stream.real, strict=True):
        x = layer.read_feed_forward(hidden[real])
        weights, added = mixture.weights(layer.module, x), torch.zeros_like(x)
        for number, expert in enumerate(pool):
            at = weights[:, number].nonzero()[:, 0]
            share = weights[at, number, None]
            channels = activations(expert, act, x[at])
            out = channels @ expert.down.T
            added.index_add_(0, at, share * out)
            sums.power[number] += (share * channels).square().sum(0)
            sums.mass[number] += float(share.sum())
            sums.length[number] += float((share[:, 0] * out.norm(dim=1)).sum())
            sums.calls[number] += len(at)
        sums.tokens += len(x)
        sums.weights.append(weights)
        sums.output.append(added)
    return sums


def activations(expert: Expert, act: Activation, x: Tensor) -> Tensor:
    """What enters the expert's down projection, (tokens, channels)."""
    return act(x @ expert.gate.T) * (x @ expert.up.T)


def channel_scores(pool: Sequence[Expert], routed: Routed) -> list[Tensor]:
    """√E[(g·a)²]·‖w_down‖ of each channel: the length of what it adds to the stream, root mean square."""
    return [
        (power / max(routed.tokens, 1)).sqrt() * expert.down.norm(dim=0)
        for expert, power in zip(pool, routed.power, strict=True)
    ]


def expert_scores(choice: Choice, routed: Routed) -> list[float]:
    """What decides between whole experts, larger is kept: REAP's score, or the routed mass."""
    if choice == "reap":
        return [s / max(n, 1) for s, n in zip(routed.length, routed.calls, strict=True)]
    return list(routed.mass)


class Kept(NamedTuple):
    """Channels of a dense block, and what they stood for in the mixture."""

    expert: Expert
    """Their weights; down still as in the mixture."""
    source: Tensor
    """(experts, channels): the weight of a channel in a token's output is that token's expert weights times
    this."""
    indices: list[int]
    """Numbered through the pool, ascending; empty for channels that are averages."""


def keep(
    choice: Choice,
    pool: Sequence[Expert],
    routed: Routed,
    count: int,
    *,
    shared: bool,
    given: Sequence[int] = (),
) -> Kept:
    """``count`` channels, or all when there are fewer; ``given`` indices are taken as they are.

    ``shared``: the pool's last expert serves every token, and its channels go before all others."""
    if choice == "average" and not given:
        return _averages(pool, routed, count, shared=shared)
    sizes = [len(expert.gate) for expert in pool]
    indices = list(given) or top(_priority(choice, pool, routed, shared=shared), min(count, sum(sizes)))
    owner = torch.repeat_interleave(torch.arange(len(pool)), torch.tensor(sizes))[indices]
    parts = [_rows(pool, owner, indices, sizes, number) for number in range(len(pool))]
    expert = Expert(*(torch.cat([p[i] for p in parts], dim=i // 2) for i in range(3)))
    source = torch.nn.functional.one_hot(owner, len(pool)).T.to(expert.gate.dtype)
    return Kept(expert, source, indices)


def _rows(pool: Sequence[Expert], owner: Tensor, indices: list[int], sizes: list[int], number: int) -> Expert:
    """The kept channels of one expert."""
    at = torch.tensor(indices)[owner == number] - sum(sizes[:number])
    expert = pool[number]
    return Expert(expert.gate[at], expert.up[at], expert.down[:, at])


def _priority(choice: Choice, pool: Sequence[Expert], routed: Routed, *, shared: bool) -> Tensor:
    """One number per channel of the pool: shared before routed, then whole experts in order when asked for,
    then the channel's own score."""
    scores = channel_scores(pool, routed)
    rank = [0] * len(pool)
    if choice in ("mass", "reap"):
        of_experts = expert_scores(choice, routed)
        order = sorted(range(len(pool)), key=lambda e: of_experts[e])
        rank = [order.index(e) for e in range(len(pool))]
    if shared:
        rank[-1] = len(pool)
    above = 2 * max(float(s.max()) for s in scores) + 1
    return torch.cat([s.double() + above * r for s, r in zip(scores, rank, strict=True)])


def _averages(pool: Sequence[Expert], routed: Routed, count: int, *, shared: bool) -> Kept:
    """The shared expert, then as many averages of routed experts as fill ``count``: dealt out in the order of
    their mass, each weighed by it; the last average is cut to its first channels."""
    own = list(pool[-1:]) if shared else []
    routed_pool = pool[:-1] if shared else pool
    size = len(routed_pool[0].gate)
    room = max(count - sum(len(e.gate) for e in own), 0)
    groups = min(-(-room // size), len(routed_pool))
    order = sorted(range(len(routed_pool)), key=lambda e: -routed.mass[e])
    members = [order[g::groups] for g in range(groups)]
    made = [_average([routed_pool[e] for e in m], [routed.mass[e] for e in m]) for m in members]
    blocks, holders = [*made, *own], [*members, *([[len(pool) - 1]] if shared else [])]
    expert = Expert(*(torch.cat([b[i] for b in blocks], dim=i // 2) for i in range(3)))
    source = torch.zeros(len(pool), len(expert.gate), dtype=expert.gate.dtype)
    start = 0
    for block, holder in zip(blocks, holders, strict=True):
        source[holder, start : start + len(block.gate)] = 1
        start += len(block.gate)
    at = [*range(min(room, groups * size)), *range(groups * size, len(source[0]))]
    return Kept(Expert(expert.gate[at], expert.up[at], expert.down[:, at]), source[:, at], [])


def _average(experts: list[Expert], mass: list[float]) -> Expert:
    share = torch.tensor(mass, dtype=torch.float64) + 1e-12
    share /= share.sum()
    parts = [torch.stack([e[i] for e in experts]).double() for i in range(3)]
    return Expert(*(torch.einsum("e,eab->ab", share, p).to(experts[0].gate.dtype) for p in parts))
