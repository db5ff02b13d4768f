"""A teacher behind vLLM's `prompt_logprobs`: a server of that shape with a real tiny model behind it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestServer
from click.testing import CliRunner, Result
from prompt_logprobs import Vllm

from understudy.cli.capture import capture as capture_command
from understudy.cli.distil import distil as distil_command
from understudy.compress.corpus import Document
from understudy.compress.prompted import LIKELIEST, TOP, Prompted
from understudy.compress.targets import sparse
from understudy.endpoint import HttpEndpoint
from understudy.errors import EndpointError, InputError, ModelError


@pytest.fixture
async def vllm(make, tokenizer):
    served = Vllm(make(seed=3), tokenizer)
    app = web.Application()
    app.router.add_post("/v1/completions", served.respond)
    async with TestServer(app) as server:
        served.url = str(server.make_url("/v1"))  # pyright: ignore[reportAttributeAccessIssue]
        yield served


def asking(vllm: Any, tokenizer: Any, vocab: int = 48) -> Prompted:
    return Prompted(lambda: HttpEndpoint("vllm/large", vllm.url, "large"), tokenizer, vocab)


async def told(prompted: Prompted, documents: list[Document]) -> list[Any]:
    """It brings an event loop of its own, and is asked batch by batch."""

    def ask() -> list[Any]:
        with prompted:
            return [one for document in documents for one in prompted.told([document])]

    return await asyncio.to_thread(ask)


async def test_prompts_become_the_teachers_own_distribution(vllm, tokenizer, documents):
    first = documents[3]
    signal = sparse((await told(asking(vllm, tokenizer), [first]))[0], 48)
    exact = vllm.log_p(first.tokens)[:-1].exp()
    assert bool(signal.known.all())
    assert signal.tokens.shape == (len(first.tokens) - 1, TOP)
    named = exact.gather(1, signal.tokens) * (signal.mass > 0)
    torch.testing.assert_close(signal.mass, named, rtol=3e-3, atol=1e-5)
    torch.testing.assert_close(signal.rest, 1 - named.sum(-1), rtol=5e-3, atol=2e-3)
    there = torch.tensor(first.tokens[1:])[:, None]
    assert bool((signal.tokens == there).any(-1).all())
    asked = vllm.asked[0]
    assert (asked["prompt"], asked["max_tokens"], asked["prompt_logprobs"]) == (first.tokens, 1, LIKELIEST)
    assert asked["model"] == "large"


async def test_tokens_that_the_student_has_not_are_left_to_the_bucket(vllm, tokenizer, documents):
    signal = sparse((await told(asking(vllm, tokenizer, 30), documents[:1]))[0], 30)
    exact = vllm.log_p(documents[0].tokens)[:-1].exp()
    assert int(signal.tokens.max()) < 30
    assert bool((signal.rest >= exact[:, 30:].topk(1).values[:, 0] - 2e-3).all())


async def test_all_batches_go_through_one_client(vllm, tokenizer, documents):
    opened: list[HttpEndpoint] = []

    def connect() -> HttpEndpoint:
        opened.append(HttpEndpoint("vllm/large", vllm.url, "large"))
        return opened[-1]

    assert len(await told(Prompted(connect, tokenizer, 48), documents[:3])) == len(vllm.asked) == 3
    assert len(opened) == 1


async def test_another_tokenizer_is_refused(vllm, tokenizer, documents):
    class Shifted:
        def decode(self, tokens: list[int]) -> str:
            return tokenizer.decode([token + 1 for token in tokens])

    vllm.tokenizer = Shifted()
    with pytest.raises(ModelError, match="another tokenizer: its token"):
        await told(asking(vllm, tokenizer), documents[:1])


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (None, "nothing of the prompt's tokens"),
        ([None, {"3": {"logprob": -0.5}}], "of 2 tokens where"),
        ([None, {"3": {"rank": 1}}], "logprob"),
    ],
)
async def test_a_server_that_is_no_vllm_is_named(said, message, vllm, tokenizer, documents):
    vllm.told = said
    with pytest.raises(EndpointError, match=message) as fault:
        await told(asking(vllm, tokenizer), documents[:1])
    assert "prompt_logprobs" in fault.value.expected


def run(command: Any, *arguments: Any, fails: bool = False) -> Result:
    result = CliRunner().invoke(command, [str(a) for a in arguments])
    if result.exception and not (fails or isinstance(result.exception, SystemExit)):
        raise result.exception
    assert (result.exit_code != 0) is fails, result.output
    return result


async def test_distil_by_an_endpoint_of_the_config(vllm, make, tokenizer, chats, tmp_path: Path):
    from understudy.compress.checkpoint import save

    student, data = save(make(seed=1), tokenizer, tmp_path / "student"), tmp_path / "chats.jsonl"
    data.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    config = tmp_path / "understudy.toml"
    config.write_text(f'[endpoints.cluster]\nbase_url = "{vllm.url}"\n')
    common = ("--data", data, "--config", config)
    heal = ("cluster/large", student, "--out", tmp_path / "healed", "--tokens", 1500, *common)
    said = await asyncio.to_thread(run, distil_command, *heal, fails=True)
    assert "cluster/large is asked of 40 texts" in said.stderr
    assert vllm.asked == []
    rate = ("--learning-rate", "3e-3", "--json", "--yes")
    curve = json.loads((await asyncio.to_thread(run, distil_command, *heal, *rate)).stdout)
    assert curve["checks"][-1]["kl"] < 0.9 * curve["checks"][0]["kl"]
    paid = len(vllm.asked)
    assert 0 < paid <= 40
    again = ("cluster/large", student, "--out", tmp_path / "healed", "--tokens", 1500, *common, *rate)
    await asyncio.to_thread(run, distil_command, *again)
    assert len(vllm.asked) == paid
    captured = ("cluster/large", "--as-they-are", "--out", tmp_path / "healed.targets", *common, "--json")
    kept = await asyncio.to_thread(run, capture_command, *captured, "--student", student)
    assert json.loads(kept.stdout)["made"] == 0
    with pytest.raises(InputError, match="no tokens of its own"):
        await asyncio.to_thread(run, capture_command, *captured)
