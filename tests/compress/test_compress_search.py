"""The shape that costs least, by measuring: dead parts are found, budgets kept, trials checked whole."""

from __future__ import annotations

import copy
import math
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch

from understudy.compress import checkpoint, corpus, search
from understudy.compress import plan as plans
from understudy.compress.calibrate import enter, feed_forward_of, observe
from understudy.compress.decoder import extras_of, layers_of, parameters, shape_of, states_of
from understudy.compress.elimination import choose_channels, ranking
from understudy.compress.families import DENSE
from understudy.compress.fidelity import divergence, side_of
from understudy.compress.importance import Gated, head_columns, refit
from understudy.compress.progress import silent
from understudy.compress.prune import cut_channels
from understudy.compress.search import Budget, Sample, Search
from understudy.compress.single import Sizes, decided
from understudy.errors import InputError

WIDE = {"intermediate_size": 256, "num_hidden_layers": 3}


def smaller(model: Any, **sizes: Any) -> int:
    """Parameters of the model with these sizes."""
    return plans.decide(shape_of(model), extras_of(model), **sizes).parameters_after


def searched(model: Any, most: int, text: Any, **sizes: Any):
    start = plans.decide(shape_of(model), extras_of(model), **sizes).student
    budget = Budget(partial(parameters, extras=extras_of(model)), most, f"{most} parameters")
    return search_of(model, text, start).cheapest(budget)


def search_of(model: Any, text: Any, start: Any = None, progress: Any = silent) -> Search:
    """Axes and plans on the same texts, the last of them for KL."""
    every = Sample(text[:-1], text[-1:])
    return Search(model, start or shape_of(model), every, every, progress)


def kill_heads(model: Any) -> None:
    for layer in layers_of(model):
        layer.o.weight[:, head_columns([0, 4], 8)] = 0


def kill_channels(model: Any) -> None:
    for layer in layers_of(model):
        layer.down.weight[:, 1::2] = 0


def kill_layer(model: Any) -> None:
    layers_of(model)[1].o.weight.zero_()
    layers_of(model)[1].down.weight.zero_()


