"""The distillation loss at the language-model head, in row chunks, with gradients computed going forward.

loss = Σ_i [ kl_i·T²·KL(p_i‖q_i) + ce_i·(−log q_i(label_i)) ] / normaliser

over the rows whose weights are not both zero. Logits exist for one chunk of rows at a time and are turned
into gradients of the hidden state and the head at once, so the memory is two chunks of logits and one head,
whatever the batch; of a sparse signal it is one. It ignores where rows come from (corpus) and who the
teacher is (signal).

Source: the chunked gradient-in-forward scheme is Liger Kernel's (arXiv 2410.10989 §3.3); KL at a temperature
with T² is arXiv 1503.02531 §2; skew KL arXiv 2402.03898 §3; Jensen–Shannon arXiv 2306.13649 §3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from understudy.compress.signal import Dense, Head, Signal, Sparse

Divergence = Literal["forward", "reverse", "jensen-shannon", "skew"]
BLOCK = 16
"""Rows worked on at once between matrix products: a few MiB, so that they stay in the cache."""
SKEW = 0.1
"""Share of the teacher in skew KL's mixture."""


class Rows(NamedTuple):
    """What is learnt at each position; all first dimensions are equal."""

    signal: Signal
    """What the teacher says there."""
    labels: Tensor
    """The next token, int64 (rows,)."""
    kl: Tensor
    """Weight of the divergence from the teacher, (rows,)."""
    ce: Tensor
    """Weight of cross-entropy with the label, (rows,)."""


class Side(NamedTuple):
    """One model at some positions."""

    hidden: Tensor
    """Final hidden states, (rows, width)."""
    head: Head


class Options(NamedTuple):
    """How the loss is computed."""

    divergence: Divergence = "forward"
    temperature: float = 1.0
    softcap: float = 0.0
    """c of the student's logit soft-cap (0: none)."""
    chunk: int = 256
    """Rows whose logits exist at once."""


class Loss(NamedTuple):
    """Scalars; only ``total`` carries a gradient."""

    total: Tensor
    kl: Tensor
    """Sum over rows of the divergence (at its weight), not normalised."""
    ce: Tensor
    """Sum over rows of cross-entropy (at its weight), not normalised."""


def distillation_loss(
    hidden: Tensor,
    head: Tensor,
    rows: Rows,
    *,
    normaliser: float,
    options: Options = Options(),  # noqa: B008 -- an immutable tuple
) -> Loss:
    """The loss of student states ``hidden`` (rows, width) under ``head`` (vocab, width).

    ``normaliser`` is the number of valid tokens of the *whole* step, over all micro-batches and processes, so
    accumulation changes nothing. No valid row gives 0 with zero gradients. A vocabulary padded further than
    the other is cut to the shorter one. A `Sparse` signal has only forward KL at temperature 1.
    """
    if isinstance(rows.signal, Sparse) and (options.divergence, options.temperature) != ("forward", 1.0):
        raise ValueError("a sparse signal gives forward KL at temperature 1 only")
    valid = (rows.kl != 0) | (rows.ce != 0)
    compact = Rows(rows.signal.at(valid), rows.labels[valid], rows.kl[valid], rows.ce[valid])
    found = cast(Any, _ChunkedLoss).apply(hidden[valid], head, compact, max(normaliser, 1.0), options)
    return Loss(*found)


@torch.no_grad()
def kl_rows(teacher: Signal, student: Side, chunk: int = 256) -> Tensor:
    """KL(teacher‖student) of each row, (rows,), without gradients; of a sample its unbiased estimate."""
    found: list[Tensor] = []
    if isinstance(teacher, Dense):
        for _, (a, b) in logit_blocks((Side(teacher.hidden, teacher.head), student), chunk):
            found.append(_forward_kl(_normalise(a), _normalise(b))[0])
    else:
        teacher = _cut(teacher, len(student.head.weight))
        cut = Side(student.hidden, Head(student.head.weight[: teacher.vocab], student.head.softcap))
        for at, (logits,) in logit_blocks((cut,), chunk):
            found.append(_sparse_kl(_part(teacher, at), _normalise(logits))[0])
    return torch.cat(found) if found else torch.zeros(0)


