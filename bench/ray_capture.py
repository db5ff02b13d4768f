"""Bench of capture on Ray: what one and two workers make of it beside the plain loop, and a node that dies.

Clusters are nodes of one core each on this machine, started by Ray's own `cluster_utils`; the teacher is a
Llama of random weights and the texts are random tokens, so nothing is downloaded. In the last run one of two
nodes is killed, without notice, when a third of the targets are there. Rates are of the time after every
worker has delivered a shard, beside the CPU-seconds of the whole cluster in that time, which a busy machine
changes less. Every run's files are compared byte by byte with the plain loop's. Prints Markdown, exits with 1
when a file is missing, doubled or different. `--targets N` makes it smaller; `--killed-only` leaves the
timings out; `--data` hands the same errands to Ray Data too (`pip install 'ray[data]'`).
"""

from __future__ import annotations

import argparse
import logging
import os
import pickle
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
from understudy.compress.spread import Errand, Source, capture_on, make_there
from understudy.compress.targets import Origin
from understudy.compress.teacher import LiveTeacher

LENGTH, VOCAB = 128, 4096
SHARDS = 48
STORE_BYTES = 100 << 20


class Mark(NamedTuple):
    """A moment of a run."""

    seconds: float
    cpu: float
    """CPU-seconds of this process and all that descend from it."""
    targets: int


class Run(NamedTuple):
    name: str
    begun: Mark
    warm: Mark
    """When every worker had delivered: all have started, imported and loaded the teacher."""
    ended: Mark
    fault: str
    """What of the files is not as the plain loop's; empty when nothing is."""

    @property
    def seconds(self) -> float:
        return self.ended.seconds - self.begun.seconds

    @property
    def rate(self) -> float:
        """Targets a second once warm."""
        return (self.ended.targets - self.warm.targets) / (self.ended.seconds - self.warm.seconds)

    @property
    def cpu(self) -> float:
        """CPU-seconds for 10,000 targets once warm."""
        return 1e4 * (self.ended.cpu - self.warm.cpu) / (self.ended.targets - self.warm.targets)


def mark(targets: int = 0) -> Mark:
    return Mark(time.monotonic(), _cpu_s(), targets)


def _cpu_s() -> float:
    """Of this process and its descendants, those included that have ended and were waited for."""
    parents, spent = dict[int, int](), dict[int, float]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        parents[int(path.parent.name)] = int(fields[1])
        spent[int(path.parent.name)] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    own = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in own} - own:
        own |= more
    return sum(spent[pid] for pid in own)


class Work(NamedTuple):
    source: Source
    documents: list[Document]
    folder: Path
    """Beneath it a folder for each run."""

    @property
    def shard_tokens(self) -> int:
        return sum(len(d.tokens) - 1 for d in self.documents) // SHARDS


class Watch:
    """Progress that notes when all workers had delivered, and does something once at a third."""

    def __init__(self, workers: int = 0, at_a_third: Any = None) -> None:
        self.begun, self.act = mark(), at_a_third
        self.warm: Mark | None = None
        self._warm_note = "" if not workers else f"{workers} worker{'s' if workers > 1 else ''}"

    def __call__(self, step: str, done: int, total: int, note: str = "") -> None:
        if done and self.warm is None and note == self._warm_note:
            self.warm = mark(done)
        if self.act is not None and done >= total / 3 and self.warm is not None:
            act, self.act = self.act, None
            act()
        print(f"  {done:,} of {total:,} {note}", file=sys.stderr, flush=True)

    def run(self, name: str, targets: int, fault: str = "") -> Run:
        ended = mark(targets)
        return Run(name, self.begun, self.warm or self.begun, ended, fault)


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
    return watch.run("plain loop", done.tokens)


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


