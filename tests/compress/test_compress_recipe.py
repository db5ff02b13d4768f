"""`own` from a saved teacher to a report, twice; and the commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from understudy.cli import compress as commands
from understudy.compress import recipe
from understudy.compress.recipe import OwnJob, OwnReport, own
from understudy.config import Own
from understudy.errors import InputError, ModelError

SETTINGS = Own(params="", ffn=8, heads=4, calibration_tokens=200, distil_tokens=2000, learning_rate=1e-3)


@pytest.fixture
def job(folder: Path, chats, tmp_path: Path) -> OwnJob:
    return OwnJob(str(folder), chats[8:], chats[:8], tmp_path / "own", SETTINGS, seed=1)


def test_own_makes_a_student(job):
    steps: list[str] = []
    report = own(job, lambda step, *_: steps.append(step))
    assert list(dict.fromkeys(steps)) == ["load", "shape", "prune", "fidelity", "heal"]
    assert report.after.kl < report.before.kl
    assert 0 < report.gap_closed < 1
    assert report.parameters_after < report.parameters_before
    assert len(report.plan.layers) == 2
    assert set(report.seconds) == {"load", "shape", "prune", "fidelity", "heal"}
    assert report.seconds["heal"] > 0
    model = AutoModelForCausalLM.from_pretrained(report.checkpoint)
    assert model.num_parameters() == report.parameters_after
    card = (job.out / "checkpoint" / "README.md").read_text()
    assert report.calibration_hash in card
    assert "| FFN channels | 24 | 8 |" in card
    assert sorted(p.name for p in job.out.iterdir()) == [
        "before.json",
        "checkpoint",
        "job.json",
        "plan.json",
        "report.json",
    ]
    assert msgspec.json.decode((job.out / "report.json").read_bytes(), type=OwnReport) == report


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


def test_too_little_text(job):
    for poor in (job._replace(train=job.train[:1]), job._replace(held_out=[])):
        with pytest.raises(ModelError, match="held-out chats"):
            own(poor)
    assert not (job.out / "checkpoint").exists()


def test_calibration_text_joins_in(job):
    report = own(job._replace(calibration_text=["the cat sat on the mat because it is warm " * 5]))
    assert report.training_hash != own(job._replace(out=job.out.with_name("plain"))).training_hash


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
        commands.distil, folder, pruned, "--out", healed, "--tokens", 800, "--data", data, "--json",
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
