"""Hourly and daily sums: equal to the calls they count, however these arrived."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from understudy.protocol import Cost, Usage
from understudy.traffic.database import open_database
from understudy.traffic.migrations import migrate
from understudy.traffic.record import Call
from understudy.traffic.store import Store, open_store

MakeCall = Callable[..., Call]
HOUR = 497_222  # 1,789,999,200 s


def test_an_hour_sums_its_calls(store: Store, make_call: MakeCall) -> None:
    at = HOUR * 3600.0
    calls = [
        make_call(at=at, total_s=0.5),
        make_call(at=at + 3599.9, total_s=1.5, status=503, usage=None),
        make_call(at=at + 3600.0, usage=Usage(prompt_tokens=5, cached_tokens=4)),
        make_call(at=at, alias="other"),
    ]
    store.insert(calls[:1], "s", 1, price=lambda _: Cost(0.25, "", ""))
    store.insert(calls, "s", 2)  # the first again: counted once
    first, other, second = store.hours()
    assert first == (HOUR, "assistant", "openai/gpt-4.1", 2, 1, 1, 12, 3, 0, 0.25, 2.0)
    assert (other.alias, other.calls) == ("other", 1)
    assert (second.hour, second.prompt_tokens, second.cached_tokens) == (HOUR + 1, 5, 4)
    day, of_other = store.days()
    assert day == (
        HOUR // 24 * 24,
        "assistant",
        "openai/gpt-4.1",
        3,
        1,
        1,
        17,
        3,
        4,
        0.25,
        2.0 + second.total_s,
    )
    assert of_other == other._replace(hour=HOUR // 24 * 24)


def test_days_begin_at_midnight(store: Store, make_call: MakeCall) -> None:
    midnight = HOUR // 24 * 86_400.0
    store.insert([make_call(at=midnight + seconds) for seconds in (-0.5, 0.0, 86_399.0, 86_400.0)], "s", 1)
    store.insert([make_call(at=midnight)], "s", 2)
    first = HOUR // 24 * 24
    assert [(day.hour - first, day.calls) for day in store.days()] == [(-24, 1), (0, 3), (24, 1)]
    assert [day.hour - first for day in store.days(since=midnight + 3 * 3600)] == [0, 24]


def test_a_span_takes_whole_hours(store: Store, make_call: MakeCall) -> None:
    store.insert([make_call(at=(HOUR + n) * 3600.0 + 60) for n in range(4)], "s", 1)
    at = HOUR * 3600.0
    assert [h.hour for h in store.hours(since=at + 3600 + 59)] == [HOUR + 1, HOUR + 2, HOUR + 3]
    assert [h.hour for h in store.hours(since=at, until=at + 7200)] == [HOUR, HOUR + 1]
    assert [h.hour for h in store.hours(until=at + 7201)] == [HOUR, HOUR + 1, HOUR + 2]


def test_absurd_counts_overflow_nothing(store: Store, make_call: MakeCall) -> None:
    absurd = Usage(prompt_tokens=2**63, completion_tokens=-1)
    for offset in range(1, 4):
        store.insert([make_call(at=HOUR * 3600.0, usage=absurd) for _ in range(600)], "s", offset)
    assert store.hours()[0].prompt_tokens == pytest.approx(1800 * 2.0**53)


@pytest.mark.parametrize("second", [0.0, 0.5, 1800.0, 1801.0, 3599.999])
def test_a_store_from_before_is_summed_when_opened(store_url: str, tmp_path: Path, second: float) -> None:
    old = open_database(store_url, tmp_path)
    migrate(old, upto=10)
    for key, status in (("1", 200), ("2", 500)):
        old.execute(
            "INSERT INTO calls (key, at, alias, target, answered_by, route, status, stream, usage_estimated, "
            "ttft_s, total_s, finish_reason, task_id, tags, caller, prompt_tokens, cost_usd) VALUES "
            "(?, ?, 'a', 'o/m', '', 'chat.completions', ?, 0, 0, 0.1, 0.25, 'stop', '', '', '', 7, 0.5)",
            (key, HOUR * 3600 + second, status),
        )
    old.close()
    with open_store(store_url, tmp_path) as store:
        assert store.hours() == [(HOUR, "a", "o/m", 2, 1, 2, 14, 0, 0, 1.0, 0.5)]
        assert store.days() == [(HOUR // 24 * 24, "a", "o/m", 2, 1, 2, 14, 0, 0, 1.0, 0.5)]


@pytest.mark.parametrize("hour", [-25, -24, -1, 0, 23, 24])
def test_hours_of_a_store_from_before_fall_into_their_day(store_url: str, tmp_path: Path, hour: int) -> None:
    old = open_database(store_url, tmp_path)
    migrate(old, upto=24)
    old.execute(f"INSERT INTO hours VALUES ({hour}, 'a', 'o/m', 1, 0, 0, 0, 0, 0, 0, 0)")
    migrate(old)
    assert old.query("SELECT day FROM days") == [(hour // 24,)]
    old.close()
