"""Answers the student samples itself, for its teacher to score: the last stage of healing.

What a student is trained on is then what it writes when it is served, its own mistakes included. The teacher
says of every token what it would have written there, and reverse KL pulls the student toward what the teacher
finds likely. Samples follow from the seed and the number of the step, so a resumed run draws the same. It
ignores the loss (losses).

Source: arXiv 2306.13649 §3.1 (GKD), arXiv 2306.08543 (reverse KL on the student's samples).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from understudy.compress.document import Document

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prompts_of(documents: Sequence[Document], most: int) -> list[list[int]]:
    """What stands before the last answer of each chat of texts alone, where that leaves room in ``most``."""
    found: list[list[int]] = []
    for document in documents:
        if document.media:
            continue
        starts = [i for i, said in enumerate(document.answer) if said and i and not document.answer[i - 1]]
        if starts and starts[-1] < most:
            found.append(document.tokens[: starts[-1]])
    return found


@torch.no_grad()
def sampled(
    student: PreTrainedModel, prompts: Sequence[Sequence[int]], new_tokens: int, seed: int
) -> list[Document]:
    """The student's answers at temperature 1 over its whole vocabulary, marked as answers."""
    from transformers import GenerationConfig

    length = max(len(p) for p in prompts)
    tokens = torch.zeros(len(prompts), length, dtype=torch.int64)
    real = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = torch.tensor(prompt)
        real[row, length - len(prompt) :] = 1
    ends = _ends(student)
    settings = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=new_tokens,
        eos_token_id=sorted(ends) or None, pad_token_id=0,
    )  # fmt: skip
    device = student.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        out = cast(Any, student).generate(
            input_ids=tokens.to(device), attention_mask=real.to(device), generation_config=settings
        )
    answers = cast(list[list[int]], out[:, length:].tolist())
    return [_document(p, _upto_end(a, ends)) for p, a in zip(prompts, answers, strict=True)]


def _ends(student: PreTrainedModel) -> set[int]:
    ends = student.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends} if isinstance(ends, int) else set()


def _upto_end(answer: list[int], ends: set[int]) -> list[int]:
    stop = next((i + 1 for i, token in enumerate(answer) if token in ends), len(answer))
    return answer[:stop]


def _document(prompt: Sequence[int], answer: Sequence[int]) -> Document:
    return Document([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))
