"""Benchmark items as questions for a chat, and how their answers are read.

For APIs without log-probabilities: the options get letters, the model may think aloud, and its last word
counts. It ignores how items are sampled and what an accuracy is (benchmarks).

Sources: the data sets' own cards; MMMU's images and options as in its repository (Yue et al. 2024); GSM8K's
final answer after `####` (Cobbe et al. 2021).
"""

from __future__ import annotations

import ast
import base64
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from understudy.evaluate.grade import Reply, grade
from understudy.protocol import Json

LETTERS = "ABCDEFGHIJ"
CHOOSE = "Think if you must; end with one line: Answer: LETTER"
STATE = "Work it out; end with one line: Answer: RESULT"


class Question(NamedTuple):
    """One item as it is put to a chat model."""

    messages: list[dict[str, Any]]
    options: tuple[str, ...]
    """Empty where the answer is free text."""
    gold: int
    """Index of the right option; 0 for free text, as two outcomes begin with the right one."""
    expected: str
    """Letter or text."""


def _choice(text: str, options: Sequence[str], gold: int) -> Question:
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    content = f"{text.strip()}\n\n{listed}\n\n{CHOOSE}"
    return Question([{"role": "user", "content": content}], tuple(options), gold, LETTERS[gold])


def hellaswag(row: Json) -> Question:
    context = f"{row['activity_label']}: {row['ctx_a']} {str(row['ctx_b']).capitalize()}"
    return _choice(f"How does this go on?\n\n{context}", row["endings"], int(row["label"]))


def mmlu(row: Json) -> Question:
    return _choice(str(row["question"]), row["choices"], int(row["answer"]))


def arc(row: Json) -> Question:
    gold = list(row["choices"]["label"]).index(row["answerKey"])
    return _choice(str(row["question"]), row["choices"]["text"], gold)


def piqa(row: Json) -> Question:
    return _choice(f"How is this done best?\n\n{row['goal']}", [row["sol1"], row["sol2"]], int(row["label"]))


def boolq(row: Json) -> Question:
    text = f"{row['passage']}\n\nQuestion: {row['question']}?"
    return _choice(text, ["no", "yes"], int(is_yes(row["answer"])))


def is_yes(answer: object) -> bool:
    """A truth value as Arrow, JSON or CSV holds it."""
    return str(answer).strip().lower() in ("true", "1", "yes")


def winogrande(row: Json) -> Question:
    options = [row["option1"], row["option2"]]
    return _choice(f"What belongs in the gap?\n\n{row['sentence']}", options, int(row["answer"]) - 1)


def gsm8k(row: Json) -> Question:
    _, mark, result = str(row["answer"]).rpartition("####")
    if not mark:
        raise ValueError("an answer without ####")
    expected = result.strip().replace(",", "")
    content = f"{row['question']}\n\n{STATE}"
    return Question([{"role": "user", "content": content}], (), 0, expected)


_IMAGE = re.compile(r"<image (\d+)>")


def mmmu(row: Json) -> Question:
    """Text and pictures in the order in which the question names them."""
    options = _options(row["options"])
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    text = f"{row['question']}\n\n{listed}\n\n{CHOOSE if options else STATE}"
    parts = _IMAGE.split(text)  # text and picture numbers in turn
    content = [
        _picture(row, part) if place % 2 else {"type": "text", "text": part}
        for place, part in enumerate(parts)
        if part.strip()
    ]
    gold = LETTERS.index(row["answer"]) if options else 0
    return Question([{"role": "user", "content": content}], tuple(options), gold, str(row["answer"]))


def _options(value: object) -> list[str]:
    found: object = ast.literal_eval(value) if isinstance(value, str) else value
    return [str(option) for option in cast(list[object], found or [])]


def _picture(row: Json, number: str) -> Json:
    raw = cast(bytes, row[f"image_{number}"]["bytes"])
    kind = "png" if raw.startswith(b"\x89PNG") else "webp" if raw[8:12] == b"WEBP" else "jpeg"
    data = base64.b64encode(raw).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}}


_STATED = re.compile(r"answer\s*(?:is)?\s*[:=]?\s*\**\s*\(?([A-J])\b", re.IGNORECASE)
_LEADING = re.compile(r"^\W*([A-J])(?:\W|$)")
_ALONE = re.compile(r"(?<![A-Za-z'’])([A-J])(?![A-Za-z'’])")


def letter_of(text: str, options: int) -> str:
    """The option an answer settles on: the last that it calls its answer, else the letter it begins with,
    else the only one it names; empty when it names none, or several."""
    allowed = LETTERS[:options]
    stated = [letter.upper() for letter in _STATED.findall(text) if letter.upper() in allowed]
    if stated:
        return stated[-1]
    leading = _LEADING.match(text)
    named = {letter for letter in _ALONE.findall(text) if letter in allowed}
    if leading and leading[1] in allowed and (leading[1] != "A" or not re.match(r"^\W*A [a-z]", text)):
        return leading[1]
    return named.pop() if len(named) == 1 else ""


def is_right(text: str, expected: str, options: int) -> bool:
    """Whether an answer is right: its letter, or for free text its last number or words."""
    if options:
        return letter_of(text, options) == expected
    said = re.split(r"answer\s*(?:is)?\s*[:=]?", text, flags=re.IGNORECASE)[-1]
    return grade("match", Reply(said.strip().strip("*. ")), expected) == 1.0
