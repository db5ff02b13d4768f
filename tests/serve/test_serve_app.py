"""The OpenAI routes, asked by the official client over a real socket."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
import torch
from openai import AsyncOpenAI
from serve_tokenizers import CORPUS
from transformers import AutoTokenizer

from understudy.config import Serve
from understudy.errors import AddressError
from understudy.serve.server import RunningServe, start

MESSAGES: list[Any] = [{"role": "user", "content": "Count to ten: 1 2 3"}]
ENGINES = pytest.mark.parametrize("model", ["tiny", "folder"])


@pytest.fixture
async def client(server: RunningServe) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


@ENGINES
async def test_a_streamed_chat_equals_an_unstreamed_one(client: AsyncOpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    whole = await client.chat.completions.create(**asked)
    stream = await client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content != ""
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 12
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens > 10
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert whole.model == model


async def test_usage_is_streamed_only_when_asked_for(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=2, temperature=0, stream=True
    )
    assert all(chunk.usage is None and chunk.choices for chunk in [c async for c in stream])


@ENGINES
async def test_chat_follows_the_template_and_the_reference(
    client: AsyncOpenAI, model: str, checkpoint: Path, reference: Any
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokens = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    answer = await client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=1, temperature=0, logprobs=True, top_logprobs=3
    )
    with torch.inference_mode():
        logprobs = reference(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
    expected, best = logprobs.topk(3)
    assert answer.choices[0].logprobs is not None
    [token] = answer.choices[0].logprobs.content or []
    assert [bytes(top.bytes or ()) for top in token.top_logprobs] == [
        tokenizer.decode([index]).encode() for index in best.tolist()
    ]
    assert [top.logprob for top in token.top_logprobs] == pytest.approx(expected.tolist(), abs=0.02)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(tokens)


@ENGINES
async def test_stop_strings_end_an_answer_before_them(client: AsyncOpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "messages": MESSAGES, "temperature": 0}
    text = (await client.chat.completions.create(**asked, max_tokens=12)).choices[0].message.content or ""
    stop = text[4:6]
    stopped = (await client.chat.completions.create(**asked, max_tokens=12, stop=[stop])).choices[0]
    assert stopped.message.content == text[: text.index(stop)]
    assert stopped.finish_reason == "stop"


@ENGINES
async def test_seeds_repeat_and_choices_differ(client: AsyncOpenAI, model: str) -> None:
    async def texts(seed: int) -> list[str]:
        answer = await client.chat.completions.create(
            model=model, messages=MESSAGES, max_tokens=16, temperature=1.5, seed=seed, n=2
        )
        return [choice.message.content or "" for choice in answer.choices]

    first = await texts(1)
    assert first == await texts(1)
    assert first[0] != first[1]
    assert first != await texts(2)


def reference_scores(model: Any, tokens: list[int]) -> list[float]:
    with torch.inference_mode():
        logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return [float(logprobs[place, token]) for place, token in enumerate(tokens[1:])]


@ENGINES
async def test_echoed_logprobs_are_those_of_the_reference(
    client: AsyncOpenAI, model: str, checkpoint: Path, reference: Any
) -> None:
    """What `lm_eval --model local-completions` sends: token ids, several prompts, one token more."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompts = [tokenizer(text)["input_ids"] for text in (*CORPUS, CORPUS[0] + " and more", CORPUS[0])]
    answer = await client.completions.create(
        model=model, prompt=prompts, max_tokens=1, temperature=0, echo=True, logprobs=1, seed=1234
    )
    assert [choice.index for choice in answer.choices] == list(range(len(prompts)))
    for tokens, choice in zip(prompts, answer.choices, strict=True):
        scores = choice.logprobs
        assert scores is not None
        assert scores.token_logprobs is not None
        assert scores.top_logprobs is not None
        assert scores.token_logprobs[0] is None
        assert scores.token_logprobs[1:-1] == pytest.approx(reference_scores(reference, tokens), abs=0.02)
        assert len(scores.token_logprobs) == len(tokens) + 1
        for value, top in zip(scores.token_logprobs[1:], scores.top_logprobs[1:], strict=True):
            assert max(top.values()) >= value
            assert sum(math.exp(logprob) for logprob in top.values()) <= 1 + 1e-5
        assert choice.text.startswith(tokenizer.decode(tokens))
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(tokens) for tokens in prompts)


@ENGINES
async def test_echo_scores_text_alone_and_text_with_more(client: AsyncOpenAI, model: str) -> None:
    asked: dict[str, Any] = {
        "model": model,
        "prompt": CORPUS[2],
        "temperature": 0,
        "echo": True,
        "logprobs": 2,
    }
    alone = (await client.completions.create(**asked, max_tokens=0)).choices[0]
    longer = (await client.completions.create(**asked, max_tokens=5)).choices[0]
    assert alone.text == CORPUS[2]
    assert alone.logprobs is not None
    assert longer.logprobs is not None
    assert longer.logprobs.token_logprobs is not None
    assert longer.logprobs.text_offset is not None
    count = len(alone.logprobs.token_logprobs or [])
    assert longer.logprobs.token_logprobs[1:count] == pytest.approx(
        (alone.logprobs.token_logprobs or [])[1:], abs=1e-3
    )
    assert longer.logprobs.text_offset == sorted(longer.logprobs.text_offset)
    assert longer.text.startswith(CORPUS[2])
    plain = await client.completions.create(model=model, prompt=CORPUS[2], temperature=0, max_tokens=5)
    assert longer.text == CORPUS[2] + plain.choices[0].text


