"""A layer at a time from disk, and after a kill from where it was: the same student, in little memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from understudy.compress import checkpoint, streaming
from understudy.compress import plan as plans
from understudy.compress.decoder import extras_of, layers_of, shape_of
from understudy.compress.families import DENSE
from understudy.compress.journal import Journal
from understudy.compress.prune import Method, prune
from understudy.compress.single import PruneJob, Sizes, prune_only
from understudy.errors import ModelError

EXACT = Method(precision="fp32")
EVERYTHING = {"ffn": 16, "heads": 2, "kv_heads": 1, "hidden": 24, "layers": 3}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, weight in left.items():
        torch.testing.assert_close(weight, right[name], rtol=0, atol=0)


@pytest.mark.parametrize("family", [family.model_type for family in DENSE])
@pytest.mark.parametrize("tied", [True, False])
def test_streamed_or_loaded_the_student_is_the_same(
    family, tied, make, text, tokenizer, tmp_path, monkeypatch
):
    kinds = ["sliding_attention", "full_attention"] * 2
    extra = {"layer_types": kinds} if family == "gemma3_text" else {}
    model = make(family, num_hidden_layers=4, tie_word_embeddings=tied, **extra)
    model.generation_config = GenerationConfig(eos_token_id=[2, 5], do_sample=True, top_p=0.9)
    teacher = checkpoint.save(model, tokenizer, tmp_path / "teacher")
    monkeypatch.setattr(streaming, "SHARD_BYTES", 10_000)
    for stream in (False, True):
        loaded = checkpoint.load(teacher, stream=stream).model
        assert streaming.is_streamed(loaded) is stream
        plan = plans.decide(shape_of(loaded), extras_of(loaded), **EVERYTHING)
        prune(loaded, plan, text, EXACT, journal=Journal(tmp_path / f"journal {stream}", "one job"))
        checkpoint.save(loaded, tokenizer, tmp_path / str(stream))
    assert len(list((tmp_path / "True").glob("model-*.safetensors"))) > 1
    same(weights(tmp_path / "True"), weights(tmp_path / "False"))
    left, right = (
        json.loads((tmp_path / s / "generation_config.json").read_text()) for s in ("True", "False")
    )
    assert left["eos_token_id"] == right["eos_token_id"] == [2, 5]


def test_layers_are_in_memory_only_while_awake(folder: Path):
    model = checkpoint.load(folder, stream=True).model
    first, second = layers_of(model)
    with first.awake():
        assert not first.q.weight.is_meta
        assert second.q.weight.is_meta
        with first.awake():  # a second time changes nothing
            assert not first.q.weight.is_meta
    assert first.q.weight.is_meta


def test_the_teachers_dtype_is_kept(make, text, tokenizer, tmp_path: Path):
    teacher = checkpoint.save(make().to(torch.bfloat16), tokenizer, tmp_path / "teacher")
    loaded = checkpoint.load(teacher, stream=True).model
    plan = plans.decide(shape_of(loaded), extras_of(loaded), ffn=16)
    prune(loaded, plan, text, EXACT, journal=Journal(tmp_path / "journal", "one job"))
    again = AutoModelForCausalLM.from_pretrained(checkpoint.save(loaded, tokenizer, tmp_path / "student"))
    assert {weight.dtype for weight in again.parameters()} == {torch.bfloat16}


def test_a_mixture_is_loaded_whole(make, tokenizer, tmp_path: Path):
    teacher = checkpoint.save(make("mixtral"), tokenizer, tmp_path / "teacher")
    assert not streaming.is_streamed(checkpoint.load(teacher, stream=True).model)


def test_weights_that_are_not_finite_are_named_before_anything_begins(make, tokenizer, tmp_path: Path):
    model = make()
    with torch.no_grad():
        layers_of(model)[1].up.weight[0, 0] = float("inf")
    checkpoint.save(model, tokenizer, tmp_path / "bad")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight holds values that are not finite"):
        checkpoint.load(tmp_path / "bad", stream=True)


class Killed(BaseException):
    """Stands for the power cut."""


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("shape", ["uniform", "per-layer"])
def test_a_kill_at_any_layer_costs_nothing_but_time(stream, shape, make, text, tokenizer, tmp_path: Path):
    """Killed after every single layer, cut or narrowed, and begun again each time."""
    teacher = checkpoint.save(make(num_hidden_layers=4), tokenizer, tmp_path / "teacher")

    def run(name: str, journal: Journal | None, progress=lambda *_: None) -> None:
        model = checkpoint.load(teacher, stream=stream).model
        plan = plans.decide(shape_of(model), extras_of(model), **EVERYTHING)
        if shape == "per-layer":
            plan = plans.per_layer(plan, [8, 16, 12], extras_of(model))
        prune(model, plan, text, EXACT, progress, journal)
        checkpoint.save(model, tokenizer, tmp_path / name)

    run("whole", Journal(tmp_path / "another", "one job") if stream else None)
    kills = 0
    for stop in [("prune", n) for n in range(1, 5)] + [("width", n) for n in range(1, 4)]:

        def kill(step: str, done: int, total: int, note: str = "", stop=stop) -> None:
            if (step, done) == stop:
                raise Killed

        with pytest.raises(Killed):
            run("never", Journal(tmp_path / "journal", "one job"), kill)
        kills += 1
    steps: list[str] = []
    run("resumed", Journal(tmp_path / "journal", "one job"), lambda step, *_: steps.append(step))
    assert kills == 7
    assert set(steps) <= {"width"}  # the last note may have been one layer short, not more
    assert len(steps) <= 1
    same(weights(tmp_path / "resumed"), weights(tmp_path / "whole"))


def test_a_changed_job_begins_anew(tmp_path: Path):
    first = Journal(tmp_path / "journal", "one")
    first.plan(lambda: plans.load(write_plan(tmp_path)))
    assert (tmp_path / "journal" / "plan.json").exists()
    Journal(tmp_path / "journal", "one")
    assert (tmp_path / "journal").exists()
    Journal(tmp_path / "journal", "another")
    assert not (tmp_path / "journal").exists()


def write_plan(folder: Path) -> Path:
    from understudy.compress.decoder import Extras, Shape

    shape = Shape(layers=2, hidden=48, ffn=24, heads=6, kv_heads=2, head_dim=8, vocab=48)
    extras = Extras(True, False, False, False, False, False, 2, False)
    plans.save(plans.plan_of(shape, shape, extras, "as it is"), folder / "some.json")
    return folder / "some.json"


def test_prune_goes_on_with_the_plan_it_had(folder: Path, documents, tmp_path: Path):
    shown: list[str] = []

    def job(out: str) -> PruneJob:
        return PruneJob(str(folder), tmp_path / out, Sizes(ffn=16), None, lambda _: documents, 400, EXACT)

    def kill(step: str, done: int, total: int, note: str = "") -> None:
        if (step, done) == ("prune", 1):
            raise Killed

    with pytest.raises(Killed):
        prune_only(job("student"), lambda plan: shown.append(str(plan)), kill)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["student.plan.json", "student.prune", "teacher"]
    prune_only(job("student"), lambda plan: shown.append(str(plan)))
    prune_only(job("whole"), lambda plan: None)
    assert shown[0] == shown[1]
    same(weights(tmp_path / "student"), weights(tmp_path / "whole"))
    assert not (tmp_path / "student.prune").exists()


def test_a_full_disk_on_the_way_leaves_nothing(folder: Path, documents, tmp_path: Path):
    import resource

    job = PruneJob(str(folder), tmp_path / "student", Sizes(ffn=16), None, lambda _: documents, 400, EXACT)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(ModelError, match="cannot write"):
            prune_only(job, lambda plan: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["student.plan.json", "teacher"]


def test_a_token_that_the_model_does_not_have(make, text):
    model = make(vocab_size=16)
    with pytest.raises(ModelError, match="the model has 16"):
        prune(model, plans.decide(shape_of(model), extras_of(model), ffn=16), text)


def test_pruning_leaves_no_layer_awake(folder: Path, text, tmp_path: Path):
    """What is in memory between layers is the embedding; bench/pruning.py measures the process itself."""
    model = checkpoint.load(folder, stream=True).model
    awake: list[int] = []

    def look(*_: object) -> None:
        awake.append(sum(not p.is_meta for layer in layers_of(model) for p in layer.module.parameters()))

    plan = plans.decide(shape_of(model), extras_of(model), ffn=16, hidden=24)
    prune(model, plan, text, EXACT, look, Journal(tmp_path / "journal", "one job"))
    assert len(awake) >= 4
    assert set(awake) == {0}
