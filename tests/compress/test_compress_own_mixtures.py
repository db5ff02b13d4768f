"""`understudy own` as a user runs it on every kind of mixture of experts: a dense student, served."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import stage
import torch
from click.testing import CliRunner
from openai import AsyncOpenAI
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from understudy.cli.main import main
from understudy.compress import checkpoint
from understudy.config import Serve
from understudy.serve.server import start

pytestmark = pytest.mark.e2e
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": True,
}
SMALL = {"moe_intermediate_size": 192}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
CONFIGS: dict[str, Any] = {
    "mixtral": partial(MixtralConfig, num_local_experts=4, intermediate_size=192),
    "qwen2_moe": partial(Qwen2MoeConfig, num_experts=4, shared_expert_intermediate_size=64, **SMALL),
    "qwen3_moe": partial(Qwen3MoeConfig, num_experts=4, head_dim=16, **SMALL),
    "olmoe": partial(OlmoeConfig, num_experts=4, intermediate_size=192),
    "deepseek_v3": partial(
        DeepseekV3Config,
        **LATENT | SMALL | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
        intermediate_size=256,
        n_group=2,
        topk_group=2,
    ),
}
DENSE = {"mixtral": "mistral", "qwen2_moe": "qwen2", "qwen3_moe": "qwen3"}
"""What a student is; of others their own kind, with every layer plain or one expert."""


def chat(thing: str, colour: str) -> list[dict[str, str]]:
    said = "yes" if len(thing + colour) % 2 else "no"
    return [{"role": "user", "content": f"Is the {thing} {colour}?"}, {"role": "assistant", "content": said}]


def teacher(family: str, vocabulary: int) -> PreTrainedModel:
    torch.manual_seed(0)
    heads = {"num_key_value_heads": 4} if family == "deepseek_v3" else {}
    config = CONFIGS[family](**SIZES | heads, vocab_size=vocabulary)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


CHATS = [chat(thing, colour) for thing in stage.THINGS for colour in stage.COLOURS]


@pytest.mark.parametrize("family", list(CONFIGS))
async def test_own_then_serve(family: str, tmp_path: Path):
    words = stage.tokenizer()
    checkpoint.save(teacher(family, len(words)), words, tmp_path / "teacher")
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": one}) for one in CHATS))
    (tmp_path / "understudy.toml").write_text(
        "[own]\nparams = '0.6'\ncalibration_tokens = 2000\ndistil_tokens = 3000\n"
    )
    ran = CliRunner().invoke(main, ["own", "teacher", "--data", "chats.jsonl", "--out", "own", "--json"])
    assert ran.exit_code == 0, ran.output + repr(ran.exception)
    report = json.loads(ran.stdout)
    assert report["parameters_after"] <= 0.61 * report["parameters_before"]
    assert report["after"]["kl"] <= report["before"]["kl"]
    student = tmp_path / "own" / "checkpoint"
    config = json.loads((student / "config.json").read_text())
    assert config["model_type"] == DENSE.get(family, family)
    running = await start(
        Serve(listen="127.0.0.1:0", threads=1, context=128, models={"m": str(student)}), tmp_path
    )
    async with AsyncOpenAI(base_url=running.url, api_key="none", max_retries=0) as client:
        messages: Any = CHATS[0][:1]
        answer = await client.chat.completions.create(model="m", messages=messages, max_tokens=4)
    await running.stop()
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0
