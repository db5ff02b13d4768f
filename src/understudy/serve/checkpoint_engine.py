"""A checkpoint folder in transformers: for models that see or hear, or are not (yet) exported to GGUF.

Weights are computed in float32, one request after the other: correct before fast. Pictures and sound come as
data in the request and go through the model's own processor. It ignores grammars, tools and penalties, and
refuses requests that ask for them; GGUF files serve them all (llamacpp).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from understudy import processor
from understudy.config import Serve
from understudy.errors import InputError, MissingExtraError, ModelError
from understudy.protocol import Json
from understudy.serve.engine import Scored, ScoreJob, TokenScore, cpu_threads
from understudy.serve.logprobs import TextLogprobs, chat_logprobs
from understudy.serve.request import ChatRequest, CompletionRequest, Prompt, RequestError, Sampling
from understudy.serve.sampling import TextCutter, draw
from understudy.serve.scoring import ScoreQueue
from understudy.serve.token_bytes import piece

if TYPE_CHECKING:
    import torch

SCORE_TOKENS = 512
"""Tokens scored in one forward pass; bounds the memory for logits."""
_REFUSED = (
    *("tools", "tool_choice", "parallel_tool_calls", "response_format"),
    *("logit_bias", "presence_penalty", "frequency_penalty", "repeat_penalty"),
)


class _Step(NamedTuple):
    """A generated token: the text it releases, its logprobs in the chat form, why it is the last."""

    text: str
    entry: Json | None
    finish: str | None


class CheckpointEngine:
    """One checkpoint folder. Make it with `open`."""

    def __init__(self, model: Any, tokenizer: Any, context: int, processor: Any = None) -> None:
        text = model.config.get_text_config()
        self.context = min(context, int(getattr(text, "max_position_embeddings", context)))
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self._model = model
        self._tokenizer = tokenizer
        self._processor = processor
        self._added: dict[int, Any] = dict(tokenizer.added_tokens_decoder)
        self._ends = _end_tokens(model, tokenizer)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._scores = ScoreQueue(lambda: _CheckpointScorer(model))

    @classmethod
    async def open(cls, folder: Path, settings: Serve) -> CheckpointEngine:
        """Load a checkpoint. Raises ModelError for a folder that transformers cannot load."""
        model, tokenizer, eyes = await asyncio.to_thread(_load, folder, cpu_threads(settings.threads))
        return cls(model, tokenizer, settings.context, eyes)

    async def chat(self, request: ChatRequest) -> AsyncGenerator[Json, None]:
        tokens, shown = await asyncio.to_thread(self._read, request.messages)
        self._check(request, tokens)
        top = (request.top_logprobs or 0) if request.logprobs else None
        limit = self.context if request.limit is None else request.limit
        for index in range(request.n or 1):
            yield _chunk(index, {"delta": {"role": "assistant", "content": ""}})
            async with aclosing(self._generate(request, tokens, limit, top, index, shown)) as steps:
                async for step in steps:
                    delta = {"content": step.text} if step.text else {}
                    logprobs = chat_logprobs(step.entry and {"content": [step.entry]}, top)
                    yield _chunk(index, {"delta": delta, "logprobs": logprobs}, step.finish, tokens)

    async def complete(self, request: CompletionRequest, prompt: Prompt) -> AsyncGenerator[Json, None]:
        tokens = await self.tokenize(prompt) if isinstance(prompt, str) else prompt
        for index in range(request.n or 1):
            form = TextLogprobs(request.logprobs or 0)
            steps = self._generate(request, tokens, request.limit, request.logprobs, index)
            async with aclosing(steps):
                async for step in steps:
                    logprobs = form.take(step.entry and {"content": [step.entry]})
                    yield _chunk(index, {"text": step.text, "logprobs": logprobs}, step.finish, tokens)

    async def _generate(
        self,
        request: Sampling,
        tokens: Sequence[int],
        limit: int,
        top: int | None,
        index: int,
        shown: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> AsyncGenerator[_Step, None]:
        """Steps from the engine's thread. Closing it stops that thread after the token in hand."""
        self._check(request, tokens)
        loop = asyncio.get_running_loop()
        steps: asyncio.Queue[_Step | None] = asyncio.Queue()
        gone = threading.Event()

        def work() -> None:
            try:
                most = min(limit, self.context - len(tokens))
                logits = _Predictions(self._model, tokens, shown)
                for step in self._steps(request, logits, most, top, index):
                    loop.call_soon_threadsafe(steps.put_nowait, step)
                    if gone.is_set():
                        return
            finally:
                loop.call_soon_threadsafe(steps.put_nowait, None)

        working = loop.run_in_executor(self._thread, work)
        try:
            while (step := await steps.get()) is not None:
                yield step
            await working
        finally:
            gone.set()

    def _check(self, request: Sampling, tokens: Sequence[int]) -> None:
        for name in _REFUSED:
            if getattr(request, name, None):
                raise RequestError(f"{name} is not supported by the checkpoint engine", param=name)
        if len(tokens) >= self.context:
            raise RequestError(
                f"the prompt has {len(tokens)} tokens; this model's context is {self.context}",
                code="context_length_exceeded",
            )

    def _steps(
        self, request: Sampling, predictions: _Predictions, limit: int, top: int | None, index: int
    ) -> Iterator[_Step]:
        import torch

        generator = torch.Generator()
        seeded = request.seed is not None
        generator.manual_seed(cast(int, request.seed) + index) if seeded else generator.seed()
        cutter = TextCutter(request.stops)
        made: list[int] = []
        for logits in predictions.after(made):
            token = draw(logits, request, generator)
            ended = token in self._ends
            if not ended:
                made.append(token)
            text = self._tokenizer.decode(made, skip_special_tokens=True)
            entry = None if ended or top is None else self._entry(logits, token, top)
            released = cutter.grow(text)
            finish = "stop" if ended or cutter.stopped else "length" if len(made) >= limit else None
            if finish and not cutter.stopped:
                released += cutter.finish(text)
            yield _Step(released, entry, finish)
            if finish:
                return

    def _entry(self, logits: torch.Tensor, token: int, top: int) -> Json:
        logprobs = logits.log_softmax(-1)
        values, best = logprobs.topk(max(top, 1))
        likeliest = zip(best.tolist(), values.tolist(), strict=True)
        named = [self._named(other, value) for other, value in likeliest]
        return {**self._named(token, float(logprobs[token])), "top_logprobs": named}

    def _named(self, token: int, logprob: float) -> Json:
        raw = piece(self._tokenizer, token, self._added)
        return {"token": raw.decode(errors="replace"), "bytes": list(raw), "logprob": logprob}

    def _read(self, messages: list[Json]) -> tuple[list[int], Mapping[str, torch.Tensor]]:
        """Tokens of a chat, and what its pictures and sounds are to the model."""
        if self._processor is None:
            return self._render(messages), {}
        try:
            opened, parts = processor.opened(messages)
            text = processor.rendered(self._processor, opened, prompt=True)
            made = processor.processed(self._processor, text, parts)
        except InputError as error:
            raise RequestError(str(error), param="messages") from error
        tokens = cast(list[int], made["input_ids"][0].tolist())
        return tokens, {name: value for name, value in made.items() if name not in processor.OF_TEXT}

    def _render(self, messages: list[Json]) -> list[int]:
        if any(isinstance(message.get("content"), list) for message in messages):
            messages = [_plain(message, index) for index, message in enumerate(messages)]
        if not self._tokenizer.chat_template:
            raise RequestError("this model has no chat template; use /v1/completions", param="messages")
        rendered = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return cast(list[int], rendered["input_ids"])

    async def score(self, tokens: Sequence[int], top: int) -> Scored:
        return await self._scores.score(tokens, top)

    async def tokenize(self, text: str) -> list[int]:
        return cast(list[int], self._tokenizer(text)["input_ids"])

    async def pieces(self, tokens: Sequence[int]) -> list[bytes]:
        return [piece(self._tokenizer, token, self._added) for token in tokens]

    async def close(self) -> None:
        await self._scores.close()
        self._thread.shutdown(wait=False, cancel_futures=True)


