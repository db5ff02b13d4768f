"""`own` from a saved teacher to a report, twice; and the commands."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from understudy.cli import compress as commands
from understudy.cli.distil import distil as distil_command
from understudy.compress import checkpoint, recipe
from understudy.compress import plan as plans
from understudy.compress.corpus import encode_chat
from understudy.compress.decoder import Shape
from understudy.compress.plan import LayerPlan
from understudy.compress.progress import silent
from understudy.compress.recipe import OwnJob, OwnReport, own
from understudy.compress.single import shared_out
from understudy.config import Own
from understudy.errors import InputError, ModelError

SETTINGS = Own(params="", ffn=8, heads=4, calibration_tokens=200, distil_tokens=2000, learning_rate=1e-3)


@pytest.fixture
def job(folder: Path, chats, tmp_path: Path) -> OwnJob:
    return OwnJob(str(folder), chats[8:], chats[:8], tmp_path / "own", SETTINGS, seed=1)


def test_own_makes_a_student(job):
    # the refit leaves little to heal: 2,000 tokens help on texts set aside, and not beyond noise elsewhere
    job = job._replace(settings=msgspec.structs.replace(SETTINGS, distil_tokens=25_000))
    steps: list[str] = []
    report = own(job, lambda step, *_: steps.append(step))
    assert list(dict.fromkeys(steps)) == ["load", "shape", "prune", "fidelity", "heal", "baseline"]
    assert report.after.kl < report.before.kl
    assert "tokens are kept: KL" in report.notes[-1]
    assert 0 < report.gap_closed < 1
    assert report.parameters_after < report.parameters_before
    assert len(report.plan.layers) == 2
    assert set(report.seconds) == {"load", "shape", "prune", "fidelity", "heal", "baseline"}
    assert report.seconds["heal"] > 0
    model = AutoModelForCausalLM.from_pretrained(report.checkpoint)
    assert model.num_parameters() == report.parameters_after
    card = (job.out / "checkpoint" / "README.md").read_text()
    assert report.calibration_hash in card
    assert "| FFN channels | 24 | 8 |" in card
    assert sorted(p.name for p in job.out.iterdir()) == [
        "before.json",
        "checkpoint",
        "curve.svg",
        "job.json",
        "plan.json",
        "report.json",
    ]
    assert msgspec.json.decode((job.out / "report.json").read_bytes(), type=OwnReport) == report


@pytest.mark.parametrize("ffn", [18, 4])
def test_own_shares_channels_out(job, ffn):
    """At once, and behind a step healed on the way: 4 channels and 4 heads are two cuts."""
    small = Own(ffn=ffn, heads=4, shape="per-layer", calibration_tokens=200, distil_tokens=500)
    report = own(job._replace(settings=small))
    plan = report.plan
    model = AutoModelForCausalLM.from_pretrained(report.checkpoint)
    assert model.config.ffn_per_layer == plan.ffns == [len(layer.channels) for layer in plan.layers]
    assert sum(plan.ffns) == 2 * ffn
    padding = 3 * plan.student.hidden * (2 * plan.student.ffn - sum(plan.ffns))
    assert model.num_parameters() == report.parameters_after + padding
    assert plan.reason == "sizes as given, shared out among the layers by measured damage"
    assert bool([note for note in report.notes if "cut to" in note]) == (ffn == 4)


def test_own_spends_a_budget_that_nobody_named(job, monkeypatch):
    given: list[int] = []

    def seen(model, plan, texts, most, progress):
        given.append(most)
        return shared_out(model, plan, texts, most, progress)

    monkeypatch.setattr(recipe, "shared_out", seen)
    report = own(job._replace(settings=Own(shape="per-layer", calibration_tokens=200, distil_tokens=500)))
    assert given == [int(0.75 * report.parameters_before)]
    assert report.parameters_after <= given[0]


def test_a_finished_run_is_only_read(job):
    first = own(job)
    steps: list[str] = []
    assert own(job, lambda step, *_: steps.append(step)) == first
    assert steps == []


def test_a_changed_job_begins_anew(job):
    first = own(job)
    second = own(job._replace(settings=msgspec.structs.replace(SETTINGS, ffn=16)))
    assert second.parameters_after > first.parameters_after


def test_a_killed_run_goes_on_where_it_was(job):
    class Killed(Exception):
        """Stands for the power cut."""

    def kill(step: str, done: int, total: int, note: str = "") -> None:
        if step == "heal" and done > total / 2:
            raise Killed

    whole = own(job._replace(out=job.out.with_name("whole")))
    with pytest.raises(Killed):
        own(job, kill)
    steps: list[str] = []
    report = own(job, lambda step, *_: steps.append(step))
    assert "prune" not in steps
    assert report.points == whole.points
    assert report.after == whole.after


def test_a_large_cut_is_made_in_steps(job):
    """−59% takes two cuts; the plan's indices are the teacher's own; a kill between them costs nothing."""
    settings = msgspec.structs.replace(SETTINGS, ffn=1, heads=2, distil_tokens=4000)
    large = job._replace(settings=settings)

    class Killed(Exception):
        """Stands for the power cut."""

    cuts: list[str] = []

    def kill(step: str, done: int, total: int, note: str = "") -> None:
        cuts.append(step)
        if "heal" in cuts and step == "prune":
            raise Killed

    with pytest.raises(Killed):
        own(large, kill)
    assert (job.out / "step-1" / "healed").is_dir()
    assert plans.load(job.out / "step-1" / "plan.json").student.ffn == 5  # √(24·1), rounded
    steps: list[str] = []
    report = own(large, lambda step, *_: steps.append(step))
    assert steps.count("heal") > 0
    assert report.plan.teacher.ffn == 24
    assert (report.plan.student.ffn, report.plan.student.heads) == (1, 2)
    assert report.plan.removed > 0.5
    kept = [layer.channels for layer in report.plan.layers]
    assert all(len(channels) == 1 and 0 <= channels[0] < 24 for channels in kept)
    assert report.after.kl < report.before.kl + report.before.kl_se  # a few words decide, and others prove
    assert not list(job.out.glob("step-*"))
    whole = own(large._replace(out=job.out.with_name("whole")))
    assert whole.after == report.after
    assert whole.plan == report.plan
    assert "cut to" in whole.notes[0]


def test_two_plans_are_one():
    shape = Shape(layers=3, hidden=8, ffn=6, heads=4, kv_heads=2, head_dim=2, vocab=9)

    def plan(layers: list[LayerPlan], width: list[int]) -> plans.Plan:
        return plans.Plan(
            teacher=shape,
            student=shape,
            parameters_before=9,
            parameters_after=8,
            reason="",
            layers=layers,
            width=width,
        )

    first = [LayerPlan(layer=n, channels=[1, 3, 5], heads=[0, 1, 3], kv_heads=[0, 1]) for n in (0, 2)]
    second = [LayerPlan(layer=1, channels=[0, 2], heads=[2], kv_heads=[1])]
    found = recipe.plans_joined(plan(first, [0, 2, 4, 6]), plan(second, [1, 3]))
    assert found.layers == [LayerPlan(layer=2, channels=[1, 5], heads=[3], kv_heads=[1])]
    assert found.width == [2, 6]
    assert recipe.plans_joined(plan(first, [0, 2]), plan(second, [])).width == [0, 2]


def test_the_report_compares_with_a_model_off_the_shelf(job, make, tokenizer):
    """Bits per byte by hand, on one chat; a model of another name is measured in its own tokens."""
    from understudy.compress.baseline import bits_per_byte
    from understudy.compress.checkpoint import save

    report = own(job)
    assert report.baseline is None
    assert "no off-the-shelf model" in report.beside_baseline
    shelf = save(make(seed=3), tokenizer, job.out.with_name("shelf"))
    other = own(job._replace(settings=msgspec.structs.replace(SETTINGS, baseline=str(shelf))))
    assert other.baseline is not None
    word = "better" if other.bits_per_byte < other.baseline.bits_per_byte else "WORSE"
    assert f"{word} than off the shelf: {shelf}" in other.beside_baseline
    assert other.teacher_bits_per_byte > 0
    assert other.beside_baseline in (job.out / "checkpoint" / "README.md").read_text()
    chat, model = job.held_out[0], make()
    document = encode_chat(tokenizer, chat)
    with torch.no_grad():
        log_p = torch.log_softmax(model(input_ids=torch.tensor([document.tokens])).logits[0], -1)
    places = [i for i, said in enumerate(document.answer) if said]
    nll = -sum(float(log_p[i - 1, document.tokens[i]]) for i in places)
    wanted = nll / math.log(2) / len(chat[-1]["content"])
    assert bits_per_byte(model, [document], [chat]) == pytest.approx(wanted, rel=1e-4)


def test_too_little_text(job):
    for poor in (job._replace(train=job.train[:1]), job._replace(held_out=[])):
        with pytest.raises(ModelError, match="held-out chats"):
            own(poor)
    assert not (job.out / "checkpoint").exists()


def test_calibration_text_joins_in(job):
    report = own(job._replace(calibration_text=["the cat sat on the mat because it is warm " * 5]))
    assert report.training_hash != own(job._replace(out=job.out.with_name("plain"))).training_hash


def test_what_chooses_the_weights_was_seen_by_nobody(job):
    """Calibration brings a student near its teacher on what it read: a check there finds only harm."""
    steps = recipe._Steps(
        job._replace(settings=msgspec.structs.replace(SETTINGS, calibration_tokens=10**6)), silent
    )
    steps.loaded = checkpoint.load(job.teacher)
    texts = steps._texts()
    checked = {tuple(d.tokens) for d in texts.checked}
    assert checked
    assert not checked & {tuple(d.tokens) for d in (*texts.calibration, *texts.train)}
    assert len(texts.calibration) == len(texts.train)


def test_generic_texts_join_the_healing_by_their_share(folder: Path, data: Path, tmp_path: Path):
    """`own --generic`: the same job without it, or with another share, is another job."""
    generic = tmp_path / "generic.txt"
    generic.write_text("the dog ran home\n\nit is cold and it rains today\n\nthe cat sat on the mat\n")
    config = tmp_path / "understudy.toml"
    config.write_text(
        f'[own]\nteacher = "{folder}"\nffn = 8\ncalibration_tokens = 200\n'
        "distil_tokens = 600\nlearning_rate = 1e-3\n"
    )
    common = ("--out", tmp_path / "own", "--data", data, "--config", config, "--json")
    found = [
        json.loads(run(commands.own, *common, *more)[1])
        for more in ((), ("--generic", generic), ("--generic", generic, "--generic-share", 0.5))
    ]
    assert found[0]["calibration_hash"] == found[1]["calibration_hash"]
    losses = [[point["loss"] for point in one["points"]] for one in found]
    assert losses[0] != losses[1] != losses[2]


def test_an_unreachable_budget_leaves_no_checkpoint(job):
    with pytest.raises(InputError, match="cannot be reached"):
        own(job._replace(settings=Own(params="0.01")))
    assert not (job.out / "checkpoint").exists()


# the commands


def run(command, *arguments) -> tuple[int, str]:
    result = CliRunner().invoke(command, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


@pytest.fixture
def data(tmp_path: Path, chats) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    return path


def test_prune_then_distil_then_fidelity(folder: Path, data: Path, tmp_path: Path):
    pruned, healed = tmp_path / "pruned", tmp_path / "healed"
    code, out = run(
        commands.prune, folder, "--out", pruned, "--ffn", 8, "--calibration", data, "--tokens", 300, "--json"
    )
    assert code == 0
    assert json.loads(out)["student"]["ffn"] == 8
    assert json.loads((tmp_path / "pruned.plan.json").read_text()) == json.loads(out)
    code, out = run(
        distil_command, folder, pruned, "--out", healed, "--tokens", 800, "--data", data, "--json",
        "--learning-rate", "1e-3",
    )  # fmt: skip
    assert code == 0
    assert json.loads(out)["finished"]
    assert not (tmp_path / "healed.heal").exists()
    found = []
    for student in (pruned, healed):
        code, out = run(commands.fidelity, folder, student, "--text", data, "--json")
        assert code == 0
        found.append(json.loads(out)["kl"])
    assert found[1] < found[0]


def test_a_dry_run_only_plans(folder: Path, tmp_path: Path):
    code, _ = run(commands.prune, folder, "--out", tmp_path / "student", "--heads", 4, "--dry-run")
    assert code == 0
    assert (tmp_path / "student.plan.json").exists()
    assert not (tmp_path / "student").exists()


def test_texts_too_short_leave_nothing_behind(folder: Path, tmp_path: Path):
    data = tmp_path / "short.jsonl"
    data.write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    with pytest.raises((InputError, ModelError)):
        run(commands.prune, folder, "--out", tmp_path / "student", "--heads", 4, "--calibration", data)
    assert not list(tmp_path.glob("student*"))


def test_a_plan_that_cannot_be_written_is_an_error_with_a_name(folder: Path, tmp_path: Path):
    (tmp_path / "student.plan.json").mkdir()
    with pytest.raises(ModelError, match=r"cannot write the plan .*student\.plan\.json"):
        run(commands.prune, folder, "--out", tmp_path / "student", "--heads", 4, "--dry-run")
    assert not list(tmp_path.glob("*.part"))


def test_own_from_a_file(folder: Path, data: Path, tmp_path: Path):
    config = tmp_path / "understudy.toml"
    config.write_text(
        '[own]\nteacher = "teacher"\nparams = ""\nffn = 8\ndistil_tokens = 400\n[evaluate]\nheld_out = 0.3\n'
    )
    code, out = run(commands.own, "--out", tmp_path / "own", "--data", data, "--config", config, "--json")
    assert code == 0
    assert json.loads(out)["after"]["kl"] > 0


def test_bad_lines_are_named(folder: Path, tmp_path: Path):
    data = tmp_path / "bad.jsonl"
    data.write_text('[{"role": "user", "content": "x"}]\n{"no": 1}\n')
    with pytest.raises(InputError, match=r"bad\.jsonl:2: no messages"):
        run(commands.own, folder, "--out", tmp_path / "own", "--data", data)


def test_no_teacher_is_asked_for(tmp_path: Path, data: Path):
    with pytest.raises(InputError, match="no teacher"):
        run(commands.own, "--out", tmp_path / "own", "--data", data, "--config", "understudy.toml")


def test_an_interrupted_folder_of_another_job_keeps_foreign_files(job):
    job.out.mkdir()
    (job.out / "notes.txt").write_text("mine")
    (job.out / "job.json").write_text('{"identity":"another"}')
    (job.out / "pruned").mkdir()
    own(job)
    assert (job.out / "notes.txt").read_text() == "mine"
    shutil.rmtree(job.out)
    assert recipe.MEASURED_TOKENS > recipe.CHECKED_TOKENS
