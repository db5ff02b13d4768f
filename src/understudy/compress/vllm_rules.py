"""Whether vLLM would take a checkpoint: the rules its model code puts on a config.json, checked without it.

vLLM needs a GPU build to be installed, so what its classes assert is written down here. It ignores memory,
quantisation and parallelism beyond one device.

Source: vLLM, `vllm/model_executor/models/{llama,qwen2,qwen3,gemma3}.py` (attention and MLP constructors) and
`vllm/config` (`ModelConfig.get_head_size`), read 2026-11.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

ARCHITECTURES = {
    "LlamaForCausalLM": "silu",
    "MistralForCausalLM": "silu",
    "Qwen2ForCausalLM": "silu",
    "Qwen3ForCausalLM": "silu",
    "Gemma3ForCausalLM": "gelu_pytorch_tanh",
}
"""With the one activation that vLLM has a fused kernel for."""
DERIVES_HEAD_DIM = {"Qwen2ForCausalLM"}
"""Takes the head size to be width / heads, whatever `head_dim` says."""


def vllm_faults(config: dict[str, Any]) -> list[str]:
    """What vLLM would object to in a config.json; empty when nothing."""
    return list(_faults(config))


def _faults(config: dict[str, Any]) -> Iterator[str]:
    names = [str(name) for name in config.get("architectures") or []]
    architecture = next((name for name in names if name in ARCHITECTURES), "")
    if not architecture:
        yield f"architectures {names}: none of {', '.join(sorted(ARCHITECTURES))}"
        return
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation != ARCHITECTURES[architecture]:
        yield f"activation {activation!r}: only {ARCHITECTURES[architecture]!r}"
    yield from _head_faults(config, architecture)
    yield from _layer_faults(config)


def _head_faults(config: dict[str, Any], architecture: str) -> Iterator[str]:
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    size = int(config.get("head_dim") or hidden // heads)
    if heads % kv_heads:
        yield f"{heads} query heads over {kv_heads} KV heads: not a multiple"
    if not config.get("head_dim") and hidden % heads:
        yield f"width {hidden} over {heads} heads without head_dim"
    if architecture in DERIVES_HEAD_DIM and heads * size != hidden:
        yield f"{heads} heads of {size} in width {hidden}: {architecture} takes the head size from both"


def _layer_faults(config: dict[str, Any]) -> Iterator[str]:
    layers, kinds = int(config["num_hidden_layers"]), config.get("layer_types")
    if kinds and len(kinds) != layers:
        yield f"{len(kinds)} layer_types for {layers} layers"
    if config.get("use_sliding_window") and "max_window_layers" in config and not kinds:
        yield "a sliding window for some layers only, without layer_types"
    if config.get("ffn_per_layer") and len(config["ffn_per_layer"]) != layers:
        yield f"{len(config['ffn_per_layer'])} FFN sizes for {layers} layers"
