"""Pruning against hand-made dead parts and float64 solutions."""

from __future__ import annotations

import copy
import resource
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from understudy.compress import checkpoint
from understudy.compress import plan as plans
from understudy.compress.calibrate import Gram, enter, observe
from understudy.compress.decoder import extras_of, layers_of, shape_of
from understudy.compress.elimination import choose_channels, leaving, ranking
from understudy.compress.importance import (
    Gated,
    Score,
    channel_scores,
    choose_heads,
    damage,
    damping,
    head_columns,
    inverted,
    refit,
    reread,
    top,
)
from understudy.compress.plan import LayerPlan
from understudy.compress.prune import Method, prune
from understudy.errors import InputError, ModelError

EXACT = Method(precision="fp32")


def plan_for(model: Any, **sizes: Any):
    return plans.decide(shape_of(model), extras_of(model), **sizes)


def gram_of(x: torch.Tensor, width: int, lag: torch.Tensor | None = None) -> Gram:
    gram = Gram.zeros(x.shape[1], width)
    gram.add(x, lag)
    return gram


def test_pruning_nothing_changes_no_logit(make: Any, text: Any, logits: Any):
    model = make()
    before = logits(model)
    plan = prune(model, plan_for(model), text, EXACT)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    assert plan.layers[0].channels == list(range(24))


def test_pruning_dead_channels_is_exact(make: Any, text: Any, logits: Any):
    model = make()
    dead = [1, 5, 6, 7, 11, 12, 20, 23]
    with torch.no_grad():
        for layer in layers_of(model):
            layer.down.weight[:, dead] = 0
    before = logits(model)
    plan = prune(model, plan_for(model, ffn=16), text, EXACT)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    assert all(not set(dead) & set(kept.channels) for kept in plan.layers)


def test_pruning_dead_heads_is_exact(make: Any, text: Any, logits: Any):
    model = make()
    with torch.no_grad():
        for layer in layers_of(model):
            layer.o.weight[:, head_columns([0, 4], 8)] = 0
    before = logits(model)
    plan = prune(model, plan_for(model, heads=4), text, EXACT)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    assert all(kept.heads == [1, 2, 3, 5] for kept in plan.layers)


def test_pruning_a_dead_group_is_exact(make: Any, text: Any, logits: Any):
    model = make()
    with torch.no_grad():
        for layer in layers_of(model):
            layer.o.weight[:, head_columns([0, 1, 2], 8)] = 0
    before = logits(model)
    plan = prune(model, plan_for(model, heads=3, kv_heads=1), text, EXACT)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    assert all(kept.kv_heads == [1] for kept in plan.layers)


