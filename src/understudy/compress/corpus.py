"""Chats and texts as tokens: which tokens are answers, and how documents are packed into rows.

Several documents share a row; positions start anew in each, from which transformers builds block-diagonal
attention, so a document's activations do not depend on its neighbours. Documents that begin alike may share
their beginning (beginnings); the batch then says what each token sees. Padding is known by length alone:
a tokenizer's pad token is often its end-of-turn token. It ignores where chats come from.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from understudy.compress.beginnings import bundles, distinct_tokens
from understudy.compress.document import Chat, Document, Shown
from understudy.compress.media import encode as encode_shown
from understudy.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

LEAST_SAVED = 0.05
"""Share of tokens that shared beginnings must save for rows to be made longer for them."""


class Row(NamedTuple):
    """Documents side by side, padded to a common length."""

    documents: list[Document]
    length: int

    @property
    def tokens(self) -> int:
        return sum(len(d.tokens) for d in self.documents)

    @property
    def media(self) -> Shown | None:
        return self.documents[0].media if self.documents else None

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
    sight: Tensor | None
    """bool, (rows, 1, length, length): what each token sees; None where documents see only themselves."""
    media: tuple[Shown | None, ...] = ()
    """Of each row."""

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; pictures follow when they are looked at."""
        *parts, sight, media = self
        moved = None if sight is None else sight.to(device)
        return Batch(*(part.to(device) for part in parts), sight=moved, media=media)

    def first(self, rows: int) -> Batch:
        """The first rows."""
        return self.rows(range(min(rows, len(self.tokens))))

    def rows(self, chosen: Sequence[int]) -> Batch:
        """These rows, in this order."""
        *parts, sight, media = self
        at = list(chosen)
        of = tuple(media[i] for i in at) if media else ()
        return Batch(*(part[at] for part in parts), sight=None if sight is None else sight[at], media=of)