def nll_rows(student: Side, labels: Tensor, chunk: int = 256) -> Tensor:
    """−log of the student's probability of each label, (rows,), without gradients; ``labels`` (rows,)."""
    found: list[Tensor] = []
    for at, (logits,) in logit_blocks((student,), chunk):
        found.append(-_normalise(logits).gather(1, labels[at, None])[:, 0])
    return torch.cat(found) if found else torch.zeros(0)


def logit_blocks(sides: Sequence[Side], chunk: int = 256) -> Iterator[tuple[slice, list[Tensor]]]:
    """The logits of several models for a few rows at a time: (rows, [(few, vocab) per side]).

    Products are made for ``chunk`` rows at once into buffers that are used again, and handed on in blocks
    that fit a processor's cache; a consumer may overwrite its block. Vocabularies are cut to the shortest.
    """
    vocab = min(len(side.head.weight) for side in sides)
    weights = [_factor(side.head.weight[:vocab]) for side in sides]
    count = len(sides[0].hidden)
    buffers = [torch.empty(min(chunk, count), vocab, dtype=_sums(w), device=w.device) for w in weights]
    for start in range(0, count, chunk):
        for side, weight, buffer in zip(sides, weights, buffers, strict=True):
            hidden = side.hidden[start : start + chunk].to(weight.dtype)
            _product(hidden, weight.T, buffer[: len(hidden)])
        size = min(chunk, count - start)
        for block in _blocks(size, buffers[0].device):
            views = [
                _softcap_(buffer[block], side.head.softcap)
                for side, buffer in zip(sides, buffers, strict=True)
            ]
            yield slice(start + block.start, start + block.stop), views


def _sums(weight: Tensor) -> torch.dtype:
    """What products are added up and kept in: logits in bf16 would be wrong by percents of a probability."""
    return torch.promote_types(weight.dtype, torch.float32)


def _factor(weight: Tensor) -> Tensor:
    """A matrix as it enters products. Only accelerators multiply bf16 and answer in fp32; elsewhere it is
    widened once."""
    return weight if weight.is_cuda else weight.to(_sums(weight))


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """``left`` @ ``right`` in ``out``'s precision, whatever theirs."""
    if right.dtype == out.dtype:
        torch.mm(left.to(out.dtype), right, out=out)
    else:
        out.copy_(torch.mm(left.to(right.dtype), right, out_dtype=out.dtype))


def _blocks(rows: int, device: torch.device) -> Iterator[slice]:
    size = BLOCK if device.type == "cpu" else max(rows, 1)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


class _ChunkedLoss(torch.autograd.Function):
    """Gradients are made in forward, for that is where the logits are; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, rows: Rows, normaliser: float, options: Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide, rows_at_once = _sums(head), min(options.chunk, len(hidden))
        target = _target(rows.signal, head, rows_at_once)
        used = _factor(head[: target.vocab])
        given = torch.empty(rows_at_once, target.vocab, dtype=wide, device=head.device)
        grad_hidden = torch.zeros_like(hidden, dtype=wide)
        grad_head = torch.zeros_like(head, dtype=wide) if ctx.needs_input_grad[1] else None
        sums = torch.zeros(2, dtype=torch.float64, device=head.device)
        for start in range(0, len(hidden), options.chunk):
            at = slice(start, start + options.chunk)
            states, size = hidden[at], len(hidden[at])
            target.prepare(at)
            _product(states, used.T, given[:size])
            for block in _blocks(size, head.device):
                part = slice(start + block.start, start + block.stop)
                weights = _Weights(rows.labels[part], rows.kl[part].to(given), rows.ce[part].to(given))
                sums += target.gradient_(part, block, given[block], weights, options)
            grad = given[:size].div_(normaliser)
            _product(grad, used, grad_hidden[at])
            if grad_head is not None:
                grad_head[: target.vocab].addmm_(grad.T, states.to(wide))
        grad_hidden = grad_hidden.to(hidden.dtype)
        grad_head = grad_head.to(head.dtype) if grad_head is not None else None
        ctx.save_for_backward(grad_hidden, grad_head)
        total = (sums.sum() / normaliser).to(hidden.dtype)
        parts = sums[0].clone(), sums[1].clone()
        ctx.mark_non_differentiable(*parts)
        return total, *parts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        scale = grads[0]
        if scale.item() != 1:
            grad_hidden = grad_hidden * scale
            grad_head = grad_head * scale if grad_head is not None else None
        return grad_hidden, grad_head, None, None, None


class _Weights(NamedTuple):
    """A block's labels and weights, each (rows,)."""

    labels: Tensor
    kl: Tensor
    ce: Tensor


