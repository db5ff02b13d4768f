"""Who answered for a target, and how fast: what watch and plan ask of the store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from understudy.protocol import Usage
from understudy.traffic.figures import AnsweredBy
from understudy.traffic.fingerprints import Fingerprint
from understudy.traffic.record import Call
from understudy.traffic.store import Store

MakeCall = Callable[..., Call]
T = 1_790_000_000.0


def test_each_id_that_answered_is_counted_from_first_to_last_sight(store: Store, make_call: MakeCall) -> None:
    calls = [
        make_call(at=T, answered_by="m-1"),
        make_call(at=T + 10, answered_by="m-1"),
        make_call(at=T + 20, answered_by="m-2"),
        make_call(at=T + 30, answered_by="m-3", status=500),
        make_call(at=T + 40, answered_by=""),
        make_call(at=T + 50, answered_by="a-1", target="other/a"),
    ]
    store.insert(calls, "s", 1)
    assert store.answered_by() == [
        AnsweredBy("openai/gpt-4.1", "m-1", 2, T, T + 10),
        AnsweredBy("openai/gpt-4.1", "m-2", 1, T + 20, T + 20),
        AnsweredBy("other/a", "a-1", 1, T + 50, T + 50),
    ]
    assert [a.answered_by for a in store.answered_by(since=T + 15)] == ["m-2", "a-1"]


def test_latencies_are_medians_of_answered_calls(store: Store, make_call: MakeCall) -> None:
    usage = Usage(prompt_tokens=5, completion_tokens=40)
    calls = [make_call(ttft_s=t / 10, total_s=t, usage=usage) for t in (1.0, 2.0, 8.0)]
    calls += [make_call(total_s=99.0, status=500), make_call(total_s=4.0, usage=None, target="other/a")]
    store.insert(calls, "s", 1)
    fast, other = store.latencies()
    assert (fast.target, fast.calls, fast.total_s, fast.tokens_per_s) == ("openai/gpt-4.1", 3, 2.0, 20.0)
    assert fast.ttft_s == pytest.approx(0.2)
    assert (other.target, other.tokens_per_s) == ("other/a", 0.0)
    assert store.latencies(latest=1)[0].target == "other/a"


def test_fingerprints_are_summed_over_batches_in_any_order(store: Store, make_call: MakeCall) -> None:
    def call(at: float, fingerprint: str, **fields: Any) -> Call:
        return make_call(at=at, answered_by="m-1", fingerprint=fingerprint, **fields)

    store.insert([call(T + 20, "fp_a"), call(T + 30, "fp_b\0"), call(T + 40, "", status=200)], "s", 1)
    store.insert([call(T, "fp_a"), call(T + 10, "fp_a"), call(T + 50, "fp_c", status=500)], "s", 2)
    store.insert([call(T + 90, "fp_d" * 99)], "s", 3)
    expected = [
        Fingerprint("openai/gpt-4.1", "m-1", "fp_a", 3, T, T + 20),
        Fingerprint("openai/gpt-4.1", "m-1", "fp_b\ufffd", 1, T + 30, T + 30),
        Fingerprint("openai/gpt-4.1", "m-1", "fp_d" * 16, 1, T + 90, T + 90),
    ]
    assert store.fingerprints() == expected
    store.forget(T + 1e9)
    assert store.fingerprints() == expected
