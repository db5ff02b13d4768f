"""One of our endpoints as a model of lm-evaluation-harness; imports `lm_eval`, so only harness imports it.

The harness speaks text and so do we: no tokenizer is needed on this side. Which tokens are a continuation's
is told by the offsets the endpoint returns. It ignores log-probabilities over chat, which no API gives.

Source: lm-evaluation-harness 0.4.13, lm_eval/models/api_models.py (trailing spaces of a context go to its
continuation) and openai_completions.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple, TypeVar, cast

import msgspec

from understudy.endpoint import Endpoint
from understudy.errors import EndpointError
from understudy.evaluate.benchmarks import PROMPTS_PER_REQUEST, cannot_score
from understudy.evaluate.workers import side_by_side
from understudy.protocol import Json

MOST_STOPS = 4
"""Stop sequences that OpenAI's API takes; the others are cut off here."""
TOLERANCE = 1e-6

T = TypeVar("T")
_LM: Any = import_module("lm_eval.api.model").LM


class Likelihood(NamedTuple):
    """What the harness wants to know of a continuation."""

    logprob: float
    """In nats."""
    greedy: bool
    """Whether each of its tokens was the likeliest."""


class EndpointLM(_LM):  # type: ignore[misc]  (the harness is an extra, and untyped)
    """An endpoint as the harness sees a model; ``runner`` is where its calls are awaited."""

    def __init__(
        self, endpoint: Endpoint, runner: asyncio.Runner, *, chat: bool = False, concurrency: int = 8
    ) -> None:
        super().__init__()
        self._endpoint = endpoint
        self._runner = runner
        self._chat = chat
        self._concurrency = concurrency

    @property
    def tokenizer_name(self) -> str:
        return self._endpoint.name

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The messages as they are: the endpoint has the template."""
        return msgspec.json.encode(chat_history).decode()

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        pairs = [_parted(*request.args) for request in requests]
        return [(found.logprob, found.greedy) for found in self._scored(pairs)]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Without a token before the first one, whose own log-probability nobody can tell: it is left out."""
        return [found.logprob for found in self._scored([("", str(r.args[0])) for r in requests])]

    def generate_until(self, requests: list[Any]) -> list[str]:
        jobs = [(str(r.args[0]), cast(Json, r.args[1])) for r in requests]
        return self._runner.run(_in_order(self._generate, jobs, self._concurrency))

    def _scored(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        if self._chat:
            raise EndpointError(
                f"{self._endpoint.name} cannot score prompts by chat",
                expected="a task that generates, or a completions route with echo and logprobs",
                next_step="leave out --chat, or choose a generative task (gsm8k, mmlu_generative)",
            )
        starts = range(0, len(pairs), PROMPTS_PER_REQUEST)
        batches = [pairs[start : start + PROMPTS_PER_REQUEST] for start in starts]
        found = self._runner.run(_in_order(self._score, batches, self._concurrency))
        return [one for batch in found for one in batch]

    async def _score(self, batch: Sequence[tuple[str, str]]) -> list[Likelihood]:
        prompts = [context + continuation for context, continuation in batch]
        asked = {"prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
        answer = await self._endpoint.complete(asked)
        choices = sorted(cast(list[Json], answer.body.get("choices") or []), key=lambda c: int(c["index"]))
        if len(choices) != len(batch):
            raise cannot_score(self._endpoint, f"{len(choices)} choices for {len(batch)} prompts")
        return [
            self._likelihood(context, continuation, cast(Json, choice.get("logprobs") or {}))
            for (context, continuation), choice in zip(batch, choices, strict=True)
        ]

    def _likelihood(self, context: str, continuation: str, logprobs: Json) -> Likelihood:
        offsets = cast(list[int], logprobs.get("text_offset") or [])
        values = cast(list[float | None], logprobs.get("token_logprobs") or [])
        tops = cast(list[dict[str, float] | None], logprobs.get("top_logprobs") or [None] * len(values))
        end = len(context) + len(continuation)
        inside = [
            (value, top)
            for value, offset, top in zip(values, offsets, tops, strict=False)
            if len(context) <= offset < end and value is not None
        ]
        if not inside:
            raise cannot_score(self._endpoint, "no log-probabilities of the prompt")
        greedy = all(value >= max((top or {}).values(), default=value) - TOLERANCE for value, top in inside)
        return Likelihood(sum(value for value, _ in inside), greedy)

    async def _generate(self, job: tuple[str, Json]) -> str:
        context, wanted = job
        until = cast(list[str] | str, wanted.get("until") or [])
        stops = [until] if isinstance(until, str) else until
        request: Json = {
            "max_tokens": int(wanted.get("max_gen_toks", 256)),
            "temperature": float(wanted.get("temperature", 0.0)) if wanted.get("do_sample") else 0.0,
        }
        if stops and not self._chat:
            request["stop"] = stops[:MOST_STOPS]
        if self._chat:
            answer = await self._endpoint.chat({**request, "messages": msgspec.json.decode(context)})
        else:
            answer = await self._endpoint.complete({**request, "prompt": context})
        return _cut(answer.text, stops)


def _parted(context: str, continuation: str) -> tuple[str, str]:
    """Spaces that end the context begin the continuation, where tokenizers keep them."""
    plain = context.rstrip()
    return plain, context[len(plain) :] + continuation


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.partition(stop)[0] if stop else text
    return text


async def _in_order(work: Callable[[Any], Awaitable[T]], jobs: Sequence[Any], concurrency: int) -> list[T]:
    """Results in the order of the jobs, at most ``concurrency`` at work; the first error ends all."""
    waiting = iter(enumerate(jobs))
    done: dict[int, T] = {}

    async def turn() -> None:
        for place, job in waiting:
            done[place] = await work(job)

    await side_by_side(turn, concurrency)
    return [done[place] for place in range(len(jobs))]