class _DenseTarget:
    """The teacher's logits of one chunk, made from its states."""

    def __init__(self, signal: Dense, head: Tensor, chunk: int) -> None:
        self.signal = signal
        self.vocab = min(len(head), len(signal.head.weight))
        self.weight = _factor(signal.head.weight[: self.vocab].to(head.dtype)).T
        self.wanted = torch.empty(chunk, self.vocab, dtype=_sums(head), device=head.device)

    def prepare(self, at: slice) -> None:
        states = self.signal.hidden[at]
        _product(states, self.weight, self.wanted[: len(states)])

    def gradient_(
        self, part: slice, block: slice, given: Tensor, weights: _Weights, options: Options
    ) -> Tensor:
        """Replace the student's logits ``given`` by d loss / d (head product), not yet normalised.

        Returns the weighted sums of divergence and cross-entropy, float64 (2,).
        """
        wanted = _softcap_(self.wanted[block], self.signal.head.softcap)
        capped = _softcap_(given, options.softcap)
        slope = 1 - (capped / options.softcap).square() if options.softcap else None
        nll, plain = (
            _cross_entropy(capped, weights) if bool(weights.ce.any()) else (given.new_zeros(()), None)
        )
        temperature = options.temperature
        p, q = (_normalise(x / temperature if temperature != 1 else x) for x in (wanted, capped))
        divergence, grad = _DIVERGENCES[options.divergence](p, q)
        kl = (divergence * weights.kl).sum() * temperature**2
        grad = grad.mul_((weights.kl * temperature)[:, None])
        if plain is not None:
            grad.add_(plain)
        if slope is not None:
            grad.mul_(slope)
        given.copy_(grad)
        return torch.stack([kl.double(), nll.double()])


class _SparseTarget:
    """A few of the teacher's probabilities; no teacher logits are made."""

    def __init__(self, signal: Sparse, head: Tensor) -> None:
        self.signal = _cut(signal, len(head))
        self.vocab = self.signal.vocab

    def prepare(self, at: slice) -> None:
        """Nothing: the signal is what is needed."""

    def gradient_(
        self, part: slice, block: slice, given: Tensor, weights: _Weights, options: Options
    ) -> Tensor:
        """As `_DenseTarget.gradient_`; cross-entropy is one more token with its weight as mass."""
        signal = _part(self.signal, part)
        capped = _softcap_(given, options.softcap)
        slope = 1 - (capped / options.softcap).square() if options.softcap else None
        log_q = _normalise(capped)
        divergence, shares = _sparse_kl(signal, log_q)
        nll = -log_q.gather(1, weights.labels[:, None])[:, 0] * weights.ce
        pull = (signal.mass.to(given) - shares.named).mul_(weights.kl[:, None])
        scale = weights.kl * (shares.whole - shares.ratio) + weights.ce
        torch.exp(log_q, out=given)
        given.mul_(scale[:, None]).scatter_add_(1, signal.tokens, -pull)
        given.scatter_add_(1, weights.labels[:, None], -weights.ce[:, None])
        if slope is not None:
            given.mul_(slope)
        return torch.stack([(divergence * weights.kl).sum().double(), nll.sum().double()])


def _target(signal: Signal, head: Tensor, chunk: int) -> _DenseTarget | _SparseTarget:
    return _DenseTarget(signal, head, chunk) if isinstance(signal, Dense) else _SparseTarget(signal, head)


