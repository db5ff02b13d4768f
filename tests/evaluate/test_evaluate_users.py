"""What users put up with: retries, rephrasings and feedback told apart, arms compared by a known interval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from understudy.errors import EvidenceError
from understudy.evaluate.users import Rate, figures, marks_of, newcombe, read_marks, write_marks
from understudy.traffic.sample import Exchange


def call(
    key: str, task: str, *said: str, target: str = "host/old", role: str = "user", **more: Any
) -> Exchange:
    """A call whose messages are the user's turns with answers between."""
    turns = [{"role": "user", "content": text} for text in said]
    messages = [m for turn in turns for m in (turn, {"role": "assistant", "content": "well"})][:-1]
    if role == "tool":
        messages.append({"role": "tool", "content": "42"})
    fields: dict[str, Any] = {"expected": None, "grades": {}, **more}
    return Exchange(
        key=key, at=float(key), alias="a", target=target, request={"messages": messages},
        body={"choices": [{"message": {"role": "assistant", "content": "yes"}}]}, answer="yes",
        task_id=task, tags={}, prompt_hash=key, usage=None, status=200, total_s=0.1, ttft_s=0.1, **fields,
    )  # fmt: skip


def test_what_is_a_retry_and_what_a_rephrasing() -> None:
    marks = {
        m.at: m
        for m in marks_of(
            [
                call("1", "t1", "How do I reset my password?"),
                call("2", "t1", "how do I reset my password"),  # again, said the same
                call("3", "t1", "How can I reset the password?"),  # otherwise
                call("4", "t1", "What does it cost?"),  # another question
                call("5", "t2", "Book a table", role="tool"),
                call("6", "t2", "Book a table", role="tool"),  # the agent goes on: nobody asked again
                call("7", "", "Where is my parcel now?", "Where is my parcel right now?"),
                call("8", "", "Where is my parcel now?"),  # another user's, for all anyone knows
            ]
        )
    }
    assert [(m.calls, m.retries, m.rephrasings) for m in marks.values()] == [
        (4, 1, 1), (2, 0, 0), (1, 0, 1), (1, 0, 0),
    ]  # fmt: skip
    assert all(m.negative is None and m.completed is None for m in marks.values())


def test_feedback_and_completion() -> None:
    marks = marks_of(
        [
            call("1", "t1", "q", expected="yes"),
            call("2", "t2", "q", expected="no"),
            call("3", "t3", "q", grades={"thumbs": 0.0}),
            call("4", "t4", "q", expected="no"),
            call("5", "t4", "otherwise", expected="yes"),  # the last word counts
        ]
    )
    assert [m.completed for m in marks] == [True, False, False, True]
    assert [m.negative for m in marks] == [None, None, True, None]


def test_arms_by_who_answered_first_and_their_difference(tmp_path: Path) -> None:
    sample = [call(str(i), f"t{i}", "a long question", expected="yes") for i in range(1, 57)]
    sample += [
        call(str(100 + i), f"u{i}", "a long question", target="local/new", expected="yes" if i < 48 else "no")
        for i in range(80)
    ]
    sample += [call(str(300 + i), f"u{i}", "a long question", target="host/old") for i in range(8)]
    marks = marks_of(sample)
    write_marks(tmp_path, marks)
    old, new = figures(read_marks(tmp_path), "host/old")
    assert (old.model, old.tasks, new.model, new.tasks) == ("host/old", 56, "local/new", 80)
    assert (old.frustrated.share, new.retried.share, new.frustrated.share) == (0.0, 0.1, 0.1)
    assert (old.completed.share, new.completed.share) == (1.0, 0.6)
    assert new.less_completed is not None
    assert new.less_completed[0] == pytest.approx(0.4)
    assert old.more_frustrated is None
    assert old.negative.of == 0


def test_newcombe_by_his_own_example() -> None:
    """56/70 against 48/80: 0.2 with 0.0524 to 0.3339 (Newcombe 1998, table II, method 10)."""
    from understudy.evaluate.task import wilson

    one, other = (
        Rate(of=n, share=x / n, low=wilson(x, n)[0], high=wilson(x, n)[1]) for x, n in ((56, 70), (48, 80))
    )
    assert newcombe(one, other) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    assert newcombe(one, Rate(of=0, share=0.0, low=0.0, high=1.0)) is None


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "users.jsonl").write_text("{}\n")
    with pytest.raises(EvidenceError, match=r"users\.jsonl line 1"):
        read_marks(tmp_path)
    assert read_marks(tmp_path / "none") == []