def _chunk(index: int, piece: Json, finish: str | None = None, tokens: Sequence[int] = ()) -> Json:
    """One choice's chunk. Each carries its share of the usage: a token, and the prompt once."""
    choice = {"index": index, "logprobs": None, **piece, "finish_reason": finish}
    usage = {"completion_tokens": 1, "prompt_tokens": len(tokens) if finish and index == 0 else 0}
    return {"choices": [choice], **({"usage": usage} if tokens else {})}


def _plain(message: Json, index: int) -> Json:
    """A message of text parts as one text. Raises RequestError for parts that a text model cannot take."""
    parts = cast("list[Json]", message.get("content") if isinstance(message.get("content"), list) else [])
    for part in parts:
        if part.get("type") != "text":
            raise RequestError(
                f"this model reads text only, not {part.get('type')!r}", param=f"messages[{index}].content"
            )
    return (
        {**message, "content": "".join(str(part.get("text") or "") for part in parts)} if parts else message
    )


def _load(folder: Path, threads: int) -> tuple[Any, Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingExtraError(error.name or "transformers", "serve") from error
    torch.set_num_threads(threads)
    try:
        sees = any((folder / name).is_file() for name in processor.FILES if "processor" in name)
        eyes = processor.load(str(folder)) if sees else None
        tokenizer = eyes.tokenizer if eyes else transformers.AutoTokenizer.from_pretrained(folder)
        kind = transformers.AutoModelForMultimodalLM if sees else transformers.AutoModelForCausalLM
        model = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"transformers cannot load {folder}: {error}",
            expected="a checkpoint folder with config.json, weights and tokenizer",
        ) from error
    return model.eval(), tokenizer, eyes


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    ends = model.generation_config.eos_token_id
    listed = ends if isinstance(ends, list) else [ends]
    return frozenset(int(t) for t in [*listed, tokenizer.eos_token_id] if t is not None)


