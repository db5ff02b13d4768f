"""Capture on a Ray cluster: every shard is an errand, and a shard there is never made again.

A worker makes the teacher once and keeps it. It writes a shard under a name of its own and renames it to the
name that follows from its content, so a worker that dies leaves no shard or a whole one, and the errand that
takes its place writes the same bytes or finds them there. The folder and the teacher's weights must lie on a
disk that all nodes share. It ignores the cluster (cluster) and what is in a shard (capture).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

from understudy.cluster import Cluster
from understudy.compress import checkpoint
from understudy.compress.align import Aligner, Pair
from understudy.compress.capture import Captured, Live, Shard, Tell, make
from understudy.compress.precision import Precision, matmul_precision, measured
from understudy.compress.progress import Progress, silent
from understudy.compress.targets import Origin
from understudy.compress.teacher import LiveTeacher
from understudy.errors import ModelError


class Source(NamedTuple):
    """How any machine comes to the same teacher."""

    teacher: str
    """Its weights, by a name that means the same on every node."""
    origin: Origin
    vocabularies: tuple[list[bytes], list[bytes]] | None = None
    """The bytes of the student's tokens and of its own, where they differ."""


class Errand(NamedTuple):
    """One shard to make."""

    source: Source
    shard: Shard
    pairs: list[Pair]
    """Its texts in both tokenizers' tokens, where they differ."""
    precision: Precision


class Done(NamedTuple):
    shard: Shard
    worker: str
    """HOST/PID."""


def tell_of(source: Source, teacher: LiveTeacher, pairs: Sequence[Pair]) -> Tell:
    """What a teacher that is in memory says, in the student's tokens."""
    if source.vocabularies is None:
        return Live(teacher, source.origin).told
    return Aligner(teacher, pairs, *source.vocabularies, source.origin.top).told


def capture_on(
    cluster: Cluster,
    source: Source,
    shards: Sequence[Shard],
    pairs: Mapping[tuple[int, ...], Pair],
    precision: Precision = "auto",
    progress: Progress = silent,
) -> Captured:
    """Make what is missing of ``shards``; ``pairs`` are by the student's tokens, empty where both are alike.

    How matrices are multiplied is measured here and holds for every worker. Raises ModelError when a worker's
    shard is not in the folder as it is seen from here.
    """
    chosen = measured() if precision == "auto" else precision
    missing = [shard for shard in shards if not shard.whole()]
    total = sum(shard.targets for shard in shards)
    done = total - sum(shard.targets for shard in missing)
    progress("capture", done, total)
    workers = set[str]()
    for made in cluster.each(make_there, (_errand(source, s, pairs, chosen) for s in missing)):
        _require_there(made)
        workers.add(made.worker)
        done += made.shard.targets
        progress("capture", done, total, f"{len(workers)} worker{'s' if len(workers) != 1 else ''}")
    size = sum(shard.path.stat().st_size for shard in shards)
    return Captured(tokens=total, made=len(missing), kept=len(shards) - len(missing), bytes=size)


def _errand(
    source: Source, shard: Shard, pairs: Mapping[tuple[int, ...], Pair], precision: Precision
) -> Errand:
    own = [pairs[tuple(d.tokens)] for d in shard.documents] if pairs else []
    return Errand(source, shard, own, precision)


def make_there(errand: Errand) -> Done:
    """Runs in a worker. Raises ModelError where its teacher is another than the command's."""
    source, shard = errand.source, errand.shard
    # of two beginnings of one errand the second may find the first one's file
    if not shard.whole():
        teacher = _teacher(source.teacher, source.origin.teacher)
        with matmul_precision(errand.precision):
            make(tell_of(source, teacher, errand.pairs), shard, source.origin)
    return Done(shard._replace(documents=[]), f"{socket.gethostname()}/{os.getpid()}")


@cache
def _teacher(name: str, digest: str) -> LiveTeacher:
    loaded = checkpoint.load(name)
    if loaded.digest != digest:
        raise ModelError(
            f"{name} on {socket.gethostname()} is {loaded.digest[:12]}, not {digest[:12]}",
            expected="the same weights on every node",
        )
    return LiveTeacher(loaded.model)


def _require_there(made: Done) -> None:
    path = made.shard.path
    if not path.exists():
        raise ModelError(
            f"the worker {made.worker} wrote {path}, which is not here",
            expected="a folder on a disk that all nodes of the cluster share",
        )
    for left in path.parent.glob(f"{path.stem}.*.partial"):
        left.unlink(missing_ok=True)  # by a worker that died over it