def test_refit_is_the_float64_solution():
    torch.manual_seed(1)
    x, weight = torch.randn(200, 12), torch.randn(5, 12)
    lag, keep = torch.randn(200, 5), [0, 2, 3, 7, 8, 11]
    found = refit(weight, gram_of(x, 5, lag), keep, ridge=0.03, pull=0.4)
    # the same minimum as an ordinary least-squares problem: data rows, then the ridge as √Λ-weighted rows
    x64, w64 = x.double(), weight.double()
    strength = torch.diag((0.03 * (x64[:, keep] ** 2).sum(0)).sqrt())
    left = torch.cat([x64[:, keep], strength])
    right = torch.cat([x64 @ w64.T + 0.4 * lag.double(), strength @ w64[:, keep].T])
    wanted = torch.linalg.lstsq(left, right).solution.T
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_an_inverse_is_one():
    rows = torch.randn(200, 90, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    square = rows.T @ rows
    torch.testing.assert_close(inverted(square) @ square, torch.eye(90, dtype=torch.float64))


def test_reread_is_the_float64_solution():
    torch.manual_seed(1)
    x, drift, weight = torch.randn(200, 6), 0.2 * torch.randn(200, 6), torch.randn(4, 6)
    found = reread(weight, gram_of(x, 6, drift), ridge=0.03, pull=0.4)
    x64, w64 = x.double(), weight.double()
    strength = torch.diag((0.03 * (x64**2).sum(0)).sqrt())
    left = torch.cat([x64, strength])
    right = torch.cat([(x64 + 0.4 * drift.double()) @ w64.T, strength @ w64.T])
    wanted = torch.linalg.lstsq(left, right).solution.T
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_reread_undoes_a_turned_stream():
    torch.manual_seed(1)
    turn, weight, x = torch.eye(6) + 0.1 * torch.randn(6, 6), torch.randn(4, 6), torch.randn(500, 6)
    found = reread(weight, gram_of(x, 6, x @ turn.T - x), ridge=1e-9, pull=1.0)
    torch.testing.assert_close(found, weight @ turn, rtol=1e-4, atol=1e-4)


def test_refit_keeps_the_weights_of_what_was_never_seen():
    weight = torch.randn(3, 4)
    x = torch.zeros(10, 4)
    x[:, 0] = 1
    found = refit(weight, gram_of(x, 3), [0, 2])
    torch.testing.assert_close(found[:, 1], weight[:, 2])


def test_refit_moves_a_duplicate_channel_onto_its_twin():
    x = torch.randn(300, 1).expand(-1, 2)
    weight = torch.tensor([[2.0, 3.0]])
    found = refit(weight, gram_of(x, 1), [0], ridge=1e-9)
    torch.testing.assert_close(found, torch.tensor([[5.0]]), rtol=1e-4, atol=0)
    assert damage(weight, gram_of(x, 1), [0], ridge=1e-9) < 1e-6


def test_refit_lowers_the_layers_error(make: Any, text: Any):
    model = make()
    layer, stream = layers_of(model)[0], enter(model, text)
    gram = observe(layer.down, stream, lambda h, _c: layer.feed_forward(h), 0)
    keep = list(range(16))
    weight = layer.down.weight.detach()
    error = weight.clone()
    error[:, keep] = 0
    sliced = ((error @ gram.second) * error).sum() / ((weight @ gram.second) * weight).sum()
    assert damage(weight, gram, keep) < 0.9 * float(sliced)


def test_gram_counts_real_tokens_only(make: Any, documents: Any, text: Any):
    model = make()
    layer, stream = layers_of(model)[0], enter(model, text)
    gram = observe(layer.down, stream, lambda h, _c: layer.feed_forward(h), 0)
    assert gram.tokens == stream.tokens == sum(len(d.tokens) for d in documents)


def test_equal_plan_on_permuted_channels_gives_an_equal_model(make: Any, text: Any, logits: Any):
    model, shuffled = make(), make()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for layer in layers_of(shuffled):
            layer.gate.weight.copy_(layer.gate.weight[order])
            layer.up.weight.copy_(layer.up.weight[order])
            layer.down.weight.copy_(layer.down.weight[:, order])
    kept = prune(model, plan_for(model, ffn=16), text, EXACT)
    place = order.argsort().tolist()
    moved = [
        msgspec.structs.replace(layer, channels=sorted(place[c] for c in layer.channels))
        for layer in kept.layers
    ]
    prune(shuffled, msgspec.structs.replace(kept, layers=moved), text, EXACT)
    torch.testing.assert_close(logits(shuffled), logits(model), rtol=1e-4, atol=1e-5)


def test_a_finished_plan_can_be_applied_again(make: Any, text: Any, logits: Any, tmp_path: Path):
    first, second = make(), make()
    plan = prune(first, plan_for(first, ffn=16, heads=4), text, EXACT)
    plans.save(plan, tmp_path / "plan.json")
    prune(second, plans.load(tmp_path / "plan.json"), text, EXACT)
    torch.testing.assert_close(logits(second), logits(first), rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_inputs_kept_or_computed_again_are_the_same(
    family: Any, make: Any, text: Any, logits: Any, monkeypatch: Any
):
    found = []
    for most in (1 << 30, 0):
        monkeypatch.setattr("understudy.compress.calibrate.KEEP_BYTES", most)
        model = make(family)
        prune(model, plan_for(model, ffn=16, heads=4), text, EXACT)
        found.append(logits(model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_following_the_teacher_lowers_the_final_error(make: Any, text: Any):
    teacher = make(num_hidden_layers=4)
    errors = []
    for pull in (0.0, 0.5):
        student = copy.deepcopy(teacher)
        prune(student, plan_for(student, ffn=12), text, EXACT._replace(pull=pull))
        ends = [enter_end(model, text) for model in (teacher, student)]
        errors.append(float((ends[0] - ends[1]).square().mean()))
    assert errors[1] < errors[0]


@torch.no_grad()
def enter_end(model: Any, text: Any):
    return torch.cat(
        [
            model.model(input_ids=b.tokens, position_ids=b.positions, use_cache=False).last_hidden_state[
                b.real
            ]
            for b in text
        ]
    )


def test_scores_by_hand():
    gram = gram_of(torch.tensor([[1.0, -2.0], [3.0, 2.0]]), 1)
    block = Gated(torch.tensor([[3.0], [0.0]]), torch.tensor([[0.0], [4.0]]), torch.tensor([[4.0, -3.0]]))
    wanted: dict[Score, list[float]] = {
        "output": [(10 / 2) ** 0.5 * 4, (8 / 2) ** 0.5 * 3],
        "wanda-sp": [(10 / 2) ** 0.5 * 4, (8 / 2) ** 0.5 * 3],
        "minitron": [4.0, 4.0],
        "flap": [(5 - 4) * 16, (4 - 0) * 9],
        "magnitude": [5.0, 5.0],
    }
    scores: list[Score] = ["output", "wanda-sp", "minitron", "flap", "magnitude"]
    assert set(scores) == set(wanted)
    for score in scores:
        values = wanted[score]
        torch.testing.assert_close(channel_scores(score, block, gram), torch.tensor(values).float())


def test_top_prefers_the_lower_index_on_a_tie():
    assert top(torch.tensor([1.0, 2.0, 1.0, 2.0]), 3) == [0, 1, 3]


def test_elimination_is_the_least_loss_of_every_channel_tried():
    torch.manual_seed(6)
    gram = gram_of(torch.randn(60, 9) @ torch.randn(9, 9), 4, torch.randn(60, 4))
    weight, ridge, pull = torch.randn(4, 9), 0.03, 0.4
    second, lag = gram.second.double(), gram.lag.double()
    strength = torch.diag(damping(second.diagonal(), ridge))
    free = torch.linalg.solve(second + strength, (second + strength) @ weight.double().T + pull * lag)

    def loss(gone: list[int]) -> float:
        """Above the least of the same objective with all channels, which is reached at ``free``."""
        keep = [c for c in range(9) if c not in gone]
        error = -free
        error[keep] += refit(weight.double(), gram, keep, ridge=ridge, pull=pull).T
        return float((error * ((second + strength) @ error)).sum())

    order = leaving(weight, gram, 5, ridge=ridge, pull=pull)
    for count in range(5):
        others = [c for c in range(9) if c not in order[:count]]
        assert order[count] == min(others, key=lambda c: loss([*order[:count], c]))


def test_a_massive_channel_does_not_hinder_the_others_refit():
    torch.manual_seed(7)
    x = torch.randn(400, 1).expand(-1, 2).clone()
    massive = torch.zeros(400, 1)
    massive[0] = 5_000
    gram = gram_of(torch.cat([x, massive], 1), 1)
    found = refit(torch.tensor([[2.0, 3.0, 1.0]]), gram, [0, 2])
    torch.testing.assert_close(found, torch.tensor([[5.0, 1.0]]), rtol=0.02, atol=0)


def test_too_many_channels_to_eliminate_are_scored(monkeypatch: Any):
    torch.manual_seed(8)
    gram, down = gram_of(torch.randn(50, 6), 3), torch.randn(3, 6)
    block = Gated(torch.randn(6, 3), torch.randn(6, 3), down)
    monkeypatch.setattr("understudy.compress.elimination.LARGEST", 5)
    assert choose_channels("obs", block, gram, 4) == top(channel_scores("output", block, gram), 4)
    assert sorted(ranking(block, gram)[2:]) == top(channel_scores("output", block, gram), 4)


def test_gram_in_blocks_is_the_gram_at_once():
    torch.manual_seed(9)
    x = torch.randn(30, 300)
    torch.testing.assert_close(gram_of(x, 1).second, x.T @ x, rtol=1e-4, atol=1e-4)


def test_heads_are_those_of_least_damage():
    torch.manual_seed(4)
    mix = torch.randn(12, 12)
    gram, weight = gram_of(torch.randn(80, 12) @ mix, 5), torch.randn(5, 12)
    pairs = [[a, b] for a in (0, 1, 2) for b in (3, 4, 5)]
    best = min(pairs, key=lambda heads: damage(weight, gram, head_columns(heads, 2)))
    assert choose_heads(weight, gram, heads=6, kv_heads=2, keep=2, keep_kv=2).query == best


def test_greedy_heads_agree_with_enumeration_when_one_head_goes(monkeypatch: Any):
    torch.manual_seed(2)
    gram, weight = gram_of(torch.randn(100, 24), 6), torch.randn(6, 24)
    arguments = {"heads": 6, "kv_heads": 1, "keep": 5, "keep_kv": 1}
    every = choose_heads(weight, gram, **arguments)
    monkeypatch.setattr("understudy.compress.importance.ENUMERATE_UP_TO", 1)
    assert choose_heads(weight, gram, **arguments) == every


@pytest.mark.parametrize(
    ("params", "wanted"), [("0.75", 75), ("1", 100), ("50", 50), ("0.05K", 50), (".5", 50), ("0.00005M", 50)]
)
def test_params_as_share_or_count(params: Any, wanted: Any):
    assert plans.wanted_parameters(params, 100) == wanted


@pytest.mark.parametrize("params", ["", "1.5", "abc", "0", "-1", "2M", "75%"])
def test_params_that_cannot_be(params: Any):
    with pytest.raises(InputError):
        plans.wanted_parameters(params, 1000)


def test_params_choose_the_largest_ffn_within_the_budget(make: Any):
    model = make(intermediate_size=512)
    shape, extras = shape_of(model), extras_of(model)
    plan = plans.decide(shape, extras, params="0.75")
    assert plan.student.ffn % 64 == 0
    assert plan.parameters_after <= 0.75 * plan.parameters_before
    larger = msgspec.structs.replace(plan.student, ffn=plan.student.ffn + 64)
    assert plans.parameters(larger, extras) > 0.75 * plan.parameters_before


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"ffn": 25}, "ffn = 25"),
        ({"heads": 5}, "5 query heads over 2 KV heads"),
        ({"heads": 8}, "heads = 8"),
        ({"kv_heads": 3}, "kv_heads = 3"),
        ({"params": "0.1"}, "cannot be reached"),
    ],
)
def test_sizes_that_cannot_be(sizes: Any, message: Any, make: Any):
    model = make()
    with pytest.raises(InputError, match=message):
        plan_for(model, **sizes)


