"""Who fails where the other fails: CAPA against hand-computed values, and what the report makes of it."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from understudy.cli.evaluate import evaluate
from understudy.errors import InputError
from understudy.evaluate.benchmarks import BenchmarkHeader, Scored
from understudy.evaluate.certify import build
from understudy.evaluate.diversity import Judged, capa, compare, of_benchmarks, of_table, warning
from understudy.evaluate.evidence import Lines
from understudy.evaluate.needed import shared_blind_spots
from understudy.evaluate.scores import read
from understudy.evaluate.verify import verify


def test_capa_by_hand() -> None:
    """Three items of 4, 4 and 2 options. p̄ = (.7+.1+.5)/3 and (.4+.1+1)/3; mean 1/(options-1) = 5/9."""
    items = [
        Judged((0.7, 0.1, 0.1, 0.1), (0.4, 0.6, 0.0, 0.0), 0),
        Judged((0.1, 0.9, 0.0, 0.0), (0.1, 0.9, 0.0, 0.0), 0),
        Judged((0.5, 0.5), (0.0, 1.0), 1),
    ]
    observed = ((0.28 + 0.06) + (0.01 + 0.81) + 0.5) / 3
    first, second = 1.3 / 3, 1.5 / 3
    expected = first * second + (1 - first) * (1 - second) * (1 / 3 + 1 / 3 + 1) / 3
    got = capa(items)
    assert got is not None
    assert got.value == pytest.approx((observed - expected) / (1 - expected), abs=1e-12)
    assert got.low < got.value < got.high


def test_two_outcomes_are_cohens_kappa_and_the_jackknife_is_the_jackknife() -> None:
    """40 both right, 10 only the first, 20 only the second, 30 neither: κ = 0.4 (textbook table)."""
    rights = [(True, True)] * 40 + [(True, False)] * 10 + [(False, True)] * 20 + [(False, False)] * 30

    def kappa(cells: list[tuple[bool, bool]]) -> float:
        n = len(cells)
        a, b = (sum(c[i] for c in cells) / n for i in (0, 1))
        expected = a * b + (1 - a) * (1 - b)
        return (sum(x == y for x, y in cells) / n - expected) / (1 - expected)

    pair = compare("a", "b", rights, on="traffic")
    assert pair.capa == pytest.approx(0.4)
    left_out = [kappa(rights[:i] + rights[i + 1 :]) for i in range(100)]
    mean = math.fsum(left_out) / 100
    half = 1.959963984540054 * math.sqrt(0.99 * math.fsum((v - mean) ** 2 for v in left_out))
    assert pair.low == pytest.approx(0.4 - half)
    assert pair.error_overlap == pytest.approx(30 / 60)
    assert pair.second_fails_too == pytest.approx(30 / 50)
    assert (pair.failures, pair.second_fails) == (50, 0.4)


def test_independent_models_are_alike_by_chance_only() -> None:
    rng = random.Random(3)
    pair = compare("a", "b", [(rng.random() < 0.8, rng.random() < 0.6) for _ in range(4000)], on="traffic")
    assert pair.low is not None
    assert pair.high is not None
    assert pair.low < 0.0 < pair.high
    assert not warning(pair)


def test_two_that_never_fail_have_no_agreement_beyond_chance() -> None:
    pair = compare("a", "b", [(True, True)] * 9, on="traffic")
    assert (pair.capa, pair.error_overlap, pair.second_fails_too) == (None, None, None)
    assert not pair.shares_blind_spots
    assert compare("a", "b", [(True, True), (True, False)] * 9, on="traffic").capa is None


@pytest.fixture
def table_file(tmp_path: Path) -> Path:
    """`twin` fails exactly where `old` does but for one item in ten; `other` fails elsewhere."""
    lines = ["item,cluster,model,score"]
    for i in range(200):
        old = i % 4 != 0
        scores = {"old": old, "twin": old if i % 10 else not old, "other": i % 4 != 1}
        lines += [f"i{i},,{model},{int(score)}" for model, score in scores.items()]
    path = tmp_path / "scores.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_scores_show_every_pair_and_call_the_twin_out(table_file: Path) -> None:
    shown = CliRunner().invoke(evaluate, ["scores", str(table_file), "--diversity"])
    assert shown.exit_code == 0
    assert shown.stdout.count("CAPA") == 3 + 1
    assert "twin shares the blind spots of old" in shown.stdout
    out = CliRunner().invoke(
        evaluate, ["scores", str(table_file), "--diversity", "--incumbent", "old", "--json"]
    )
    pairs = {pair["second"]: pair for pair in json.loads(out.stdout)}
    assert set(pairs) == {"twin", "other"}
    assert pairs["other"]["both_wrong"] == 0
    assert pairs["other"]["capa"] < 0


def test_an_unknown_incumbent_is_named(table_file: Path) -> None:
    with pytest.raises(InputError, match="no scores of 'none'"):
        of_table(read(table_file), incumbent="none")


def test_the_certificate_compares_all_arms_and_calls_the_fallback_out(drill: Path) -> None:
    certificate = build(drill)
    pairs = {(p.first, p.second, p.on): p for p in certificate.diversity or []}
    arms = ("host/old", "local/student", "local/small")
    assert {(a, b) for a, b, on in pairs if on == "traffic"} == {
        (arms[0], arms[1]), (arms[0], arms[2]), (arms[1], arms[2])
    }  # fmt: skip
    small = pairs["host/old", "local/small", "traffic"]
    failing = small.both_wrong + small.only_second
    assert small.second_fails_too == pytest.approx(small.both_wrong / failing)
    # 10 and 12 of 20 right, the first ten by both
    bench = pairs["host/old", "local/student", "hellaswag"]
    assert (bench.both_right, bench.only_second, bench.both_wrong) == (10, 2, 8)
    twin = compare(arms[0], arms[2], [(i % 3 > 0, i % 3 > 0) for i in range(90)], on="traffic")
    lines = shared_blind_spots(certificate.question, [twin])
    assert lines[0].startswith("local/small shares the blind spots of host/old")
    question = msgspec.structs.replace(certificate.question, fallbacks=["host/unseen"])
    assert shared_blind_spots(question, [twin]) == [
        "Whether the fallback host/unseen fails where the incumbent does is not known: evaluate it too."
    ]


def test_a_certificate_of_an_earlier_format_is_refused_with_what_to_do(drill: Path) -> None:
    """Its verdict mixed likeness to the incumbent with right answers: that rule must confirm nothing."""
    path = drill / "certificate.json"
    path.write_bytes(path.read_bytes().replace(b"understudy-certificate/3", b"understudy-certificate/2"))
    with pytest.raises(InputError, match=r"certificate/2"):
        verify(path)


def test_two_copies_of_a_model_are_alike_on_a_benchmark_scored_by_the_character() -> None:
    """Nats per character differ by hundredths; a softmax over them made copies as alike as strangers."""
    rng = random.Random(5)
    lines = [
        Scored(
            key=str(i),
            gold=rng.randrange(4),
            logprobs=[rng.uniform(-200, -90) for _ in "abcd"],
            lengths=[120] * 4,
        )
        for i in range(60)
    ]
    benches = [
        Lines(
            BenchmarkHeader(suite="hellaswag", model=name, seed=1, items=60, population=60, normalised=True),
            lines,
        )
        for name in ("a", "b")
    ]
    pair = of_benchmarks(benches, ["a", "b"])[0]
    assert pair.both_wrong + pair.both_right == 60
    assert pair.capa == pytest.approx(1.0)
