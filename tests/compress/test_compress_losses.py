"""The chunked loss against dense float64, and against autograd's own differences."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from understudy.compress.losses import (
    Divergence,
    Options,
    Rows,
    Side,
    distillation_loss,
    kl_rows,
    logit_blocks,
)
from understudy.compress.precision import matmul_precision
from understudy.compress.signal import Dense, Head, Sparse

DIVERGENCES: list[Divergence] = ["forward", "reverse", "jensen-shannon", "skew"]


class Problem(NamedTuple):
    hidden: Tensor
    head: Tensor
    rows: Rows

    @property
    def teacher(self) -> Head:
        return self.rows.signal.head


def problem(dtype=torch.float64, count=9, vocab=13, padded=0, softcap=0.0) -> Problem:
    torch.manual_seed(5)
    kl, ce = torch.rand(count, dtype=dtype), torch.rand(count, dtype=dtype)
    kl[::3], ce[::2], kl[4], ce[4] = 0, 0, 0, 0
    states, labels = torch.randn(count, 6, dtype=dtype), torch.randint(0, vocab, (count,))
    head = torch.randn(vocab, 5, dtype=dtype, requires_grad=True)
    hidden = torch.randn(count, 5, dtype=dtype, requires_grad=True)
    signal = Dense(states, Head(torch.randn(vocab + padded, 6, dtype=dtype), softcap))
    return Problem(hidden, head, Rows(signal, labels, kl, ce))


def dense(p: Problem, options: Options, normaliser: float) -> Tensor:
    """The formula, all logits at once, gradients by autograd."""

    def capped(logits: Tensor, c: float) -> Tensor:
        return c * torch.tanh(logits / c) if c else logits

    vocab = min(len(p.head), len(p.teacher.weight))
    student = capped(p.hidden @ p.head.T, options.softcap)[:, :vocab]
    teacher = capped(p.rows.signal.hidden @ p.teacher.weight.T, p.teacher.softcap)[:, :vocab]
    t, s = (torch.log_softmax(x / options.temperature, -1) for x in (teacher, student))
    m = (t.exp() + s.exp()) / 2
    mixed = (0.1 * t.exp() + 0.9 * s.exp()).log()
    divergence = {
        "forward": (t.exp() * (t - s)).sum(-1),
        "reverse": (s.exp() * (s - t)).sum(-1),
        "jensen-shannon": ((t.exp() * (t - m.log())).sum(-1) + (s.exp() * (s - m.log())).sum(-1)) / 2,
        "skew": (t.exp() * (t - mixed)).sum(-1),
    }[options.divergence]
    nll = cross_entropy(student, p.rows.labels, reduction="none")
    return ((p.rows.kl * divergence).sum() * options.temperature**2 + (p.rows.ce * nll).sum()) / normaliser


def part_of(rows: Rows, at: slice) -> Rows:
    mask = torch.zeros(len(rows.labels), dtype=torch.bool)
    mask[at] = True
    return Rows(rows.signal.at(mask), rows.labels[at], rows.kl[at], rows.ce[at])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, 0.0), (2.0, 3.0)])
def test_loss_and_gradients_are_the_dense_ones(divergence, temperature, softcap):
    options = Options(divergence, temperature, softcap, chunk=4)
    p = problem(softcap=softcap)
    wanted = dense(p, options, 3.0)
    gradients = torch.autograd.grad(wanted, (p.hidden, p.head))
    found = distillation_loss(p.hidden, p.head, p.rows, normaliser=3.0, options=options).total
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, (p.hidden, p.head)), gradients)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(divergence):
    p = problem(count=5, vocab=7)

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        options = Options(divergence, 1.5, 2.0, 2)
        return distillation_loss(hidden, head, p.rows, normaliser=2.0, options=options).total

    assert torch.autograd.gradcheck(loss, (p.hidden, p.head))


def test_kl_by_hand():
    # teacher (½, ½), student (¾, ¼): KL = ½·ln(½/¾) + ½·ln(½/¼) = ln 2 − ½·ln 3
    hidden, head = torch.tensor([[1.0]]), torch.tensor([[3.0], [1.0]]).log()
    signal = Dense(torch.zeros(1, 1), Head(torch.zeros(2, 1)))
    rows = Rows(signal, torch.tensor([0]), torch.ones(1), torch.zeros(1))
    found = distillation_loss(hidden, head, rows, normaliser=1)
    torch.testing.assert_close(found.total, torch.tensor(0.14384103))
    assert float(found.ce) == 0


@pytest.mark.parametrize("chunk", [1, 2, 7, 20, 256])
def test_chunks_change_nothing(chunk):
    found = []
    for size in (256, chunk):
        p = problem(count=40)
        loss = distillation_loss(p.hidden, p.head, p.rows, normaliser=7, options=Options(chunk=size)).total
        found.append((loss, *torch.autograd.grad(loss, (p.hidden, p.head))))
    torch.testing.assert_close(found[1], found[0])


def test_a_split_step_adds_up_to_the_whole():
    p = problem(count=12)
    whole = distillation_loss(p.hidden, p.head, p.rows, normaliser=5).total
    wanted = torch.autograd.grad(whole, (p.hidden, p.head))
    parts = []
    for at in (slice(0, 5), slice(5, 12)):
        rows = part_of(p.rows, at)
        parts.append(distillation_loss(p.hidden[at], p.head, rows, normaliser=5).total)
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), (p.hidden, p.head)), wanted)


def test_a_frozen_head_costs_no_gradient():
    p = problem()
    wanted = torch.autograd.grad(distillation_loss(p.hidden, p.head, p.rows, normaliser=3).total, p.hidden)
    frozen = p.head.detach()
    loss = distillation_loss(p.hidden, frozen, p.rows, normaliser=3).total
    torch.testing.assert_close(torch.autograd.grad(loss, p.hidden), wanted)
    assert frozen.grad is None


def test_an_all_masked_batch_is_zero_with_finite_gradients():
    p = problem()
    rows = p.rows._replace(kl=torch.zeros(9), ce=torch.zeros(9))
    loss = distillation_loss(p.hidden, p.head, rows, normaliser=0)
    gradients = torch.autograd.grad(loss.total, (p.hidden, p.head))
    assert float(loss.total.detach()) == 0
    assert all(float(g.abs().max()) == 0 for g in gradients)


def test_masked_rows_may_hold_anything():
    p = problem()
    wanted = float(distillation_loss(p.hidden, p.head, p.rows, normaliser=3).total.detach())
    hidden = p.hidden.detach().clone()
    hidden[(p.rows.kl == 0) & (p.rows.ce == 0)] = float("nan")
    found = distillation_loss(hidden.requires_grad_(), p.head, p.rows, normaliser=3).total
    assert float(found.detach()) == pytest.approx(wanted)
    assert bool(torch.autograd.grad(found, p.head)[0].isfinite().all())


def test_a_vocabulary_padded_further_is_cut():
    plain, padded = problem(), problem(padded=3)
    cut = Head(padded.teacher.weight[:13])
    losses = [
        distillation_loss(
            padded.hidden,
            padded.head,
            padded.rows._replace(signal=padded.rows.signal._replace(head=head)),
            normaliser=3,
        ).total
        for head in (padded.teacher, cut)
    ]
    assert float(losses[0].detach()) == float(losses[1].detach())
    assert plain.head.shape == padded.head.shape


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-5), ("bf16", 5e-3)])
def test_gradients_near_float64(precision, limit):
    torch.manual_seed(0)
    hidden, head, states = torch.randn(64, 96), torch.randn(500, 96) / 5, torch.randn(64, 96)
    # values that bf16 holds exactly: what is measured is the loss, not the rounding of its arguments
    hidden, head, states = (x.bfloat16().float() for x in (hidden, head, states))
    rows = Rows(
        Dense(states, Head(head)), torch.zeros(64, dtype=torch.int64), torch.ones(64), torch.zeros(64)
    )
    exact = [x.double().requires_grad_() for x in (hidden, head)]
    p = Problem(*exact, Rows(Dense(states.double(), Head(head.double())), *rows[1:]))
    wanted = torch.autograd.grad(dense(p, Options(), 64), exact)
    near = [x.clone().requires_grad_() for x in (hidden, head)]
    with matmul_precision(precision):
        loss = distillation_loss(*near, rows, normaliser=64).total
    for found, grad in zip(torch.autograd.grad(loss, near), wanted, strict=True):
        assert float((found.double() - grad).norm() / grad.norm()) < limit


def test_states_and_head_in_bf16_are_multiplied_exactly():
    """Logits rounded to bf16 would be wrong by percents: only the gradients handed out are rounded."""
    torch.manual_seed(0)
    given = torch.randn(64, 96), torch.randn(500, 96), torch.randn(64, 96)
    hidden, head, states = (x.bfloat16() for x in given)
    ones = torch.zeros(64, dtype=torch.int64), torch.ones(64), torch.full((64,), 0.1)
    exact = [x.double().requires_grad_() for x in (hidden, head)]
    p = Problem(*exact, Rows(Dense(states.double(), Head(head.double())), *ones))
    wanted = torch.autograd.grad(dense(p, Options(), 64), exact)
    near = [x.clone().requires_grad_() for x in (hidden, head)]
    rows = Rows(Dense(states, Head(head)), *ones)
    loss = distillation_loss(*near, rows, normaliser=64, options=Options(chunk=24)).total
    for found, grad in zip(torch.autograd.grad(loss, near), wanted, strict=True):
        assert found.dtype == torch.bfloat16
        assert float((found.double() - grad).norm() / grad.norm()) < 5e-3
    divergence = kl_rows(rows.signal, Side(hidden, Head(head)), chunk=24)
    only = p._replace(rows=p.rows._replace(ce=torch.zeros(64)))
    torch.testing.assert_close(
        divergence.double().sum(), dense(only, Options(), 1.0).detach(), rtol=1e-5, atol=0
    )


def test_kl_of_rows_without_gradients():
    p = problem()
    side = Side(p.hidden, Head(p.head, 2.0))
    found = kl_rows(p.rows.signal, side, chunk=4)
    ones = p.rows._replace(kl=torch.ones(9).double(), ce=torch.zeros(9).double())
    wanted = dense(p._replace(rows=ones), Options(softcap=2.0), 1.0)
    torch.testing.assert_close(found.sum(), wanted.detach())


def test_blocks_cover_every_row_once():
    side = Side(torch.randn(37, 3), Head(torch.randn(8, 3)))
    seen = torch.cat([torch.arange(37)[at] for at, _ in logit_blocks([side], chunk=20)])
    assert seen.tolist() == list(range(37))


# sparse signals


def sparse_of(p: Problem, few: int, *, bucket: bool) -> Sparse:
    """The first tokens of the teacher's distributions; the rest as one bucket, or left out."""
    found = torch.log_softmax(p.rows.signal.hidden @ p.teacher.weight.T, -1).exp()
    mass, tokens = found.topk(few, dim=-1)
    rest = (1 - mass.sum(-1)).clamp_min(0) if bucket else torch.zeros(len(mass), dtype=mass.dtype)
    negentropy = (mass * mass.log()).sum(-1) + (rest * rest.clamp_min(1e-30).log())
    known = torch.ones(len(mass), dtype=torch.bool)
    return Sparse(tokens, mass, rest, negentropy, known, found.shape[1])


