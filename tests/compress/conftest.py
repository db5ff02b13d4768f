"""Two-layer models of every family, a tokenizer of our own words, and chats in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma3TextConfig,
    Glm4MoeConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from understudy.compress.corpus import Chat, Document, batches, encode_chat, pack

TEXT = "user assistant the cat dog sat on a mat is it warm cold yes no why because of sun moon and rain"
WORDS = TEXT.split()
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }} {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 48,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
ROUTED: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHARED: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "intermediate_size": 40,
    "n_group": 1,
    "topk_group": 1,
}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 6,
}
CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": LlamaConfig,
    "mistral": lambda **kw: MistralConfig(**{"sliding_window": 6} | kw),
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma3_text": lambda **kw: Gemma3TextConfig(
        **{
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
            "final_logit_softcapping": 9.0,
        }
        | kw
    ),
    "smollm3": lambda **kw: SmolLM3Config(no_rope_layer_interval=2, **kw),
    "mixtral": lambda **kw: MixtralConfig(
        **{"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6} | kw
    ),
    "qwen2_moe": lambda **kw: Qwen2MoeConfig(**ROUTED | {"shared_expert_intermediate_size": 16} | kw),
    "qwen3_moe": lambda **kw: Qwen3MoeConfig(
        **kw | ROUTED | {"mlp_only_layers": [0], "intermediate_size": 40}
    ),
    "olmoe": lambda **kw: OlmoeConfig(**without_head_dim(kw) | ROUTED | {"clip_qkv": 1.0}),
    "deepseek_v2": lambda **kw: DeepseekV2Config(
        **without_head_dim(kw) | SHARED | LATENT | {"q_lora_rank": None}
    ),
    "deepseek_v3": lambda n_routed_experts=4, **kw: DeepseekV3Config(
        **without_head_dim(kw)
        | SHARED
        | LATENT
        | {"q_lora_rank": 12, "n_group": 2, "topk_group": 2, "n_routed_experts": n_routed_experts}
    ),
    "glm4_moe": lambda **kw: Glm4MoeConfig(**kw | SHARED | {"use_qk_norm": True}),
}


def without_head_dim(sizes: dict[str, Any]) -> dict[str, Any]:
    """For families that derive it."""
    return {name: size for name, size in sizes.items() if name != "head_dim"}


Make = Callable[..., PreTrainedModel]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models this small lose more to waking threads than they gain."""
    torch.set_num_threads(1)


@pytest.fixture
def make() -> Make:
    """A model of random weights: every parameter is moved, so that biases and gains count."""

    def build(family: str = "llama", seed: int = 0, **sizes: Any) -> PreTrainedModel:
        torch.manual_seed(seed)
        config = CONFIGS[family](**{"tie_word_embeddings": True} | SIZES | sizes)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.15)
        return model

    return build


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; the pad token is the end-of-turn token, as in many GGUF files."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture
def chats() -> list[Chat]:
    """Forty different chats of two turns."""
    nouns, ends = ["cat", "dog", "sun", "moon", "rain"], ["warm", "cold"]
    return [
        [
            {"role": "user", "content": f"is the {noun} {end} on {'a mat ' * length}"},
            {"role": "assistant", "content": "yes because it is the sun" if end == "warm" else "no"},
        ]
        for noun in nouns
        for end in ends
        for length in range(4)
    ]


@pytest.fixture
def documents(tokenizer: PreTrainedTokenizerFast, chats: list[Chat]) -> list[Document]:
    return [encode_chat(tokenizer, chat) for chat in chats]


@pytest.fixture
def text(documents: list[Document]) -> list[Any]:
    """The documents in batches of two packed rows."""
    return list(batches(pack(documents, 64), 128))


@pytest.fixture
def folder(tmp_path: Path, make: Make, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A saved two-layer teacher."""
    from understudy.compress.checkpoint import save

    return save(make(), tokenizer, tmp_path / "teacher")


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: int = 11) -> torch.Tensor:
    ids = torch.arange(3, 3 + tokens)[None] % 40
    return model(input_ids=ids, use_cache=False).logits


@pytest.fixture
def logits() -> Callable[..., torch.Tensor]:
    return logits_of