class _Predictions:
    """Logits of the next token, again and again, behind a prompt and what it shows."""

    def __init__(self, model: Any, tokens: Sequence[int], shown: Mapping[str, torch.Tensor]) -> None:
        self._model, self._tokens, self._shown = model, list(tokens), shown

    def after(self, made: list[int]) -> Iterator[torch.Tensor]:
        """``made`` is read for the token chosen last."""
        import torch

        inner: Any = getattr(self._model, "model", None)
        if getattr(inner, "rope_deltas", None) is not None:
            inner.rope_deltas = None  # of the chat before this one
        fed, past, shown = self._tokens, None, dict(self._shown)
        while True:
            with torch.inference_mode():
                ids = torch.tensor([fed])
                out = self._model(
                    input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1, **shown
                )
            yield out.logits[0, -1].float()
            fed, past, shown = made[-1:], out.past_key_values, self._later()

    def _later(self) -> dict[str, torch.Tensor]:
        """What a model that reads pictures by cross-attention is to see of them behind the prompt."""
        seen = self._shown.get("cross_attention_mask")
        return {} if seen is None else {"cross_attention_mask": seen[:, -1:]}


class _CheckpointScorer:
    """Scores by full forward passes over padded batches."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def score(self, jobs: Sequence[ScoreJob]) -> list[Scored]:
        order = sorted(range(len(jobs)), key=lambda index: len(jobs[index].tokens))
        scores: dict[int, Scored] = {}
        while order:
            longest = len(jobs[order[-1]].tokens)
            batch = [order.pop() for _ in range(max(1, min(len(order), SCORE_TOKENS // longest)))]
            scores.update(zip(batch, self._batch([jobs[index] for index in batch]), strict=True))
        return [scores[index] for index in range(len(jobs))]

    def _batch(self, jobs: Sequence[ScoreJob]) -> list[Scored]:
        import torch

        longest = max(len(job.tokens) for job in jobs)
        ids = torch.tensor([[*job.tokens, *[0] * (longest - len(job.tokens))] for job in jobs])
        mask = torch.tensor([[1] * len(j.tokens) + [0] * (longest - len(j.tokens)) for j in jobs])
        with torch.inference_mode():
            logprobs = self._model(ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
        return [_scored(row, job) for row, job in zip(logprobs, jobs, strict=True)]

    def close(self) -> None:
        """The engine owns the model."""


def _scored(logprobs: torch.Tensor, job: ScoreJob) -> Scored:
    """``logprobs`` of shape (longest, vocabulary) for one job."""
    values, best = logprobs[: len(job.tokens)].topk(job.top)
    tops: list[tuple[tuple[int, float], ...]] = [
        tuple(zip(b, v, strict=True)) for b, v in zip(best.tolist(), values.tolist(), strict=True)
    ]
    tokens = [TokenScore(job.tokens[0], None, ())]
    for place, token in enumerate(job.tokens[1:]):
        tokens.append(TokenScore(token, float(logprobs[place, token]), tops[place]))
    return Scored(tuple(tokens), tops[-1])
