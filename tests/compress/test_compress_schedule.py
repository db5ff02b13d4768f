"""What a step does by how much of the run is done; what a check measures, however its rows are packed."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pytest
import torch

from understudy.compress import precision
from understudy.compress.corpus import Document, Row, pack
from understudy.compress.distill import Corpus, heal
from understudy.compress.held_out import HeldOut
from understudy.compress.schedule import Settings, rate_at, rate_for, stage_at, weights
from understudy.compress.teacher import LiveTeacher

PLAN = Settings(learning_rate=1.0, warm_up=0.1, adapt=0.3, on_policy=0.2, adapt_ce=0.25, adapt_rest=0.5)


@pytest.mark.parametrize(
    ("share", "rate"),
    # halfway up; the peak; halfway down the cosine: (1 + 0.05) / 2; a twentieth at the end; never 0
    [(0.05, 0.5), (0.1, 1.0), (0.55, 0.525), (1.0, 0.05), (0.0, 0.1)],
)
def test_the_rate_rises_linearly_and_falls_by_a_cosine(share: float, rate: float):
    assert rate_at(share, PLAN, distance=9.0) == pytest.approx(rate)


def test_a_rate_that_nobody_gave_follows_the_distance():
    """Twice as far, four times the rate, within bounds; ten times as much for low-rank corrections."""
    assert rate_for(0.6) == pytest.approx(4 * rate_for(0.3))
    assert rate_for(0.4, lora=True) == pytest.approx(10 * rate_for(0.4))
    assert (rate_for(0.0), rate_for(1e9)) == (2e-5, 2e-4)
    plan = msgspec.structs.replace(PLAN, learning_rate=0.0)
    assert rate_at(0.1, plan, distance=0.3) == pytest.approx(rate_for(0.3))
    assert rate_at(0.1, plan, distance=0.3, halvings=2) == pytest.approx(rate_for(0.3) / 4)


def test_stages_follow_one_another():
    found = [stage_at(share, PLAN) for share in (0.0, 0.49, 0.51, 0.79, 0.81, 1.0)]
    assert found == ["heal", "heal", "adapt", "adapt", "on-policy", "on-policy"]
    assert stage_at(0.99, Settings(adapt=0.0)) == "heal"


def test_each_stage_weighs_by_hand():
    answers, known = torch.tensor([True, False, True]), torch.tensor([True, True, False])
    found = {stage: weights(answers, known, stage, PLAN) for stage in ("heal", "adapt", "on-policy")}
    assert [w.tolist() for w in found["heal"]] == [[1, 1, 0], [0, 0, 0]]
    assert [w.tolist() for w in found["adapt"]] == [[0.75, 0.5, 0], [0.25, 0, 0.25]]
    assert [w.tolist() for w in found["on-policy"]] == [[1, 0, 0], [0, 0, 0]]


@pytest.fixture
def speaking():
    """Documents that end with token 0, which is what rows are padded with: pad equals end of turn."""
    words = torch.randint(1, 48, (9, 21), generator=torch.Generator().manual_seed(3)).tolist()
    return [Document([*w[: 9 + i], 0], [j > 5 for j in range(10 + i)]) for i, w in enumerate(words)]


def test_a_check_is_the_same_however_rows_are_packed_and_padded(make, speaking):
    """One row each, all packed, more padding, other batches: answers and the end of turn are all there."""
    teacher, student = make(), make(seed=1)
    layouts = [
        ([Row([d], len(d.tokens)) for d in speaking], 1),
        ([Row([d], 40) for d in speaking], 4),
        (pack(speaking, 64), 1),
        (pack(speaking, 128), 3),
    ]
    checks = [
        HeldOut(rows, LiveTeacher(teacher, 0), 0.9, 0.1, 0.1).check(student, torch.device("cpu"), batch)
        for rows, batch in layouts
    ]
    with torch.no_grad():
        said = [torch.log_softmax(student(torch.tensor([d.tokens])).logits[0], -1) for d in speaking]
    nll = [
        -float(s[i - 1, d.tokens[i]])
        for s, d in zip(said, speaking, strict=True)
        for i in range(1, len(d.tokens))
        if d.answer[i]
    ]
    assert checks[0].answer_nll == pytest.approx(sum(nll) / len(nll), rel=1e-4)
    for check in checks[1:]:
        for field in ("kl", "answer_kl", "answer_nll", "loss"):
            assert getattr(check, field) == pytest.approx(getattr(checks[0], field), rel=2e-3)


def test_a_step_learns_the_same_however_rows_are_padded(make, speaking, tmp_path: Path):
    losses = []
    for length in (64, 128):
        # a step reads every row: all documents, whichever rows they stand in
        whole = len(pack(speaking, length)) * length
        settings = Settings(
            tokens=100, step_tokens=whole, micro_tokens=whole, row_tokens=length, checks=1, precision="fp32"
        )
        corpus = Corpus(speaking, [])
        curve = heal(make(seed=1), LiveTeacher(make()), corpus, settings, tmp_path / str(length))
        losses.append((curve.points[0].loss, curve.points[0].tokens))
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_the_bar_says_speed_and_what_the_held_out_distance_does(make, speaking, tmp_path: Path):
    notes: list[str] = []
    settings = Settings(
        tokens=300, step_tokens=128, row_tokens=64, checks=2, learning_rate=1e-3, precision="fp32"
    )
    corpus = Corpus(speaking[:6], speaking[6:])
    curve = heal(
        make(seed=1),
        LiveTeacher(make()),
        corpus,
        settings,
        tmp_path,
        lambda step, done, total, note="": notes.append(note),
    )
    assert f"held out {curve.checks[0].kl:.3f}" in notes[0]
    assert all("tokens/s" in note for note in notes)


@pytest.mark.parametrize(("exact", "rounded", "chosen"), [(1.0, 0.5, "bf16"), (1.0, 0.9, "fp32")])
def test_the_precision_is_chosen_by_measuring_once(monkeypatch, exact: float, rounded: float, chosen: str):
    times, asked = {"fp32": exact, "bf16": rounded}, []
    monkeypatch.setattr(precision, "_seconds", lambda kind: asked.append(kind) or times[kind])
    precision.measured.cache_clear()
    try:
        for _ in range(3):
            with precision.matmul_precision("auto") as used:
                assert used == chosen
        assert asked == ["fp32", "bf16"]
    finally:
        precision.measured.cache_clear()


def test_the_rate_is_the_schedules_in_every_step(make, speaking, tmp_path: Path):
    settings = Settings(tokens=600, step_tokens=64, row_tokens=64, checks=1, precision="fp32", patience=9)
    corpus = Corpus(speaking[:6], speaking[6:])
    curve = heal(make(seed=1), LiveTeacher(make()), corpus, settings, tmp_path)
    done = 0
    for point in curve.points:
        assert point.learning_rate == rate_at(done / 600, settings, curve.checks[0].kl)
        done = point.tokens
    assert math.isclose(max(p.learning_rate for p in curve.points), rate_for(curve.checks[0].kl), rel_tol=0.2)
