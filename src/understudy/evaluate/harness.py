"""Any task of lm-evaluation-harness on any endpoint, through `lm_eval` itself.

Tasks, prompts, metrics and their errors are the harness's own; here its model is one of our endpoints, so
keys, pace and errors are as everywhere else. Data sets come from a local folder where they are there (Arrow,
Parquet, JSONL, CSV), else the harness looks for them itself. It ignores what the built-in benchmarks do
without the harness (benchmarks).

Source: lm-evaluation-harness 0.4.13, lm_eval/evaluator.py and lm_eval/api/model.py.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from understudy.errors import InputError, MissingExtraError
from understudy.evaluate.benchmarks import CACHE, FEW_ITEMS, interval_of
from understudy.protocol import Json

if TYPE_CHECKING:
    from understudy.endpoint import HttpEndpoint

SPLITS = ("train", "validation", "test", "dev", "val")
ALIASES = {"cais/mmlu": "hails/mmlu_no_train", "aps/super_glue": "super_glue"}
"""Data sets of the harness that collections keep under another name."""
READ = {".arrow", ".parquet", ".jsonl", ".json", ".csv"}


class HarnessFigure(msgspec.Struct, frozen=True, kw_only=True):
    """One metric of one task."""

    task: str
    metric: str
    """As the harness names it, its filter after a comma where it is not `none`."""
    value: float
    stderr: float | None
    items: int
    few: bool
    """Fewer than FEW_ITEMS items: read the error before the value."""


class HarnessDifference(msgspec.Struct, frozen=True, kw_only=True):
    """Candidate minus incumbent on the same items of one task."""

    task: str
    metric: str
    items: int
    difference: float
    low: float
    """95% interval, normal approximation on per-item differences."""
    high: float
    few: bool


Samples = dict[str, dict[str, dict[str, float]]]
"""Task -> metric -> item -> score."""


class HarnessRun(msgspec.Struct, frozen=True, kw_only=True):
    """What the harness said of one model."""

    model: str
    figures: list[HarnessFigure]
    samples: Samples


def run_tasks(
    endpoint: HttpEndpoint,
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    items: int = 0,
    fewshot: int | None = None,
    chat: bool = False,
    seed: int = 1234,
    concurrency: int = 8,
) -> HarnessRun:
    """Run ``tasks`` (names or patterns of the harness) on an endpoint, which is opened and closed here.

    ``items`` is the most per task, the first ones, 0 for all. ``chat`` asks by chat, which answers generative
    tasks only. Raises MissingExtraError without `lm_eval`, InputError for a task it does not know, and
    EndpointError when the endpoint cannot score prompts.
    """
    try:
        evaluator: Any = import_module("lm_eval.evaluator")
        manager: Any = import_module("lm_eval.tasks").TaskManager()
    except ImportError as error:
        raise MissingExtraError("lm_eval", "lm-eval") from error
    from understudy.evaluate.harness_model import EndpointLM

    named = sorted({name for task in tasks for name in manager.match_tasks([task])})
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise InputError(
            f"no task {unknown[0]!r} in lm-evaluation-harness", next_step="lm_eval ls tasks   # lists them"
        )
    with asyncio.Runner() as runner, local_data(folder):
        model = EndpointLM(endpoint, runner, chat=chat, concurrency=concurrency)
        runner.run(endpoint.__aenter__())
        try:
            found = evaluator.simple_evaluate(
                model=model, tasks=named, num_fewshot=fewshot, limit=items or None,
                task_manager=manager, bootstrap_iters=0, log_samples=True, apply_chat_template=chat,
                random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
            )  # fmt: skip
        finally:
            runner.run(endpoint.__aexit__(None, None, None))
    return run_of(endpoint.name, cast(Json, found))


def run_of(model: str, found: Json) -> HarnessRun:
    samples = {task: _scores(lines) for task, lines in cast(Json, found["samples"]).items()}
    figures = [
        _figure(task, metric, values)
        for task, by_metric in sorted(samples.items())
        for metric, values in sorted(by_metric.items())
    ]
    return HarnessRun(model=model, figures=figures, samples=samples)


def _scores(lines: Sequence[Json]) -> dict[str, dict[str, float]]:
    """Metric -> item -> score; metrics that are not one number an item are left out."""
    scores: dict[str, dict[str, float]] = {}
    for line in lines:
        for metric in line.get("metrics", ()):
            value = line.get(metric)
            if isinstance(value, int | float):
                name = metric if line.get("filter", "none") == "none" else f"{metric},{line['filter']}"
                scores.setdefault(name, {})[str(line["doc_id"])] = float(value)
    return scores


def _figure(task: str, metric: str, scores: Mapping[str, float]) -> HarnessFigure:
    """Mean and its standard error over the items, which for every metric here is a mean of per-item
    scores."""
    count = len(scores)
    mean = math.fsum(scores.values()) / count
    spread = math.fsum((x - mean) ** 2 for x in scores.values())
    stderr = math.sqrt(spread / (count - 1) / count) if count > 1 else None
    few = count < FEW_ITEMS
    return HarnessFigure(task=task, metric=metric, value=mean, stderr=stderr, items=count, few=few)


def differences(incumbent: HarnessRun, candidate: HarnessRun) -> list[HarnessDifference]:
    """Every task and metric that both runs have, on the items both have."""
    return [
        _difference(task, metric, scores, candidate.samples[task][metric])
        for task, by_metric in sorted(incumbent.samples.items())
        for metric, scores in sorted(by_metric.items())
        if len(scores.keys() & candidate.samples.get(task, {}).get(metric, {}).keys()) > 1
    ]


def _difference(
    task: str, metric: str, own: Mapping[str, float], other: Mapping[str, float]
) -> HarnessDifference:
    shared = [other[item] - score for item, score in own.items() if item in other]
    mean, low, high = interval_of(shared)
    return HarnessDifference(
        task=task, metric=metric, items=len(shared), difference=mean, low=low, high=high,
        few=len(shared) < FEW_ITEMS,
    )  # fmt: skip


@contextmanager
def local_data(folder: Path | None) -> Generator[None]:
    """While open, the harness's `datasets.load_dataset` finds what ``folder`` holds there first.

    The harness has no seam for this: it calls the function by its module at the moment a task is built.
    """
    if folder is None:
        yield
        return
    datasets: Any = import_module("datasets")
    original: Callable[..., Any] = datasets.load_dataset

    def load(path: str, name: str | None = None, **more: Any) -> Any:
        splits = find_splits(folder, path, name)
        return _opened(splits) if splits else original(path=path, name=name, **more)

    datasets.load_dataset = load
    try:
        yield
    finally:
        datasets.load_dataset = original


def find_splits(folder: Path, path: str, name: str | None) -> dict[str, list[Path]]:
    """Files by split of the data set ``path`` with configuration ``name``; none where it is not there.

    Folders: ``path`` itself, its alias, or its last part; within it ``name`` (`none` and `default` for no
    name); within that SPLIT/FILE, SPLIT-FILE or SPLIT.EXTENSION, or these in `data/`.
    """
    places = [path, ALIASES.get(path, path), path.rpartition("/")[2]]
    root = next((folder / place for place in places if (folder / place).is_dir()), None)
    if root is None:
        return {}
    wanted = [name] if name else ["none", "default", "plain_text", "main"]
    inner = next((root / one for one in wanted if (root / one).is_dir()), root)
    splits: dict[str, list[Path]] = {}
    for file in sorted(f for f in inner.rglob("*") if f.suffix in READ and not f.name.startswith(CACHE)):
        parts = [*file.relative_to(inner).parts[:-1], file.name.partition("-")[0].partition(".")[0]]
        split = next((part for part in parts if part in SPLITS), None)
        if split and not file.name.endswith(("_info.json", "state.json")):
            splits.setdefault(split, []).append(file)
    return splits


def _opened(splits: Mapping[str, Sequence[Path]]) -> Any:
    datasets: Any = import_module("datasets")
    readers: dict[str, Callable[[str], Any]] = {
        ".arrow": datasets.Dataset.from_file,
        ".parquet": datasets.Dataset.from_parquet,
        ".csv": datasets.Dataset.from_csv,
        ".json": datasets.Dataset.from_json,
        ".jsonl": datasets.Dataset.from_json,
    }
    kind: Any = type("LocalData", (datasets.DatasetDict,), {"__missing__": _empty_split})
    return kind(
        {
            split: datasets.concatenate_datasets([readers[file.suffix](str(file)) for file in files])
            for split, files in splits.items()
        }
    )


def _empty_split(held: Mapping[str, Any], split: str) -> Any:
    """A task asks for the split of its few-shot examples even when it wants none."""
    return next(iter(held.values())).select([])
