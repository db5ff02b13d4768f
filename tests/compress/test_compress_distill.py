"""Healing: it learns, it repeats itself exactly after a kill, and it refuses what is not its run."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from understudy.compress import distill
from understudy.compress import plan as plans
from understudy.compress.corpus import Document, batches, pack
from understudy.compress.curve import Check, Curve
from understudy.compress.decoder import extras_of, shape_of
from understudy.compress.distill import Corpus, Settings, heal
from understudy.compress.fidelity import fidelity
from understudy.compress.prune import prune
from understudy.compress.teacher import LiveTeacher
from understudy.errors import ModelError

SETTINGS = Settings(
    tokens=6000,
    step_tokens=256,
    micro_tokens=128,
    row_tokens=64,
    learning_rate=3e-3,
    precision="fp32",
    seed=7,
)


@pytest.fixture
def corpus():
    """Words at random: every held-out document is of the training texts' kind."""
    words = torch.randint(3, 48, (70, 40), generator=torch.Generator().manual_seed(1)).tolist()
    documents = [Document(tokens, [i > 25 for i in range(40)]) for tokens in words]
    return Corpus(documents[10:], documents[:10])


@pytest.fixture
def pair(make, text):
    """A teacher and its pruned student."""
    teacher = make()
    student = copy.deepcopy(teacher)
    prune(student, plans.decide(shape_of(student), extras_of(student), ffn=8, heads=4), text)
    return teacher, student


def test_healing_brings_the_student_nearer(pair, corpus, tmp_path: Path):
    teacher, student = pair
    curve = heal(student, LiveTeacher(teacher), corpus, SETTINGS, tmp_path)
    assert curve.checks[-1].kl < 0.6 * curve.checks[0].kl
    assert curve.finished
    assert curve.stopped == "tokens"
    assert curve.points[-1].tokens >= 6000 > curve.points[-2].tokens


KILLED = """
import os, signal
from pathlib import Path
import msgspec
from transformers import AutoModelForCausalLM
from understudy.compress.corpus import Document
from understudy.compress.distill import Corpus, Settings, heal
from understudy.compress.teacher import LiveTeacher
def kill(step, done, total, note=""):
    if done > 0.7 * total:
        os.kill(os.getpid(), signal.SIGKILL)
teacher, student = (AutoModelForCausalLM.from_pretrained(name) for name in ("teacher", "student"))
train, held_out, settings = msgspec.json.decode(
    Path("job.json").read_bytes(), type=tuple[list[Document], list[Document], Settings]
)
heal(student, LiveTeacher(teacher), Corpus(train, held_out), settings, Path("killed"), kill)
"""