async def test_completions_stream_several_prompts(client: AsyncOpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "prompt": ["one", "two"],
        "max_tokens": 4,
        "temperature": 0,
        "n": 2,
    }
    whole = await client.completions.create(**asked)
    stream = await client.completions.create(**asked, stream=True)
    texts = ["", "", "", ""]
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert texts[0] == texts[1] != texts[2]


async def test_json_schema_holds_the_model_to_its_form(client: AsyncOpenAI) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    answer = await client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=40,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "r", "schema": schema}},
    )
    assert (answer.choices[0].message.content or "").lstrip().startswith("{")


async def test_models_are_listed_once_their_files_exist(
    client: AsyncOpenAI, copy_later: Callable[[], None]
) -> None:
    assert [model.id async for model in client.models.list()] == ["tiny", "folder", "cut"]
    with pytest.raises(openai.NotFoundError, match=r"not there yet.*tiny, folder, cut"):
        await client.chat.completions.create(model="later", messages=MESSAGES, max_tokens=1)
    copy_later()
    assert (await client.models.retrieve("later")).id == "later"
    answer = await client.chat.completions.create(model="later", messages=MESSAGES, max_tokens=1)
    assert answer.model == "later"


async def test_errors_have_openai_shape(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.chat.completions.create(model="nobody", messages=MESSAGES)
    assert unknown.value.code == "model_not_found"
    assert "tiny, folder, cut" in str(unknown.value)
    with pytest.raises(openai.InternalServerError, match=r"is cut off: .* bytes"):
        await client.chat.completions.create(model="cut", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="reasoning_effort") as unsupported:
        await client.chat.completions.create(model="tiny", messages=MESSAGES, reasoning_effort="low")
    assert unsupported.value.param == "reasoning_effort"
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with pytest.raises(openai.BadRequestError) as no_tools:
        await client.chat.completions.create(model="tiny", messages=MESSAGES, tools=tools)
    assert no_tools.value.param == "tools"


@ENGINES
async def test_a_prompt_beyond_the_context_is_refused(client: AsyncOpenAI, model: str) -> None:
    long = "0 1 2 3 " * 60
    chat: Any = [{"role": "user", "content": long}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(model=model, messages=chat, stream=stream)
        assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as refused:
        await client.completions.create(model=model, prompt=long, echo=True, logprobs=1)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="not in the vocabulary"):
        await client.completions.create(model=model, prompt=[5, 999_999], echo=True, logprobs=1)


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"model": "tiny"}', b"\xff"])
async def test_bodies_that_are_no_request(server: RunningServe, body: bytes) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{server.url}/completions", data=body) as answer,
    ):
        assert answer.status == 400
        assert set((await answer.json())["error"]) == {"message", "type", "param", "code"}


async def test_unknown_routes_and_health(server: RunningServe) -> None:
    root = server.url.removesuffix("/v1")
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{root}/health") as answer:
            assert (await answer.json())["status"] == "ok"
        async with session.get(f"{root}/v1/nothing") as answer:
            assert answer.status == 404
            assert "error" in await answer.json()


async def _generated(server: RunningServe) -> int:
    """Tokens llama.cpp has generated for finished requests, and whether it is at rest: -1 while busy."""
    engine: Any = await server.models.engine("tiny")
    metrics = await engine.metrics()
    return -1 if metrics["requests_processing"] else int(metrics["tokens_predicted_total"])


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_cancels_its_generation(
    server: RunningServe, client: AsyncOpenAI, stream: bool
) -> None:
    await client.completions.create(model="tiny", prompt="a", max_tokens=1)
    before = await _generated(server)
    # 120 long answers of a hundred tokens: none of them can be finished before the client goes
    calls = [
        client.completions.create(
            model="tiny", prompt=[f"prompt {n} {m}" for m in range(10)], max_tokens=100, stream=stream, n=2
        )
        for n in range(6)
    ]
    tasks = [asyncio.ensure_future(call) for call in calls]
    await asyncio.sleep(0.02)
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, openai.AsyncStream):
            await outcome.close()
    after = -1
    for _ in range(500):
        after = await _generated(server)
        if after >= 0:
            break
        await asyncio.sleep(0.02)
    assert 0 <= after - before < 6_000


async def test_a_port_in_use_is_named(server: RunningServe, tmp_path: Path) -> None:
    port = server.url.split(":")[2].removesuffix("/v1")
    with pytest.raises(AddressError, match=port):
        await start(Serve(listen=f"127.0.0.1:{port}"), tmp_path)