def dense_of(signal: Sparse, p: Problem, options: Options, normaliser: float) -> Tensor:
    """The same loss by autograd."""
    logits = p.hidden @ p.head.T
    if options.softcap:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    log_q = torch.log_softmax(logits[:, : signal.vocab], -1)
    named = log_q.gather(1, signal.tokens)
    unnamed = 1 - (named.exp() * (signal.mass > 0)).sum(-1)
    kl = signal.negentropy - (signal.mass * named).sum(-1) - signal.rest * unnamed.log()
    nll = -log_q.gather(1, p.rows.labels[:, None])[:, 0]
    return (p.rows.kl * kl + p.rows.ce * nll).sum() / normaliser


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("bucket", [False, True])
@pytest.mark.parametrize("chunk", [2, 256])
def test_a_sparse_signal_against_autograd(softcap, bucket, chunk):
    p, options = problem(), Options(softcap=softcap, chunk=chunk)
    signal = sparse_of(p, 4, bucket=bucket)
    wanted = dense_of(signal, p, options, 3.0)
    gradients = torch.autograd.grad(wanted, (p.hidden, p.head))
    rows = p.rows._replace(signal=signal)
    found = distillation_loss(p.hidden, p.head, rows, normaliser=3.0, options=options).total
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, (p.hidden, p.head)), gradients)


