"""How fast an endpoint answers real requests, and what that costs.

A small measurement on requests of the traffic itself: every sample is kept, every figure is computed from the
samples. It ignores memory and parameters (the caller hands them in) and answers' quality (proof). Figures of
a machine that does other work besides are those of that machine at that moment.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from understudy.endpoint import Endpoint
from understudy.errors import EndpointError, EvidenceError
from understudy.evaluate.proof import Tokens, quantile
from understudy.evaluate.workers import side_by_side

PERFORMANCE = "performance.json"
MILLION = 1_000_000
GENERATES = 16
"""Fewest tokens of an answer that tell how fast a model generates; the last few wait for other calls."""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One timed call."""

    prompt_tokens: int
    completion_tokens: int
    ttft_s: float
    total_s: float


class ModelSheet(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is known and was measured of one model; None where nobody knows."""

    model: str
    """ENDPOINT/MODEL."""
    parameters: int | None = None
    context_length: int | None = None
    """Tokens."""
    modalities: tuple[str, ...] = ("text",)
    memory_bytes: int | None = None
    """Peak resident memory while serving."""
    file_bytes: int | None = None
    samples: list[Sample] = []
    wall_s: float = 0.0
    """Time the whole measurement took, calls side by side included."""
    concurrency: int = 1
    usd_per_hour: float | None = None
    """Price of the machine, for a model of one's own."""
    usd_per_million_input: float | None = None
    """List price, for a hosted model."""
    usd_per_million_output: float | None = None
    price_source: str = ""


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """Figures from the samples."""

    requests: int
    prompt_tokens_per_s: float | None
    """Until the first byte, one call's view."""
    generation_tokens_per_s: float | None
    """After the first byte, one call's view; None where all answers are shorter than `GENERATES` tokens."""
    tokens_per_s: float | None
    """Prompt and completion tokens of all calls over the wall clock."""
    p50_s: float
    p95_s: float


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """US dollars; None where there is no price or nothing was completed."""

    usd_per_million_tokens: float | None
    """Over this traffic's own mix of prompt and completion tokens."""
    usd_per_completed_task: float | None
    source: str


async def measure(
    endpoint: Endpoint, requests: Sequence[Mapping[str, Any]], *, concurrency: int = 1
) -> tuple[list[Sample], float]:
    """Samples and wall-clock seconds of asking every request once, streamed; failed calls give no sample."""
    samples: list[Sample] = []
    waiting = iter(requests)

    async def work() -> None:
        for request in waiting:
            sample = await _timed(endpoint, request)
            if sample is not None:
                samples.append(sample)

    started = time.perf_counter()
    await side_by_side(work, concurrency)
    return samples, time.perf_counter() - started


async def _timed(endpoint: Endpoint, request: Mapping[str, Any]) -> Sample | None:
    streamed = {**request, "stream": True, "stream_options": {"include_usage": True}}
    try:
        answer = await endpoint.chat(streamed)
    except EndpointError:
        return None
    usage = answer.usage
    return Sample(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        ttft_s=answer.ttft_s,
        total_s=answer.total_s,
    )


def speed(sheet: ModelSheet) -> Speed | None:
    """Figures of a sheet; None without samples."""
    samples = sheet.samples
    if not samples:
        return None
    prompt = sum(s.prompt_tokens for s in samples)
    completion = sum(s.completion_tokens for s in samples)
    long = [s for s in samples if s.completion_tokens >= GENERATES]
    # the first token comes with the first byte
    generated = sum(s.completion_tokens - 1 for s in long)
    return Speed(
        requests=len(samples),
        prompt_tokens_per_s=_per(prompt, sum(s.ttft_s for s in samples)),
        generation_tokens_per_s=_per(generated, sum(s.total_s - s.ttft_s for s in long)),
        tokens_per_s=_per(prompt + completion, sheet.wall_s),
        p50_s=quantile([s.total_s for s in samples], 0.50),
        p95_s=quantile([s.total_s for s in samples], 0.95),
    )


def _per(count: float, seconds: float) -> float | None:
    return count / seconds if seconds > 0.0 and count else None


def usd_of(sheet: ModelSheet, prompt_tokens: int, completion_tokens: int) -> float | None:
    """Price of some tokens: by list price, else by the machine's hours at the measured throughput."""
    if sheet.usd_per_million_input is not None and sheet.usd_per_million_output is not None:
        priced = (
            prompt_tokens * sheet.usd_per_million_input + completion_tokens * sheet.usd_per_million_output
        )
        return priced / MILLION
    figures = speed(sheet)
    if sheet.usd_per_hour is None or figures is None or figures.tokens_per_s is None:
        return None
    return (prompt_tokens + completion_tokens) / figures.tokens_per_s / 3600.0 * sheet.usd_per_hour


def cost(sheet: ModelSheet, tokens: Tokens) -> Cost:
    """Cost on these calls. Per completed task = all attempts of all calls over the calls that succeeded."""
    total = usd_of(sheet, tokens.prompt, tokens.completion)
    used = tokens.prompt + tokens.completion
    retried = tokens.attempts / tokens.calls if tokens.calls else 1.0
    return Cost(
        usd_per_million_tokens=total / used * MILLION if total is not None and used else None,
        usd_per_completed_task=total * retried / tokens.completed
        if total is not None and tokens.completed
        else None,
        source=sheet.price_source,
    )


class _Sheets(msgspec.Struct):
    models: list[ModelSheet]


def write_performance(folder: Path, sheets: Sequence[ModelSheet]) -> Path:
    """``folder/performance.json``, the evidence behind speed, memory and cost."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PERFORMANCE
    path.write_bytes(msgspec.json.format(msgspec.json.encode(_Sheets(list(sheets))), indent=1) + b"\n")
    return path


def read_performance(folder: Path) -> dict[str, ModelSheet]:
    """Sheets by model; none when the file is absent. Raises EvidenceError when it cannot be read."""
    path = folder / PERFORMANCE
    if not path.exists():
        return {}
    try:
        sheets = msgspec.json.decode(path.read_bytes(), type=_Sheets)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise EvidenceError(str(path), [f"{path.name}: {error}"]) from error
    return {sheet.model: sheet for sheet in sheets.models}
