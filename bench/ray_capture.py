"""Bench of capture on Ray: what one and two workers make of it beside the plain loop, and a node that dies.

Clusters are nodes of one core each on this machine, started by Ray's own `cluster_utils`; the teacher is a
Llama of random weights and the texts are random tokens, so nothing is downloaded. In the last run one of two
nodes is killed, without notice, when a third of the targets are there. Every run's files are compared byte
by byte with the plain loop's. Prints Markdown, exits with 1 when a file is missing, doubled or different.
`--targets N` makes it smaller; `--killed-only` leaves the timings out.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from understudy.cluster import connect
from understudy.compress import checkpoint
from understudy.compress.capture import Live, Shard, capture, planned
from understudy.compress.corpus import Document
from understudy.compress.spread import Source, capture_on
from understudy.compress.targets import Origin
from understudy.compress.teacher import LiveTeacher

LENGTH, VOCAB = 128, 4096
SHARDS = 24
STORE_BYTES = 100 << 20


class Run(NamedTuple):
    name: str
    seconds: float
    first: float
    """Until the first shard was there: workers start, import and load the teacher."""
    targets: int
    first_targets: int
    fault: str
    """What of the files is not as the plain loop's; empty when nothing is."""


class Work(NamedTuple):
    source: Source
    documents: list[Document]
    folder: Path
    """Beneath it a folder for each run."""

    @property
    def shard_tokens(self) -> int:
        return sum(len(d.tokens) - 1 for d in self.documents) // SHARDS


class Watch:
    """Progress that notes when the first shard came, and does something once at a third."""

    def __init__(self, at_a_third: Any = None) -> None:
        self.started, self.first, self.first_targets, self.act = time.monotonic(), 0.0, 0, at_a_third
        self.note = ""

    def __call__(self, step: str, done: int, total: int, note: str = "") -> None:
        if done and not self.first:
            self.first, self.first_targets = time.monotonic() - self.started, done
        self.note = note
        if self.act is not None and done >= total / 3 and note == "2 workers":
            act, self.act = self.act, None
            act()
        print(f"  {done:,} of {total:,} {note}", file=sys.stderr, flush=True)


def prepare(folder: Path, targets: int) -> Work:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    name = save(LlamaForCausalLM(config), folder / "teacher")
    tokens = torch.randint(3, VOCAB, (max(targets // (LENGTH - 1), SHARDS), LENGTH)).tolist()
    digest = checkpoint.load(name).digest
    origin = Origin(teacher=digest, tokenizer="", template="", vocab=VOCAB, row_tokens=LENGTH)
    return Work(Source(name, origin), [Document(t, [False] * LENGTH) for t in tokens], folder)


def save(model: LlamaForCausalLM, folder: Path) -> str:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    checkpoint.save(
        model, PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2"), folder
    )
    return str(folder)


def plainly(work: Work) -> Run:
    watch = Watch()
    teacher = LiveTeacher(checkpoint.load(work.source.teacher).model)
    tell = Live(teacher, work.source.origin).told
    done = capture(
        tell,
        work.documents,
        work.folder / "plain",
        work.source.origin,
        shard_tokens=work.shard_tokens,
        precision="fp32",
        progress=watch,
    )
    return Run(
        "plain loop",
        time.monotonic() - watch.started,
        watch.first,
        done.tokens,
        watch.first_targets,
        "",
    )


@contextmanager
def nodes(count: int) -> Generator[tuple[Any, list[Any]]]:
    """A cluster of so many nodes of one core, and its nodes but the head."""
    from ray.cluster_utils import Cluster

    own = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=own | {"include_dashboard": False})
    try:
        yield cluster, [cluster.add_node(**own) for _ in range(count - 1)]
    finally:
        cluster.shutdown()


def spread(work: Work, name: str, count: int, *, kill: bool = False) -> Run:
    """One run on ``count`` nodes of which, with ``kill``, the last one dies in the middle."""
    folder = work.folder / name.replace(" ", "-")
    shards = planned(work.documents, folder, work.source.origin, shard_tokens=work.shard_tokens)
    with nodes(count) as (cluster, others), connect(cluster.address) as there:
        watch = Watch((lambda: cluster.remove_node(others[-1], allow_graceful=False)) if kill else None)
        done = capture_on(there, work.source, shards, {}, "fp32", watch)
        seconds = time.monotonic() - watch.started
        fault = "no node was killed: one of them had made nothing" if kill and watch.act else ""
    fault = fault or difference(shards, folder, work.folder / "plain")
    return Run(name, seconds, watch.first, done.tokens, watch.first_targets, fault)


def difference(shards: list[Shard], folder: Path, plain: Path) -> str:
    """What of a folder's files is not the plain loop's."""
    own, wanted = (sorted(path.name for path in f.iterdir()) for f in (folder, plain))
    if own != wanted or len(shards) != len(own) - 1:
        return f"files differ: {sorted(set(own) ^ set(wanted))}"
    other = [name for name in own if (folder / name).read_bytes() != (plain / name).read_bytes()]
    return f"content differs: {other}" if other else ""


def table(runs: list[Run]) -> str:
    head = (
        "| run | seconds | until the first shard | targets/s, all | targets/s, after the first shard "
        "| beside the plain loop | files as the plain loop's |\n| --- | --: | --: | --: | --: | --: | --- |\n"
    )
    return head + "\n".join(_row(run, runs[0]) for run in runs)


def _row(run: Run, plain: Run) -> str:
    verdict = run.fault or "all, byte by byte"
    return (
        f"| {run.name} | {run.seconds:.1f} | {run.first:.1f} | {run.targets / run.seconds:,.0f} | "
        f"{_steady(run):,.0f} | {_steady(run) / _steady(plain):.2f} | {verdict} |"
    )


def _steady(run: Run) -> float:
    return (run.targets - run.first_targets) / (run.seconds - run.first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", type=int, default=80_000)
    parser.add_argument("--killed-only", action="store_true")
    given = parser.parse_args()
    if find_spec("ray") is None:
        print("Not measured: the package `ray` is not installed (`pip install 'understudy[ray]'`).")
        return
    logging.disable(logging.WARNING)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = prepare(Path(folder), given.targets)
        runs = [plainly(work)]
        if not given.killed_only:
            runs += [spread(work, "Ray, 1 worker", 1), spread(work, "Ray, 2 workers", 2)]
        runs.append(spread(work, "Ray, 2 workers, one killed at a third", 2, kill=True))
    load = os.getloadavg()[0]
    print(
        f"A Llama of 6 layers, width 256 and random weights; {runs[0].targets:,} targets in {SHARDS} shards; "
        f"nodes of one core, one thread each, all on one machine of {os.cpu_count()} cores (load {load:.1f} "
        f"at the end). The clusters' own start is not counted.\n\n{table(runs)}"
    )
    sys.exit(any(run.fault for run in runs))


if __name__ == "__main__":
    main()
