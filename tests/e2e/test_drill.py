"""The drill as a user runs it: real sockets, the official client, an interruption and a forgery."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stage
from safetensors import safe_open
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.e2e
UNDERSTUDY = [sys.executable, "-m", "understudy"]
STEPS = ["Incumbent", "Record", "Watch and plan", "Own", "Serve", "Prove", "Certify", "Move"]


def understudy(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*UNDERSTUDY, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300, env=quiet()
    )


def quiet() -> dict[str, str]:
    return {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def interrupt_when(path: Path, process: subprocess.Popen[str]) -> None:
    """Ctrl-C as soon as ``path`` is there and has some lines."""
    deadline = time.monotonic() + 120
    while not path.exists() or len(path.read_text().split()) < 10:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drill that was interrupted while recording and then run to its end."""
    root = tmp_path_factory.mktemp("drill")
    stage.set_up(root)
    process = subprocess.Popen(
        [*UNDERSTUDY, "drill"],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=quiet(),
        start_new_session=True,  # a terminal sends Ctrl-C to all that run in it, the workload too
    )
    interrupt_when(root / "run" / "workload.done", process)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    done = understudy("drill", "--json", cwd=root)
    assert done.returncode == 0, done.stderr
    (root / "outcome.json").write_text(done.stdout)
    return root


def test_every_step_ran_and_says_what_came_of_it(folder: Path) -> None:
    outcome = json.loads((folder / "outcome.json").read_text())
    assert list(outcome["steps"]) == STEPS
    recorded = outcome["steps"]["Record"]
    calls, labelled = int(recorded.split()[0]), int(recorded.split("streamed, ")[1].split()[0])
    # Ctrl-C may fall between an answer and the note that it came: that one request is sent again
    assert 80 <= calls <= 81
    assert 60 <= labelled <= 61
    assert outcome["moved_to"] in ("vendor/lead", "local/student")
    assert outcome["moved_to"] in outcome["steps"]["Move"].rpartition("answered by")[2]


def test_no_request_was_sent_twice_although_it_was_interrupted(folder: Path) -> None:
    shown = json.loads(understudy("traffic", "show", "--limit", "200", "--json", cwd=folder).stdout)
    calls = shown["calls"] if isinstance(shown, dict) else shown
    recorded = [call for call in calls if call["target"] == "vendor/lead" and call["status"] == 200]
    assert len({call["task_id"] for call in recorded}) == 80
    assert len(recorded) <= 80 + 2  # the one in flight at Ctrl-C, and the one after the move


def test_the_student_is_a_standard_checkpoint_a_quarter_smaller(folder: Path) -> None:
    student = AutoModelForCausalLM.from_pretrained(folder / "run" / "own" / "checkpoint")
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    assert student.num_parameters() <= 0.75 * teacher.num_parameters()
    weights = next((folder / "run" / "own" / "checkpoint").glob("*.safetensors"))
    with safe_open(weights, "pt") as file:
        assert "model.layers.0.mlp.down_proj.weight" in file.keys()  # noqa: SIM118 - not a mapping


def test_a_second_run_does_nothing_again(folder: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (folder / "run").rglob("*.json*")}
    done = understudy("drill", cwd=folder)
    assert done.returncode == 0
    assert done.stderr.count("done before") == len(STEPS)
    assert {p: p.stat().st_mtime_ns for p in (folder / "run").rglob("*.json*")} == before


def test_verify_holds_and_one_changed_digit_fails(folder: Path, tmp_path: Path) -> None:
    assert understudy("verify", "run/certificate.json", cwd=folder).returncode == 0
    copy = tmp_path / "copy"
    shutil.copytree(folder / "run", copy)
    evidence = next(p for p in (copy / "evidence").glob("local-student*.jsonl"))
    lines = evidence.read_text().splitlines()
    call = json.loads(lines[1])
    call["usage"]["prompt_tokens"] += 1
    evidence.write_text("\n".join([lines[0], json.dumps(call), *lines[2:]]) + "\n")
    forged = understudy("verify", str(copy / "certificate.json"), cwd=folder)
    assert forged.returncode == 1
    assert evidence.name in forged.stdout + forged.stderr


def test_the_judge_and_the_users_are_part_of_the_evidence(folder: Path) -> None:
    """A judge that says nothing sensible: each of its words is kept, and no verdict rests on them."""
    evidence = folder / "run" / "evidence"
    certificate = json.loads((folder / "run" / "certificate.json").read_text())
    files = {entry["file"] for entry in certificate["evidence"]}
    judged = next(evidence.glob("judged-local-student*.jsonl"))
    assert {"evidence/users.jsonl", f"evidence/{judged.name}"} <= files
    asked = {json.loads(line)["key"] for line in judged.read_text().splitlines()[1:]}
    unknown = {
        item["key"]
        for line in (evidence / "exchanges.jsonl").read_text().splitlines()[1:]
        if (item := json.loads(line)).get("agreement")
    }
    assert asked
    assert asked <= unknown
    marks = [json.loads(line) for line in (evidence / "users.jsonl").read_text().splitlines()]
    assert len(marks) >= 80
    users = certificate["users"]
    assert users[0]["model"] == "vendor/lead"
    assert users[0]["tasks"] == 80


def test_the_page_needs_nothing_from_outside(folder: Path) -> None:
    page = (folder / "run" / "certificate.html").read_text()
    assert "<svg" in page
    assert "src=" not in page
    assert "<link" not in page


@pytest.mark.parametrize("command", ["watch", "plan assistant", "traffic show", "models lead"])
def test_the_tables_speak_json(folder: Path, command: str) -> None:
    done = understudy(*command.split(), "--json", cwd=folder)
    assert done.returncode in (0, 1), done.stderr
    json.loads(done.stdout)