def test_kill_and_resume_repeat_the_uninterrupted_run(pair, corpus, tmp_path: Path):
    """Killed by the system, in a process of its own, with nothing left to clean up."""
    teacher, student = pair
    again = copy.deepcopy(student)
    teacher.save_pretrained(tmp_path / "teacher"), student.save_pretrained(tmp_path / "student")
    (tmp_path / "job.json").write_bytes(msgspec.json.encode((corpus.train, corpus.held_out, SETTINGS)))
    whole = heal(student, LiveTeacher(teacher), corpus, SETTINGS, tmp_path / "whole")
    died = subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path, check=False, timeout=300)
    assert died.returncode == -signal.SIGKILL
    resumed = heal(again, LiveTeacher(teacher), corpus, SETTINGS, tmp_path / "killed")
    assert resumed.points == whole.points
    assert resumed.checks == whole.checks
    for one, two in zip(student.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.fixture
def heeded_interrupts():
    """Ctrl-C as a terminal has it: a suite started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded_interrupts")
def test_ctrl_c_saves_between_steps(pair, corpus, tmp_path: Path):
    teacher, student = pair
    steps: list[int] = []

    def interrupt(step: str, done: int, total: int, note: str = "") -> None:
        steps.append(done)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        heal(copy.deepcopy(student), LiveTeacher(teacher), corpus, SETTINGS, tmp_path, interrupt)
    saved = json.loads((tmp_path / "state.json").read_bytes())
    assert len(saved["curve"]["points"]) == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    curve = heal(student, LiveTeacher(teacher), corpus, SETTINGS, tmp_path)
    assert curve.finished


def test_a_finished_run_is_not_repeated(pair, corpus, tmp_path: Path):
    teacher, student = pair
    again = copy.deepcopy(student)
    first = heal(student, LiveTeacher(teacher), corpus, SETTINGS, tmp_path)
    calls: list[str] = []
    second = heal(
        again, LiveTeacher(teacher), corpus, SETTINGS, tmp_path, lambda step, *_: calls.append(step)
    )
    assert calls == []
    assert second.points == first.points
    for one, two in zip(student.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_another_runs_state_is_refused(pair, corpus, tmp_path: Path):
    teacher, student = pair
    heal(student, LiveTeacher(teacher), corpus, SETTINGS, tmp_path)
    for other in (
        (corpus, msgspec.structs.replace(SETTINGS, seed=8)),
        (Corpus(corpus.train[1:], corpus.held_out), SETTINGS),
    ):
        with pytest.raises(ModelError, match="other texts or settings"):
            heal(student, LiveTeacher(teacher), *other, tmp_path)


def test_a_corrupted_state_is_named(pair, corpus, tmp_path: Path):
    teacher, student = pair
    heal(student, LiveTeacher(teacher), corpus, SETTINGS, tmp_path)
    best = tmp_path / "best.safetensors"
    best.write_bytes(best.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"best\.safetensors"):
        heal(student, LiveTeacher(teacher), corpus, SETTINGS, tmp_path)


def test_micro_batches_change_no_gradient(pair, corpus, tmp_path: Path):
    """The same two steps in one piece and in four give the same losses."""
    teacher, student = pair
    losses = []
    for micro in (64, 256):
        settings = msgspec.structs.replace(SETTINGS, micro_tokens=micro, tokens=400)
        curve = heal(copy.deepcopy(student), LiveTeacher(teacher), corpus, settings, tmp_path / str(micro))
        losses.append([point.loss for point in curve.points])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_early_stop_keeps_the_best_weights(pair, corpus, tmp_path: Path):
    teacher, student = pair
    settings = msgspec.structs.replace(SETTINGS, learning_rate=1.0, checks=20, patience=2, tokens=20_000)
    curve = heal(student, LiveTeacher(teacher), corpus, settings, tmp_path)
    assert curve.stopped == "early"
    assert curve.checks[-1].tokens < 20_000
    best = min(curve.checks, key=lambda check: check.loss)
    rows = pack(corpus.held_out, 64)
    with_best = fidelity(teacher, student, list(batches(rows, 128)), precision="fp32")
    assert with_best.kl == pytest.approx(best.kl, rel=2e-2)


def test_healing_hands_out_nothing_worse_than_it_began_with(pair, corpus, tmp_path: Path):
    """A rate that only harms: the student comes back as it was, and the run says so."""
    teacher, student = pair
    before = copy.deepcopy(student)
    settings = msgspec.structs.replace(SETTINGS, learning_rate=1.0, tokens=1000)
    curve = heal(student, LiveTeacher(teacher), corpus, settings, tmp_path)
    assert min(check.kl for check in curve.checks[1:]) > curve.checks[0].kl
    assert "healing brought nothing" in curve.notes[-1]
    for one, two in zip(student.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def checked(*found: tuple[float, float]) -> Curve:
    """A curve of (KL, loss) at its checks."""
    return Curve(
        checks=[
            Check(step=i, tokens=10 * i, kl=kl, answer_kl=kl, answer_nll=1.0, loss=loss)
            for i, (kl, loss) in enumerate(found)
        ]
    )


def test_a_better_loss_does_not_pay_for_a_greater_distance():
    """Right answers are learnt by cross-entropy: less of it, farther from the teacher, is not handed out."""
    curve = checked((0.10, 0.5), (0.09, 0.4), (0.20, 0.1))
    assert curve.best == 1
    assert "after 10 tokens are kept: KL 0.1000 → 0.0900" in curve.handed_out
    assert checked((0.10, 0.5), (0.09, 0.6)).best == 0
    assert checked((math.nan, math.nan)).best == 0


def test_a_check_that_finds_the_student_worse_takes_it_back_at_half_the_rate(pair, corpus, tmp_path: Path):
    """From a rate that only harms to one that heals: 0.3, 0.15, … are tried in turn, each from the best."""
    teacher, student = pair
    settings = msgspec.structs.replace(SETTINGS, learning_rate=0.3, checks=12, patience=12, adapt=0.0)
    curve = heal(student, LiveTeacher(teacher), corpus, settings, tmp_path)
    assert curve.checks[1].kl > curve.checks[0].kl
    assert curve.halvings >= 2
    assert curve.checks[curve.best].kl < 0.9 * curve.checks[0].kl
    after = next(p for p in curve.points if p.step == curve.checks[1].step + 1)
    before = curve.points[curve.checks[1].step - 1]
    assert after.learning_rate < 0.55 * before.learning_rate
    # what it does there is learnt from the start's weights, not from where the first quarter led
    assert after.kl < 1.5 * curve.points[0].kl


def test_a_run_that_stepped_back_resumes_bit_identically(pair, corpus, tmp_path: Path):
    teacher, student = pair
    settings = msgspec.structs.replace(SETTINGS, learning_rate=0.3, checks=6, patience=9, tokens=3000)
    other, again = copy.deepcopy(student), copy.deepcopy(student)
    whole = heal(student, LiveTeacher(teacher), corpus, settings, tmp_path / "whole")

    class Killed(Exception):
        """Stands for the power cut."""

    def kill(step: str, done: int, total: int, note: str = "") -> None:
        if done > 0.5 * total:
            raise Killed

    with pytest.raises(Killed):
        heal(other, LiveTeacher(teacher), corpus, settings, tmp_path / "killed", kill)
    resumed = heal(again, LiveTeacher(teacher), corpus, settings, tmp_path / "killed")
    assert whole.halvings > 0
    assert (resumed.points, resumed.checks, resumed.halvings) == (whole.points, whole.checks, whole.halvings)


def test_minutes_end_the_run(pair, corpus, tmp_path: Path):
    teacher, student = pair
    settings = msgspec.structs.replace(SETTINGS, tokens=10**9, minutes=0.01, patience=9)
    curve = heal(student, LiveTeacher(teacher), corpus, settings, tmp_path)
    assert curve.stopped == "minutes"
    assert curve.points[-1].learning_rate < SETTINGS.learning_rate


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_vocabulary_is_trained_only_when_asked(train, tied, make, corpus, tmp_path: Path):
    teacher, student = make(tie_word_embeddings=tied), make(tie_word_embeddings=tied, seed=1)
    weights = [student.model.embed_tokens.weight, student.lm_head.weight]
    before = [w.detach().clone() for w in weights]
    settings = msgspec.structs.replace(SETTINGS, train_vocabulary=train, tokens=500)
    heal(student, LiveTeacher(teacher), corpus, settings, tmp_path)
    moved = [not torch.equal(w, b) for w, b in zip(weights, before, strict=True)]
    assert moved == [train, train]
    assert all(p.requires_grad for p in student.parameters())


def test_nothing_to_learn_from(pair, tmp_path: Path):
    teacher, student = pair
    with pytest.raises(ModelError, match="nothing to learn from"):
        heal(student, LiveTeacher(teacher), Corpus([], []), SETTINGS, tmp_path)


def test_the_teachers_memory_gives_what_it_was_given(make, documents):
    rows = pack(documents, 64)
    fresh, remembering = LiveTeacher(make(), cache_bytes=0), LiveTeacher(make())
    for _ in range(2):
        for keys in ([0, 1], [1, 2], [2, 0]):
            part = [rows[k] for k in keys]
            one, two = (teacher.signal(keys, part).hidden for teacher in (remembering, fresh))
            torch.testing.assert_close(one, two, rtol=2e-2, atol=2e-2)
    counted = sum(row.targets for row in rows[:3])
    assert len(remembering.signal([0, 1, 2], rows[:3]).hidden) == counted


def test_forget_removes_only_its_own_files(pair, corpus, tmp_path: Path):
    teacher, student = pair
    heal(student, LiveTeacher(teacher), corpus, SETTINGS, tmp_path / "heal")
    (tmp_path / "heal" / "mine.txt").write_text("kept")
    distill.forget(tmp_path / "heal")
    assert [p.name for p in (tmp_path / "heal").iterdir()] == ["mine.txt"]
