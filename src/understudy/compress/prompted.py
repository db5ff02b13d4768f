"""A teacher behind a vLLM server: what it says of texts as they are, by `prompt_logprobs`.

The student's own tokens are the prompt, and nothing is answered anew: each position comes back with its
likeliest tokens and the one that stands there, and all others are one bucket. Teacher and student must have
one tokenizer; what the server calls the tokens is held against the student's. It ignores hosted models that
tell only of their own answers (answers), and pictures, which are no tokens.

Source: docs.vllm.ai, OpenAI-compatible server: extra parameters of completions, and `prompt_logprobs` of
a choice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import TYPE_CHECKING, Any, Self, cast

import msgspec

from understudy.compress.align import UNKNOWN, Guess, told_of
from understudy.compress.document import Document
from understudy.compress.targets import Told
from understudy.endpoint import Endpoint
from understudy.errors import EndpointError, InputError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LIKELIEST = 20
"""vLLM's default for --max-logprobs."""
TOP = LIKELIEST + 1
"""The token that stands there may be none of the likeliest."""
STRANGE = 0.1
"""Share of tokens with another text from which the tokenizers are two: texts of single tokens may differ by a
server's version, but those of another tokenizer differ nearly everywhere."""

Connect = Callable[[], AbstractAsyncContextManager[Endpoint]]


class Likely(msgspec.Struct):
    """One token of a position, as vLLM tells it."""

    logprob: float
    decoded_token: str | None = None


class Prompted:
    """A server that is asked of texts; use as ``with``. ``told`` is a `capture.Tell`.

    One client for all of them, so that connections are used again and a pace is kept from one call to the
    next.
    """

    def __init__(
        self, connect: Connect, tokenizer: PreTrainedTokenizerBase, vocab: int, concurrency: int = 8
    ) -> None:
        """``connect`` opens the endpoint; ``vocab`` is the student's."""
        self._connect, self._tokenizer, self._vocab = connect, tokenizer, vocab
        self._concurrency = concurrency
        self._runner, self._stack = asyncio.Runner(), AsyncExitStack()

    def __enter__(self) -> Self:
        self._endpoint = self._runner.run(self._stack.enter_async_context(self._connect()))
        return self

    def __exit__(self, *error: object) -> None:
        self._runner.run(self._stack.aclose())
        self._runner.close()

    def told(self, documents: Sequence[Document]) -> list[Told]:
        """What it says of each text.

        Raises EndpointError when it does not answer or tells nothing of prompts, ModelError when its tokens
        are others, and InputError for pictures or sound.
        """
        if any(d.media for d in documents):
            raise InputError("pictures or sound for a server that is sent tokens", expected="texts alone")
        return self._runner.run(self._all(documents))

    async def _all(self, documents: Sequence[Document]) -> list[Told]:
        gate = asyncio.Semaphore(self._concurrency)

        async def one(document: Document) -> Told:
            async with gate:
                return await self._one(self._endpoint, document.tokens)

        return await asyncio.gather(*map(one, documents))

    async def _one(self, endpoint: Endpoint, tokens: list[int]) -> Told:
        # a server refuses max_tokens = 0 without echo: the one token that it adds is thrown away
        asked = {"prompt": tokens, "max_tokens": 1, "temperature": 0, "prompt_logprobs": LIKELIEST}
        answer = await endpoint.complete(asked)
        places = _places(answer.body, len(tokens), endpoint.name)
        self._require_same_texts(places, endpoint.name)
        return told_of([self._guess(place) for place in places[1:]], TOP)

    def _guess(self, place: Mapping[int, Likely] | None) -> Guess:
        """Tokens beyond the student's vocabulary are left to the bucket."""
        found = {token: one.logprob for token, one in (place or {}).items() if 0 <= token < self._vocab}
        return Guess(list(found), list(found.values())) if found else UNKNOWN

    def _require_same_texts(self, places: Sequence[Mapping[int, Likely] | None], name: str) -> None:
        texts = {token: one.decoded_token for place in places for token, one in (place or {}).items()}
        both = [
            (token, said, self._text(token)) for token, said in texts.items() if said and token < self._vocab
        ]
        # a token that is part of a character has no text of its own
        both = [pair for pair in both if "\ufffd" not in pair[1] + pair[2]]
        strange = [pair for pair in both if pair[1].strip() != pair[2].strip()]
        if len(strange) > STRANGE * len(both):
            token, said, own = strange[0]
            raise ModelError(
                f"{name} has another tokenizer: its token {token} is {said!r}, the student's is {own!r}",
                expected="a teacher whose tokens are the student's",
                next_step=f"understudy distil recorded STUDENT --generate {name}: its texts alone",
            )

    def _text(self, token: int) -> str:
        return cast(str, cast(Any, self._tokenizer).decode([token]))


def _places(body: Mapping[str, Any], count: int, name: str) -> list[dict[int, Likely] | None]:
    """Of each token of the prompt what was told; nothing of the first. Raises EndpointError."""
    choices = cast("list[Mapping[str, Any]]", body.get("choices") or [{}])
    told = choices[0].get("prompt_logprobs")
    try:
        places = msgspec.convert(told, list[dict[int, Likely] | None], str_keys=True)
    except msgspec.ValidationError as fault:
        raise _untold(name, "nothing of the prompt's tokens" if told is None else str(fault)) from fault
    if len(places) != count:
        raise _untold(name, f"of {len(places):,} tokens where {count:,} were sent")
    return places


def _untold(name: str, what: str) -> EndpointError:
    return EndpointError(
        f"{name} told {what}",
        expected="a vLLM server, whose completions honour `prompt_logprobs`",
        next_step=f"understudy capture {name}: what a hosted model says of its own answers",
    )
