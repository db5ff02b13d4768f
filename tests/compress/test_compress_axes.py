"""Every combination of axes on every family: counted, reloaded, and exact where what goes is dead."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM

from understudy.compress import checkpoint
from understudy.compress import plan as plans
from understudy.compress.calibrate import Gram
from understudy.compress.decoder import bias_of, body, extras_of, head_weight, layers_of, shape_of
from understudy.compress.families import DENSE
from understudy.compress.importance import refit_gain, refit_reader
from understudy.compress.prune import Method, prune
from understudy.compress.taylor import channel_sensitivity
from understudy.errors import InputError, ModelError

EXACT = Method(precision="fp32")
FAMILIES = [family.model_type for family in DENSE]
AXES: dict[str, Any] = {"ffn": 16, "heads": 4, "kv_heads": 1, "hidden": 24, "layers": 2}
COMBINATIONS = [chosen for count in (1, 2, 3, 4, 5) for chosen in itertools.combinations(AXES, count)]


def sizes_of(axes: tuple[str, ...]) -> dict[str, Any]:
    """The sizes of the chosen axes; with one KV group only its three query heads remain."""
    sizes = {axis: AXES[axis] for axis in axes}
    return sizes | ({"heads": 2} if {"heads", "kv_heads"} <= set(axes) else {})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("axes", COMBINATIONS, ids="+".join)
def test_every_combination_of_axes_reloads_with_the_same_logits(
    family: Any, axes: Any, make: Any, text: Any, tokenizer: Any, tmp_path: Path, logits: Any
):
    kinds = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    extra = kinds if family == "gemma3_text" else {}
    model = make(family, num_hidden_layers=3, tie_word_embeddings=len(axes) % 2 == 1, **extra)
    plan = plans.decide(shape_of(model), extras_of(model), **sizes_of(axes))
    done = prune(model, plan, text, EXACT)
    assert model.num_parameters() == plan.parameters_after
    assert (len(done.width), len(done.layers)) == (plan.student.hidden, plan.student.layers)
    checkpoint.save(model, tokenizer, tmp_path / "student")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    assert shape_of(again) == plan.student
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    assert bool(logits(model).isfinite().all())


@pytest.mark.parametrize(
    ("heads", "kv_heads", "wanted"),
    [(6, 6, {"heads": 3, "kv_heads": 3}), (6, 1, {"heads": 3})],
    ids=["MHA", "MQA"],
)
def test_all_or_one_kv_head(heads: Any, kv_heads: Any, wanted: Any, make: Any, text: Any, logits: Any):
    model = make(num_attention_heads=heads, num_key_value_heads=kv_heads)
    plan = prune(model, plans.decide(shape_of(model), extras_of(model), **wanted), text, EXACT)
    assert model.num_parameters() == plan.parameters_after
    assert bool(logits(model).isfinite().all())


@pytest.mark.parametrize("kind", ["llama3", "linear", "yarn"])
def test_rope_scaling_is_kept(kind: Any, make: Any, text: Any, tokenizer: Any, tmp_path: Path, logits: Any):
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    model = make("llama", rope_parameters=rope)
    prune(model, plans.decide(shape_of(model), extras_of(model), heads=4, hidden=24), text, EXACT)
    again = checkpoint.load(checkpoint.save(model, tokenizer, tmp_path / "student")).model
    assert again.config.rope_parameters["rope_type"] == kind
    torch.testing.assert_close(logits(again, 60), logits(model, 60), rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_pruning_dead_dimensions_is_exact(family: Any, tied: Any, make: Any, text: Any, logits: Any):
    """Dimensions that nothing writes and nothing reads, but for the mean of squares the norms divide by."""
    model = make(family, tie_word_embeddings=tied)
    dead = [i for i in range(48) if i % 2]
    with torch.no_grad():
        for weight in {id(w): w for w in (body(model).embed_tokens.weight, head_weight(model))}.values():
            weight[:, dead] = 0
        for layer in layers_of(model):
            for writer in (layer.o, layer.down):
                writer.weight[dead] = 0
                if (bias := bias_of(writer)) is not None:
                    bias[dead] = 0
    before = logits(model)
    plan = prune(model, plans.decide(shape_of(model), extras_of(model), hidden=24), text, EXACT)
    assert not set(dead) & set(plan.width)
    # the rms over half the dimensions is √2 as large, which the gains make good
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3)


def test_pruning_a_dead_layer_is_exact(make: Any, text: Any, logits: Any):
    model = make(num_hidden_layers=3)
    with torch.no_grad():
        layers_of(model)[1].o.weight.zero_()
        layers_of(model)[1].down.weight.zero_()
    before = logits(model)
    plan = prune(model, plans.decide(shape_of(model), extras_of(model), layers=2), text, EXACT)
    assert [kept.layer for kept in plan.layers] == [0, 2]
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def test_a_finished_plan_of_every_axis_can_be_applied_again(
    make: Any, text: Any, logits: Any, tmp_path: Path
):
    first, second = make(num_hidden_layers=3), make(num_hidden_layers=3)
    sizes: dict[str, Any] = AXES | {"heads": 2}
    plan = prune(first, plans.decide(shape_of(first), extras_of(first), **sizes), text, EXACT)
    plans.save(plan, tmp_path / "plan.json")
    prune(second, plans.load(tmp_path / "plan.json"), text, EXACT)
    torch.testing.assert_close(logits(second), logits(first), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"width": [0, 1]}, "2 dimensions"),
        ({"width": [*range(23), 48]}, "24 dimensions"),
        ({"swap": True}, "layers"),
    ],
)
def test_wrong_dimensions_or_layers_are_refused(change: Any, said: Any, make: Any, text: Any):
    model = make(num_hidden_layers=3)
    plan = prune(make(num_hidden_layers=3), plans.decide(shape_of(model), extras_of(model), hidden=24), text)
    if change.pop("swap", False):
        change["layers"] = plan.layers[::-1]
    with pytest.raises(ModelError, match=said):
        prune(model, msgspec.structs.replace(plan, **change), text)


@pytest.mark.parametrize("sizes", [{"hidden": 49}, {"hidden": 25}, {"layers": 3}, {"layers": -1}])
def test_sizes_that_cannot_be(sizes: Any, make: Any):
    model = make()
    with pytest.raises(InputError):
        plans.decide(shape_of(model), extras_of(model), **sizes)


def test_refitted_reader_is_the_float64_solution():
    torch.manual_seed(5)
    wide = torch.randn(300, 8) @ torch.randn(8, 8)
    keep, weight = [0, 2, 3, 5, 7], torch.randn(4, 8)
    narrow = wide[:, keep] * 1.3
    gram = Gram.zeros(5, 8)
    gram.add(narrow, wide)
    found = refit_reader(weight, gram, keep, ridge=0.03)
    v, u, w = narrow.double(), wide.double(), weight.double()
    strength = torch.diag((0.03 * (v**2).sum(0)).sqrt())
    left = torch.cat([v, strength])
    right = torch.cat([u @ w.T, strength @ w[:, keep].T])
    torch.testing.assert_close(
        found.double(), torch.linalg.lstsq(left, right).solution.T, rtol=1e-4, atol=1e-5
    )


def test_refitted_gain_by_hand():
    gain, power, product = torch.tensor([2.0, 1.0]), torch.tensor([4.0, 0.0]), torch.tensor([6.0, 0.0])
    factor = 6 * 2 / (4 * 2**2)  # all that the dimension never seen is scaled by
    wanted = torch.tensor([(6 + 1 * factor * 2) / (4 + 1), factor])
    torch.testing.assert_close(refit_gain(gain, power, product, ridge=0.5), wanted)


@torch.no_grad()
def test_refit_makes_a_narrow_model_closer(make: Any, text: Any):
    errors = []
    batch = text[0]
    for refit in (False, True):
        teacher, student = make(num_hidden_layers=3), make(num_hidden_layers=3)
        plan = plans.decide(shape_of(student), extras_of(student), hidden=36)
        prune(student, plan, text, EXACT._replace(refit=refit))
        ends = [m(input_ids=batch.tokens, position_ids=batch.positions).logits for m in (teacher, student)]
        errors.append(float((ends[0] - ends[1])[batch.predicts].square().mean()))
    assert errors[1] < 0.7 * errors[0]


def test_taylor_is_the_loss_change_to_first_order(make: Any, text: Any):
    model = make()
    [first, _] = channel_sensitivity(model, text)
    layer = layers_of(model)[0]
    assert first.shape == (24,)
    assert layer.down.weight.grad is None
    with torch.no_grad():
        layer.gate.weight[7] = layer.up.weight[7] = 0
        layer.down.weight[:, 7] = 0
    assert channel_sensitivity(model, text)[0][7] == 0
