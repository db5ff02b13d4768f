"""Chats with pictures or sound as documents, through the model's own processor.

A document keeps what was sent, not its tensors, which are many times larger: they are made when a batch needs
them, and remembered while small. It ignores content parts and processors (processor) and how the model reads
tensors (families).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from understudy.compress.document import Chat, Document, Shown
from understudy.errors import InputError
from understudy.processor import OF_TEXT, Part, opened, processed, rendered

if TYPE_CHECKING:
    from torch import Tensor

REMEMBER_BYTES = 1 << 20
"""Tensors of a document up to this size are kept between epochs."""
_PER_TOKEN = ("token_type_ids", "mm_token_type_ids", "cross_attention_mask")
"""Of what processors make, what has an entry for each token: (1, length, …)."""


class Media:
    """What one document shows: its tensors by name, the first dimension counting pictures or documents."""

    def __init__(self, processor: Any, text: str, parts: Sequence[Part]) -> None:
        self._processor, self._text, self._parts = processor, text, tuple(parts)
        self._tensors: dict[str, Tensor] | None = None
        digest = hashlib.sha256()
        for part in parts:
            digest.update(hashlib.sha256(part.raw).digest())
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        """Pictures and sounds."""
        return len(self._parts)

    def tensors(self) -> dict[str, Tensor]:
        if self._tensors is not None:
            return self._tensors
        made = processed(self._processor, self._text, self._parts)
        tensors = {name: value for name, value in made.items() if name not in OF_TEXT}
        if sum(t.numel() * t.element_size() for t in tensors.values()) <= REMEMBER_BYTES:
            self._tensors = tensors
        return tensors


def stacked(media: Sequence[Shown | None], length: int) -> dict[str, Tensor]:
    """Several documents' tensors as one call takes them, padded with zeros to the largest of each name.

    Zeros are what processors pad with: a picture that is not there, a token of no special type.
    """
    import torch
    from torch.nn import functional

    given = [one.tensors() for one in media if one is not None]
    found: dict[str, Tensor] = {}
    for name in given[0]:
        values = [one[name] for one in given if name in one]
        largest = [max(sizes) for sizes in zip(*(v.shape[1:] for v in values), strict=True)]
        if name in _PER_TOKEN:
            largest[0] = length
        padded: list[Tensor] = []
        for value in values:
            more = [
                n
                for size, most in zip(reversed(value.shape[1:]), reversed(largest), strict=True)
                for n in (0, most - size)
            ]
            padded.append(functional.pad(value, more))
        found[name] = torch.cat(padded)
    return found


def encode(processor: Any, chat: Chat) -> Document:
    """A chat as the model reads it; a picture's placeholders are tokens that nobody is to write.

    As `corpus.encode_chat` otherwise. Raises InputError for parts that cannot be read and without a template.
    """
    if not (processor.chat_template or processor.tokenizer.chat_template):
        raise InputError(
            "the processor has no chat template",
            expected="a chat model",
            next_step="name an instruction-tuned teacher",
        )
    messages, parts = opened(chat, files=True)
    text = rendered(processor, messages, prompt=False)
    made = processed(processor, text, parts)
    place = _Places(processor, text, parts, made["offset_mapping"][0])
    spans = [_span(processor, messages, i, text) for i in _learnt(chat)]
    wide = [(place.of(start), place.of(stop)) for start, stop in spans]
    answer = [
        any(start <= begin and end <= stop for start, stop in wide) and end > begin
        for begin, end in made["offset_mapping"][0].tolist()
    ]
    media = Media(processor, text, parts) if parts else None
    return Document(made["input_ids"][0].tolist(), answer, media=media)


def _learnt(chat: Chat) -> list[int]:
    return [i for i, m in enumerate(chat) if m.get("role") == "assistant" and m.get("weight", 1)]


class _Places:
    """Where a character of the rendered chat stands once placeholders are written out as many tokens."""

    def __init__(self, processor: Any, text: str, parts: Sequence[Part], offsets: Tensor) -> None:
        self.processor, self.text, self.parts = processor, text, parts
        self.shift = _last(offsets) - self._plain(text)

    def of(self, place: int) -> int:
        """All placeholders before it have moved it, and none behind it."""
        if not self.parts:
            return place
        names = _placeholders(self.processor)
        if not any(name in self.text[place:] for name in names):
            return place + self.shift
        beginning = self.text[:place]
        count = sum(beginning.count(name) for name in names)
        made = processed(self.processor, beginning, self.parts[:count])
        return place + _last(made["offset_mapping"][0]) - self._plain(beginning)

    def _plain(self, text: str) -> int:
        """Where the last token ends as long as placeholders are single tokens."""
        encoded = self.processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return max((int(stop) for _, stop in encoded["offset_mapping"]), default=0)


def _last(offsets: Tensor) -> int:
    return int(offsets[:, 1].max()) if len(offsets) else 0


def _placeholders(processor: Any) -> list[str]:
    """What stands for a picture or sound in a rendered chat."""
    names = ("boi_token", "image_token", "audio_token")
    found = [str(getattr(processor, name)) for name in names if getattr(processor, name, None)]
    return found[:1] if hasattr(processor, "boi_token") else found


def _span(processor: Any, messages: list[dict[str, Any]], index: int, text: str) -> tuple[int, int]:
    """Where message ``index`` stands in the rendered text, its header left out."""
    before = rendered(processor, messages[:index], prompt=True) if index else ""
    after = rendered(processor, messages[: index + 1], prompt=False)
    if text.startswith(before) and text.startswith(after):
        return len(before), len(after.rstrip("\n"))
    content = "".join(part.get("text", "") for part in messages[index]["content"])
    start = text.rfind(content)
    return (start, start + len(content)) if content and start >= 0 else (0, 0)
