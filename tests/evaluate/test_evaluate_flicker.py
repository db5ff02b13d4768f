"""Repeats: kept as evidence, paid once, and held against the measured difference."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from understudy.endpoint import ScriptedModel
from understudy.errors import EvidenceError, InputError
from understudy.evaluate.certify import build, write
from understudy.evaluate.evidence import Lines, ProofHeader, file_name, read_exchanges, read_lines
from understudy.evaluate.flicker import (
    PREFIX,
    Repeat,
    RepeatsHeader,
    against,
    flicker,
    measure,
    read_repeats,
)
from understudy.evaluate.grade import Reply
from understudy.evaluate.item import Call, Item
from understudy.evaluate.verify import verify
from understudy.traffic.sample import Exchange

INCUMBENT, STUDENT = "host/old", "local/student"
Sample = Callable[[int], list[Exchange]]


def moody(name: str) -> ScriptedModel:
    """Says yes and no in turn, whatever is asked."""
    words = itertools.cycle(["yes", "no"])
    return ScriptedModel(name, lambda _: next(words))


async def ask(drill: Path, sample: Sample, model: ScriptedModel, repeats: int = 3) -> Path:
    items = read_exchanges(drill / "evidence").records
    return await measure(
        model, sample(120), items, repeats=repeats, seed=2, evidence=drill / "evidence", concurrency=1
    )


async def test_repeats_are_paid_once_and_more_can_be_added(drill: Path, sample: Sample) -> None:
    model = moody(STUDENT)
    path = await ask(drill, sample, model)
    assert model.calls == 40
    await ask(drill, sample, model)
    assert model.calls == 40
    await ask(drill, sample, model, repeats=4)
    assert model.calls == 60
    lines = read_lines(path, RepeatsHeader, Repeat).records
    assert {line.repeat for line in lines} == {2, 3, 4}
    with pytest.raises(InputError, match="another sample or seed"):
        await measure(model, sample(120), [], repeats=2, seed=3, evidence=drill / "evidence")


def test_the_figures_by_hand() -> None:
    """Two questions: scores 1, 1, 0 and 0, 0, 0. Variance within: 1/3 and 0."""
    items = {k: Item(key=k, prompt_hash=k, grader="exact", expected="yes", reply=Reply("yes"), score=1.0)
             for k in "ab"}  # fmt: skip
    said = {"a": ["yes", "no"], "b": ["no", "No."]}
    records = [
        Repeat(key=k, repeat=r, reply=Reply(text), score=float(text == "yes"))
        for k, texts in said.items() for r, text in enumerate(texts, 2)
    ]  # fmt: skip
    header = RepeatsHeader(model="m", seed=1, exchanges_sha256="")
    firsts = {
        "a": Call(key="a", reply=Reply("yes"), score=1.0),
        "b": Call(key="b", reply=Reply("no"), score=0),
    }
    got = flicker(Lines(header, records), items, firsts)
    assert got is not None
    assert (got.items, got.answers, got.first, got.again) == (2, 6, 0.5, 0.25)
    assert got.scores_differ == pytest.approx(2 / 6)
    assert got.texts_differ == pytest.approx(2 / 6)
    assert got.variance == pytest.approx((1 / 3) / 2)
    assert flicker(Lines(header, records), items, {}) is None


async def test_the_report_holds_the_difference_against_flicker(drill: Path, sample: Sample) -> None:
    await ask(drill, sample, moody(STUDENT))
    alone = build(drill).flicker
    assert alone is not None
    assert alone[0].moves is None
    await ask(drill, sample, moody(INCUMBENT))
    certificate = write(drill)
    verify(drill / "certificate.json")
    assert certificate.flicker is not None
    incumbent, student = certificate.flicker
    proof = certificate.candidates[0].proof
    assert (incumbent.model, student.model) == (INCUMBENT, STUDENT)
    assert student.moves == pytest.approx(
        1.959964 * math.sqrt((incumbent.variance + student.variance) / proof.calls), rel=1e-6
    )
    assert student.difference == pytest.approx(proof.candidate_mean - proof.incumbent_mean)
    assert "How much each differs from itself" in (drill / "certificate.html").read_text()
    assert against(student, None, proof).moves is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"score": 0.25}, "not by its grader"),
        ({"key": "else"}, "no item 'else'"),
        ({"repeat": 3}, "is there 2 times"),
    ],
)
async def test_changed_repeats_are_named(
    drill: Path, sample: Sample, change: Mapping[str, Any], says: str
) -> None:
    path = await ask(drill, sample, moody(STUDENT))
    header, lines = read_repeats(drill / "evidence")[0]
    lines[0] = msgspec.structs.replace(lines[0], **change)
    path.write_bytes(b"\n".join(msgspec.json.encode(x) for x in (header, *lines)) + b"\n")
    with pytest.raises(EvidenceError, match=says):
        build(drill)


async def test_repeats_stand_beside_the_candidates_own_file(drill: Path, sample: Sample) -> None:
    path = await ask(drill, sample, moody(STUDENT), repeats=2)
    assert path.name == file_name(STUDENT, PREFIX)
    assert read_lines(drill / "evidence" / file_name(STUDENT), ProofHeader, Call).records