class _Shares(NamedTuple):
    """How the rest is shared out by the student."""

    named: Tensor
    """What the named tokens would have got of it, (rows, few): they are not among the rest."""
    ratio: Tensor
    """rest / the student's probability of the unnamed tokens, (rows,)."""
    whole: Tensor
    """mass + rest: 1 but for rounding and sampling, (rows,)."""


def _part(signal: Sparse, rows: slice) -> Sparse:
    parts = (signal.tokens, signal.mass, signal.rest, signal.negentropy, signal.known)
    return Sparse(*(part[rows] for part in parts), vocab=signal.vocab)


def _cut(signal: Sparse, vocab: int) -> Sparse:
    """The signal for a student of a smaller vocabulary: what it cannot say joins the rest."""
    if signal.vocab <= vocab:
        return signal
    beyond = signal.tokens >= vocab
    lost = (signal.mass * beyond).sum(-1)
    return signal._replace(
        tokens=signal.tokens.masked_fill(beyond, 0),
        mass=signal.mass.masked_fill(beyond, 0.0),
        rest=signal.rest + lost,
        vocab=vocab,
    )


def _sparse_kl(signal: Sparse, log_q: Tensor) -> tuple[Tensor, _Shares]:
    """Σ p·log p − Σ mass·log q − rest·log q(unnamed), per row, and what its gradient needs."""
    mass, rest = signal.mass.to(log_q), signal.rest.to(log_q)
    log_named = log_q.gather(1, signal.tokens)
    named = log_named.exp() * (mass > 0)
    unnamed = (1 - named.sum(-1)).clamp_min(torch.finfo(log_q.dtype).eps)
    divergence = signal.negentropy.to(log_q) - (mass * log_named).sum(-1) - rest * unnamed.log()
    ratio = rest / unnamed
    return divergence, _Shares(named * ratio[:, None], ratio, mass.sum(-1) + rest)


def _normalise(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1)


def _softcap_(logits: Tensor, softcap: float) -> Tensor:
    """c·tanh(logits/c), in place; as it is for c = 0."""
    return logits.div_(softcap).tanh_().mul_(softcap) if softcap else logits


def _cross_entropy(logits: Tensor, weights: _Weights) -> tuple[Tensor, Tensor]:
    """Weighted sum of −log q(label), and its gradient by the logits."""
    weight, label = weights.ce[:, None], weights.labels[:, None]
    log_q = _normalise(logits)
    nll = -(log_q.gather(1, label) * weight).sum()
    return nll, log_q.exp_().mul_(weight).scatter_add_(1, label, -weight)


def _forward_kl(wanted: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p‖q) per row and q − p. Overwrites both arguments."""
    p = wanted.exp()
    divergence = (wanted.sub_(given).mul_(p)).sum(-1)
    return divergence, given.exp_().sub_(p)


def _reverse_kl(wanted: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q‖p) per row and q·(log q/p − KL)."""
    q = given.exp()
    ratio = given - wanted
    divergence = (q * ratio).sum(-1)
    return divergence, q.mul_(ratio.sub_(divergence[:, None]))


def _jensen_shannon(wanted: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """½KL(p‖m) + ½KL(q‖m) with m = ½(p+q), per row; gradient ½q·(log q/m − KL(q‖m))."""
    middle = torch.logaddexp(wanted, given) - math.log(2)
    q, ratio = given.exp(), given - middle
    back = (q * ratio).sum(-1)
    ahead = (wanted.exp() * (wanted - middle)).sum(-1)
    return (ahead + back) / 2, q.mul_(ratio.sub_(back[:, None])).mul_(0.5)


def _skew_kl(wanted: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p‖αp + (1−α)q) per row; gradient q·(Σ r·q − r) with r = (1−α)p/m."""
    mixed = torch.logaddexp(wanted + math.log(SKEW), given + math.log(1 - SKEW))
    divergence = (wanted.exp() * (wanted - mixed)).sum(-1)
    q = given.exp()
    pull = (1 - SKEW) * (wanted - mixed).exp()
    return divergence, q * ((q * pull).sum(-1, keepdim=True) - pull)


_DIVERGENCES = {
    "forward": _forward_kl,
    "reverse": _reverse_kl,
    "jensen-shannon": _jensen_shannon,
    "skew": _skew_kl,
}
