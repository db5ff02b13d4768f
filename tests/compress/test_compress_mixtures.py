"""Mixtures of experts: the pool is the block, dense where it must be exactly, refits against float64."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from click.testing import CliRunner

from understudy.cli.compress import prune as prune_command
from understudy.compress import checkpoint, decoder
from understudy.compress import plan as plans
from understudy.compress.calibrate import attention_of, enter
from understudy.compress.decoder import extras_of, parameters, shape_of
from understudy.compress.dense import Pooling, hull, to_dense
from understudy.compress.experts import keep_experts
from understudy.compress.families import MIXTURES
from understudy.compress.fidelity import fidelity
from understudy.compress.pool import channel_scores, expert_scores, keep, route
from understudy.compress.recipe import OwnJob, own
from understudy.compress.single import Sizes, decided
from understudy.compress.student import student_of
from understudy.config import Own
from understudy.errors import InputError, ModelError

# tests reach into the architectures' own modules, which are untyped
layers_of: Any = decoder.layers_of
mixture_of: Any = decoder.mixture_of
FAMILIES = [family.model_type for family in MIXTURES]
DENSE = {family.model_type: family.dense for family in MIXTURES}
EXACT = Pooling(precision="fp32")
PLAIN = EXACT._replace(pull=0.0, reread=0.0)


def routing(model: Any):
    """The layers that route, with what `route` needs."""
    mixture = mixture_of(model)
    return mixture, [layer for layer in layers_of(model) if mixture.sparse(layer.module)]


def route_evenly(model: Any):
    """Every expert for every token with the same weight, shared gates constant."""
    mixture, layers = routing(model)
    with torch.no_grad():
        for layer in layers:
            router = layer.module.get_submodule(mixture.router)
            router.weight.zero_()
            router.top_k = 4
            if mixture.shared_gate:
                layer.module.get_submodule(mixture.shared_gate).weight.zero_()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pool_weighed_by_its_router_is_the_block(family: Any, make: Any, text: Any):
    model = make(family)
    mixture, layers = routing(model)
    stream = enter(model, text)
    for layer in layers:
        routed = route(mixture, layer, stream)
        for hidden, real, found in zip(stream.hidden, stream.real, routed.output, strict=True):
            torch.testing.assert_close(found, layer.feed_forward(hidden)[real], rtol=1e-4, atol=1e-5)
        assert sum(routed.calls[:4]) == 2 * stream.tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_as_counted(family: Any, make: Any):
    model = make(family)
    assert parameters(shape_of(model), extras_of(model)) == model.num_parameters()


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_kept_of_an_even_mixture_is_exact(family: Any, make: Any, text: Any, logits: Any):
    model = make(family)
    route_evenly(model)
    before = logits(model)
    student = to_dense(model, shape_of(model).ffn, text, EXACT).model
    assert student.config.model_type == DENSE[family]
    torch.testing.assert_close(logits(student), before, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [{"ffn": 48}, {"ffn": 40, "heads": 4}])
def test_a_dense_student_comes_back_with_the_same_logits(
    family: Any, sizes: Any, make: Any, text: Any, tokenizer: Any, tmp_path: Path, logits: Any
):
    model = make(family)
    if mixture_of(model).heads_fixed:
        sizes = {"ffn": sizes["ffn"]}
    plan = plans.decide(shape_of(model), extras_of(model), **sizes)
    student, done = student_of(model, plan, text)
    assert student.num_parameters() == plan.parameters_after
    assert len(set(done.layers[1].channels)) == sizes["ffn"]
    again = checkpoint.load(checkpoint.save(student, tokenizer, tmp_path / "student")).model
    assert again.config.model_type == DENSE[family]
    torch.testing.assert_close(logits(again), logits(student), rtol=0, atol=0)
    twice, _ = student_of(make(family), done, text)
    torch.testing.assert_close(logits(twice), logits(student), rtol=1e-3, atol=1e-4)


def test_every_axis_of_the_dense_student_can_shrink_too(
    make: Any, text: Any, tokenizer: Any, tmp_path: Path, logits: Any
):
    model = make("mixtral", num_hidden_layers=3)
    sizes: dict[str, Any] = {"ffn": 32, "heads": 4, "hidden": 40, "layers": 2}
    plan = plans.decide(shape_of(model), extras_of(model), **sizes)
    student, done = student_of(model, plan, text)
    assert student.num_parameters() == plan.parameters_after
    assert all(len(layer.channels) == 32 for layer in done.layers)
    assert len(done.width) == 40
    again = checkpoint.load(checkpoint.save(student, tokenizer, tmp_path / "student")).model
    assert shape_of(again) == plan.student
    torch.testing.assert_close(logits(again), logits(student), rtol=0, atol=0)


@torch.no_grad()
def test_scores_are_those_of_the_definition(make: Any, text: Any):
    model = make("qwen2_moe")
    mixture, layers = routing(model)
    layer, stream = layers[0], enter(model, text)
    routed = route(mixture, layer, stream)
    block, pool = layer.module.mlp, mixture.pool(layer.module)
    power, length, calls = torch.zeros(4, 24).double(), [0.0] * 4, [0] * 4
    for hidden, real in zip(stream.hidden, stream.real, strict=True):
        for x in layer.read_feed_forward(hidden[real]):
            _, weights, chosen = block.gate(x[None])
            for g, e in zip(weights[0].double(), chosen[0].tolist(), strict=True):
                gate, up = (block.experts.gate_up_proj[e].double() @ x.double()).split(24)
                a = torch.nn.functional.silu(gate) * up
                power[e] += (g * a) ** 2
                length[e] += float(g * (block.experts.down_proj[e].double() @ a).norm())
                calls[e] += 1
    for e in range(4):
        wanted = (power[e] / stream.tokens).sqrt() * pool[e].down.double().norm(dim=0)
        torch.testing.assert_close(channel_scores(pool, routed)[e].double(), wanted, rtol=1e-4, atol=1e-6)
    assert routed.calls[:4] == calls
    wanted = [s / n for s, n in zip(length, calls, strict=True)]
    assert expert_scores("reap", routed)[:4] == pytest.approx(wanted, rel=1e-4)
    assert routed.calls[4] == stream.tokens


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_the_refit_is_the_float64_solution(family: Any, make: Any, text: Any):
    model = make(family, num_hidden_layers=1)
    mixture, layers = routing(model)
    student, channels = to_dense(model, 40, text, PLAIN._replace(ridge=0.05))
    stream = enter(model, text)
    stream.advance(attention_of(layers[0]), 0)
    x = torch.cat(
        [layers[0].read_feed_forward(h[r]) for h, r in zip(stream.hidden, stream.real, strict=True)]
    )
    wanted = torch.cat(
        [layers[0].feed_forward(h)[r] for h, r in zip(stream.hidden, stream.real, strict=True)]
    )
    pool, weights = mixture.pool(layers[0].module), mixture.weights(layers[0].module, x).double()
    gate, up, down = (torch.cat([e[i] for e in pool], dim=i // 2).double() for i in range(3))
    owner = torch.cat([torch.full((len(e.gate),), n) for n, e in enumerate(pool)])[channels[0]]
    at = channels[0]
    a = torch.nn.functional.silu(x.double() @ gate[at].T) * (x.double() @ up[at].T)
    start = down[:, at] * (weights[:, owner] * a**2).sum(0) / (a**2).sum(0)
    strength = torch.diag((0.05 * (a**2).sum(0)).sqrt())
    left = torch.cat([a, strength])
    right = torch.cat([wanted.double(), strength @ start.T])
    solution = torch.linalg.lstsq(left, right).solution.T
    found = layers_of(student)[0].down.weight
    torch.testing.assert_close(found.double(), solution, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def errors(model: Any, students: Any, text: Any):
    """Squared distance of each student's final states from the mixture's."""
    ends = [
        torch.cat(
            [m.model(input_ids=b.tokens, position_ids=b.positions).last_hidden_state[b.real] for b in text]
        )
        for m in (model, *students)
    ]
    return [float((end - ends[0]).square().mean()) for end in ends[1:]]


def test_refitting_and_following_the_mixture_lower_the_error(make: Any, text: Any):
    model = make("qwen3_moe", num_hidden_layers=4)
    ways = [PLAIN._replace(refit=False), PLAIN, EXACT]
    sliced, refitted, followed = errors(model, [to_dense(model, 40, text, w).model for w in ways], text)
    assert refitted < sliced
    assert followed < refitted


def test_shared_channels_go_first(make: Any, text: Any):
    model = make("deepseek_v3")
    mixture, (layer,) = routing(model)
    routed = route(mixture, layer, enter(model, text))
    pool = mixture.pool(layer.module)
    for choice in ("channels", "mass", "reap"):
        kept = keep(choice, pool, routed, 30, shared=True)
        assert set(range(96, 120)) < set(kept.indices)
        assert kept.source[4].tolist() == [0.0] * 6 + [1.0] * 24


@pytest.mark.parametrize("choice", ["mass", "reap"])
def test_whole_experts_are_kept_in_the_order_of_their_score(choice: Any, make: Any, text: Any):
    model = make("mixtral")
    mixture, layers = routing(model)
    routed, pool = route(mixture, layers[0], enter(model, text)), mixture.pool(layers[0].module)
    kept = keep(choice, pool, routed, 48, shared=False)
    scores = expert_scores(choice, routed)
    best = sorted(range(4), key=lambda e: -scores[e])[:2]
    assert {c // 24 for c in kept.indices} == set(best)


def test_averages_of_equal_experts_are_exact(make: Any, text: Any, logits: Any):
    model = make("mixtral")
    _, layers = routing(model)
    with torch.no_grad():
        for layer in layers:
            for name in ("gate_up_proj", "down_proj"):
                stacked = getattr(layer.module.mlp.experts, name)
                stacked.copy_(stacked[:1].expand_as(stacked))
    student = to_dense(model, 24, text, EXACT._replace(choice="average")).model
    torch.testing.assert_close(logits(student), logits(model), rtol=1e-3, atol=1e-4)


def test_a_plain_layer_narrower_than_the_student_grows_without_a_change(make: Any, text: Any, logits: Any):
    model = make("qwen3_moe")
    student = to_dense(model, 64, text, PLAIN).model
    down = layers_of(student)[0].down.weight
    assert down.shape[1] == 64
    assert not down[:, 40:].any()
    assert layers_of(student)[0].gate.weight[40:].any()
    first = [layers_of(m)[0] for m in (model, student)]
    x = torch.randn(1, 5, 48)
    torch.testing.assert_close(first[1].feed_forward(x), first[0].feed_forward(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_experts_kept_change_nothing_and_half_come_back(
    family: Any, make: Any, text: Any, tokenizer: Any, tmp_path: Path, logits: Any
):
    model = make(family)
    before = logits(model)
    assert keep_experts(model, 4, text)[1] == [0, 1, 2, 3]
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    plan = plans.decide(shape_of(model), extras_of(model), experts=4 if family == "deepseek_v3" else 2)
    student, done = student_of(model, plan, text)
    assert student.num_parameters() == plan.parameters_after
    assert len(done.layers[1].experts) == plan.student.experts
    again = checkpoint.load(checkpoint.save(student, tokenizer, tmp_path / "student")).model
    assert shape_of(again) == plan.student
    torch.testing.assert_close(logits(again), logits(student), rtol=1e-4, atol=1e-5)


def test_as_many_experts_of_each_group_stay(make: Any, text: Any):
    model = make("deepseek_v3", n_routed_experts=8)
    mixture, (layer,) = routing(model)
    stream = enter(model, text)
    for index, other in enumerate(layers_of(model)):
        stream.advance(attention_of(other), index)
        if other.module is not layer.module:
            stream.advance(lambda hidden, _call, other=other: other.feed_forward(hidden), index)
    scores = expert_scores("reap", route(mixture, layer, stream))
    best = [sorted(group, key=lambda e: -scores[e])[:2] for group in (range(4), range(4, 8))]
    assert keep_experts(model, 4, text)[1] == sorted(best[0]) + sorted(best[1])
    assert shape_of(model).experts == 4


def test_taking_out_experts_that_are_never_chosen_is_exact(make: Any, text: Any, logits: Any):
    model = make("glm4_moe")
    _, (layer,) = routing(model)
    layer.module.mlp.gate.e_score_correction_bias[[0, 2]] = -100.0
    before = logits(model)
    assert keep_experts(model, 2, text)[1] == [1, 3]
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_fewer_experts_share_the_tokens_out_anew(make: Any, text: Any):
    model = make("mixtral", num_hidden_layers=1)
    whole = copy.deepcopy(model).model.layers[0].mlp
    (kept,) = keep_experts(model, 3, text)
    x = torch.randn(1, 7, 48)
    logits = x[0] @ whole.gate.weight[kept].T
    share, chosen = logits.softmax(-1).topk(2)
    share /= share.sum(-1, keepdim=True)
    wanted = torch.zeros(7, 48)
    for t in range(7):
        for g, e in zip(share[t], chosen[t].tolist(), strict=True):
            gate, up = (whole.experts.gate_up_proj[kept[e]] @ x[0, t]).split(24)
            down = whole.experts.down_proj[kept[e]]
            wanted[t] += g * (down @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(model.model.layers[0].mlp(x)[0], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        ("llama", {"experts": 2}, "experts = 2"),
        ("mixtral", {"experts": 1}, "experts = 1"),
        ("mixtral", {"experts": 5}, "experts = 5"),
        ("mixtral", {"experts": 3, "heads": 4}, "beside other sizes"),
        ("deepseek_v3", {"experts": 3}, "experts = 3"),
        ("olmoe", {"heads": 2}, "heads = 2"),
        ("olmoe", {"layers": 1}, "layers = 1"),
        ("deepseek_v2", {"heads": 3, "kv_heads": 3}, "heads = 3"),
        ("deepseek_v2", {"hidden": 40}, "hidden = 40"),
        ("mixtral", {"ffn": 97}, "ffn = 97"),
    ],
)
def test_sizes_that_cannot_be(family: Any, sizes: Any, message: Any, make: Any):
    model = make(family)
    with pytest.raises(InputError, match=message):
        plans.decide(shape_of(model), extras_of(model), **sizes)


def test_nothing_asked_gives_the_width_that_a_token_passes(
    make: Any, folder: Any, tokenizer: Any, tmp_path: Path
):
    path = checkpoint.save(make("qwen2_moe"), tokenizer, tmp_path / "mixture")
    loaded = checkpoint.load(path)
    plan = decided(shape_of(loaded.model), loaded, Sizes())
    assert (plan.teacher.ffn, plan.student.ffn, plan.student.experts) == (112, 64, 0)
    assert decided(shape_of(loaded.model), loaded, Sizes(heads=4)).student.ffn == 64
    assert decided(shape_of(loaded.model), loaded, Sizes(experts=3)).student.experts == 3


def test_a_dense_model_is_no_mixture(make: Any, text: Any):
    with pytest.raises(ModelError, match="routes in no layer"):
        to_dense(make(), 16, text)
    with pytest.raises(ModelError, match="routes in no layer"):
        keep_experts(make(), 2, text)


def test_a_mixture_without_calibration_or_with_strange_channels_is_refused(make: Any, text: Any):
    model = make("mixtral")
    with pytest.raises(ModelError, match="no calibration text"):
        to_dense(model, 24, [])
    plan = plans.decide(shape_of(model), extras_of(model), ffn=24)
    done = student_of(model, plan, text).plan
    for channels in ([0, 0], [96], list(range(25))):
        broken = [msgspec.structs.replace(done.layers[0], channels=channels), done.layers[1]]
        with pytest.raises(ModelError, match="of the plan keeps"):
            student_of(model, msgspec.structs.replace(plan, layers=broken), text)


def test_a_weight_without_a_source_is_named(make: Any):
    model = make("mixtral")
    del model.model.norm.weight
    model.model.norm.register_parameter("weight", torch.nn.Parameter(torch.ones(5)))
    with pytest.raises(ModelError, match=r"no weight for model\.norm\.weight"):
        hull(model, mixture_of(model), 24)


def test_own_makes_a_dense_student_of_a_mixture_and_heals_it(
    make: Any, tokenizer: Any, chats: Any, tmp_path: Path
):
    teacher = checkpoint.save(make("mixtral"), tokenizer, tmp_path / "teacher")
    settings = Own(ffn=32, heads=4, calibration_tokens=400, distil_tokens=8000, learning_rate=5e-4)
    job = OwnJob(
        teacher=str(teacher),
        train=chats[8:],
        held_out=chats[:8],
        out=tmp_path / "out",
        settings=settings,
        seed=0,
    )
    report = own(job)
    assert report.after.kl < report.before.kl
    student = checkpoint.load(report.checkpoint).model
    assert student.config.model_type == "mistral"
    assert shape_of(student) == report.plan.student
    assert own(job) == report


def test_prune_keeps_a_mixture_when_asked(make: Any, tokenizer: Any, tmp_path: Path):
    teacher = checkpoint.save(make("olmoe"), tokenizer, tmp_path / "teacher")
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on a mat is it warm yes\n\n" * 20)
    arguments = [str(teacher), "--out", str(tmp_path / "few"), "--experts", "3", "--calibration", str(text)]
    result = CliRunner().invoke(prune_command, arguments)
    assert result.exit_code == 0, result.output
    assert checkpoint.load(tmp_path / "few").model.config.num_experts == 3


@pytest.fixture
def bench():
    path = Path(__file__).parents[2] / "bench" / "mixtures.py"
    spec = importlib.util.spec_from_file_location("mixtures", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mixtures"] = module
    spec.loader.exec_module(module)
    return module


def test_pooled_channels_of_a_trained_mixture_lose_least(bench: Any):
    """A small instance of the bench: random weights have no experts worth telling apart."""
    drawn = bench.Text()
    teacher = bench.trained(drawn, 60, seed=0)
    assert bench.specialised(teacher, drawn) > 0.5
    calibration, held_out = (bench.batched(drawn.documents(64, seed)) for seed in (11, 14))
    losses = {
        choice: fidelity(
            teacher, to_dense(teacher, 2 * bench.CHANNELS, calibration, Pooling(choice)).model, held_out
        ).kl
        for choice in bench.NAMES
    }
    assert losses["channels"] < 0.95 * min(kl for choice, kl in losses.items() if choice != "channels")
