"""How fast and how exactly matrices are multiplied on this processor.

Weights and sums stay in fp32; where the processor multiplies bf16 natively, fp32 matrix products may round
their *inputs* to bf16 and still add up and answer in fp32. Which is faster is measured once per process. It
ignores accelerators, whose own settings decide there.

Source: PyTorch 2.9 notes on `torch.backends.mkldnn.matmul.fp32_precision`.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, cast

Precision = Literal["auto", "fp32", "bf16"]


@contextmanager
def matmul_precision(precision: Precision = "auto") -> Generator[Literal["fp32", "bf16"]]:
    """Run fp32 matrix products with inputs rounded to bf16, exactly, or as `measured` says."""
    import torch

    chosen = measured() if precision == "auto" else precision
    backend = cast(Any, torch.backends.mkldnn).matmul
    before = backend.fp32_precision
    backend.fp32_precision = "bf16" if chosen == "bf16" else "ieee"
    try:
        yield chosen
    finally:
        backend.fp32_precision = before


@cache
def measured() -> Literal["fp32", "bf16"]:
    """bf16 where it is at least a quarter faster than fp32 on a product of a layer's size."""
    exact, rounded = _seconds("fp32"), _seconds("bf16")
    return "bf16" if rounded * 1.25 < exact else "fp32"


def _seconds(precision: Literal["fp32", "bf16"]) -> float:
    """Best of five products, so that a neighbour's burst does not decide."""
    import torch

    left, right = torch.ones(512, 576), torch.ones(576, 1536)
    best = float("inf")
    with matmul_precision(precision):
        for _ in range(5):
            start = time.perf_counter()
            torch.mm(left, right)
            best = min(best, time.perf_counter() - start)
    return best
