"""Export: llama.cpp computes from the GGUF what transformers computes from the checkpoint."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from serve_tokenizers import CORPUS, SHAPE, byte_level_tokenizer, spaces_tokenizer
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from understudy.config import Serve
from understudy.errors import ModelError
from understudy.serve.engine import ScoreJob
from understudy.serve.export import export_gguf
from understudy.serve.gguf_file import read_header
from understudy.serve.gguf_layout import rope_factors, shape_of
from understudy.serve.k_quants import quantize_k
from understudy.serve.llama_scorer import LlamaScorer, open_scorer
from understudy.serve.llamacpp import LlamaCppEngine
from understudy.serve.speed import tokens_per_second

Maker = Callable[..., Path]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, biases, grouped": (
        "Llama",
        {"attention_bias": True, "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    "llama 3 rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama, linear rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, "head_dim": 32}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": False}),
    "gemma3": (
        "Gemma3Text",
        {"num_hidden_layers": 7, "sliding_window": 16, "query_pre_attn_scalar": 64, "num_key_value_heads": 3},
    ),
}


TOLERANCE = 0.02
"""On a logprob in F16: what the issue that ordered the gate allows."""


def greedy_differences(scorer: LlamaScorer, model: Any, prompt: list[int], count: int) -> list[int]:
    """Steps of the reference's greedy answer at which ours would go another way.

    Where the reference itself is undecided within the tolerance, rounding may decide: no difference.
    """
    tokens, differences = list(prompt), list[int]()
    for step in range(count):
        with torch.inference_mode():
            logprobs = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        [scored] = scorer.score([ScoreJob(tuple(tokens), 1)])
        best = int(logprobs.argmax())
        if float(logprobs[best] - logprobs[scored.following[0][0]]) > TOLERANCE:
            differences.append(step)
        tokens.append(best)
    return differences


@pytest.mark.parametrize("family", FAMILIES)
def test_gate_logprobs_and_greedy_tokens_agree(family: str, make_checkpoint: Maker, tmp_path: Path) -> None:
    name, config = FAMILIES[family]
    checkpoint = make_checkpoint(name, **config)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(checkpoint)(CORPUS[0] + CORPUS[1])["input_ids"][:80]
    report = export_gguf(checkpoint, tmp_path / "m.gguf", "f16")
    scorer = open_scorer(report.path, 128, 1)
    [scored] = scorer.score([ScoreJob(tuple(tokens), 1)])
    with torch.inference_mode():
        logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    ours = np.array([score.logprob for score in scored.tokens[1:]])
    theirs = logprobs[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])].numpy()
    assert np.abs(ours - theirs).max() <= TOLERANCE
    assert greedy_differences(scorer, model, tokens[:12], 16) == []
    scorer.close()
    stored = sum(weight.numel() for weight in model.parameters())
    assert report.parameters == stored + (32 if family == "llama 3 rope" else 0)


def test_quantised_types_have_their_size_and_stay_close(
    checkpoint: Path, reference: Any, tmp_path: Path
) -> None:
    tokens = AutoTokenizer.from_pretrained(checkpoint)(CORPUS[0])["input_ids"]
    with torch.inference_mode():
        logprobs = reference(torch.tensor([tokens])).logits[0].log_softmax(-1)
    errors: dict[str, float] = {}
    sizes: dict[str, int] = {}
    for kind in ("f32", "f16", "q8_0", "q4_0"):
        report = export_gguf(checkpoint, tmp_path / f"{kind}.gguf", kind)
        scorer = open_scorer(report.path, 128, 1)
        [scored] = scorer.score([ScoreJob(tuple(tokens), 0)])
        scorer.close()
        picked = [float(logprobs[i, t]) for i, t in enumerate(tokens[1:])]
        errors[kind] = float(
            np.mean([abs(s.logprob - p) for s, p in zip(scored.tokens[1:], picked, strict=True)])
        )  # type: ignore[operator]
        sizes[kind] = report.bytes
    assert sizes["f32"] > sizes["f16"] > sizes["q8_0"] > sizes["q4_0"]
    assert errors["f16"] < 0.02
    assert errors["f16"] < errors["q8_0"] < errors["q4_0"] < 2.0


@pytest.mark.parametrize(("kind", "bits"), [("q4_k", 4.5), ("q5_k", 5.5), ("q6_k", 6.5625)])
def test_k_types_are_read_back_close_by_the_other_library(kind: str, bits: float) -> None:
    weight = np.random.default_rng(0).normal(size=(6, 512)).astype(np.float32)
    stored = quantize_k(weight, GGMLQuantizationType[kind.upper()])
    assert stored.nbytes * 8 == weight.size * bits
    error = np.abs(dequantize(stored, GGMLQuantizationType[kind.upper()]) - weight)
    assert error.mean() < 0.45 / 2 ** (bits - 2.5)


def test_k_types_where_rows_allow_and_what_stands_in(make_checkpoint: Maker, tmp_path: Path) -> None:
    """Width 256 holds whole blocks; 192 FFN channels don't, so `down_proj` is Q5_0 as in llama.cpp."""
    checkpoint = make_checkpoint(
        "Llama", hidden_size=256, intermediate_size=192, num_attention_heads=4, tie_word_embeddings=True
    )
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(checkpoint)(CORPUS[0])["input_ids"]
    with torch.inference_mode():
        logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    errors: dict[str, float] = {}
    for kind in ("q6_k", "q4_k"):
        report = export_gguf(checkpoint, tmp_path / f"{kind}.gguf", kind)
        types = {t.name: t.tensor_type.name for t in GGUFReader(report.path).tensors}
        assert types["blk.0.attn_q.weight"] == kind.upper()
        assert types["blk.0.ffn_down.weight"] == {"q6_k": "Q8_0", "q4_k": "Q5_0"}[kind]
        scorer = open_scorer(report.path, 128, 1)
        [scored] = scorer.score([ScoreJob(tuple(tokens), 0)])
        scorer.close()
        pairs = zip(scored.tokens[1:], tokens[1:], strict=True)
        errors[kind] = float(
            np.mean([abs(s.logprob - float(logprobs[i, t])) for i, (s, t) in enumerate(pairs)])
        )
    assert errors["q6_k"] < errors["q4_k"] < 2.0


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Mistral"])
def test_sizes_per_layer_are_exported_without_their_padding(
    family: str, make_checkpoint: Maker, tmp_path: Path
) -> None:
    extra = {"attention_bias": True, "mlp_bias": True} if family == "Llama" else {"sliding_window": None}
    checkpoint = _copy(make_checkpoint(family, **extra), tmp_path / "padded")
    sizes = [64, 32]

    def pad(weights: dict[str, Any]) -> None:
        for name, weight in weights.items():
            layer = sizes[int(name.split(".")[2])] if ".mlp." in name else 0
            if "down_proj.weight" in name:
                weight[:, layer:] = 0
            elif "gate_proj" in name or "up_proj" in name:
                weight[layer:] = 0

    _change_weights(checkpoint, pad)
    _change_config(checkpoint, ffn_per_layer=sizes)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(checkpoint)(CORPUS[0])["input_ids"][:60]
    report = export_gguf(checkpoint, tmp_path / "m.gguf", "f16")
    scorer = open_scorer(report.path, 128, 1)
    [scored] = scorer.score([ScoreJob(tuple(tokens), 1)])
    assert greedy_differences(scorer, model, tokens[:12], 8) == []
    scorer.close()
    with torch.inference_mode():
        logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    ours = np.array([score.logprob for score in scored.tokens[1:]])
    theirs = logprobs[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])].numpy()
    assert np.abs(ours - theirs).max() <= TOLERANCE
    assert report.architecture == "deci"
    field = GGUFReader(report.path).get_field("deci.feed_forward_length")
    assert field is not None
    assert field.contents() == sizes
    assert report.parameters < sum(weight.numel() for weight in model.parameters())