def spread(work: Work, name: str, count: int, *, kill: bool = False, data: bool = False) -> Run:
    """One run on ``count`` nodes of which, with ``kill``, the last one dies in the middle."""
    folder = work.folder / name.replace(" ", "-")
    shards = planned(work.documents, folder, work.source.origin, shard_tokens=work.shard_tokens)
    with nodes(count) as (cluster, others), connect(cluster.address) as there:
        die = (lambda: cluster.remove_node(others[-1], allow_graceful=False)) if kill else None
        watch = Watch(count, die)
        if data:
            _through_data(work.source, shards, count, watch)
        else:
            capture_on(there, work.source, shards, {}, "fp32", watch)
        run = watch.run(name, sum(shard.targets for shard in shards))
    fault = "no node was killed: one of them had made nothing" if kill and watch.act else ""
    return run._replace(fault=fault or difference(shards, folder, work.folder / "plain"))


class _Maker:
    """What Ray Data makes in each of its actors."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        done = [make_there(pickle.loads(errand)) for errand in batch["errand"]]
        return {"targets": [one.shard.targets for one in done], "worker": [one.worker for one in done]}


def _through_data(source: Source, shards: list[Shard], count: int, watch: Watch) -> None:
    """The same errands as rows of a dataset, an actor pool of one worker a core."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = [{"errand": pickle.dumps(Errand(source, shard, [], "fp32"))} for shard in shards]
    made = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _Maker, batch_size=1, num_cpus=1, compute=ray.data.ActorPoolStrategy(size=count)
    )
    done, workers, total = 0, set[str](), sum(shard.targets for shard in shards)
    for row in made.iter_rows():
        done += int(row["targets"])
        workers.add(str(row["worker"]))
        watch("capture", done, total, f"{len(workers)} worker{'s' if len(workers) > 1 else ''}")


def difference(shards: list[Shard], folder: Path, plain: Path) -> str:
    """What of a folder's files is not the plain loop's."""
    own, wanted = (sorted(path.name for path in f.iterdir()) for f in (folder, plain))
    if own != wanted or len(shards) != len(own) - 1:
        return f"files differ: {sorted(set(own) ^ set(wanted))}"
    other = [name for name in own if (folder / name).read_bytes() != (plain / name).read_bytes()]
    return f"content differs: {other}" if other else ""


def table(runs: list[Run]) -> str:
    head = (
        "| run | seconds | until all had delivered | targets/s after that | beside the plain loop "
        "| CPU-s for 10,000 | beside the plain loop | files as the plain loop's |\n"
        "| --- | --: | --: | --: | --: | --: | --: | --- |\n"
    )
    return head + "\n".join(_row(run, runs[0]) for run in runs)


def _row(run: Run, plain: Run) -> str:
    # what the dead node's processes had spent is gone with them
    spent = ("–", "–") if "killed" in run.name else (f"{run.cpu:.2f}", f"{run.cpu / plain.cpu:.2f}")
    return (
        f"| {run.name} | {run.seconds:.1f} | {run.warm.seconds - run.begun.seconds:.1f} | {run.rate:,.0f} | "
        f"{run.rate / plain.rate:.2f} | {spent[0]} | {spent[1]} | "
        f"{run.fault or 'all, byte by byte'} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", type=int, default=80_000)
    parser.add_argument("--killed-only", action="store_true")
    parser.add_argument("--data", action="store_true", help="Ray Data too; it wants pandas.")
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
        if given.data:
            runs.append(spread(work, "Ray Data, 2 workers", 2, data=True))
            runs.append(spread(work, "Ray Data, 2 workers, one killed at a third", 2, kill=True, data=True))
    load = os.getloadavg()[0]
    print(
        f"A Llama of 6 layers and width 256; {runs[0].ended.targets:,} targets, {SHARDS} shards; "
        f"nodes of one core, one thread each, all on one machine of {os.cpu_count()} cores (load {load:.1f} "
        f"at the end). The clusters' own start is not counted.\n\n{table(runs)}"
    )
    sys.exit(any(run.fault for run in runs))


if __name__ == "__main__":
    main()
