"""A certificate's numbers, and that verify notices every change of a number, a record or the page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from understudy.cli.evaluate import verify as verify_command
from understudy.errors import EvidenceError, InputError
from understudy.evaluate.certificate import Certificate, encode, rounded
from understudy.evaluate.certify import build
from understudy.evaluate.evidence import file_name
from understudy.evaluate.verify import verify

INCUMBENT, STUDENT, SMALL = "host/old", "local/student", "local/small"


def read(drill: Path) -> Certificate:
    return msgspec.json.decode((drill / "certificate.json").read_bytes(), type=Certificate)


def test_an_untouched_certificate_holds(drill: Path) -> None:
    assert len(verify(drill / "certificate.json")) == 64


def test_the_numbers(drill: Path) -> None:
    got = read(drill)
    student, small = got.candidates
    assert (got.verdict, got.winner) == ("PASS", STUDENT)
    assert (student.proof.verdict, small.proof.verdict) == ("PASS", "FAIL")
    assert (student.proof.candidates, student.proof.seed) == (2, 2)
    assert got.days_left == 37
    assert (student.fit.share, student.fit.misfits) == (0.9, {"context": 40})
    assert (got.exposure.calls, got.exposure.usd_per_month) == (400, 3.5)
    assert got.own == {"teacher": "old", "parameters_after": 101_000_000}


def test_benchmarks_have_errors_and_paired_differences(drill: Path) -> None:
    """10 of 20, 12 of 20: the second is right on two more items, on all the others both agree."""
    got = read(drill)
    own = got.incumbent.benchmarks["hellaswag"]
    assert own.accuracy.accuracy == 0.5
    assert own.accuracy.stderr == pytest.approx((0.25 / 19) ** 0.5)
    assert own.versus is None
    versus = got.candidates[0].model.benchmarks["hellaswag"].versus
    assert versus is not None
    assert versus.difference == pytest.approx(0.1)
    # two ones among twenty: sample variance (2·0.81 + 18·0.01)/19
    half = 1.959964 * ((2 * 0.81 + 18 * 0.01) / 19 / 20) ** 0.5
    assert versus.high - versus.difference == pytest.approx(half, rel=1e-6)


def test_costs_are_of_all_attempts_over_successes(drill: Path) -> None:
    """List price for the host, the machine's hours for the student, the plan's price for the small one."""
    got = read(drill)
    used = got.candidates[0].proof.incumbent_tokens
    host = got.incumbent.cost
    assert host is not None
    total = (used.prompt * 1.0 + used.completion * 2.0) / 1e6
    assert host.usd_per_completed_task == pytest.approx(total / used.completed)
    student = got.candidates[0].model
    assert student.speed is not None
    assert student.cost is not None
    assert student.speed.tokens_per_s == pytest.approx(4 * 33 / 1.2)
    assert student.cost.usd_per_million_tokens == pytest.approx(1e6 / 110 / 3600 * 0.36)
    small = got.candidates[1].model.cost
    assert small is not None
    assert small.usd_per_million_tokens == pytest.approx(4.0)


def test_what_is_needed_next_names_the_loser_and_the_small_sample(drill: Path) -> None:
    lines = " ".join(read(drill).next)
    assert f"Move traffic to {STUDENT}" in lines
    assert f"{SMALL} loses" in lines
    assert "small samples" in lines


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from leaves(inner, (*path, index))
    else:
        yield path, value


def changed(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 1.0000001 if value else 1e-9
    return (value or "") + "x"


def test_every_changed_field_is_noticed(drill: Path) -> None:
    """Each leaf of the certificate in turn, found by the comparison that verify makes."""
    from understudy.evaluate.verify import _differences

    document = json.loads((drill / "certificate.json").read_text())
    built = json.loads(encode(build(drill)))
    paths = [path for path, _ in leaves(document)]
    assert len(paths) > 300
    for path in paths:
        forged = json.loads(json.dumps(document))
        inner = forged
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = changed(inner[path[-1]])
        assert len(_differences(forged, built)) == 1, path


@pytest.mark.parametrize(
    ("find", "put"),
    [('"margin": 0.1', '"margin": 0.2'), ('"PASS"', '"FAIL"'), ('"created": 1795500000.0', '"created": 1')],
)
def test_a_changed_digit_fails_verify(drill: Path, find: str, put: str) -> None:
    path = drill / "certificate.json"
    text = path.read_text()
    assert find in text
    path.write_text(text.replace(find, put, 1))
    with pytest.raises(EvidenceError) as caught:
        verify(path)
    assert any("from the evidence" in d for d in caught.value.differences)


FILES = [
    "question.json",
    "exchanges.jsonl",
    file_name(STUDENT),
    file_name(SMALL),
    file_name(INCUMBENT, "bench-hellaswag-"),
    file_name(STUDENT, "bench-hellaswag-"),
    "performance.json",
    "plan.json",
    "own-report.json",
]


def test_the_list_of_evidence_is_complete(drill: Path) -> None:
    listed = {entry.file for entry in read(drill).evidence}
    assert listed == {f"evidence/{name}" for name in [*FILES, file_name(SMALL, "bench-hellaswag-")]}


@pytest.mark.parametrize("name", FILES)
def test_a_changed_evidence_file_is_named(drill: Path, name: str) -> None:
    path = drill / "evidence" / name
    digits = [i for i, c in enumerate(path.read_text()) if c.isdigit()]
    text = list(path.read_text())
    at = digits[len(digits) // 2]
    text[at] = str((int(text[at]) + 1) % 10)
    path.write_text("".join(text))
    with pytest.raises(EvidenceError) as caught:
        verify(drill / "certificate.json")
    assert any("sha256" in d.lower() or "SHA-256" in d for d in caught.value.differences)


@pytest.mark.parametrize("name", FILES)
def test_a_removed_or_cut_evidence_file_is_named(drill: Path, name: str) -> None:
    path = drill / "evidence" / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(EvidenceError):
        verify(drill / "certificate.json")
    path.unlink()
    with pytest.raises(EvidenceError):
        verify(drill / "certificate.json")


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda lines: [*lines, lines[1]], "is there 2 times"),
        (lambda lines: [lines[0], *lines[2:]], "sha256"),
        (
            lambda lines: [lines[0], lines[1].replace(b'"score":1.0', b'"score":0.0'), *lines[2:]],
            "by its grader",
        ),
        (lambda lines: [lines[0], lines[1].replace(b'"key":"key', b'"key":"kez'), *lines[2:]], "no item"),
        (lambda lines: [lines[0].replace(b"local/student", b"local/other"), *lines[1:]], "holds calls of"),
    ],
)
def test_changed_records_are_named(drill: Path, edit: Any, says: str) -> None:
    path = drill / "evidence" / file_name(STUDENT)
    lines = edit(path.read_bytes().splitlines())
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(EvidenceError, match=says):
        verify(drill / "certificate.json")


def test_a_benchmark_item_scored_twice_is_named(drill: Path) -> None:
    path = drill / "evidence" / file_name(STUDENT, "bench-hellaswag-")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, lines[-1]]))
    with pytest.raises(EvidenceError, match="item v/19 is there 2 times"):
        verify(drill / "certificate.json")


def test_an_added_file_is_named(drill: Path) -> None:
    (drill / "evidence" / "more.json").write_text("{}")
    with pytest.raises(EvidenceError, match="evidence"):
        verify(drill / "certificate.json")


def test_a_changed_page_is_named(drill: Path) -> None:
    page = drill / "certificate.html"
    page.write_text(page.read_text().replace(">PASS<", ">FAIL<", 1))
    with pytest.raises(EvidenceError, match="is not the page"):
        verify(drill / "certificate.json")
    page.write_text("<html>another</html>")
    with pytest.raises(EvidenceError, match="names another certificate"):
        verify(drill / "certificate.json")
    page.unlink()
    verify(drill / "certificate.json")


def test_what_is_no_certificate_is_the_users_to_mend(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    for text, says in (("", "not JSON"), ("[]", "not JSON"), ("{}", "format None")):
        path.write_text(text)
        with pytest.raises(InputError, match=says):
            verify(path)
    with pytest.raises(InputError, match="No such file"):
        verify(tmp_path / "absent.json")


def test_the_command_says_ok_or_lists_differences(drill: Path) -> None:
    path = drill / "certificate.json"
    good = CliRunner().invoke(verify_command, [str(path)])
    assert good.exit_code == 0
    assert "every number follows" in good.output
    copy = Path(shutil.copy(path, drill / "copy.json"))
    copy.write_text(copy.read_text().replace('"paid": ', '"paid": 1', 1))
    bad = CliRunner().invoke(verify_command, [str(copy), "--json"])
    assert bad.exit_code == 1
    told = json.loads(bad.output)
    assert not told["ok"]
    assert len(told["differences"]) == 1
    assert "paid" in told["differences"][0]


def test_numbers_keep_ten_digits() -> None:
    assert rounded({"a": [1 / 3, 2, True, None]}) == {"a": [0.3333333333, 2, True, None]}
