"""lm-evaluation-harness on our endpoints: local data found, figures and differences by hand, a task run."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from understudy.endpoint import HttpEndpoint
from understudy.evaluate.harness import HarnessRun, differences, find_splits, run_of, run_tasks


@pytest.mark.parametrize(
    ("files", "path", "name", "splits"),
    [
        (["Rowan/hellaswag/none/validation/data-0.arrow"], "Rowan/hellaswag", None, ["validation"]),
        (["hellaswag/validation.jsonl", "hellaswag/train.jsonl"],
         "Rowan/hellaswag", None, ["train", "validation"]),
        (["ai2_arc/ARC-Easy/test-00000-of-1.parquet"], "allenai/ai2_arc", "ARC-Easy", ["test"]),
        (["hails/mmlu_no_train/anatomy/test/d.arrow", "hails/mmlu_no_train/anatomy/test/state.json"],
         "cais/mmlu", "anatomy", ["test"]),
        (["other/x/test.csv"], "cais/mmlu", "anatomy", []),
    ],
)  # fmt: skip
def test_local_data_sets_are_found(
    files: list[str], path: str, name: str | None, splits: list[str], tmp_path: Path
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert sorted(find_splits(tmp_path, path, name)) == splits


def test_what_datasets_keeps_beside_a_split_is_not_read_as_more_of_it(tmp_path: Path) -> None:
    split = tmp_path / "Rowan/hellaswag/none/validation"
    split.mkdir(parents=True)
    for name in ("data-00000-of-00001.arrow", "cache-0cae0695b6d8f65a.arrow"):
        (split / name).touch()
    found = find_splits(tmp_path, "Rowan/hellaswag", None)
    assert [file.name for file in found["validation"]] == ["data-00000-of-00001.arrow"]


def harness_run(model: str, scores: list[float]) -> HarnessRun:
    lines: list[dict[str, Any]] = [
        {"doc_id": i, "filter": "none", "metrics": ["acc", "words"], "acc": score, "words": ["x"]}
        for i, score in enumerate(scores)
    ]
    return run_of(model, {"samples": {"t": lines}})


def test_figures_and_paired_differences() -> None:
    old, new = harness_run("host/old", [1, 0, 1, 0]), harness_run("host/new", [1, 1, 1, 0])
    [figure] = old.figures  # what is not one number an item is left out
    assert (figure.metric, figure.value, figure.items, figure.few) == ("acc", 0.5, 4, True)
    assert figure.stderr == pytest.approx((1.0 / 3 / 4) ** 0.5)
    [pair] = differences(old, new)
    assert pair.difference == pytest.approx(0.25)
    assert pair.high - pair.low == pytest.approx(2 * 1.959964 * 0.25, rel=1e-6)


class Scorer(BaseHTTPRequestHandler):
    """A completions route that gives every character one log-probability: the shorter, the likelier."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        choices = [{"index": i, "text": p, "logprobs": scored(p)} for i, p in enumerate(request["prompt"])]
        body = json.dumps({"choices": choices}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        return


def scored(prompt: str) -> dict[str, Any]:
    values: list[float | None] = [None, *[-1.0] * (len(prompt) - 1)]
    return {
        "token_logprobs": values,
        "text_offset": list(range(len(prompt))),
        "top_logprobs": [None] * len(prompt),
    }


@pytest.fixture
def scorer() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Scorer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join()


@pytest.mark.filterwarnings("default")
def test_a_task_of_the_harness_end_to_end(
    scorer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"goal": f"do {i}", "sol1": "a", "sol2": "bbb", "label": int(i % 3 == 0)} for i in range(9)]
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    endpoint = HttpEndpoint("local/m", scorer, "m")
    found = run_tasks(endpoint, ["piqa"], folder=tmp_path, items=6)
    accuracy = next(f for f in found.figures if f.metric == "acc")
    assert (accuracy.value, accuracy.items) == (pytest.approx(4 / 6), 6)
