"""Chats and texts as tokens: which tokens are answers, and how documents are packed into rows.

Several documents share a row; positions start anew in each, from which transformers builds block-diagonal
attention, so a document's activations do not depend on its neighbours. Padding is known by length alone:
a tokenizer's pad token is often its end-of-turn token. It ignores where chats come from.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from understudy.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

Chat = list[dict[str, Any]]
"""OpenAI messages, the last one by the assistant."""


class Document(NamedTuple):
    """One chat or text."""

    tokens: list[int]
    answer: list[bool]
    """Whether each token was written by the assistant."""


class Row(NamedTuple):
    """Documents side by side, padded to a common length."""

    documents: list[Document]
    length: int

    @property
    def tokens(self) -> int:
        return sum(len(d.tokens) for d in self.documents)

    @property
    def targets(self) -> int:
        """Tokens that have a predecessor in their own document: what a loss averages over."""
        return sum(len(d.tokens) - 1 for d in self.documents)


class Batch(NamedTuple):
    """Rows as tensors, each (rows, length)."""

    tokens: Tensor
    positions: Tensor
    """Start at 0 in each document."""
    labels: Tensor
    """The next token."""
    real: Tensor
    """bool: a token of a document, not padding."""
    predicts: Tensor
    """bool: the next token is in the same document."""
    answers: Tensor
    """bool: the next token is in the same document and the assistant's."""
    document: Tensor
    """int64: number of the document within the batch; −1 on padding."""


def encode_chat(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> Document:
    """Tokens of a chat in the model's template; the assistant's are those after its turn's header.

    The header is what `add_generation_prompt` adds; the end-of-turn token counts as the assistant's.
    Raises InputError when the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise InputError(
            "the tokenizer has no chat template",
            expected="a chat model, or texts in place of chats",
            next_step="name an instruction-tuned teacher",
        )
    text = _render(tokenizer, chat, prompt=False)
    spans = [_span(tokenizer, chat, i, text) for i, m in enumerate(chat) if m.get("role") == "assistant"]
    encoded = cast(Any, tokenizer)(text, add_special_tokens=False, return_offsets_mapping=True)
    answer = [
        any(start <= begin and end <= stop for start, stop in spans) and end > begin
        for begin, end in encoded["offset_mapping"]
    ]
    return Document(list(encoded["input_ids"]), answer)


def _render(tokenizer: PreTrainedTokenizerBase, chat: Chat, *, prompt: bool) -> str:
    return cast(str, tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt))


def _span(tokenizer: PreTrainedTokenizerBase, chat: Chat, index: int, text: str) -> tuple[int, int]:
    """Where message ``index`` stands in the rendered text, its header left out."""
    before = _render(tokenizer, chat[:index], prompt=True) if index else ""
    after = _render(tokenizer, chat[: index + 1], prompt=False)
    if text.startswith(before) and text.startswith(after):
        return len(before), len(after.rstrip("\n"))
    # templates that rewrite earlier turns (dropped reasoning): the content's own place
    content = str(chat[index].get("content") or "")
    start = text.rfind(content)
    return (start, start + len(content)) if content and start >= 0 else (0, 0)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Document:
    """Tokens of running text; none of them is an answer."""
    tokens = cast(list[int], cast(Any, tokenizer)(text, add_special_tokens=False)["input_ids"])
    return Document(list(tokens), [False] * len(tokens))


def windows(documents: Sequence[Document], length: int) -> list[Document]:
    """Documents cut to at most ``length`` tokens; a piece of one token predicts nothing and is left out."""
    pieces = [
        Document(d.tokens[i : i + length], d.answer[i : i + length])
        for d in documents
        for i in range(0, len(d.tokens), length)
    ]
    return [piece for piece in pieces if len(piece.tokens) > 1]


def pack(documents: Sequence[Document], length: int) -> list[Row]:
    """Rows of at most ``length`` tokens by best fit, longest documents first; the order is deterministic."""
    pieces = sorted(windows(documents, length), key=lambda d: (-len(d.tokens), d.tokens))
    rows: list[Row] = []
    room: dict[int, list[int]] = {}  # tokens left -> rows
    for piece in pieces:
        need = len(piece.tokens)
        left = min((space for space, at in room.items() if space >= need and at), default=0)
        at = room[left].pop() if left else len(rows)
        if not left:
            rows.append(Row([], length))
        rows[at].documents.append(piece)
        room.setdefault((left or length) - need, []).append(at)
    return rows


def row_length(documents: Sequence[Document], most: int = 512) -> int:
    """The shortest power of two, 64 at least, that holds 19 documents in 20: short rows save attention."""
    lengths = sorted(len(d.tokens) for d in documents) or [0]
    wanted = lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))]
    length = 64
    while length < min(wanted, most):
        length *= 2
    return min(length, most)


T = TypeVar("T")


def shuffled(items: Iterable[T], seed: int) -> list[T]:
    """The items in an order that follows from the seed alone."""
    order = list(items)
    random.Random(seed).shuffle(order)  # noqa: S311 -- an order, not a secret
    return order


def take(documents: Sequence[Document], tokens: int, seed: int) -> list[Document]:
    """Documents in a seeded order until ``tokens`` are reached."""
    taken: list[Document] = []
    count = 0
    for document in shuffled(documents, seed):
        if count >= tokens:
            break
        taken.append(document)
        count += len(document.tokens)
    return taken


def batches(rows: Sequence[Row], tokens: int) -> Iterator[Batch]:
    """Rows in batches of about ``tokens`` tokens, padding included."""
    per_batch = max(1, tokens // rows[0].length) if rows else 1
    for start in range(0, len(rows), per_batch):
        yield collate(rows[start : start + per_batch])


def collate(rows: Sequence[Row]) -> Batch:
    """Rows as tensors. Padding gets token 0 and positions of its own, so it is a document nobody reads."""
    import torch

    length = max(row.tokens for row in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    positions = torch.zeros_like(tokens)
    document = torch.full_like(tokens, -1)
    answers = torch.zeros_like(tokens, dtype=torch.bool)
    number = 0
    for r, row in enumerate(rows):
        start = 0
        for piece in row.documents:
            stop = start + len(piece.tokens)
            tokens[r, start:stop] = torch.tensor(piece.tokens)
            answers[r, start:stop] = torch.tensor(piece.answer)
            positions[r, start:stop] = torch.arange(stop - start)
            document[r, start:stop] = number
            number, start = number + 1, stop
        positions[r, start:] = torch.arange(length - start)
    real = document >= 0
    predicts = real & (document == _next(document, -2))
    return Batch(
        tokens, positions, _next(tokens, 0), real, predicts, predicts & _next(answers, False), document
    )


def _next(values: Tensor, last: int | bool) -> Tensor:
    """Each column replaced by the one to its right."""
    import torch

    return torch.cat([values[:, 1:], torch.full_like(values[:, :1], last)], dim=1)


def fingerprint(documents: Sequence[Document]) -> str:
    """SHA-256 (hex) of the tokens and answer marks, order included."""
    digest = hashlib.sha256()
    for d in documents:
        digest.update(b"|" + ",".join(map(str, d.tokens)).encode())
        digest.update(bytes(d.answer))
    return digest.hexdigest()
