"""What a run is measured by while it learns: rows that it does not learn from.

Every process reads all of them: they are few, and with FSDP each forward pass is a meeting. It ignores when a
check is due and what follows from it (distill, curve).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from understudy.compress.corpus import Row, collate
from understudy.compress.curve import Check
from understudy.compress.fidelity import final_hidden, side_of
from understudy.compress.losses import Side, kl_rows, nll_rows
from understudy.compress.teacher import Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HeldOut(NamedTuple):
    """Rows, who is right about them, and what a check's loss weighs: the weights of the run's last stage."""

    rows: list[Row]
    teacher: Teacher
    answers: float
    """Weight of the KL of the assistant's tokens, per token of theirs."""
    ce: float
    """Weight of cross-entropy with them."""
    rest: float
    """Weight of all tokens' KL."""

    @torch.no_grad()
    def check(self, student: PreTrainedModel, device: torch.device, per_batch: int) -> Check:
        """Held-out KL over all tokens and over the assistant's, ``per_batch`` rows a forward pass."""
        totals = torch.zeros(6, dtype=torch.float64)
        for start in range(0, len(self.rows), per_batch):
            part = self.rows[start : start + per_batch]
            totals += self._sums(student, device, -1 - start, part)
        return self._found(*totals.tolist())

    def _found(
        self, tokens: float, kl: float, known: float, answer_kl: float, answers: float, nll: float
    ) -> Check:
        """A check from its sums: what was summed over, and how many tokens that were."""
        kl, answer_kl, nll = kl / max(tokens, 1), answer_kl / max(known, 1), nll / max(answers, 1)
        loss = self.answers * answer_kl + self.ce * nll + self.rest * kl if answers else kl
        return Check(step=0, tokens=0, kl=kl, answer_kl=answer_kl, answer_nll=nll, loss=loss)

    def _sums(self, student: PreTrainedModel, device: torch.device, key: int, part: Sequence[Row]) -> Tensor:
        """Tokens known of and their KL, answer tokens known of and their KL, answer tokens and their −log
        probability: sums over held-out rows."""
        batch = collate(part).to(device)
        signal = self.teacher.signal([key - i for i in range(len(part))], part)
        own = side_of(student, final_hidden(student, batch))
        known = signal.known.to(own.hidden.device)
        kl = kl_rows(signal, own).double().nan_to_num() * known
        answers = batch.answers[batch.predicts]
        both = answers & known
        nll = nll_rows(Side(own.hidden[answers], own.head), batch.labels[batch.predicts][answers]).double()
        sums = (known.sum(), kl.sum(), both.sum(), kl[both].sum(), answers.sum(), nll.sum())
        return torch.tensor([float(s) for s in sums], dtype=torch.float64)
