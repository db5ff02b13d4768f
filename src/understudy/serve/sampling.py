"""Drawing tokens and cutting text for the checkpoint engine; llama.cpp does both itself.

It ignores penalties and grammars: the checkpoint engine refuses requests that ask for them.

Source: Holtzman et al. 2020 (top_p); Nguyen et al. 2024 (min_p).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from understudy.serve.request import Sampling

if TYPE_CHECKING:
    import torch


def draw(logits: torch.Tensor, asked: Sampling, generator: torch.Generator) -> int:
    """The next token from logits of shape (vocabulary,); temperature 0 takes the likeliest."""
    temperature = 1.0 if asked.temperature is None else asked.temperature
    if temperature == 0:
        return int(logits.argmax())
    values, order = (logits / temperature).softmax(-1).sort(descending=True)
    if asked.top_k:
        values = values[: asked.top_k]
    if asked.min_p:
        values = values[values >= asked.min_p * values[0]]
    if asked.top_p is not None:
        # keep tokens until their sum reaches top_p, the one that crosses it included
        values = values[values.cumsum(-1) - values < asked.top_p]
    return int(order[values.multinomial(1, generator=generator)])


class TextCutter:
    """Text that grows token by token, released as soon as no stop string can begin in it."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._text = ""
        self._released = 0
        self.stopped = False

    def grow(self, text: str) -> str:
        """The newly released part, given the whole text so far."""
        # an unfinished character decodes to U+FFFD: wait for its other bytes
        self._text = text.rstrip("\ufffd")
        found = [at for stop in self._stops if (at := self._text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._text) - self._held_back())

    def finish(self, text: str) -> str:
        """What is left when generation ends for another reason."""
        self._text = text
        return self._release(len(text))

    def _held_back(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        ends = [n for stop in self._stops for n in range(1, len(stop)) if self._text.endswith(stop[:n])]
        return max(ends, default=0)

    def _release(self, end: int) -> str:
        piece = self._text[self._released : end]
        self._released = max(self._released, end)
        return piece
