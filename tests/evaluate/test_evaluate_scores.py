"""`evaluate scores`: golden run, every ordered pair, and what it says of files it cannot use."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from click.testing import CliRunner

from understudy.cli.evaluate import evaluate
from understudy.errors import InputError
from understudy.evaluate.scores import generalise, read, repeated, study
from understudy.evaluate.sequential import Design, Interval


@pytest.fixture
def table_file(tmp_path: Path) -> Path:
    """300 items in 30 clusters; `good` is right as often as `old`, `bad` 20 points less."""
    rng = random.Random(9)
    lines = ["item,cluster,model,score"]
    for i in range(300):
        right = rng.random() < 0.7
        same, lucky = rng.random() < 0.9, rng.random() < 0.7
        scores = {"old": right, "good": right if same else lucky, "bad": right and rng.random() < 0.7}
        lines += [f"i{i},c{i % 30},{model},{int(score)}" for model, score in scores.items()]
    path = tmp_path / "scores.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def invoke(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(evaluate, ["scores", *args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def test_json_holds_verdict_calls_and_the_truth(table_file: Path) -> None:
    _, out = invoke(str(table_file), "--incumbent", "old", "--candidate", "bad", "--json")
    got = json.loads(out)
    assert got["verdict"] == "FAIL"
    assert got["items"] == 300
    assert got["calls"] < 150
    assert got["interval"][0] <= got["difference"] <= got["interval"][1]
    assert got["difference_all"] == pytest.approx(_truth(table_file, "bad"))
    assert (got["clusters"], got["seed"], got["margin"]) == (30, 20260101, 0.03)


def test_names_from_a_file_do_not_drive_the_terminal_in_json_either(table_file: Path) -> None:
    """JSON need not escape DEL, C1 or directions of writing; we do, and it reads back the same."""
    hostile = "\x1b]0;\x07\x7f\x9b31m\u202e\U000e0001\\\x9b\u00e9"
    rows = [r.split(",") for r in table_file.read_text().splitlines()[1:]]
    path = table_file.with_suffix(".jsonl")
    path.write_text(
        "".join(
            json.dumps({"item": i, "cluster": c, "model": hostile if m == "bad" else m, "score": int(s)})
            + "\n"
            for i, c, m, s in rows
        )
    )
    for wanted in (["--incumbent", "old", "--candidate", hostile], ["--all-pairs"], ["--diversity"]):
        _, out = invoke(str(path), *wanted, "--json")
        assert not [c for c in out if not c.isprintable() and c != "\n"]
        assert "\u00e9" in out
        documents = (
            [json.loads(out)] if wanted != ["--all-pairs"] else [json.loads(x) for x in out.splitlines()]
        )
        assert hostile in _strings(documents)


def _strings(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for part in value.values() for text in _strings(part)]
    if isinstance(value, list):
        return [text for part in value for text in _strings(part)]
    return [value] if isinstance(value, str) else []


def _truth(path: Path, model: str) -> float:
    rows = [line.split(",") for line in path.read_text().splitlines()[1:]]
    total = {m: sum(int(s) for _, _, name, s in rows if name == m) for m in ("old", model)}
    return (total[model] - total["old"]) / 300


def test_text_says_the_same(table_file: Path) -> None:
    _, out = invoke(str(table_file), "--incumbent", "old", "--candidate", "good", "--margin", "0.1")
    assert "verdict         PASS" in out
    assert "difference_all" in out


def test_the_same_seed_gives_the_same_answer_in_any_row_order(table_file: Path, tmp_path: Path) -> None:
    header, *rows = table_file.read_text().splitlines()
    random.Random(1).shuffle(rows)
    other = tmp_path / "shuffled.csv"
    other.write_text("\n".join([header, *rows]))
    args = ("--incumbent", "old", "--candidate", "good", "--json", "--seed", "5")
    assert invoke(str(table_file), *args) == invoke(str(other), *args)


def test_all_pairs_prints_a_line_for_each_ordered_pair(table_file: Path) -> None:
    _, out = invoke(str(table_file), "--all-pairs", "--repeats", "5", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == 6
    assert {(x["incumbent"], x["candidate"]) for x in lines} >= {("old", "bad"), ("bad", "old")}
    for line in lines:
        assert sum(line["verdicts"].values()) == 5
        assert 0 < line["calls"] <= 300


def test_repeats_count_wrong_verdicts_against_the_truth(table_file: Path) -> None:
    table, truth = read(table_file), _truth(table_file, "bad")
    result = repeated(table, "old", "bad", Design(-truth, 0.05, 0.10), seed=1, repeats=200)
    assert result.difference_all == pytest.approx(truth)
    assert result.false_pass <= 0.05 + 4 * (0.05 * 0.95 / 200) ** 0.5
    assert result.covered >= 0.85


def test_whole_clusters_are_paid_whole(table_file: Path) -> None:
    result = study(read(table_file), "old", "bad", Design(0.03), seed=1, unit="cluster")
    assert result.calls % 10 == 0


def test_jsonl_reads_like_csv(table_file: Path, tmp_path: Path) -> None:
    header, *rows = table_file.read_text().splitlines()
    names = header.split(",")
    path = tmp_path / "scores.jsonl"
    objects = [dict(zip(names, row.split(","), strict=True)) for row in rows]
    path.write_text("\n".join(json.dumps({**o, "score": float(o["score"])}) for o in objects))
    assert read(path) == read(table_file)


BROKEN = """item,cluster,model,score
a,,x,1
a,,y,maybe
b,,x,1.5
b,,y
,,x,1
a,,x,0
c,,x,nan
b,,y,1
b,,x,0
a,,y,1
"""


def test_broken_lines_are_counted_and_listed(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    path.write_text(BROKEN)
    with pytest.raises(InputError) as caught:
        read(path)
    message = str(caught.value)
    for part in (
        "6 broken line(s)",
        "line 3: score 'maybe' is not a number",
        "line 4: score 1.5 is not in [0, 1]",
        "line 5: 3 fields, expected 4",
        "line 6: item or model is empty",
        "line 7: item 'a' of 'x' was already scored above",
        "line 8: score nan is not in [0, 1]",
        "--skip-broken",
    ):
        assert part in message


def test_broken_lines_can_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    path.write_text(BROKEN)
    table = read(path, skip_broken=True)
    assert len(table.broken) == 6
    assert table.scores == {"x": {"a": 1.0, "b": 0.0}, "y": {"b": 1.0, "a": 1.0}}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("item,model\na,x\n", "no column score"),
        ("", "no column item, model, score"),
        ("item,model,score\na,x,1\n", "scores of 1 model"),
    ],
)
def test_files_without_scores_are_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "scores.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        read(path)


def test_unknown_models_and_missing_files_are_named(table_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no scores of 'new'"):
        study(read(table_file), "old", "new", Design(0.03), seed=1)
    with pytest.raises(InputError, match="No such file"):
        read(tmp_path / "absent.csv")


def test_the_clustered_error_is_the_sandwich() -> None:
    """Two clusters (1, 1), (0, 0): mean 1/2, cluster sums ±1, variance 2·2/1/16 = 1/4."""
    pairs = [("a", 1.0), ("a", 1.0), ("b", 0.0), ("b", 0.0)]
    got = generalise(pairs, Interval(0.0, 0.0, 0.9))
    assert got is not None
    assert got.difference == 0.5
    assert got.high - got.difference == pytest.approx(1.6448536 * 0.5, rel=1e-6)
    assert generalise([("a", 1.0)], Interval(0.0, 0.0, 0.9)) is None


def test_an_incumbent_that_scores_nothing_cannot_be_failed_against(tmp_path: Path) -> None:
    """All nought on both sides: no PASS, in one order or in many."""
    path = tmp_path / "scores.csv"
    rows = [f"i{i},,{model},0" for i in range(200) for model in ("old", "new")]
    path.write_text("\n".join(["item,cluster,model,score", *rows]) + "\n")
    code, said = invoke(str(path), "--incumbent", "old", "--candidate", "new", "--json")
    told = json.loads(said)
    assert (code, told["verdict"]) == (0, "UNDECIDED")
    assert "scores of 0 on every item would have passed" in told["doubts"][0]
    assert "doubt " in invoke(str(path), "--incumbent", "old", "--candidate", "new")[1]
    table = read(path)
    assert repeated(table, "old", "new", Design(0.03), seed=1, repeats=3).verdicts == {"UNDECIDED": 3}
