"""Where each weight of a checkpoint goes in a GGUF file, family by family.

One place for what differs between Llama, Mistral, Qwen2, Qwen3 and Gemma 3 (text): names, the order of rotary
dimensions, biases, extra norms, and the metadata of their shape. It ignores tokenizers (gguf_tokenizer) and
bytes (export).

Source: llama.cpp's conventions as its loader reads them (gguf.constants); transformers' config classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from understudy.errors import ModelError
from understudy.protocol import Json

Array = npt.NDArray[np.float32]


class Family(NamedTuple):
    """What is particular to one ``model_type``."""

    architecture: str
    """GGUF's name."""
    interleaved: bool
    """Rotary pairs lie next to each other: rows of q and k are reordered from transformers' halves."""
    norms: Mapping[str, str]
    """Norms of a layer, transformers' name -> GGUF's."""
    norm_offset: float = 0.0
    """Added to norm weights; Gemma stores them less one."""
    scale_by_hidden: bool = False
    """llama.cpp multiplies embeddings by √hidden, as the model does."""


_LLAMA_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_GEMMA_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
FAMILIES: dict[str, Family] = {
    "llama": Family("llama", True, _LLAMA_NORMS),
    "mistral": Family("llama", True, _LLAMA_NORMS),
    "qwen2": Family("qwen2", False, _LLAMA_NORMS),
    "qwen3": Family("qwen3", False, _LLAMA_NORMS | _QK_NORMS),
    "gemma3_text": Family("gemma3", False, _GEMMA_NORMS | _QK_NORMS, norm_offset=1.0),
}
_MATRICES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA_PATTERN = 6
"""Every sixth layer of Gemma 3 attends to everything; llama.cpp has it fixed."""


class Place(NamedTuple):
    """One tensor of the GGUF file."""

    name: str
    source: str
    """Its name in the checkpoint."""
    heads: int = 0
    """Heads whose rotary rows are reordered; 0: none."""
    offset: float = 0.0
    """Added to the weights."""
    channels: int = 0
    """FFN channels that are no padding: rows of gate and up, columns of down; 0: not cut."""


class Shape(NamedTuple):
    """The numbers of a config that a layout needs."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    ffns: tuple[int, ...] = ()
    """FFN channels of each layer where they differ; the checkpoint is padded to ``ffn``."""


def family_of(config: Json) -> Family:
    """The family of a config.json. Raises ModelError for one that is not known."""
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise ModelError(
            f"model_type {kind!r} cannot be exported to GGUF",
            expected="one of: " + ", ".join(sorted(FAMILIES)),
            next_step="serve the checkpoint folder as it is, or convert it with llama.cpp's own tools",
        )
    return FAMILIES[kind] if not config.get("ffn_per_layer") else _by_layer(kind)


def _by_layer(kind: str) -> Family:
    """`deci`, the plain decoder with a shape for each layer; rotary pairs as in llama."""
    if FAMILIES[kind].norms != _LLAMA_NORMS:
        raise ModelError(
            f"{kind} with FFN sizes per layer cannot be exported",
            expected="a family without extra norms: llama.cpp's architecture for it (deci) has none",
            next_step="prune with --shape uniform",
        )
    return Family("deci", True, _LLAMA_NORMS)


def shape_of(config: Json) -> Shape:
    """The shape a config.json declares. Raises ModelError naming a field that is missing."""
    try:
        heads = int(config["num_attention_heads"])
        return Shape(
            layers=int(config["num_hidden_layers"]),
            hidden=int(config["hidden_size"]),
            ffn=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", config.get("model_type") == "gemma3_text")),
            ffns=tuple(int(size) for size in config.get("ffn_per_layer") or ()),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"config.json: {error} is missing or wrong", expected="a whole config") from error


def places(family: Family, shape: Shape, names: Sequence[str]) -> list[Place]:
    """Every tensor of the file, in order, given the names in the checkpoint (without ``model.``).

    Raises ModelError for tensors that are missing or have no place: nothing is dropped silently.
    """
    wanted = [Place("token_embd.weight", "embed_tokens.weight")]
    for layer in range(shape.layers):
        wanted += _layer(family, shape, layer, set(names))
    wanted.append(Place("output_norm.weight", "norm.weight", offset=family.norm_offset))
    if not shape.tied:
        wanted.append(Place("output.weight", "lm_head.weight"))
    sources = {place.source for place in wanted}
    if missing := sorted(sources - set(names)):
        raise ModelError(
            f"{len(missing)} tensors are missing, first {missing[0]}", expected="a whole checkpoint"
        )
    spare = sorted(n for n in set(names) - sources if not n.endswith("inv_freq") and n != "lm_head.weight")
    if spare:
        raise ModelError(f"{len(spare)} tensors have no place in GGUF, first {spare[0]}")
    return wanted


def _layer(family: Family, shape: Shape, layer: int, names: set[str]) -> list[Place]:
    rotated = {"self_attn.q_proj": shape.heads, "self_attn.k_proj": shape.kv_heads}
    found: list[Place] = []
    for source, target in _MATRICES.items():
        heads = rotated.get(source, 0) if family.interleaved else 0
        for part in ("weight", "bias"):
            name = f"layers.{layer}.{source}.{part}"
            if part == "weight" or name in names:
                cut = shape.ffns[layer] if shape.ffns and _has_channels(source, part) else 0
                found.append(Place(f"blk.{layer}.{target}.{part}", name, heads, channels=cut))
    for source, target in family.norms.items():
        name = f"layers.{layer}.{source}.weight"
        found.append(Place(f"blk.{layer}.{target}.weight", name, offset=family.norm_offset))
    return found


def _has_channels(source: str, part: str) -> bool:
    return source in ("mlp.gate_proj", "mlp.up_proj") or (source == "mlp.down_proj" and part == "weight")


def cut_shape(place: Place, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A tensor's shape without padding."""
    if not place.channels:
        return shape
    return (*shape[:-1], place.channels) if "ffn_down" in place.name else (place.channels, *shape[1:])