def encode_chat(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> Document:
    """Tokens of a chat in the model's template; the assistant's are those after its turn's header.

    The header is what `add_generation_prompt` adds; the end-of-turn token counts as the assistant's. An
    assistant's message with ``weight`` 0 is read and not learnt, as in OpenAI's fine-tuning format
    (platform.openai.com/docs/guides/supervised-fine-tuning).
    For a model that sees or hears its processor stands in the tokenizer's place.
    Raises InputError when the tokenizer has no chat template.
    """
    if hasattr(tokenizer, "tokenizer"):
        return encode_shown(tokenizer, chat)
    if not tokenizer.chat_template:
        raise InputError(
            "the tokenizer has no chat template",
            expected="a chat model, or texts in place of chats",
            next_step="name an instruction-tuned teacher",
        )
    text = _render(tokenizer, chat, prompt=False)
    learnt = [i for i, m in enumerate(chat) if m.get("role") == "assistant" and m.get("weight", 1)]
    spans = [_span(tokenizer, chat, i, text) for i in learnt]
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
    plain = getattr(tokenizer, "tokenizer", tokenizer)
    tokens = cast(list[int], cast(Any, plain)(text, add_special_tokens=False)["input_ids"])
    return Document(list(tokens), [False] * len(tokens))


def windows(documents: Sequence[Document], length: int) -> list[Document]:
    """Documents cut to at most ``length`` tokens; a piece of one token predicts nothing and is left out.

    One with pictures stays whole: their placeholders must not be parted from them.
    """
    pieces = [
        d if d.media else Document(d.tokens[i : i + length], d.answer[i : i + length])
        for d in documents
        for i in range(0, 1 if d.media else len(d.tokens), length)
    ]
    return [piece for piece in pieces if len(piece.tokens) > 1]


def pack(documents: Sequence[Document], length: int, *, share: bool = False) -> list[Row]:
    """Rows of at most ``length`` tokens by best fit, longest first; the order is deterministic.

    With ``share``, documents that begin alike stand in one row behind a single copy of their beginning. One
    with pictures has a row of its own, behind all others.
    """
    pieces = windows(documents, length)
    seeing = sorted((d for d in pieces if d.media), key=lambda d: (-len(d.tokens), d.tokens))
    pieces = [d for d in pieces if not d.media]
    wholes = bundles(pieces, length) if share else [[piece] for piece in pieces]
    wholes.sort(key=lambda bundle: (-_size(bundle), [d.tokens for d in bundle]))
    rows: list[Row] = []
    room: dict[int, list[int]] = {}  # tokens left -> rows
    for bundle in wholes:
        need = _size(bundle)
        left = min((space for space, at in room.items() if space >= need and at), default=0)
        at = room[left].pop() if left else len(rows)
        if not left:
            rows.append(Row([], length))
        first = len(rows[at].documents)
        rows[at].documents.extend(d._replace(after=first) if d.after >= 0 else d for d in bundle)
        room.setdefault((left or length) - need, []).append(at)
    return rows + [Row([document], len(document.tokens)) for document in seeing]


def shared_length(documents: Sequence[Document]) -> int:
    """Twice what documents need by themselves where they begin alike: the longer a row, the fewer copies of a
    beginning. Where they do not, a longer row only lets attention look at more that it may not see."""
    length, tokens = row_length(documents), sum(len(d.tokens) for d in documents)
    if all(d.media for d in documents):
        return length
    return length * 2 if sum(distinct_tokens(documents)) < (1 - LEAST_SAVED) * tokens else length


def _size(bundle: Sequence[Document]) -> int:
    return sum(len(d.tokens) for d in bundle)


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


def take(documents: Sequence[Document], tokens: int, seed: int, *, share: bool = False) -> list[Document]:
    """Documents in a seeded order until ``tokens`` are reached; ``share`` counts a common beginning once."""
    order = shuffled(documents, seed)
    sizes = distinct_tokens(order) if share else (len(d.tokens) for d in order)
    taken: list[Document] = []
    count = 0
    for document, size in zip(order, sizes, strict=True):
        if count >= tokens:
            break
        taken.append(document)
        count += size
    return taken


def batches(rows: Sequence[Row], tokens: int) -> Iterator[Batch]:
    """Rows in batches of about ``tokens`` tokens, padding included; as many pictures in each row."""
    shown = [len(row.media) if row.media else 0 for row in rows]
    for count in sorted(set(shown)):
        alike = [row for row, number in zip(rows, shown, strict=True) if number == count]
        per_batch = max(1, tokens // alike[0].length) if alike else 1
        for start in range(0, len(alike), per_batch):
            yield collate(alike[start : start + per_batch])


def collate(rows: Sequence[Row]) -> Batch:
    """Rows as tensors. Padding gets token 0 and positions of its own, so it is a document nobody reads."""
    import torch

    length = max(row.tokens for row in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    positions = torch.zeros_like(tokens)
    document = torch.full_like(tokens, -1)
    start_of, before = torch.zeros_like(tokens), torch.full_like(tokens, -2)
    answers = torch.zeros_like(tokens, dtype=torch.bool)
    number = 0
    for r, row in enumerate(rows):
        first, begin = number, 0
        for piece in row.documents:
            stop = begin + len(piece.tokens)
            tokens[r, begin:stop] = torch.tensor(piece.tokens)
            answers[r, begin:stop] = torch.tensor(piece.answer)
            positions[r, begin:stop] = torch.arange(piece.start, piece.start + len(piece.tokens))
            document[r, begin:stop] = number
            if piece.after >= 0:
                start_of[r, begin:stop], before[r, begin:stop] = piece.start, first + piece.after
            number, begin = number + 1, stop
        positions[r, begin:] = torch.arange(length - begin)
    real = document >= 0
    predicts = real & (document == _next(document, -2))
    sight = _sight(document, positions, before, start_of) if bool((before >= 0).any()) else None
    learnt, media = predicts & _next(answers, False), tuple(row.media for row in rows)
    return Batch(tokens, positions, _next(tokens, 0), real, predicts, learnt, document, sight, media)


def _sight(document: Tensor, positions: Tensor, before: Tensor, start_of: Tensor) -> Tensor:
    """What each token sees: its own document up to itself, and the beginning that its document continues."""
    import torch

    places = torch.arange(document.shape[1])
    own = (document[:, :, None] == document[:, None, :]) & (places[:, None] >= places[None, :])
    shared = (before[:, :, None] == document[:, None, :]) & (positions[:, None, :] < start_of[:, :, None])
    return (own | shared)[:, None]


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
        digest.update(d.media.digest.encode() if d.media else b"")
    return digest.hexdigest()
