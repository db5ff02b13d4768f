"""A small retirement drill's folder, made with scripted models."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from understudy import config
from understudy.endpoint import ScriptedModel
from understudy.evaluate import certificate as certificates
from understudy.evaluate.benchmarks import BenchmarkHeader, Scored
from understudy.evaluate.certify import write
from understudy.evaluate.evidence import Journal, file_name
from understudy.evaluate.performance import ModelSheet, Sample, write_performance
from understudy.evaluate.replay import prove
from understudy.protocol import Usage
from understudy.traffic.sample import Exchange

INCUMBENT, STUDENT, SMALL = "host/old", "local/student", "local/small"
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"


def make_sample(count: int = 120) -> list[Exchange]:
    rng = random.Random(1)
    return [_exchange(i, rng.random() < 0.7) for i in range(count)]


def _exchange(i: int, right: bool) -> Exchange:
    answer = ("yes" if i % 2 else "no") if right else HOSTILE
    return Exchange(
        key=f"key{i:03}", at=1.79e9 + i, alias="assistant", target=INCUMBENT,
        request={"messages": [{"role": "user", "content": f"{HOSTILE} q{i}"}]},
        body={"choices": [{"message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}]},
        answer=answer, expected="yes" if i % 2 else "no", grades={}, task_id="",
        tags={"task": "even" if i % 4 < 2 else HOSTILE}, prompt_hash=f"h{i}",
        usage=Usage(prompt_tokens=30, completion_tokens=2), status=200, total_s=0.2, ttft_s=0.1,
    )  # fmt: skip


def _answers(name: str, right: float) -> ScriptedModel:
    rng = random.Random(5)

    def script(request: dict[str, list[dict[str, str]]]) -> str:
        number = int(request["messages"][0]["content"].rpartition("q")[2])
        return ("yes" if number % 2 else "no") if rng.random() < right else f"{HOSTILE} {name}"

    return ScriptedModel(name, script)


def _benchmark(evidence: Path, model: str, right: int) -> None:
    header = BenchmarkHeader(
        suite="hellaswag", model=model, seed=1, items=20, population=500, normalised=True
    )
    with Journal(evidence / file_name(model, "bench-hellaswag-"), header) as journal:
        for i in range(20):
            best = 2 if i < right else 1
            logprobs = [-9.0 - (choice != best) for choice in range(4)]
            journal.append(Scored(key=f"v/{i}", gold=2, logprobs=logprobs, lengths=[10] * 4))


def _performance(evidence: Path) -> None:
    samples = [Sample(prompt_tokens=30, completion_tokens=3, ttft_s=0.1, total_s=0.3)] * 4
    write_performance(
        evidence,
        [
            ModelSheet(
                model=INCUMBENT, parameters=135_000_000, context_length=8192,
                usd_per_million_input=1.0, usd_per_million_output=2.0, price_source="list",
            ),
            ModelSheet(
                model=STUDENT, parameters=101_000_000, context_length=8192, memory_bytes=2**28,
                samples=samples, wall_s=1.2, usd_per_hour=0.36, price_source="machine",
            ),
        ],
    )  # fmt: skip


async def _drill(folder: Path) -> None:
    evidence = folder / certificates.EVIDENCE
    settings = config.Evaluate(margin=0.10, seed=2)
    for model in (_answers(STUDENT, 0.95), _answers(SMALL, 0.2)):
        await prove(model, make_sample(), settings, evidence=evidence, candidates=2)
    for model, right in ((INCUMBENT, 10), (STUDENT, 12), (SMALL, 6)):
        _benchmark(evidence, model, right)
    _performance(evidence)
    plan = {
        "calls": 400, "window_days": 2.0, "tokens": 12_800, "successor": "vendor/next", "unknown": [1],
        "incumbent": {"model": INCUMBENT, "share": 1.0, "usd_per_month": 3.5},
        "candidates": [{"model": STUDENT, "share": 0.9, "misfits": {"context": 40}}],
        "excluded": [{"model": SMALL, "share": 0.5, "usd_per_million_tokens": 4.0, "modalities": ["text"]}],
    }  # fmt: skip
    (evidence / certificates.PLAN).write_bytes(msgspec.json.encode(plan))
    report = {"teacher": "old", "parameters_after": 101_000_000, "layers": [1, 2]}
    (evidence / certificates.OWN_REPORT).write_bytes(msgspec.json.encode(report))
    question = certificates.Question(
        alias="assistant", incumbent=INCUMBENT, candidates=[STUDENT, SMALL], created=1.7955e9,
        retires="2026-12-31", reason="notice", lineage={STUDENT: ["pruned", "distilled"]},
        sample_sha256="00", seeds={"order": 2}, versions={"understudy": "0"},
    )  # fmt: skip
    certificates.write_question(folder, question)
    write(folder)


@pytest.fixture(scope="session")
def _finished_drill(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drill")
    asyncio.run(_drill(folder))
    return folder


@pytest.fixture
def drill(_finished_drill: Path, tmp_path: Path) -> Path:
    """A folder of its own with certificate, page and evidence."""
    return Path(shutil.copytree(_finished_drill, tmp_path / "drill"))


@pytest.fixture
def sample() -> Callable[[int], list[Exchange]]:
    return make_sample
