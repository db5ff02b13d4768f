"""Evidence of long trials: what is kept in memory, and that it is told alike in one go and bit by bit."""

from __future__ import annotations

from collections.abc import Sequence

from understudy.rollout.evidence import Evidence, Settled
from understudy.traffic.record import Attempt, Call
from understudy.traffic.rows import StoredCall, shape_of

HOUR_S = 3600.0


def call(number: int, at: float, task: str, *, caller: str = "") -> StoredCall:
    target = "local/new" if hash(task or caller) % 3 == 0 else "vendor/old"
    made = Call(
        key=f"{int(at * 1000):012x}{number:020x}",
        at=at,
        route="chat.completions",
        alias="chat",
        target=target,
        status=200,
        attempts=[Attempt(target=target, status=200, billed="yes", started=at, ended=at)],
        task_id=task,
        caller=caller,
        total_s=1.0,
    )
    return StoredCall(made, None, shape_of(made))


def evidence() -> Evidence:
    return Evidence(
        "chat", candidate="local/new", incumbent="vendor/old", since=0.0, settle_s=60.0, idle_s=1800.0
    )


def told(calls: Sequence[StoredCall], steps: int, *, most: list[int] | None = None) -> list[Settled]:
    """Tasks that settled, the calls given in so many steps of time."""
    each, events, end = evidence(), [], calls[-1].call.at + 3 * HOUR_S
    for step in range(1, steps + 1):
        upto = end * step / steps
        each.give([c for c in calls if end * (step - 1) / steps <= c.call.at < upto])
        events += each.tell(each.advance(upto), {}, {})
        if most is not None:
            most.append(len(each._tasks) + len(each._open) + len(each._read))  # type: ignore[attr-defined]
    return [event for event in events if isinstance(event, Settled)]


def test_a_long_trial_takes_as_much_memory_as_its_last_half_hour() -> None:
    calls = [call(n, n * 4.0, f"t{n}") for n in range(5_000)]  # five and a half hours
    most: list[int] = []
    assert len(told(calls, 400, most=most)) == 5_000
    assert max(most) < 2_500


def test_a_name_that_comes_back_after_long_is_a_task_anew_in_one_go_and_bit_by_bit() -> None:
    times = [0.0, 50.0, 70.0, 1000.0, 2500.0, 2500.0 + 2000.0, 2500.0 + 2030.0]
    calls = [call(n, at, "again") for n, at in enumerate(times)]
    calls += [call(100 + n, n * 2 * HOUR_S, "", caller="key-1") for n in range(3)]
    calls.sort(key=lambda each: each.call.key)
    whole, parts = told(calls, 1), told(calls, 997)
    assert sorted(whole) == sorted(parts)
    # at 0 and at 4500, for until 2500 it was never silent for half an hour; and the key once
    assert [each.at for each in sorted(whole)] == [60.0, 60.0, 4560.0]
