"""One chat or text as a model reads it: its tokens, which of them are answers, and what it shows.

It ignores how documents are made (corpus, media) and how they are laid out in rows (corpus, beginnings).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Chat = list[dict[str, Any]]
"""OpenAI messages, the last one by the assistant."""


class Shown(Protocol):
    """Pictures or sound of one document, as `media.Media` makes them."""

    digest: str

    def __len__(self) -> int:
        """How many pictures and sounds."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What the model reads of them, by name; the first dimension counts pictures or documents."""
        ...


class Document(NamedTuple):
    """One chat or text."""

    tokens: list[int]
    answer: list[bool]
    """Whether each token is one the model is to write: the assistant's, of messages with a weight."""
    start: int = 0
    """Position of the first token."""
    after: int = -1
    """In a row: the number of the document whose tokens before ``start`` stand in front of this one."""
    media: Shown | None = None
    """Its pictures or sound, whose placeholders are among the tokens; it then has a row of its own."""

    def upto(self, count: int) -> Document:
        """The first tokens."""
        return Document(self.tokens[:count], self.answer[:count])

    def since(self, start: int) -> Document:
        """What follows, as a continuation of document 0."""
        return Document(self.tokens[start:], self.answer[start:], start, 0)
