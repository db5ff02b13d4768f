"""Which channels and heads matter, and the least-squares refit that makes up for the rest.

Everything here is a function of a writing projection's weight W (width, n) and the `Gram` of its input. It
ignores models, layers and plans.
"""

from __future__ import annotations

import itertools
import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from understudy.compress.calibrate import Gram

Score = Literal["obs", "output", "magnitude", "wanda-sp", "minitron", "flap", "taylor", "random"]
ENUMERATE_UP_TO = 256
"""Subsets of heads tried exhaustively; beyond, heads leave one at a time."""


BLOCK = 1024
"""Rows turned to float64 at once: a wide layer's statistics are a good part of memory as it is."""


FLOOR = 1e-6
"""Least power that a ridge reckons with, as a share of the mean."""


class Gated(NamedTuple):
    """The weights of a gated feed-forward block: gate and up (n, width), down (width, n)."""

    gate: Tensor
    up: Tensor
    down: Tensor


class Heads(NamedTuple):
    """Kept heads by index into the layer as it is."""

    query: list[int]
    kv: list[int]


def channel_scores(score: Score, block: Gated, gram: Gram, taylor: Tensor | None = None) -> Tensor:
    """Importance of each FFN channel, (n,), larger is kept.

    ``output`` √H_jj·‖W_:j‖ with H = Σxxᵀ, the norm of the channel's own contribution; it also stands in for
    ``obs`` (ours, elimination) where there are too many channels for that.
    Sources of the others: Wanda-sp and FLAP arXiv 2312.11983, Minitron arXiv 2407.14679 §2.2, magnitude:
    the L2 norm of all of a channel's weights, ``taylor`` as `taylor.channel_sensitivity` measured it.
    """
    if score == "taylor" and taylor is not None:
        return taylor
    norm = block.down.norm(dim=0)
    mean = gram.first / max(gram.tokens, 1)
    power = gram.second.diagonal() / max(gram.tokens, 1)
    if score in ("obs", "output"):
        return power.sqrt() * norm
    if score == "wanda-sp":
        return power.sqrt() * block.down.abs().sum(0)
    if score == "minitron":
        return gram.absolute
    if score == "flap":
        return (power - mean.square()).clamp(min=0) * norm.square()
    if score == "magnitude":
        return (block.gate.square().sum(1) + block.up.square().sum(1) + norm.square()).sqrt()
    return torch.rand(len(norm), generator=torch.Generator().manual_seed(len(norm)))


def top(scores: Tensor, count: int) -> list[int]:
    """Indices of the ``count`` largest scores, ascending; ties go to the lower index."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return sorted(order[:count].tolist())


def projected(weight: Tensor, gram: Gram) -> Tensor:
    """H Wᵀ in float64, (n, width): the part of `refit` that all choices of channels share."""
    return _through(gram.second, weight.double())


def _through(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows`` Wᵀ in float64, a block of rows at a time."""
    return torch.cat([part.double() @ weight.T for part in rows.split(BLOCK)])


def refit(
    weight: Tensor,
    gram: Gram,
    keep: list[int],
    *,
    ridge: float = 1e-2,
    pull: float = 0.0,
    product: Tensor | None = None,
) -> Tensor:
    """The kept columns of W, refitted so that W'x_S is closest to Wx + pull·d over the calibration tokens.

    W'ᵀ = (H_SS + Λ)⁻¹(H_S: Wᵀ + pull·X_Sᵀd + ΛW_Sᵀ), Λ as `damping` has it: a ridge toward the original
    weights, so a direction never seen keeps them. Solved in float64; (width, |keep|) in the weight's dtype.
    ``product``: `projected`, where it is known already.
    """
    at = torch.tensor(keep)
    original = weight.double()
    rows = gram.second[at]
    wanted = _through(rows, original) if product is None else product[at]
    inner = rows[:, at].double()
    del rows
    strength = damping(inner.diagonal(), ridge)
    wanted += strength[:, None] * original[:, at].T
    if pull:
        wanted += pull * gram.lag[at].double()
    inner.diagonal().add_(strength)
    return torch.cholesky_solve(wanted, torch.linalg.cholesky(inner)).T.to(weight.dtype)


