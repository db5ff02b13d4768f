"""FFN sizes per layer: the least predicted damage, and a checkpoint that still is a standard one."""

from __future__ import annotations

import itertools
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM

from understudy.compress import checkpoint
from understudy.compress import plan as plans
from understudy.compress.allocation import STEPS, allocate, curves
from understudy.compress.decoder import extras_of, layers_of, shape_of
from understudy.compress.document import Document
from understudy.compress.prune import Method, prune
from understudy.compress.single import Sizes, filled, most_parameters, shared_out
from understudy.errors import InputError, ModelError

EXACT = Method(precision="fp32")


def plan_for(model, sizes):
    plan = plans.decide(shape_of(model), extras_of(model), ffn=max(sizes))
    return plans.per_layer(plan, sizes, extras_of(model))


@pytest.mark.parametrize("seed", range(3))
def test_allocation_is_the_best_of_all(seed):
    draw = torch.Generator().manual_seed(seed)
    found = [sorted(torch.rand(STEPS + 1, generator=draw).tolist(), reverse=True) for _ in range(4)]
    chosen = allocate(found, 32, 4 * 16, 4)
    every = [s for s in itertools.product(range(4, 33, 4), repeat=4) if sum(s) <= 64]

    def loss(sizes):
        return sum(curve[size * STEPS // 32] for curve, size in zip(found, sizes, strict=True))

    assert loss(chosen) == pytest.approx(min(map(loss, every)))


def test_too_few_channels_for_the_layers_are_refused():
    with pytest.raises(InputError, match="8 FFN channels over 3 layers"):
        allocate([[1.0] * (STEPS + 1)] * 3, 32, 8, 4)


def test_the_layer_that_hurts_less_gives_more(make, text):
    model = make()
    with torch.no_grad():
        layers_of(model)[0].down.weight[:, 4:] *= 1e-3
    found = curves(model, text)
    assert [curve[-1] for curve in found] == [0.0, 0.0]
    assert all(a >= b for curve in found for a, b in itertools.pairwise(curve))
    first, second = allocate(found, 24, 24, 4)
    assert first < second


def test_what_rounding_left_of_a_budget_is_spent(make):
    model = make()
    shape, extras = shape_of(model), extras_of(model)
    plan = plans.decide(shape, extras, ffn=12)
    channel = 3 * shape.hidden
    texts = [Document([1 + (5 * i) % 40 for i in range(n, n + 40)], [False] * 40) for n in range(4)]
    for most, channels in ((0, 24), (plan.parameters_after + 7 * channel - 1, 30), (10**9, 48)):
        shared = shared_out(model, plan, texts, most)
        assert sum(shared.ffns) == channels
        assert shared.parameters_after == plan.parameters_after + (channels - 24) * channel


def test_a_budget_that_nobody_named_is_spent_as_well(make):
    model = make()
    plan = plans.decide(shape_of(model), extras_of(model), params="0.75")
    most = int(0.75 * plan.parameters_before)
    assert most_parameters(filled(Sizes(shape="per-layer"), extras_of(model)), plan) == most
    assert most_parameters(filled(Sizes(shape="per-layer", ffn=8), extras_of(model)), plan) == 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("hidden", [48, 24])
def test_sizes_per_layer_reload_padded(family, hidden, make, text, tokenizer, tmp_path: Path, logits):
    model = make(family, mlp_bias=True) if family == "llama" else make(family)
    plan = plans.decide(shape_of(model), extras_of(model), ffn=16, hidden=hidden)
    plan = plans.per_layer(plan, [16, 8], extras_of(model))
    done = prune(model, plan, text, EXACT)
    assert [len(kept.channels) for kept in done.layers] == [16, 8]
    assert bool((layers_of(model)[1].down.weight[:, 8:] == 0).all())
    spare = 8 * (3 * hidden + 2 * (family == "llama"))
    assert plan.parameters_after == model.num_parameters() - spare
    checkpoint.save(model, tokenizer, tmp_path / "student")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    assert again.config.ffn_per_layer == [16, 8]
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


def test_a_plan_per_layer_can_be_applied_again(make, text, logits, tmp_path: Path):
    first, second = make(), make()
    plan = prune(first, plan_for(first, [8, 24]), text, EXACT)
    plans.save(plan, tmp_path / "plan.json")
    prune(second, plans.load(tmp_path / "plan.json"), text, EXACT)
    torch.testing.assert_close(logits(second), logits(first), rtol=0, atol=0)
    with pytest.raises(ModelError, match="FFN sizes"):
        prune(make(), msgspec.structs.replace(plan, ffns=[8, 16]), text)
