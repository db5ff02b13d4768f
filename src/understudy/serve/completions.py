"""Answers of the completions route: several prompts, echo, and scores of the prompts themselves.

With ``echo`` and ``logprobs`` the prompt is scored; one greedy token after it comes from the same scores, so
`lm_eval`, which asks for exactly that, costs no generation. It ignores the wire (app) and sampling (engine).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from understudy.protocol import Json
from understudy.serve.engine import Engine, Scored
from understudy.serve.logprobs import TextLogprobs
from understudy.serve.request import CompletionRequest, Prompt, RequestError

Chunks = AsyncGenerator[Json, None]


async def completion_chunks(engine: Engine, asked: CompletionRequest) -> Chunks:
    """Chunks of all prompts' completions, in order; choice k of prompt i has index i·n + k.

    The first prompt is relayed as it is generated, the others are generated meanwhile.
    """
    streams = [_one(engine, asked, prompt) for prompt in asked.prompts]
    later = [asyncio.create_task(_collect(stream)) for stream in streams[1:]]
    try:
        async with aclosing(streams[0]) as chunks:
            async for chunk in chunks:
                yield chunk
        for position, task in enumerate(later, start=1):
            for chunk in await task:
                for choice in chunk.get("choices", ()):
                    choice["index"] += position * (asked.n or 1)
                yield chunk
    finally:
        for task in later:
            task.cancel()
        await asyncio.gather(*later, return_exceptions=True)


async def _collect(stream: Chunks) -> list[Json]:
    async with aclosing(stream) as chunks:
        return [chunk async for chunk in chunks]


def _one(engine: Engine, asked: CompletionRequest, prompt: Prompt) -> Chunks:
    if asked.echo and asked.logprobs is not None:
        return _scored(engine, asked, prompt)
    return _generated(engine, asked, prompt)


async def _generated(engine: Engine, asked: CompletionRequest, prompt: Prompt) -> Chunks:
    if not prompt:
        prompt = await _tokens(engine, prompt)
    if asked.echo:
        text = prompt if isinstance(prompt, str) else _text(await engine.pieces(prompt))
        yield _chunk(asked, text)
    if asked.limit == 0:
        tokens = await _tokens(engine, prompt)
        yield {**_chunk(asked, "", finish="length"), "usage": {"prompt_tokens": len(tokens)}}
        return
    async with aclosing(engine.complete(asked, prompt)) as chunks:
        async for chunk in chunks:
            yield chunk


async def _scored(engine: Engine, asked: CompletionRequest, prompt: Prompt) -> Chunks:
    """The prompt with its logprobs, then what follows it."""
    tokens = await _tokens(engine, prompt)
    top = asked.logprobs or 0
    scored = await engine.score(tokens, max(top, 1))
    pieces = await _pieces(engine, scored)
    form = TextLogprobs(top)
    echoed = prompt if isinstance(prompt, str) else _text([pieces[token] for token in tokens])
    yield _chunk(asked, echoed, form.take_scored(scored, pieces))
    usage = {"prompt_tokens": len(tokens), "completion_tokens": min(asked.limit, 1)}
    if asked.limit == 0:
        yield {**_chunk(asked, "", finish="length"), "usage": usage}
    elif asked.limit == 1 and _greedy(asked):
        following = form.take_following(scored, pieces)
        text = pieces[scored.following[0][0]].decode(errors="replace")
        yield {**_chunk(asked, text, following, finish="length"), "usage": usage}
    else:
        async with aclosing(engine.complete(asked, tokens)) as chunks:
            async for chunk in chunks:
                for choice in chunk["choices"]:
                    if choice.get("logprobs"):
                        offsets = choice["logprobs"]["text_offset"]
                        choice["logprobs"]["text_offset"] = [len(echoed) + offset for offset in offsets]
                yield chunk


def _greedy(asked: CompletionRequest) -> bool:
    """Whether the likeliest token is the one to generate: nothing else has a say."""
    changed = asked.logit_bias or asked.presence_penalty or asked.frequency_penalty or asked.stops
    return asked.temperature == 0 and not changed and asked.repeat_penalty in (None, 1)


async def _tokens(engine: Engine, prompt: Prompt) -> list[int]:
    """A prompt's token ids. Raises RequestError for none, too many or unknown ones."""
    tokens = await engine.tokenize(prompt) if isinstance(prompt, str) else prompt
    if not tokens:
        raise RequestError("prompt: expected at least one token", param="prompt")
    if len(tokens) > engine.context:
        raise RequestError(
            f"the prompt has {len(tokens)} tokens; this model's context is {engine.context}",
            param="prompt",
            code="context_length_exceeded",
        )
    if max(tokens) >= engine.vocabulary:
        raise RequestError(
            f"prompt: token {max(tokens)} is not in the vocabulary of {engine.vocabulary}", param="prompt"
        )
    return tokens


async def _pieces(engine: Engine, scored: Scored) -> dict[int, bytes]:
    """The bytes of every token in a scored prompt."""
    tokens = {token.token for token in scored.tokens}
    tokens |= {other for token in scored.tokens for other, _ in token.top}
    tokens |= {other for other, _ in scored.following}
    ordered = sorted(tokens)
    return dict(zip(ordered, await engine.pieces(ordered), strict=True))


def _text(pieces: Sequence[bytes]) -> str:
    return b"".join(pieces).decode(errors="replace")


def _chunk(
    asked: CompletionRequest, text: str, logprobs: Json | None = None, finish: str | None = None
) -> Json:
    """The same piece for each of the n choices of a prompt."""
    one = {"text": text, "logprobs": logprobs, "finish_reason": finish}
    return {"choices": [{"index": index, **one} for index in range(asked.n or 1)]}
