"""Benchmarks by chat: questions as they are put, answers as they are read, nothing asked twice."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from understudy.endpoint import ScriptedModel
from understudy.errors import EndpointError
from understudy.evaluate.benchmarks import SUITES, BenchmarkHeader, Scored, draw, paired, run
from understudy.evaluate.diversity import of_benchmarks
from understudy.evaluate.evidence import file_name, read_lines
from understudy.evaluate.questions import is_right, letter_of, mmmu
from understudy.protocol import Answer

PNG = b"\x89PNG\r\n\x1a\nrest"


@pytest.mark.parametrize(
    ("text", "options", "letter"),
    [
        ("B", 4, "B"),
        ("(C)", 4, "C"),
        ("**Answer: D**", 4, "D"),
        ("A cat is no dog, so the answer is (b).", 4, "B"),
        ("Answer: A? No. Answer: C", 4, "C"),
        ("It must be D, I think.", 4, "D"),
        ("B. the second", 4, "B"),
        ("A good question. It is either B or C.", 4, ""),
        ("E", 4, ""),
        ("E", 5, "E"),
        ("Don't know", 4, ""),
        ("", 4, ""),
    ],
)
def test_the_letter_an_answer_settles_on(text: str, options: int, letter: str) -> None:
    assert letter_of(text, options) == letter


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("6 times 7 is 42.\nAnswer: 42", True),
        ("First 7, then 42\nAnswer: $1,042.00", False),
        ("Answer: 42 apples, of 50", False),
        ("so 42", True),
        ("Answer: 7, no. Answer: 42.", True),
        ("", False),
    ],
)
def test_the_number_an_answer_settles_on(text: str, right: bool) -> None:
    assert is_right(text, "42", 0) is right


def rows(suite: str) -> list[dict[str, Any]]:
    """Six items of each benchmark, in its own columns; the right answer is told by the item's number."""
    made: dict[str, Any] = {
        "hellaswag": lambda i: {
            "activity_label": "A", "ctx_a": f"item {i}", "ctx_b": "he",
            "endings": list("wxyz"), "label": i % 4,
        },
        "mmlu": lambda i: {"question": f"item {i}", "subject": "s", "choices": list("wxyz"), "answer": i % 4},
        "arc_easy": lambda i: {
            "question": f"item {i}", "answerKey": f"{i % 4 + 1}",
            "choices": {"text": list("wxyz"), "label": list("1234")},
        },
        "piqa": lambda i: {"goal": f"item {i}", "sol1": "w", "sol2": "x", "label": i % 2},
        "boolq": lambda i: {"passage": "p", "question": f"item {i}", "answer": bool(i % 2)},
        "winogrande": lambda i: {
            "sentence": f"item {i} _ x", "option1": "w", "option2": "x", "answer": f"{i % 2 + 1}",
        },
        "gsm8k": lambda i: {"question": f"item {i}", "answer": f"Well.\n#### {i}"},
    }  # fmt: skip
    return [made[suite](i) for i in range(6)]


def knows(request: Mapping[str, Any]) -> str:
    """Answers right by the item's number and by how many options are listed."""
    text = str(request["messages"][0]["content"])
    number = int(text.split("item ")[1].split()[0].strip("?"))
    options = sum(f"\n{letter}. " in text for letter in "ABCD")
    return f"I think.\nAnswer: {'ABCD'[number % options] if options else number}"


def cell(value: object) -> object:
    return json.dumps(value) if isinstance(value, list | dict) else value


@pytest.mark.parametrize("suite", [name for name in SUITES if name not in ("mmmu", "arc_challenge")])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
async def test_every_benchmark_can_be_asked_by_chat(suite: str, kind: str, tmp_path: Path) -> None:
    file = tmp_path / "data" / f"{SUITES[suite].split}.{kind}"
    file.parent.mkdir()
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows(suite)), file)
    elif kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows(suite)))
    else:
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, rows(suite)[0])
            writer.writeheader()
            for row in rows(suite):
                writer.writerow(
                    {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()}
                )
    drawn = draw(suite, file.parent, items=0, seed=1, generative=True)
    model = ScriptedModel("host/chat", knows)
    figure = await run(model, suite, drawn, evidence=tmp_path / "e", seed=1)
    assert (figure.accuracy, figure.items, figure.metric, figure.few) == (1.0, 6, "generative", True)
    again = await run(model, suite, drawn, evidence=tmp_path / "e", seed=1)
    assert again == figure
    assert model.calls == 6


async def test_what_a_model_refuses_is_wrong_and_pairs_and_overlaps_are_told(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows("mmlu")))
    drawn = draw("mmlu", tmp_path, items=0, seed=1, generative=True)

    class Refuses(ScriptedModel):
        async def chat(self, request: Mapping[str, Any]) -> Answer:
            if "item 3" in str(request["messages"]):
                raise EndpointError("no", status=400)
            return await super().chat(request)

    right, half = ScriptedModel("host/old", knows), Refuses("host/new", knows)
    for model in (right, half):
        await run(model, "mmlu", drawn, evidence=tmp_path / "e", seed=1)
    files = [tmp_path / "e" / file_name(name, "bench-mmlu-") for name in ("host/old", "host/new")]
    old, new = (read_lines(file, BenchmarkHeader, Scored) for file in files)
    versus = paired("mmlu", old, new)
    assert versus is not None
    assert versus.difference == pytest.approx(-1 / 6)
    [pair] = of_benchmarks([old, new], ["host/old", "host/new"])
    assert (pair.both_right, pair.only_first) == (5, 1)
    scored = old.header.__class__(
        suite="mmlu", model="host/x", seed=1, items=6, population=6, normalised=False
    )
    assert paired("mmlu", (scored, []), new) is None


def test_mmmu_puts_pictures_where_the_question_names_them() -> None:
    row = {
        "question": "Left <image 1> or right <image 2>?", "answer": "B",
        "options": "['left', \"it's right\"]",
        "image_1": {"bytes": PNG}, "image_2": {"bytes": b"\xff\xd8jpeg"},
    }  # fmt: skip
    asked = mmmu(row)
    parts = asked.messages[0]["content"]
    assert [part["type"] for part in parts] == ["text", "image_url", "text", "image_url", "text"]
    assert parts[1]["image_url"]["url"].startswith("data:image/png;base64,")
    assert parts[3]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert "B. it's right" in parts[4]["text"]
    assert (asked.expected, asked.gold, asked.options) == ("B", 1, ("left", "it's right"))
    free = mmmu(
        {"question": "How many <image 1>?", "options": "[]", "answer": "7", "image_1": {"bytes": PNG}}
    )
    assert (free.options, free.expected) == ((), "7")
