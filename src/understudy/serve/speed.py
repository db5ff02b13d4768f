"""How fast llama.cpp generates with a GGUF file on this machine: tokens a second, one sequence, by the clock.

The best of six rounds, so that a neighbour's burst does not decide. It ignores prompts, batches and the way
over HTTP (bench/serving.py).
"""

from __future__ import annotations

import time
from pathlib import Path

from understudy.serve.engine import cpu_threads
from understudy.serve.llama_scorer import open_scorer

TOKENS, ROUNDS = 48, 6


def tokens_per_second(path: Path, threads: int = 0) -> float:
    """``threads`` 0: the cores at hand. Raises ModelError when llama.cpp cannot load the file."""
    scorer = open_scorer(path, 2 * TOKENS, cpu_threads(threads))
    try:
        return max(_round(scorer.generate) for _ in range(ROUNDS))
    finally:
        scorer.close()


def _round(generate: object) -> float:
    assert callable(generate)
    started = time.perf_counter()
    generate(TOKENS)
    return TOKENS / (time.perf_counter() - started)