def reread(weight: Tensor, gram: Gram, *, ridge: float = 1e-2, pull: float = 0.5) -> Tensor:
    """A reading weight that answers the drifted stream x as W answers x + pull·d, d the lag to the teacher's.

    W' = W + pull·W(Σ d xᵀ)(H + Λ)⁻¹, the least-squares solution with a ridge toward W; float64 inside.
    """
    second = gram.second.double()
    strength = damping(second.diagonal(), ridge)
    turn = _solve(second, gram.lag.double(), strength)
    return (weight.double() + pull * weight.double() @ turn.T).to(weight.dtype)


def refit_reader(weight: Tensor, gram: Gram, keep: list[int], *, ridge: float = 1e-2) -> Tensor:
    """A reading weight for a narrower stream: W Bᵀ with B = (VᵀV + Λ)⁻¹(VᵀU + ΛE_S), (out, |keep|).

    ``gram``: of the narrow stream's v, its lag summed against the wide stream's u; B predicts u from v, with
    a ridge toward E_S, which reads the kept dimensions as they are. float64 inside.
    """
    inner = gram.second.double()
    strength = damping(inner.diagonal(), ridge)
    wanted = gram.lag.double()
    wanted[torch.arange(len(keep)), torch.tensor(keep)] += strength
    return (weight.double() @ _solve(inner, wanted, strength).T).to(weight.dtype)


def refit_gain(gain: Tensor, power: Tensor, product: Tensor, *, ridge: float = 1e-2) -> Tensor:
    """Per dimension the g that brings g·y closest to t: (Σyt + λcg₀)/(Σy² + λ), λ = ridge·mean Σy².

    ``power`` Σy², ``product`` Σyt, ``gain`` g₀, each (n,). The ridge is toward c·g₀, c the one factor for all
    dimensions that fits best: the rms over fewer dimensions is another by about one factor.
    """
    least = torch.finfo(power.dtype).tiny
    factor = (product * gain).sum() / (power * gain.square()).sum().clamp(min=least)
    strength = ridge * power.mean().clamp(min=least)
    return (product + strength * factor * gain) / (power + strength)


def damping(power: Tensor, ridge: float) -> Tensor:
    """The ridge of each column, (n,): a share of its own power Σx², which must not follow the others'.

    Where a few tokens of massive activation put a thousand times the usual power into one channel
    (SmolLM2's layers 11 and 28), a ridge of the mean power would refit nothing but that channel. Never 0:
    what was never seen must still be solvable. Source: Marquardt 1963.
    """
    least = FLOOR * power.mean().clamp(min=torch.finfo(torch.float32).tiny)
    return ridge * power.clamp(min=float(least))


def inverted(matrix: Tensor) -> Tensor:
    """The inverse of a positive definite (n, n).

    By solving for the identity: `torch.cholesky_inverse` takes 16 times as long at n = 1,536 (LOG.md,
    2026-11-26).
    """
    unit = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return torch.cholesky_solve(unit, torch.linalg.cholesky(matrix))


def _solve(inner: Tensor, wanted: Tensor, strength: Tensor) -> Tensor:
    """(inner + Λ)⁻¹ wanted."""
    return torch.cholesky_solve(wanted, torch.linalg.cholesky(inner + torch.diag(strength)))


def damage(weight: Tensor, gram: Gram, keep: list[int], *, ridge: float = 1e-2) -> float:
    """Share of the projection's output power lost after `refit`: E‖Wx − W'x_S‖² / E‖Wx‖²."""
    original, second = weight.double(), gram.second.double()
    error = original.clone()
    error[:, keep] -= refit(weight, gram, keep, ridge=ridge).double()
    power = ((original @ second) * original).sum()
    return float(((error @ second) * error).sum() / power) if power > 0 else 0.0


