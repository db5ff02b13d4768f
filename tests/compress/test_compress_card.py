"""The card's tables, and what vLLM would say of a configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from understudy.compress import plan as plans
from understudy.compress.card import Benchmark, enter_benchmarks, loads_in_vllm, model_card
from understudy.compress.decoder import extras_of, shape_of
from understudy.compress.prune import Method, prune
from understudy.compress.vllm_rules import vllm_faults

EXACT = Method(precision="fp32")


def test_benchmarks_are_entered_once(make, tmp_path: Path):
    model = make()
    plan = plans.decide(shape_of(model), extras_of(model), ffn=8)
    (tmp_path / "README.md").write_text(model_card(plan, ["calibration 12ab"]))
    for right in (0.5, 0.4):
        enter_benchmarks(tmp_path, [Benchmark("hellaswag", 100, 0.52, 0.05, right, 0.049)])
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name")
    assert "calibration 12ab" in card
    assert card.count("## Benchmarks") == 1
    assert card.endswith("| hellaswag | 100 | 52.0% ± 5.0% | 40.0% ± 4.9% |\n")


def test_a_checkpoint_without_a_card_gets_the_table(tmp_path: Path):
    enter_benchmarks(tmp_path, [Benchmark("mmlu", 10, 0.3, 0.1, 0.2, 0.1)])
    assert (tmp_path / "README.md").read_text().startswith("## Benchmarks")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"])
def test_vllm_takes_a_student_that_lost_channels_and_layers(family, make, text):
    kinds = ["sliding_attention", "full_attention"] * 2
    windows = {"qwen2": {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 6}}
    extra = {"layer_types": kinds} if family == "gemma3_text" else windows.get(family, {})
    model = make(family, num_hidden_layers=4, **extra)
    prune(model, plans.decide(shape_of(model), extras_of(model), ffn=16, layers=3), text, EXACT)
    faults = vllm_faults(model.config.to_dict() | {"architectures": [type(model).__name__]})
    assert faults == []
    if family == "qwen2":
        assert model.config.layer_types.count("full_attention") == model.config.max_window_layers


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "architectures"),
        ({"hidden_act": "relu"}, "activation 'relu'"),
        ({"num_key_value_heads": 4}, "6 query heads over 4 KV heads"),
        ({"head_dim": None, "num_attention_heads": 5, "num_key_value_heads": 5}, "width 48 over 5 heads"),
        ({"layer_types": ["full_attention"]}, "1 layer_types for 2 layers"),
        ({"ffn_per_layer": [8]}, "1 FFN sizes for 2 layers"),
    ],
)
def test_what_vllm_would_object_to(change, said, make):
    config = make().config.to_dict() | {"architectures": ["LlamaForCausalLM"]} | change
    assert said in "; ".join(vllm_faults(config))
    assert said in loads_in_vllm(config)


def test_qwen2_without_all_its_heads_is_not_for_vllm(make, text):
    """vLLM takes this family's head size from width and heads, and never reads `head_dim`."""
    model = make("qwen2")
    config = {"architectures": ["Qwen2ForCausalLM"]}
    assert vllm_faults(model.config.to_dict() | config) == []
    prune(model, plans.decide(shape_of(model), extras_of(model), heads=4), text, EXACT)
    assert "4 heads of 8 in width 48" in loads_in_vllm(model.config.to_dict() | config)
