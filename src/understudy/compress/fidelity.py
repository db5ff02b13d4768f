"""How far a student is from its teacher on a text: KL, perplexities, agreement, with standard errors.

The ruler for pruning and healing. Both models must share a tokenizer. It ignores what the text is for: task
quality is `evaluate`'s question.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import torch
from torch import Tensor

from understudy.compress.corpus import Batch
from understudy.compress.decoder import head_weight, softcap_of, states_of
from understudy.compress.losses import Side, logit_blocks
from understudy.compress.precision import Precision, matmul_precision
from understudy.compress.progress import Progress, silent
from understudy.compress.signal import Head
from understudy.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Fidelity(msgspec.Struct, frozen=True, kw_only=True):
    """A student beside its teacher. Standard errors treat documents, not tokens, as independent."""

    tokens: int
    """Predicted tokens."""
    documents: int
    kl: float
    """KL(teacher‖student) per token, nats."""
    kl_se: float
    agreement: float
    """Share of tokens on which both models' first choices are the same."""
    agreement_se: float
    teacher_perplexity: float
    student_perplexity: float
    student_perplexity_se: float
    """By the delta method from the mean log-likelihood."""
    answer_tokens: int = 0
    """Of them, tokens the assistant wrote."""
    answer_kl: float = 0.0
    answer_agreement: float = 0.0

    def __str__(self) -> str:
        return (
            f"KL {self.kl:.4f} ± {self.kl_se:.4f}, top-1 agreement {self.agreement:.1%}, perplexity "
            f"{self.student_perplexity:.2f} (teacher {self.teacher_perplexity:.2f}) on {self.tokens:,} tokens"
        )


class _Sums(NamedTuple):
    """Per document, (documents, …)."""

    tokens: Tensor
    kl: Tensor
    agree: Tensor
    teacher_nll: Tensor
    student_nll: Tensor


@torch.no_grad()
def fidelity(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    batches: Sequence[Batch],
    precision: Precision = "auto",
    progress: Progress = silent,
) -> Fidelity:
    """Compare two models of one vocabulary on every predicted token. Raises ModelError without any."""
    per_document: list[Tensor] = []
    answers = torch.zeros(3, dtype=torch.float64)
    with matmul_precision(precision):
        for number, batch in enumerate(batches):
            progress("fidelity", number, len(batches))
            values = _compare(teacher, student, batch)
            count = int(batch.document.max()) + 1
            sums = torch.zeros(count, 5, dtype=torch.float64)
            per_document.append(sums.index_add_(0, batch.document[batch.predicts], values))
            answers += values[batch.answers[batch.predicts]][:, :3].sum(0)
    progress("fidelity", len(batches), len(batches))
    table = torch.cat(per_document) if per_document else torch.zeros(0, 5)
    table = table[table[:, 0] > 0]
    if not len(table):
        raise ModelError("no text to compare on", expected="at least two tokens")
    return _summary(table, answers)


def _summary(table: Tensor, answers: Tensor) -> Fidelity:
    sums = _Sums(*table.T)
    kl, kl_se = _ratio(sums.kl, sums.tokens)
    agreement, agreement_se = _ratio(sums.agree, sums.tokens)
    teacher_nll, _ = _ratio(sums.teacher_nll, sums.tokens)
    nll, nll_se = _ratio(sums.student_nll, sums.tokens)
    count = max(float(answers[0]), 1.0)
    return Fidelity(
        tokens=int(sums.tokens.sum()),
        documents=len(table),
        kl=kl,
        kl_se=kl_se,
        agreement=agreement,
        agreement_se=agreement_se,
        teacher_perplexity=math.exp(teacher_nll),
        student_perplexity=math.exp(nll),
        student_perplexity_se=math.exp(nll) * nll_se,
        answer_tokens=int(answers[0]),
        answer_kl=float(answers[1]) / count,
        answer_agreement=float(answers[2]) / count,
    )


def _ratio(total: Tensor, tokens: Tensor) -> tuple[float, float]:
    """Mean per token and its standard error with documents as clusters (Cochran 1977, §6.4)."""
    mean = float(total.sum() / tokens.sum())
    if len(tokens) < 2:
        return mean, float("nan")
    residual = total - mean * tokens
    count = len(tokens)
    variance = float(residual.square().sum()) / (count - 1) / count / float(tokens.mean()) ** 2
    return mean, math.sqrt(variance)


def _compare(teacher: PreTrainedModel, student: PreTrainedModel, batch: Batch) -> Tensor:
    """(predicted tokens, 5): one, KL, agreement, both negative log-likelihoods; float64."""
    labels = batch.labels[batch.predicts, None]
    sides = [side_of(model, final_hidden(model, batch)) for model in (teacher, student)]
    rows: list[Tensor] = []
    for at, logits in logit_blocks(sides):
        p, q = (torch.log_softmax(side.float(), dim=-1) for side in logits)
        agree = (p.argmax(-1) == q.argmax(-1)).float()
        teacher_nll, student_nll = (-side.gather(1, labels[at])[:, 0] for side in (p, q))
        kl = p.exp().mul_(p.sub_(q)).sum(-1)
        rows.append(torch.stack([torch.ones_like(kl), kl, agree, teacher_nll, student_nll], 1))
    return torch.cat(rows).double() if rows else torch.zeros(0, 5, dtype=torch.float64)


@torch.no_grad()
def divergence(teacher: Side, student: Side) -> float:
    """KL(teacher‖student) per row, nats."""
    total = 0.0
    for _at, logits in logit_blocks([teacher, student]):
        p, q = (torch.log_softmax(side.float(), dim=-1) for side in logits)
        total += float((p.exp() * (p - q)).sum())
    return total / max(len(teacher.hidden), 1)


def side_of(model: PreTrainedModel, hidden: Tensor) -> Side:
    """A model's states with its own head."""
    return Side(hidden, Head(head_weight(model).detach(), softcap_of(model)))


def final_hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    """What enters the head at predicting positions, (predicted tokens, width)."""
    return states_of(model, batch)[batch.predicts]


def require_same_tokenizer(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    """Raises ModelError unless both tokenizers give every token the same number."""
    if teacher.get_vocab() != student.get_vocab():
        raise ModelError(
            "teacher and student have different tokenizers, so their tokens cannot be compared",
            expected="the same vocabulary with the same numbers",
        )