def test_heads_that_transformers_would_refuse_on_reload(make: Any):
    with pytest.raises(InputError, match="4 query heads with width 50"):
        plan_for(make(hidden_size=50, num_attention_heads=10), heads=4)


def test_a_plan_for_another_model_is_refused(make: Any, text: Any):
    plan = plan_for(make(num_hidden_layers=3), ffn=8)
    with pytest.raises(ModelError, match="the plan is for 3 layers"):
        prune(make(), plan, text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": [0, 1]}, "keeps 2 channels"),
        ({"channels": [*range(15), 24]}, "keeps 16 channels"),
        ({"heads": [0, 1, 2, 3]}, "keeps heads"),
    ],
)
def test_a_plan_with_wrong_indices_is_refused(change: Any, message: Any, make: Any, text: Any):
    model = make()
    good = LayerPlan(layer=0, channels=list(range(16)), heads=[0, 1, 3, 4], kv_heads=[0, 1])
    plan = msgspec.structs.replace(
        plan_for(model, ffn=16, heads=4),
        layers=[msgspec.structs.replace(good, **change), msgspec.structs.replace(good, layer=1)],
    )
    with pytest.raises(ModelError, match=message):
        prune(model, plan, text)


def test_no_calibration_text_is_refused(make: Any):
    model = make()
    with pytest.raises(ModelError, match="no calibration text"):
        prune(model, plan_for(model, ffn=16), [])


def test_a_full_disk_leaves_no_folder(make: Any, tokenizer: Any, tmp_path: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(ModelError, match="cannot write"):
            checkpoint.save(make(), tokenizer, tmp_path / "student")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
