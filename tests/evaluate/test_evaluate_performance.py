"""Speed and cost from samples, against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from understudy.endpoint import ScriptedModel
from understudy.errors import EvidenceError
from understudy.evaluate.performance import (
    ModelSheet,
    Sample,
    cost,
    measure,
    read_performance,
    speed,
    usd_of,
    write_performance,
)
from understudy.evaluate.proof import Tokens, quantile

SAMPLES = [
    Sample(prompt_tokens=100, completion_tokens=11, ttft_s=0.5, total_s=1.5),
    Sample(prompt_tokens=300, completion_tokens=21, ttft_s=1.5, total_s=3.5),
]
TOKENS = Tokens(calls=10, attempts=12, prompt=4000, completion=1000, completed=5)


def test_speed_by_hand() -> None:
    figures = speed(ModelSheet(model="m", samples=SAMPLES, wall_s=4.0))
    assert figures is not None
    assert figures.prompt_tokens_per_s == 200.0
    assert figures.generation_tokens_per_s == 10.0  # 20 more tokens in 2 s; the answer of 11 is too short
    assert figures.tokens_per_s == 108.0
    assert (figures.p50_s, figures.p95_s) == (1.5, 3.5)
    assert speed(ModelSheet(model="m")) is None


def test_short_answers_say_nothing_of_generation() -> None:
    """One word takes as long as the calls beside it; nobody should read that as tokens a second."""
    figures = speed(ModelSheet(model="m", samples=SAMPLES[:1], wall_s=1.5))
    assert figures is not None
    assert figures.generation_tokens_per_s is None


def test_cost_by_list_price() -> None:
    """4,000 in at $1 and 1,000 out at $4 a million: $0.008; twelve attempts for ten calls; five done."""
    sheet = ModelSheet(model="m", usd_per_million_input=1.0, usd_per_million_output=4.0)
    figures = cost(sheet, TOKENS)
    assert figures.usd_per_million_tokens == pytest.approx(1.6)
    assert figures.usd_per_completed_task == pytest.approx(0.008 * 1.2 / 5)


def test_cost_by_the_hour() -> None:
    sheet = ModelSheet(model="m", samples=SAMPLES, wall_s=4.0, usd_per_hour=0.36)
    assert usd_of(sheet, 4000, 1000) == pytest.approx(5000 / 108 / 3600 * 0.36)


def test_unknown_prices_stay_unknown() -> None:
    assert cost(ModelSheet(model="m"), TOKENS).usd_per_completed_task is None
    nothing = Tokens(calls=1, attempts=1, prompt=5, completion=5, completed=0)
    priced = ModelSheet(model="m", usd_per_million_input=1.0, usd_per_million_output=1.0)
    assert cost(priced, nothing).usd_per_completed_task is None


async def test_measuring_keeps_a_sample_of_each_answered_call() -> None:
    model = ScriptedModel("local/m", lambda _: "one two", fail=lambda call: call == 2)
    requests = [{"messages": [{"role": "user", "content": "a b c"}]}] * 5
    samples, wall = await measure(model, requests, concurrency=2)
    assert len(samples) == 4
    assert {(s.prompt_tokens, s.completion_tokens) for s in samples} == {(3, 2)}
    assert wall > 0


def test_the_file_reads_back_and_a_broken_one_is_named(tmp_path: Path) -> None:
    assert read_performance(tmp_path) == {}
    sheet = ModelSheet(model="m", samples=SAMPLES, wall_s=4.0, parameters=7)
    path = write_performance(tmp_path, [sheet])
    assert read_performance(tmp_path) == {"m": sheet}
    path.write_text("{")
    with pytest.raises(EvidenceError, match=r"performance\.json"):
        read_performance(tmp_path)


def test_quantiles_are_nearest_ranks() -> None:
    assert quantile([3.0, 1.0, 2.0, 4.0], 0.5) == 2.0
    assert quantile([1.0], 0.95) == 1.0
    assert quantile([], 0.5) == 0.0
