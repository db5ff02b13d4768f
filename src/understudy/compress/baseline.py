"""The comparison that matters: a student beside an off-the-shelf model of its size.

A smaller model that somebody trained from the start on far more text is often better than a badly healed
student, so every report says how they compare, or that no such model was named. Models of different
tokenizers are compared in bits per byte of the held-out answers. It ignores tasks (evaluate).

Source: arXiv 2101.00027 §3.1 (bits per byte, as the Pile's perplexity across tokenizers).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import torch

from understudy.compress.corpus import batches, encode_chat, pack, row_length
from understudy.compress.document import Chat, Document
from understudy.compress.fidelity import final_hidden, side_of
from understudy.compress.losses import Side, nll_rows
from understudy.protocol import text_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from understudy.compress.checkpoint import Loaded

BATCH_TOKENS = 2048


class Baseline(msgspec.Struct, frozen=True, kw_only=True):
    """A model off the shelf on the held-out answers."""

    model: str
    parameters: int
    bits_per_byte: float


@torch.no_grad()
def bits_per_byte(model: PreTrainedModel, documents: Sequence[Document], chats: Sequence[Chat]) -> float:
    """−log₂ of the answers' probability over their bytes; ``documents`` are the chats in its own tokens."""
    nll = 0.0
    for batch in batches(pack(documents, row_length(documents)), BATCH_TOKENS):
        side = side_of(model, final_hidden(model, batch))
        answers = batch.answers[batch.predicts]
        labels = batch.labels[batch.predicts][answers]
        nll += float(nll_rows(Side(side.hidden[answers], side.head), labels).double().sum())
    return nll / math.log(2) / max(sum(map(_answer_bytes, chats)), 1)


def _answer_bytes(chat: Chat) -> int:
    answers = [m for m in chat if m.get("role") == "assistant" and m.get("weight", 1)]
    return sum(len(text_of(m.get("content")).encode()) for m in answers)


def measured(loaded: Loaded, chats: Sequence[Chat]) -> Baseline:
    """A model named by the user, on chats encoded in its own template."""
    documents = [encode_chat(loaded.reader, chat) for chat in chats]
    return Baseline(
        model=loaded.source,
        parameters=loaded.model.num_parameters(),
        bits_per_byte=bits_per_byte(loaded.model, documents, chats),
    )
