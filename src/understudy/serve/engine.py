"""What an engine does for the app: answer chats, complete prompts, score given tokens.

An engine yields OpenAI chunks as they come, whether or not the client streams: closing the iterator cancels
the generation, and a streamed answer equals an unstreamed one by construction. It ignores HTTP (app), the
check of parameters (request) and which models there are (models).
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Sequence
from typing import NamedTuple, Protocol

from understudy.protocol import Json
from understudy.serve.request import ChatRequest, CompletionRequest, Prompt


class TokenScore(NamedTuple):
    """One token of a scored prompt."""

    token: int
    logprob: float | None
    """Natural logarithm of its probability after the tokens before it; None for the first."""
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens at this place with their logprobs, best first."""


class Scored(NamedTuple):
    """A prompt's tokens with their logprobs, and the likeliest tokens to follow."""

    tokens: tuple[TokenScore, ...]
    following: tuple[tuple[int, float], ...]


class ScoreJob(NamedTuple):
    """Tokens to score; ``top`` is how many alternatives to report at each place."""

    tokens: tuple[int, ...]
    top: int


class BlockingScorer(Protocol):
    """Scores many prompts in the calling thread."""

    def score(self, jobs: Sequence[ScoreJob]) -> list[Scored]: ...

    def close(self) -> None: ...


class Engine(Protocol):
    """One loaded model."""

    context: int
    """Most tokens of prompt and answer together."""
    vocabulary: int
    """Token ids are below it."""

    def chat(self, request: ChatRequest) -> AsyncGenerator[Json, None]:
        """Chunks of a chat completion: ``choices`` with deltas, at the end ``usage``.

        Raises RequestError (before the first chunk) for what this model cannot do.
        """
        ...

    def complete(self, request: CompletionRequest, prompt: Prompt) -> AsyncGenerator[Json, None]:
        """Chunks of one prompt's completion, logprobs in the completions route's own form."""
        ...

    async def score(self, tokens: Sequence[int], top: int) -> Scored:
        """Logprobs of given tokens; calls made together are computed together."""
        ...

    async def tokenize(self, text: str) -> list[int]:
        """Token ids of a prompt's text, with the tokens the model wants at the start."""
        ...

    async def pieces(self, tokens: Sequence[int]) -> list[bytes]:
        """The bytes each token stands for; control tokens show as their name."""
        ...

    async def close(self) -> None: ...


def cpu_threads(threads: int) -> int:
    """Threads to compute with: as configured, or one for each core this process may use."""
    if threads > 0:
        return threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