def test_all_tokens_named_is_the_dense_loss():
    p = problem()
    wanted = distillation_loss(p.hidden, p.head, p.rows, normaliser=3)
    rows = p.rows._replace(signal=sparse_of(p, 13, bucket=False))
    found = distillation_loss(p.hidden, p.head, rows, normaliser=3)
    torch.testing.assert_close((found.total, found.kl, found.ce), (wanted.total, wanted.kl, wanted.ce))
    torch.testing.assert_close(
        torch.autograd.grad(found.total, (p.hidden, p.head)),
        torch.autograd.grad(wanted.total, (p.hidden, p.head)),
    )
    side = Side(p.hidden, Head(p.head))
    torch.testing.assert_close(kl_rows(rows.signal, side, chunk=4), kl_rows(p.rows.signal, side))


def test_tokens_beyond_a_smaller_vocabulary_join_the_rest():
    p = problem(padded=3)
    signal = sparse_of(p, 6, bucket=True)
    assert bool((signal.tokens >= 13).any())
    rows = p.rows._replace(signal=signal)
    found = distillation_loss(p.hidden, p.head, rows, normaliser=3).total
    beyond = signal.tokens >= 13
    cut = Sparse(
        signal.tokens.masked_fill(beyond, 0),
        signal.mass * ~beyond,
        signal.rest + (signal.mass * beyond).sum(-1),
        signal.negentropy,
        signal.known,
        13,
    )
    torch.testing.assert_close(found, dense_of(cut, p, Options(), 3.0))


def test_a_sparse_signal_has_no_other_divergence():
    p = problem()
    rows = p.rows._replace(signal=sparse_of(p, 4, bucket=True))
    for options in (Options("reverse"), Options(temperature=2.0)):
        with pytest.raises(ValueError, match="forward KL"):
            distillation_loss(p.hidden, p.head, rows, normaliser=3, options=options)