def choose_heads(
    weight: Tensor, gram: Gram, *, heads: int, kv_heads: int, keep: int, keep_kv: int, ridge: float = 1e-2
) -> Heads:
    """The heads whose loss the refit makes up for best: whole KV groups, then equal query heads of each.

    All subsets are tried when there are at most `ENUMERATE_UP_TO`, otherwise heads are removed greedily.
    """
    return HeadSearch(weight, gram, heads, kv_heads, ridge).choose(keep, keep_kv)


class HeadSearch:
    """Subsets of heads by their damage at the output projection; one factorisation serves all of them.

    With R the columns that go, refitting the others (ridge toward the original weights) leaves the loss
    tr(W_R [((H + Λ)⁻¹)_RR]⁻¹ W_Rᵀ): the block form of the Optimal Brain Surgeon (Hassibi & Stork 1993).
    """

    def __init__(self, weight: Tensor, gram: Gram, heads: int, kv_heads: int, ridge: float = 1e-2) -> None:
        self.weight, second = weight.double().T, gram.second.double()
        damped = second + torch.diag(damping(second.diagonal(), ridge))
        self.inverse = inverted(damped)
        self.heads, self.kv_heads = heads, kv_heads
        self.group = heads // kv_heads
        self.head_dim = weight.shape[1] // heads

    def choose(self, keep: int, keep_kv: int) -> Heads:
        """``keep_kv`` whole groups, and as many query heads of each as make ``keep``."""
        groups = self.groups(keep_kv)
        return Heads(self.within(groups, keep // keep_kv), groups)

    def members(self, group: int) -> list[int]:
        return list(range(group * self.group, (group + 1) * self.group))

    def loss(self, heads: list[int]) -> float:
        """What is lost when only these stay and are refitted."""
        gone = head_columns([h for h in range(self.heads) if h not in set(heads)], self.head_dim)
        if not gone:
            return 0.0
        at = torch.tensor(gone)
        lower = torch.linalg.cholesky(self.inverse[at][:, at])
        return float(torch.linalg.solve_triangular(lower, self.weight[at], upper=False).square().sum())

    def groups(self, count: int) -> list[int]:
        everything = list(range(self.kv_heads))
        if math.comb(self.kv_heads, count) <= ENUMERATE_UP_TO:
            subsets = itertools.combinations(everything, count)
            return list(min(subsets, key=lambda s: self.loss([h for g in s for h in self.members(g)])))
        while len(everything) > count:
            rest = [[g for g in everything if g != out] for out in everything]
            everything = min(rest, key=lambda s: self.loss([h for g in s for h in self.members(g)]))
        return everything

    def within(self, groups: list[int], count: int) -> list[int]:
        """``count`` query heads of each kept group."""
        if count == self.group:
            return [h for g in groups for h in self.members(g)]
        if math.comb(self.group, count) ** len(groups) <= ENUMERATE_UP_TO:
            choices = itertools.product(*(itertools.combinations(self.members(g), count) for g in groups))
            return min(([h for part in choice for h in part] for choice in choices), key=self.loss)
        return self._greedy([self.members(g) for g in groups], count)

    def _greedy(self, kept: list[list[int]], count: int) -> list[int]:
        while any(len(part) > count for part in kept):
            trials = [
                [[h for h in part if h != out] for part in kept]
                for full in kept
                if len(full) > count
                for out in full
            ]
            kept = min(trials, key=lambda t: self.loss([h for part in t for h in part]))
        return [h for part in kept for h in part]


def head_columns(heads: list[int], head_dim: int) -> list[int]:
    """Columns of `o_proj` (rows of `q_proj`) that belong to heads."""
    return [h * head_dim + d for h in heads for d in range(head_dim)]