def arrange(place: Place, weight: Array) -> Array:
    """A checkpoint's tensor as the file holds it."""
    if place.heads:
        # transformers pairs rotary dimension i with i + d/2, llama.cpp's llama pairs 2i with 2i + 1
        halves = weight.reshape(place.heads, 2, -1, *weight.shape[1:])
        weight = halves.swapaxes(1, 2).reshape(weight.shape)
    weight = weight[tuple(slice(size) for size in cut_shape(place, weight.shape))]
    return weight + np.float32(place.offset) if place.offset else weight


def metadata(config: Json, family: Family, shape: Shape) -> dict[str, Any]:
    """Hyper-parameters under the architecture's prefix; int, float, str and list values."""
    rope = _rope(config)
    values: dict[str, Any] = {
        "block_count": shape.layers,
        "context_length": _context(config, family),
        "embedding_length": shape.hidden,
        "feed_forward_length": shape.ffn,
        "vocab_size": shape.vocabulary,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "rope.dimension_count": shape.head_dim,
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
    }
    if shape.ffns:
        values["feed_forward_length"] = list(shape.ffns)
        values["attention.head_count"] = [shape.heads] * shape.layers
        values["attention.head_count_kv"] = [shape.kv_heads] * shape.layers
    values |= _rope_scaling(rope)
    if family.architecture == "gemma3":
        values |= _gemma(config, shape)
    return values


def _context(config: Json, family: Family) -> int:
    """Trained context; cut to the window where llama.cpp would attend beyond it."""
    context = int(config.get("max_position_embeddings", 2048))
    window = config.get("sliding_window")
    used = config.get("use_sliding_window", config.get("model_type") == "mistral")
    return min(context, int(window)) if window and used and family.architecture != "gemma3" else context


def _rope(config: Json) -> Json:
    """Rotary parameters; transformers 5 keeps them in one table, for Gemma one for each kind of layer."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = rope.get("full_attention", rope)
    return {"rope_theta": config.get("rope_theta", 10000.0), **rope}


def _rope_scaling(rope: Json) -> dict[str, Any]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", "llama3", None):
        return {}
    if kind not in ("linear", "yarn"):
        raise ModelError(
            f"rope scaling {kind!r} cannot be exported", expected="default, llama3, linear or yarn"
        )
    values = {"rope.scaling.type": str(kind), "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        values["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
    return values


def rope_factors(config: Json, shape: Shape) -> Array | None:
    """Llama 3's divisors of the rotary frequencies, shape (head_dim / 2,); None for other scalings.

    Source: transformers modeling_rope_utils, llama3; Llama 3.1's reference code.
    """
    rope = _rope(config)
    if rope.get("rope_type", rope.get("type")) != "llama3":
        return None
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    original = float(rope["original_max_position_embeddings"])
    exponent = np.arange(0, shape.head_dim, 2, dtype=np.float64) / shape.head_dim
    wavelength = 2 * math.pi * float(rope["rope_theta"]) ** exponent
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - smooth) / float(rope["factor"]) + smooth)).astype(np.float32)


def _gemma(config: Json, shape: Shape) -> dict[str, Any]:
    """Gemma 3's window. Raises ModelError where llama.cpp has another value built in."""
    kinds = config.get("layer_types") or []
    fixed = [
        "full_attention" if (i + 1) % GEMMA_PATTERN == 0 else "sliding_attention" for i in range(len(kinds))
    ]
    if kinds != fixed:
        raise ModelError(
            f"layer_types differ from the pattern of {GEMMA_PATTERN} that llama.cpp has built in"
        )
    if config.get("query_pre_attn_scalar", 256) != shape.head_dim:
        raise ModelError(
            f"query_pre_attn_scalar {config['query_pre_attn_scalar']}",
            expected=f"head_dim ({shape.head_dim})",
        )
    if config.get("attn_logit_softcapping"):
        raise ModelError("attn_logit_softcapping is not computed by llama.cpp for Gemma 3")
    local = (config.get("rope_parameters") or {}).get("sliding_attention", {})
    base = float(local.get("rope_theta", config.get("rope_local_base_freq", 10000.0)))
    values = {"attention.sliding_window": int(config["sliding_window"]), "rope.freq_base_swa": base}
    if cap := config.get("final_logit_softcapping"):
        values["final_logit_softcapping"] = float(cap)
    return values
