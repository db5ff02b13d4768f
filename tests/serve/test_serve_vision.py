"""Students that see or hear, over the OpenAI routes: the `openai` client sends a picture."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import seeing
import torch
from openai import AsyncOpenAI, BadRequestError

from understudy import processor
from understudy.config import Serve
from understudy.serve.server import start

FAMILIES = ["idefics3", "qwen2_vl", "mllama", "gemma3", "qwen2_audio", "voxtral"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("seeing")
    return {family: seeing.saved(family, root / family, seed=4) for family in FAMILIES}


@pytest.fixture
async def client(folders: dict[str, Path], tmp_path: Path) -> AsyncIterator[AsyncOpenAI]:
    models = {family: str(folder) for family, folder in folders.items()}
    async with serving(models, tmp_path) as client:
        yield client


@asynccontextmanager
async def serving(models: dict[str, str], root: Path) -> AsyncIterator[AsyncOpenAI]:
    running = await start(Serve(listen="127.0.0.1:0", threads=1, context=128, models=models), root)
    async with AsyncOpenAI(base_url=running.url, api_key="none", max_retries=0) as client:
        yield client
    await running.stop()


def asked(family: str, number: int) -> list[dict[str, Any]]:
    return seeing.chats("audio" if family in ("qwen2_audio", "voxtral") else "image")[number][:1]


def oracle(family: str, folder: Path, messages: list[dict[str, Any]], count: int) -> str:
    """Greedy decoding without any cache, by the model's own forward on ever longer texts."""
    from transformers import AutoModelForMultimodalLM

    eyes = seeing.processor_of(family)
    model = AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32)
    opened, parts = processor.opened(messages)
    made = processor.processed(eyes, processor.rendered(eyes, opened, prompt=True), parts)
    shown = {name: value for name, value in made.items() if name not in processor.OF_TEXT}
    tokens: list[int] = made["input_ids"][0].tolist()
    first = len(tokens)
    with torch.no_grad():
        while len(tokens) < first + count:
            given = {name: _longer(value, name, len(tokens)) for name, value in shown.items()}
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False, **given).logits
            tokens.append(int(logits[0, -1].argmax()))
            if tokens[-1] == 2:
                break
    return eyes.tokenizer.decode(tokens[first:], skip_special_tokens=True)


def _longer(value: torch.Tensor, name: str, length: int) -> torch.Tensor:
    if name not in ("token_type_ids", "mm_token_type_ids", "cross_attention_mask"):
        return value
    last = value[:, -1:] if name == "cross_attention_mask" else torch.zeros_like(value[:, -1:])
    return torch.cat([value, *[last] * (length - value.shape[1])], dim=1)


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_picture_sent_by_the_openai_client_is_answered_as_the_model_itself_would(
    family, folders, client
):
    messages = asked(family, 1)
    answer = await client.chat.completions.create(
        model=family, messages=messages, temperature=0, max_tokens=6
    )
    assert answer.choices[0].message.content == oracle(family, folders[family], messages, 6)
    other = await client.chat.completions.create(
        model=family, messages=asked(family, 2), temperature=0, max_tokens=1, logprobs=True
    )
    first = await client.chat.completions.create(
        model=family, messages=messages, temperature=0, max_tokens=1, logprobs=True
    )
    assert first.choices[0].logprobs.content[0].logprob != other.choices[0].logprobs.content[0].logprob
    assert answer.usage.prompt_tokens > len(["user", "what", "is", "the", "color", "assistant"])


async def test_a_server_reads_no_file_and_fetches_nothing(client, tmp_path: Path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    for url in (str(tmp_path / "secret.png"), f"file://{tmp_path}/secret.png", "http://127.0.0.1:1/a.png"):
        message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
        with pytest.raises(BadRequestError, match="lies elsewhere"):
            await client.chat.completions.create(model="idefics3", messages=[message])


async def test_a_text_model_says_that_it_reads_text_only(checkpoint: Path, tmp_path: Path):
    async with serving({"blind": str(checkpoint)}, tmp_path) as client:
        with pytest.raises(BadRequestError, match="text only"):
            await client.chat.completions.create(model="blind", messages=asked("idefics3", 0))
        words = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
        answer = await client.chat.completions.create(model="blind", messages=words, max_tokens=2)
        assert answer.usage.completion_tokens <= 2
