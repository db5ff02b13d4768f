"""The ruler against dense float64, and against itself."""

from __future__ import annotations

import math

import pytest
import torch

from understudy.compress.corpus import Document, batches, pack
from understudy.compress.fidelity import fidelity, require_same_tokenizer
from understudy.errors import ModelError


@torch.no_grad()
def dense(teacher, student, documents: list[Document]):
    """Each document alone, all logits, float64: rows of (tokens, KL, agreement, NLL) per document."""
    found = []
    for document in documents:
        ids = torch.tensor([document.tokens])
        t, s = (torch.log_softmax(m.double()(input_ids=ids).logits[0, :-1], -1) for m in (teacher, student))
        nll = -s[torch.arange(len(s)), ids[0, 1:]]
        agree = (t.argmax(-1) == s.argmax(-1)).double()
        found.append([len(s), float((t.exp() * (t - s)).sum()), float(agree.sum()), float(nll.sum())])
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_against_dense_float64(family, make, documents):
    teacher, student = make(family), make(family, seed=1)
    found = fidelity(teacher, student, list(batches(pack(documents, 64), 200)), precision="fp32")
    table = dense(teacher, student, documents)
    tokens, kl, agree, nll = table.sum(0).tolist()
    assert found.tokens == tokens
    assert found.documents == len(documents)
    assert found.kl == pytest.approx(kl / tokens, rel=1e-4)
    assert found.agreement == pytest.approx(agree / tokens, abs=1e-6)
    assert found.student_perplexity == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    # ratio estimator with documents as clusters, written out
    residual = table[:, 1] - kl / tokens * table[:, 0]
    count = len(table)
    wanted = math.sqrt(float((residual**2).sum()) / (count - 1) / count) / (tokens / count)
    assert found.kl_se == pytest.approx(wanted, rel=1e-3)


def test_a_model_is_faithful_to_itself(make, text):
    found = fidelity(make(), make(), text)
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.agreement == 1
    assert found.student_perplexity == found.teacher_perplexity


def test_answers_are_counted_apart(make, documents, text):
    found = fidelity(make(), make(seed=1), text)
    assert found.answer_tokens == sum(sum(d.answer) for d in documents)
    assert found.answer_kl > 0


def test_no_text_is_refused(make):
    with pytest.raises(ModelError, match="no text"):
        fidelity(make(), make(), [])


def test_different_tokenizers_are_refused(tokenizer):
    import copy

    require_same_tokenizer(tokenizer, tokenizer)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["elephant"])
    with pytest.raises(ModelError, match="different tokenizers"):
        require_same_tokenizer(tokenizer, other)
