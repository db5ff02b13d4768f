"""Graders as tables of (answer, expected, score), and the rule that picks one."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from understudy.errors import InputError
from understudy.evaluate.grade import (
    GraderName,
    Reply,
    ToolCall,
    alternatives,
    encode_calls,
    grade,
    is_json,
    normalised,
    numbers,
    refuses,
    reply_of,
    standard,
)
from understudy.evaluate.pattern import found
from understudy.traffic.sample import Exchange

TABLE: list[tuple[GraderName, str, str, float]] = [
    ("exact", " Paris\n", "Paris", 1),
    ("exact", "paris", "Paris", 0),
    ("normalised", "The Eiffel-Tower!", "eiffel tower", 1),
    ("normalised", "eiffel", "eiffel tower", 0),
    ("choice", "B", "B", 1),
    ("choice", "(B) because A is wrong", "B", 1),
    ("choice", "The answer is C.", "C", 1),
    ("choice", "Answer: C", "B", 0),
    ("choice", "b", "B", 1),
    ("choice", "positive, I think", "Positive", 1),
    ("choice", "not positive", "positive", 0),
    ("numeric", "So 3 + 4 = 7.", "7", 1),
    ("numeric", "It costs $1,234.50", "1234.5", 1),
    ("numeric", "about 5%", "0.05", 1),
    ("numeric", "-3", "3", 0),
    ("numeric", "none", "3", 0),
    ("regex", "order #4711 shipped", r"#\d{4}\b", 1),
    ("regex", "no order", r"#\d{4}\b", 0),
    ("contains", "It is Paris, of course.", "paris", 1),
    ("contains", "Parisian", "Paris", 0),
    ("f1", "the cat sat", "cat sat down", 0.8),
    ("f1", "", "", 1),
    ("f1", "", "x", 0),
    ("match", "Positive.", "positive", 1),
    ("match", "Positive, because it is warm", "positive", 1),
    ("match", "The sentiment is positive", "positive", 1),
    ("match", "No, there is no doubt: yes", "yes", 0),
    ("match", "Yes, it is", "yes", 1),
    ("match", "B. Rome", "B", 1),
    ("match", "The capital of France is Paris", "Paris", 1),
    ("match", "I think it is 42.", "42", 1),
    ("match", "", "Paris", 0),
    ("match", "Lyon", '["Paris", "Lyon"]', 1),
    ("match", "Nice", '["Paris", "Lyon"]', 0),
    ("json", '{"a": 1, "b": {"c": "X"}}', '{"b": {"c": "x"}, "a": 1.0}', 1),
    ("json", '```json\n{"a": 1}\n```', '{"a": 1}', 1),
    ("json", '{"a": 1, "b": 2}', '{"a": 1}', 0.5),
    ("json", '{"a": true}', '{"a": 1}', 0),
    ("json", "a = 1", '{"a": 1}', 0),
    ("json", "[1, 2, 3]", "[1, 2, 4]", 2 / 3),
]


@pytest.mark.parametrize(("grader", "answer", "expected", "score"), TABLE)
def test_the_table(grader: GraderName, answer: str, expected: str, score: float) -> None:
    assert grade(grader, Reply(answer), expected) == pytest.approx(score)


CALL = ToolCall("weather", '{"city": "Rome", "days": 2}')


@pytest.mark.parametrize(
    ("calls", "score"),
    [
        ((ToolCall("weather", '{"days": 2, "city": "rome"}'),), 1.0),
        ((ToolCall("weather", '{"city": "Rome", "days": 3}'),), 0.75),
        ((ToolCall("forecast", CALL.arguments),), 0.0),
        ((CALL, CALL), 0.5),
        ((), 0.0),
    ],
)
def test_tool_calls_are_compared_by_structure(calls: tuple[ToolCall, ...], score: float) -> None:
    assert grade("tool_calls", Reply("", calls), encode_calls([CALL])) == pytest.approx(score)


def test_a_broken_regex_is_the_users_to_mend() -> None:
    with pytest.raises(InputError, match="not a regular expression"):
        grade("regex", Reply("x"), "(")


def exchange(**changes: object) -> Exchange:
    body = {"choices": [{"message": {"role": "assistant", "content": "Paris it is"}}]}
    base = Exchange(
        key="k", at=0.0, alias="a", target="e/m", request={"messages": []}, body=body, answer="Paris it is",
        expected="Paris", grades={}, task_id="", tags={}, prompt_hash="h", usage=None, status=200,
        total_s=0.0, ttft_s=0.0,
    )  # fmt: skip
    return base._replace(**changes)


JSON_WANTED = {"messages": [], "response_format": {"type": "json_object"}}
CALLING = {"choices": [{"message": {"tool_calls": [{"function": {"name": "weather", "arguments": "{}"}}]}}]}


@pytest.mark.parametrize(
    ("changes", "grader", "agreement"),
    [
        ({}, "match", False),
        ({"tags": {"grader": "numeric"}}, "numeric", False),
        ({"request": JSON_WANTED}, "json", False),
        ({"expected": None}, "f1", True),
        ({"expected": None, "request": JSON_WANTED}, "json", True),
        ({"expected": None, "body": CALLING}, "tool_calls", True),
    ],
)
def test_the_rule(changes: dict[str, object], grader: str, agreement: bool) -> None:
    got = standard(exchange(**changes))
    assert (got.grader, got.agreement) == (grader, agreement)


def test_agreement_with_itself_is_one() -> None:
    for body in (CALLING, exchange().body):
        got = standard(exchange(expected=None, body=body))
        assert grade(got.grader, reply_of(body), got.expected) == 1.0


def test_an_unknown_grader_is_named() -> None:
    with pytest.raises(InputError, match="grader='vibes'"):
        standard(exchange(tags={"grader": "vibes"}))


def test_pieces() -> None:
    assert normalised("An  “apple”, the…A ﬁg") == "apple fig"
    assert numbers("−2, 1,000 and 3.5e2 or 10%") == [-2, 1000, 350, 0.1]
    assert alternatives("[not json") == ["[not json"]
    assert alternatives('["a"]') == ["a"]
    assert is_json("[]")
    assert not is_json("{a}")
    assert refuses("I’m sorry, I can't help with that")
    assert not refuses("The tower is tall. I can see it.")


@pytest.mark.parametrize(
    ("grader", "answer", "expected"),
    [
        ("json", "```" + " " * 50_000 + "x", "{}"),
        ("code", "```" + " " * 50_000, "raise SystemExit"),
        ("json", "[" * 100_000, "{}"),
        ("json", "[" * 900 + "]" * 900, "{}"),
        ("schema", "[" * 900 + "]" * 900, '{"$ref": "#"}'),
        ("match", "x", "[" * 100_000),
        ("regex", "a" * 40 + "!", "^(a+)+$"),
        ("schema", '"' + "a" * 40 + '!"', '{"pattern": "^(a|aa)+$"}'),
        ("schema", "1e308", '{"multipleOf": 1e-10}'),
        ("numeric", "9" * 5_000, "1"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_no_answer_stalls_or_ends_an_evaluation(grader: GraderName, answer: str, expected: str) -> None:
    """Each took minutes, or ended the run with a traceback."""
    started = time.process_time()
    if grader == "schema" and "$ref" in expected:
        with pytest.raises(InputError, match="levels"):
            grade(grader, Reply(answer), expected)
    else:
        assert grade(grader, Reply(answer), expected) == 0.0
    assert time.process_time() - started < 3


def test_a_pattern_in_another_thread_is_not_searched_without_end() -> None:
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(found, "b$", "a" * 10 + "b").result()
        assert not thread.submit(found, "b$", "a" * 200_000 + "b").result()


@pytest.mark.parametrize(
    ("grader", "expected"), [("regex", "("), ("tool_calls", "not json"), ("schema", '{"multipleOf": 0}')]
)
def test_what_a_grader_cannot_use_is_named(grader: GraderName, expected: str) -> None:
    with pytest.raises(InputError):
        grade(grader, Reply("3"), expected)
