"""Sampling against probabilities worked out by hand; text cut at stop strings."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from understudy.serve.request import completion_request
from understudy.serve.sampling import TextCutter, draw

PROBABILITIES = torch.tensor([0.1, 0.5, 0.15, 0.25])


def drawn(**asked: Any) -> Counter[int]:
    request = completion_request({"model": "m", "prompt": "p", **asked})
    generator = torch.Generator().manual_seed(1)
    return Counter(draw(PROBABILITIES.log(), request, generator) for _ in range(4000))


def test_temperature_zero_takes_the_likeliest() -> None:
    assert drawn(temperature=0) == {1: 4000}


def test_frequencies_follow_the_probabilities() -> None:
    counts = drawn(temperature=1)
    for token, probability in enumerate(PROBABILITIES.tolist()):
        # five standard deviations of a binomial count
        assert abs(counts[token] - 4000 * probability) < 5 * (4000 * probability * (1 - probability)) ** 0.5


def test_temperature_sharpens() -> None:
    # at T = 1/2 probabilities go as squares: 0.25 of a total of 0.01 + 0.25 + 0.0225 + 0.0625
    expected = 4000 * 0.25 / 0.345
    assert abs(drawn(temperature=0.5)[1] - expected) < 5 * (expected * (1 - 0.25 / 0.345)) ** 0.5


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ({"top_k": 2}, {1, 3}),
        ({"top_p": 0.6}, {1, 3}),
        ({"top_p": 0.5}, {1}),
        ({"min_p": 0.4}, {1, 3}),
        ({"min_p": 0.25}, {1, 2, 3}),
    ],
)
def test_tails_are_cut(asked: dict[str, Any], kept: set[int]) -> None:
    assert set(drawn(temperature=1, **asked)) == kept


def test_text_waits_while_a_stop_string_may_begin() -> None:
    cutter = TextCutter(["END", "\n\n"])
    assert cutter.grow("one E") == "one "
    assert cutter.grow("one EN") == ""
    assert cutter.grow("one ENough\n") == "ENough"
    assert not cutter.stopped
    assert cutter.grow("one ENough\n\nmore") == ""
    assert cutter.stopped


def test_text_waits_for_the_rest_of_a_character() -> None:
    cutter = TextCutter([])
    assert cutter.grow("a\ufffd") == "a"
    assert cutter.grow("aé") == "é"
    assert cutter.finish("aé\ufffd") == "\ufffd"
