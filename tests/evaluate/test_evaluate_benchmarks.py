"""Benchmarks: prompts as lm-eval writes them, scores from echoed log-probabilities, nothing scored twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from understudy.endpoint import ScriptedModel
from understudy.errors import EndpointError, InputError
from understudy.evaluate.benchmarks import (
    SUITES,
    BenchmarkHeader,
    Drawn,
    Scored,
    accuracy,
    draw,
    right,
    run,
)
from understudy.evaluate.evidence import file_name, read_lines
from understudy.protocol import Answer

ROWS: dict[str, dict[str, Any]] = {
    "hellaswag": {
        "activity_label": "Baking", "ctx_a": "She mixes.", "ctx_b": "she",
        "endings": ["pours [step] it.", "sleeps.", "sings. [title] Loud", "runs."], "label": "2",
    },
    "mmlu": {
        "question": " 1+1? ", "subject": "high_school_maths", "choices": ["1", "2", "3", "4"], "answer": 1,
    },
    "arc_easy": {
        "question": "Why?", "choices": {"text": ["a", "bb"], "label": ["1", "2"]}, "answerKey": "2",
    },
    "piqa": {"goal": "Open it", "sol1": "push", "sol2": "pull", "label": 1},
    "boolq": {"question": "is it", "passage": "It is.", "answer": True},
    "winogrande": {"sentence": "Ann beat Bea so _ won.", "option1": "Ann", "option2": "Bea", "answer": "1"},
}  # fmt: skip
PROMPTS: dict[str, tuple[list[tuple[str, str, int]], int]] = {
    "hellaswag": (
        [
            ("Baking: She mixes. She", " pours it.", 9),
            ("Baking: She mixes. She", " sleeps.", 7),
            ("Baking: She mixes. She", " sings.. Loud", 12),
            ("Baking: She mixes. She", " runs.", 5),
        ],
        2,
    ),
    "mmlu": (
        [
            (
                "The following are multiple choice questions (with answers) about high school maths.\n\n"
                "1+1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:",
                f" {letter}",
                1,
            )
            for letter in "ABCD"
        ],
        1,
    ),
    "arc_easy": ([("Question: Why?\nAnswer:", " a", 1), ("Question: Why?\nAnswer:", " bb", 2)], 1),
    "piqa": ([("Question: Open it\nAnswer:", " push", 4), ("Question: Open it\nAnswer:", " pull", 4)], 1),
    "boolq": (
        [("It is.\nQuestion: is it?\nAnswer:", " no", 2), ("It is.\nQuestion: is it?\nAnswer:", " yes", 3)],
        1,
    ),
    "winogrande": ([("Ann beat Bea so Ann", " won.", 4), ("Ann beat Bea so Bea", " won.", 4)], 0),
}


@pytest.mark.parametrize("suite", ROWS)
def test_prompts_are_those_of_the_harness(suite: str) -> None:
    problem = SUITES[suite].problem
    assert problem is not None
    choices, gold = problem(ROWS[suite])
    assert ([tuple(choice) for choice in choices], gold) == PROMPTS[suite]


@pytest.fixture
def piqa(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "piqa" / "validation"
    folder.mkdir(parents=True)
    rows = [{"goal": f"do {i}", "sol1": "well", "sol2": "badly", "label": i % 2} for i in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "data" / "piqa" / "train.jsonl").write_text('{"goal": "never read"}')
    return tmp_path / "data"


class Scorer(ScriptedModel):
    """Splits before spaces; each token's logprob is minus its length, and the prompt's first has none."""

    def __init__(self, name: str = "local/m") -> None:
        super().__init__(name, lambda _: "")
        self.prompts = 0

    async def complete(self, request: Mapping[str, Any]) -> Answer:
        assert request["echo"]
        assert request["logprobs"]
        self.calls += 1
        self.prompts += len(request["prompt"])
        choices = [self._choice(i, prompt) for i, prompt in enumerate(request["prompt"])]
        return Answer(200, {"choices": choices[::-1]}, 0.0, 0.0, 1)

    def _choice(self, index: int, prompt: str) -> dict[str, Any]:
        words = prompt.split(" ")
        tokens = [words[0], *(f" {word}" for word in words[1:]), " next"]
        offsets = [sum(map(len, tokens[:i])) for i in range(len(tokens))]
        values = [None, *(-float(len(token)) for token in tokens[1:])]
        return {"index": index, "logprobs": {"text_offset": offsets, "token_logprobs": values}}


async def test_a_benchmark_is_scored_resumed_and_recomputed(piqa: Path, tmp_path: Path) -> None:
    drawn = draw("piqa", piqa, items=20, seed=4)
    assert (len(drawn.problems), drawn.population) == (20, 40)
    assert drawn == draw("piqa", piqa, items=20, seed=4)
    assert drawn != draw("piqa", piqa, items=20, seed=5)
    model = Scorer()
    done: list[tuple[int, int]] = []
    figure = await run(
        model, "piqa", drawn, evidence=tmp_path, seed=4, progress=lambda n, of: done.append((n, of))
    )
    path = tmp_path / file_name("local/m", "bench-piqa-")
    header, lines = read_lines(path, BenchmarkHeader, Scored)
    # " well" and " badly": -5 and -6 in all, -1.25 and -1.2 a character: acc_norm prefers the second
    assert {tuple(line.logprobs) for line in lines} == {(-5.0, -6.0)}
    assert figure == accuracy(header, lines)
    assert figure.accuracy == sum(line.gold == 1 for line in lines) / 20
    assert done[-1] == (20, 20)
    assert model.prompts == 40
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:6]) + b'{"key":')
    again = Scorer()
    assert (await run(again, "piqa", drawn, evidence=tmp_path, seed=4)).accuracy == figure.accuracy
    assert again.prompts == 2 * 15
    with pytest.raises(InputError, match="another sample"):
        await run(again, "piqa", drawn, evidence=tmp_path, seed=5)


async def test_an_endpoint_that_cannot_score_is_named(piqa: Path, tmp_path: Path) -> None:
    drawn = draw("piqa", piqa, items=2, seed=1)
    with pytest.raises(EndpointError, match="cannot score prompts"):
        await run(ScriptedModel("host/chat", lambda _: ""), "piqa", drawn, evidence=tmp_path, seed=1)


def test_normalisation_and_ties() -> None:
    line = Scored(key="k", gold=1, logprobs=[-4.0, -6.0], lengths=[2, 6])
    plain = BenchmarkHeader(suite="s", model="m", seed=1, items=1, population=1, normalised=False)
    normal = BenchmarkHeader(suite="s", model="m", seed=1, items=1, population=1, normalised=True)
    assert (right(plain, line), right(normal, line)) == (0.0, 1.0)
    assert right(plain, Scored(key="k", gold=0, logprobs=[-1.0, -1.0], lengths=[1, 1])) == 1.0


def test_bad_folders_and_rows_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no benchmark 'trivia'"):
        draw("trivia", tmp_path, items=1, seed=1)
    with pytest.raises(InputError, match="no piqa in"):
        draw("piqa", tmp_path, items=1, seed=1)
    (tmp_path / "validation.jsonl").write_text('{"goal": "x"}')
    with pytest.raises(InputError, match="piqa item validation/0: KeyError"):
        draw("piqa", tmp_path, items=1, seed=1)


def test_a_collection_without_the_benchmark_is_not_taken_for_it(piqa: Path, tmp_path: Path) -> None:
    mmlu = tmp_path / "hails/mmlu_no_train/anatomy/test"
    mmlu.mkdir(parents=True)
    (mmlu / "data.jsonl").write_text('{"question": "x", "choices": ["a", "b", "c", "d"], "answer": 0}\n')
    with pytest.raises(InputError, match="no gsm8k in"):
        draw("gsm8k", tmp_path, items=1, seed=1)
    with pytest.raises(InputError, match="without ####"):
        draw("gsm8k", mmlu, items=1, seed=1)
    cached = mmlu / "cache-0cae0695b6d8f65a.jsonl"  # what the library datasets keeps beside a split
    cached.write_text((mmlu / "data.jsonl").read_text() * 4)
    assert draw("mmlu", tmp_path, items=0, seed=1).population == 1


@pytest.mark.parametrize("form", ["stream", "file", "parquet"])
def test_arrow_and_parquet_are_read(tmp_path: Path, form: str) -> None:
    pa = pytest.importorskip("pyarrow")
    table = pa.Table.from_pylist([{"goal": f"g{i}", "sol1": "a", "sol2": "b", "label": 0} for i in range(3)])
    folder = tmp_path / "validation"
    folder.mkdir()
    if form == "parquet":
        import pyarrow.parquet as pq

        pq.write_table(table, folder / "x.parquet")
    else:
        opened = pa.ipc.new_stream if form == "stream" else pa.ipc.new_file
        with opened(str(folder / "x.arrow"), table.schema) as writer:
            writer.write_table(table)
    assert isinstance(drawn := draw("piqa", tmp_path, items=0, seed=1), Drawn)
    assert drawn.population == 3
