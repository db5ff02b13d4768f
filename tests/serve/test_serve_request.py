"""Requests: what is served is taken, what is not is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from understudy.serve.request import RequestError, chat_request, completion_request

MESSAGES = [{"role": "user", "content": "hi"}]


def test_null_stands_for_absent() -> None:
    asked = chat_request({"model": "m", "messages": MESSAGES, "temperature": None, "stop": None, "n": None})
    assert (asked.temperature, asked.stops, asked.n) == (None, [], None)


def test_newer_name_of_the_limit_wins() -> None:
    asked = chat_request({"model": "m", "messages": MESSAGES, "max_tokens": 5, "max_completion_tokens": 7})
    assert asked.limit == 7


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_p": "high"}, "top_p"),
        ({"store": True}, "store"),
        ({"modalities": ["audio"]}, "modalities[0]"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ],
)
def test_a_fault_is_named(extra: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat_request({"model": "m", "messages": MESSAGES, **extra})
    assert caught.value.status == 400
    assert caught.value.body["error"]["param"] == param


def test_a_missing_field_is_named() -> None:
    with pytest.raises(RequestError, match="messages"):
        chat_request({"model": "m"})


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), ([1, 2], [[1, 2]]), (["a", "b"], ["a", "b"]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_four_forms_of_prompt(prompt: Any, prompts: list[Any]) -> None:
    assert completion_request({"model": "m", "prompt": prompt}).prompts == prompts


@pytest.mark.parametrize("prompt", [[], [[]], [1, "a"], [-1], [True], [[1], "a", None]])
def test_other_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(RequestError) as caught:
        completion_request({"model": "m", "prompt": prompt})
    assert caught.value.body["error"]["param"] == "prompt"


def test_best_of_is_refused_unless_it_says_nothing() -> None:
    assert completion_request({"model": "m", "prompt": "a", "best_of": 1}).limit == 16
    with pytest.raises(RequestError, match="best_of"):
        completion_request({"model": "m", "prompt": "a", "best_of": 3})