@torch.no_grad()
@pytest.mark.parametrize(
    ("kill", "sizes"),
    [(kill_heads, {"heads": 4}), (kill_channels, {"ffn": 128}), (kill_layer, {"layers": 2})],
    ids=["heads", "channels", "a layer"],
)
def test_what_is_dead_is_what_goes(kill: Any, sizes: Any, make: Any, text: Any):
    model = make(**WIDE)
    kill(model)
    before = copy.deepcopy(model.state_dict())
    chosen = searched(model, smaller(model, **sizes), text)[0]
    assert chosen.shape == plans.decide(shape_of(model), extras_of(model), **sizes).student
    assert chosen.axis == "plan"
    assert chosen.kl < 1e-3
    for name, weight in model.state_dict().items():  # measuring leaves the teacher as it was
        torch.testing.assert_close(weight, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("family", [family.model_type for family in DENSE])
@pytest.mark.parametrize("share", [0.85, 0.5])
def test_every_family_stays_within_its_budget(family: Any, share: Any, make: Any, text: Any):
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = make(family, **WIDE, **({"layer_types": kinds} if family == "gemma3_text" else {}))
    most = int(share * model.num_parameters())
    found = searched(model, most, text)
    assert parameters(found[0].shape, extras_of(model)) <= most
    assert [m.axis for m in found].index("plan") == 0
    assert found[0].kl == min(m.kl for m in found if m.axis == "plan")
    assert all(m.kl == m.kl for m in found)


def test_axes_that_were_named_stay(make: Any, text: Any):
    model = make(**WIDE)
    found = searched(model, int(0.6 * model.num_parameters()), text, heads=4, layers=2)
    assert {(m.shape.heads, m.shape.layers) for m in found if m.axis == "plan"} == {(4, 2)}
    assert not {"heads", "layers"} & {m.axis for m in found}


@torch.no_grad()
def test_a_trial_is_the_model_cut_by_hand(make: Any, text: Any):
    """Each layer refitted on the untouched model's statistics, then the whole run."""
    model = make(**WIDE)
    found = next(m for m in searched(model, smaller(model, ffn=64), text) if m.axis == "ffn")
    student, stream = copy.deepcopy(model), enter(model, text[:-1])
    for index, (old, new) in enumerate(zip(layers_of(model), layers_of(student), strict=True)):
        stream.advance(old.attention, index)
        gram = observe(old.down, stream, feed_forward_of(old), index)
        block = Gated(old.gate.weight, old.up.weight, old.down.weight)
        kept = choose_channels("obs", block, gram, found.shape.ffn)
        cut_channels(new, kept, refit(old.down.weight, gram, kept))
        stream.advance(feed_forward_of(old), index)
    sides = [side_of(m, states_of(m, text[-1])[text[-1].predicts]) for m in (model, student)]
    assert found.kl == pytest.approx(divergence(*sides), rel=1e-3)


def test_channels_are_ranked_once_for_all_passes(make: Any, text: Any, monkeypatch: Any):
    """The order follows from the untouched model's statistics, which every pass takes anew."""
    model, ranked = make(**WIDE), []
    monkeypatch.setattr(search, "ranking", lambda *given: ranked.append(1) or ranking(*given))
    found = searched(model, smaller(model, ffn=128), text)
    assert sum(measured.axis == "plan" for measured in found) > 1
    assert len(ranked) == 3  # layers


def test_an_axis_that_pays_alone_is_a_finalist_however_it_ranks(make: Any, text: Any, monkeypatch: Any):
    model = make(**WIDE)
    monkeypatch.setattr(search, "_predicted", lambda teacher, shape, singles: -shape.ffn)
    found = searched(model, smaller(model, ffn=128), text)
    alone = plans.decide(shape_of(model), extras_of(model), ffn=128).student
    assert alone in [measured.shape for measured in found if measured.axis == "plan"]


def test_a_second_budget_measures_no_axis_again(make: Any, text: Any):
    """A latency is approached by budgets; what an axis costs is the same for all of them."""
    model, extras = make(**WIDE), extras_of(make(**WIDE))
    steps: list[int] = []
    asked = search_of(model, text, progress=lambda step, done, total, note="": steps.append(done))
    budgets = [
        Budget(partial(parameters, extras=extras), smaller(model, ffn=ffn), "few") for ffn in (128, 64)
    ]
    first = asked.cheapest(budgets[0])
    passes = steps.count(1)
    second = asked.cheapest(budgets[1])
    assert steps.count(1) == passes + 1  # the plans'
    assert [m for m in second if m.axis != "plan"] == [m for m in first if m.axis != "plan"]
    fresh = search_of(model, text).cheapest(budgets[1])
    alone = plans.decide(shape_of(model), extras, ffn=64).student
    kl = [{m.shape: m.kl for m in found if m.axis == "plan"}[alone] for found in (second, fresh)]
    assert kl[0] == pytest.approx(kl[1])


def test_a_budget_much_smaller_measures_what_it_takes_further(make: Any, text: Any):
    model, extras = make(**WIDE), extras_of(make(**WIDE))
    asked = search_of(model, text)
    channels: list[list[int]] = []
    for ffn in (192, 64):
        most = smaller(model, ffn=ffn)
        found = asked.cheapest(Budget(partial(parameters, extras=extras), most, f"{most} parameters"))
        channels.append([m.shape.ffn for m in found if m.axis == "ffn"])
    assert channels[0] == [192]
    assert channels[1][0] == 192
    assert min(channels[1]) == 64


def test_plans_are_measured_on_more_than_axes(make: Any, text: Any):
    model, extras = make(**WIDE), extras_of(make(**WIDE))
    budget = Budget(partial(parameters, extras=extras), smaller(model, ffn=128), "few")
    little, much = Sample(text[:1], text[-1:]), Sample(text[:-1], text[-1:])
    few, more = (Search(model, shape_of(model), little, plans).cheapest(budget) for plans in (little, much))
    assert [m for m in more if m.axis != "plan"] == [m for m in few if m.axis != "plan"]
    assert more[0].kl < few[0].kl


def test_an_unreachable_budget_measures_nothing(make: Any, text: Any):
    steps: list[str] = []

    def told(step: str, done: int, total: int, note: str = "") -> None:
        steps.append(step)

    model = make(**WIDE)
    budget = Budget(partial(parameters, extras=extras_of(model)), 900, "900 parameters")
    with pytest.raises(InputError, match="900 parameters cannot be reached"):
        search_of(model, text, progress=told).cheapest(budget)
    assert steps == []


def test_a_budget_in_whatever_unit(make: Any, text: Any):
    """Seconds a token, say: the cost is any function that grows with the shape."""
    model = make(**WIDE)
    asked = search_of(model, text)
    found = asked.cheapest(Budget(attrgetter("layers"), 2.0, "two"))
    assert found[0].shape.layers == 2
    assert found[0].shape.ffn == 256


def test_without_texts_a_rule_decides(make: Any, tokenizer: Any, documents: Any, tmp_path: Path):
    loaded = checkpoint.load(checkpoint.save(make(**WIDE), tokenizer, tmp_path / "teacher"))
    shape = shape_of(loaded.model)
    assert decided(shape, loaded, Sizes(params="0.7")).measured == []
    plan = decided(shape, loaded, Sizes(params="0.7"), lambda: documents)
    assert plan.measured[0].shape == plan.student
    assert plan.parameters_after <= 0.7 * plan.parameters_before
    assert "least measured KL" in plan.reason


def test_one_text_is_divided(make: Any, tokenizer: Any, tmp_path: Path):
    loaded = checkpoint.load(checkpoint.save(make(**WIDE), tokenizer, tmp_path / "teacher"))
    long = corpus.encode_text(tokenizer, "the cat sat on a mat because it is warm " * 90)
    plan = decided(shape_of(loaded.model), loaded, Sizes(params="0.7"), lambda: [long])
    assert plan.measured


def test_a_latency_is_reached_as_measured(make: Any, tokenizer: Any, documents: Any, tmp_path: Path):
    """The engine's clock is stood in for: it charges heads more than the fitted cost knows of."""
    from safetensors import safe_open

    loaded = checkpoint.load(checkpoint.save(make(**WIDE), tokenizer, tmp_path / "teacher"))
    asked: list[float] = []

    def speed(folder: Path) -> float:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            sizes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        weights = sum(math.prod(size) for size in sizes.values())
        layers = sum(name.endswith("down_proj.weight") for name in sizes)
        asked.append(1 / (1e-6 * weights + 1e-3 * layers))
        return asked[-1]

    def wanted(target: float):
        shape = shape_of(loaded.model)
        return decided(shape, loaded, Sizes(latency=target), lambda: documents, speed=speed)

    whole = speed(tmp_path / "teacher")
    plan = wanted(1.5 * whole)
    assert asked[-1] >= 1.5 * whole
    assert "tokens a second and more" in plan.reason
    assert plan.parameters_after < plan.parameters_before
    assert wanted(0.5 * whole).parameters_after == plan.parameters_before
    with pytest.raises(InputError, match="cannot be reached"):
        wanted(1000 * whole)


def test_a_latency_beside_a_size_is_refused(make: Any, tokenizer: Any, documents: Any, tmp_path: Path):
    loaded = checkpoint.load(checkpoint.save(make(**WIDE), tokenizer, tmp_path / "teacher"))
    for sizes in (Sizes(latency=9.0, params="0.5"), Sizes(latency=9.0, ffn=64)):
        with pytest.raises(InputError, match="latency = 9 tokens"):
            decided(shape_of(loaded.model), loaded, sizes, lambda: documents, speed=lambda _: 1.0)