async def _llama_tokens(path: Path, texts: list[str]) -> list[list[int]]:
    engine = await LlamaCppEngine.open(path, Serve(threads=1, slots=1, context=128))
    try:
        return [await engine.tokenize(text) for text in texts]
    finally:
        await engine.close()


SPLITS: dict[str, Any] = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}


@pytest.mark.parametrize("split", ["gpt-2", "smollm", "spaces"])
async def test_text_is_cut_into_the_same_tokens(split: str, make_checkpoint: Maker, tmp_path: Path) -> None:
    tokenizer = spaces_tokenizer() if split == "spaces" else byte_level_tokenizer(SPLITS[split])
    checkpoint = make_checkpoint("Llama", tokenizer)
    report = export_gguf(checkpoint, tmp_path / "m.gguf", "f16")
    texts = [*CORPUS, "1987 and 2000", "a  b   c", "the<|im_end|>the" if split != "spaces" else "the</s>the"]
    assert await _llama_tokens(report.path, texts) == [tokenizer(text)["input_ids"] for text in texts]


def test_llama3_frequency_divisors_match_transformers() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.configuration_llama import LlamaConfig

    config = LlamaConfig(**(SHAPE | {"rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 256}))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 10000 ** (np.arange(0, 64, 2) / 64)
    divisors = rope_factors(config.to_dict(), shape_of(config.to_dict()))
    assert divisors is not None
    np.testing.assert_allclose(divisors, plain / scaled.numpy(), rtol=1e-5)


def test_header_tells_shape_and_template(gguf: Path) -> None:
    header = read_header(gguf)
    assert header.metadata["llama.attention.key_length"] == SHAPE["head_dim"]
    assert header.metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert "<|im_start|>" in header.metadata["tokenizer.chat_template"]
    assert header.end <= gguf.stat().st_size


def _copy(checkpoint: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in checkpoint.iterdir():
        if file.suffix != ".gguf":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def _change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def _change_weights(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config cut off": (lambda f: (f / "config.json").write_text("{"), "not JSON"),
    "unknown family": (lambda f: _change_config(f, model_type="mamba"), "mamba"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "weights cut off": (lambda f: (f / "model.safetensors").write_bytes(b"\x00" * 9), "model.safetensors"),
    "a tensor missing": (
        lambda f: _change_weights(f, lambda w: w.pop("model.layers.1.mlp.up_proj.weight")),
        "layers.1.mlp.up_proj.weight",
    ),
    "a tensor too many": (
        lambda f: _change_weights(f, lambda w: w.update({"model.layers.0.extra.weight": torch.ones(2)})),
        "layers.0.extra.weight",
    ),
    "another shape": (lambda f: _change_config(f, intermediate_size=128), "down_proj"),
    "rope of another kind": (
        lambda f: _change_config(f, rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}),
        "longrope",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_checkpoint_is_named_and_leaves_nothing(fault: str, checkpoint: Path, tmp_path: Path) -> None:
    harm, said = FAULTS[fault]
    folder = _copy(checkpoint, tmp_path / "bad")
    harm(folder)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ModelError, match=said):
        export_gguf(folder, out / "m.gguf", "f16")
    assert list(out.iterdir()) == []


def test_unknown_split_rules_are_refused(make_checkpoint: Maker, tmp_path: Path) -> None:
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("[aeiou]"), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    checkpoint = make_checkpoint("Llama", byte_level_tokenizer(split))
    with pytest.raises(ModelError, match="split rules"):
        export_gguf(checkpoint, tmp_path / "m.gguf", "f16")
    assert list(tmp_path.iterdir()) == []


@contextmanager
def _file_limit(size: int) -> Iterator[None]:
    """Files may not grow beyond ``size`` bytes: the disk is full, as far as a writer can tell."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_leaves_the_old_file(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    out.write_text("the old one")
    with _file_limit(50_000), pytest.raises(ModelError, match="cannot write"):
        export_gguf(checkpoint, out, "f16")
    assert out.read_text() == "the old one"
    assert list(tmp_path.iterdir()) == [out]


def test_no_folder_and_no_such_kind(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        export_gguf(checkpoint, tmp_path / "none" / "m.gguf", "f16")
    with pytest.raises(ModelError, match="q3_k"):
        export_gguf(checkpoint, tmp_path / "m.gguf", "q3_k")


def test_speed_is_measured_on_the_engine(checkpoint: Path, gguf: Path, tmp_path: Path) -> None:
    from understudy.cli import compress as commands

    assert 10 < tokens_per_second(gguf, threads=1) < 1e6
    assert 10 < commands._speed(_copy(checkpoint, tmp_path / "copy")) < 1e6
