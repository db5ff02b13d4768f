"""Capture a teacher's signal once, for any number of runs without it.

Texts are cut into shards whose names follow from their content, so a capture that was interrupted, or that
several machines share, makes what is missing and nothing twice. Samples follow from the text, not from the
machine. It ignores the files' format (targets) and teachers that are not `Live` (align, answers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from understudy.compress.corpus import Row, collate, windows
from understudy.compress.document import Document
from understudy.compress.losses import Side, logit_blocks
from understudy.compress.precision import Precision, matmul_precision
from understudy.compress.progress import Progress, silent
from understudy.compress.targets import (
    SHARD_TOKENS,
    Origin,
    Told,
    begin,
    document_key,
    read_shard,
    shard_path,
    write_shard,
)
from understudy.compress.teacher import LiveTeacher
from understudy.errors import InputError, ModelError

BATCH_TOKENS = 2048


class Part(NamedTuple):
    """Which share of the shards this machine makes."""

    number: int = 1
    of: int = 1


def part_of(text: str) -> Part:
    """``2/4`` as a part. Raises InputError."""
    number, _, of = text.partition("/")
    if number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of):
        return Part(int(number), int(of))
    raise InputError(f"part {text!r}", expected="NUMBER/OF, e.g. 1/4 on the first of four machines")


class Captured(msgspec.Struct, frozen=True, kw_only=True):
    """What a capture did."""

    tokens: int
    """Targets in this machine's shards."""
    made: int
    """Shards made now."""
    kept: int
    """Shards that were there."""
    bytes: int
    """Of this machine's shards."""


class Shard(NamedTuple):
    """A file that is there or to be made."""

    path: Path
    documents: list[Document]
    targets: int

    def whole(self) -> bool:
        """Whether it is there as it was written; a corrupted one is removed."""
        if not self.path.exists():
            return False
        try:
            read_shard(self.path)
        except ModelError:
            self.path.unlink()
            return False
        return True


def planned(
    documents: Sequence[Document],
    folder: Path,
    origin: Origin,
    part: Part = Part(),  # noqa: B008 -- an immutable tuple
    shard_tokens: int = SHARD_TOKENS,
) -> list[Shard]:
    """The shards of all documents, cut to ``origin.row_tokens``, that this machine has to see to.

    Raises ModelError when the folder holds targets of another origin.
    """
    begin(folder, origin)
    groups = list(shards(windows(documents, origin.row_tokens), shard_tokens))
    return [
        Shard(shard_path(folder, origin, [document_key(d) for d in group]), group, _targets(group))
        for group in groups[part.number - 1 :: part.of]
    ]


def shards(documents: Sequence[Document], most: int = SHARD_TOKENS) -> Iterator[list[Document]]:
    """Different documents in the order of their keys, in groups of about ``most`` targets."""
    group: list[Document] = []
    count = 0
    distinct = {document_key(d): d for d in documents}
    for _, document in sorted(distinct.items()):
        group.append(document)
        count += len(document.tokens) - 1
        if count >= most:
            yield group
            group, count = [], 0
    if group:
        yield group


Tell = Callable[[Sequence[Document]], list[Told]]
"""What a teacher says of a few documents."""


def capture(
    tell: Tell,
    documents: Sequence[Document],
    folder: Path,
    origin: Origin,
    *,
    part: Part = Part(),  # noqa: B008 -- an immutable tuple
    shard_tokens: int = SHARD_TOKENS,
    precision: Precision = "auto",
    progress: Progress = silent,
) -> Captured:
    """Write the targets of all documents, cut to ``origin.row_tokens``, that are not there yet.

    A corrupted shard is made anew. Raises ModelError when the folder holds targets of another origin.
    """
    mine = planned(documents, folder, origin, part, shard_tokens)
    total, done, made, size = sum(shard.targets for shard in mine), 0, 0, 0
    with matmul_precision(precision):
        for shard in mine:
            if not shard.whole():
                make(tell, shard, origin, partial(_report, progress, done, total))
                made += 1
            done += shard.targets
            size += shard.path.stat().st_size
            progress("capture", done, total)
    return Captured(tokens=total, made=made, kept=len(mine) - made, bytes=size)


def make(tell: Tell, shard: Shard, origin: Origin, report: Callable[[int], None] = lambda now: None) -> None:
    """Ask about a shard's documents and write it; ``report`` is told of the targets done so far."""
    keys = [document_key(d) for d in shard.documents]
    write_shard(shard.path, keys, _told(tell, shard.documents, report), origin.vocab)


def _targets(group: Sequence[Document]) -> int:
    return sum(len(d.tokens) - 1 for d in group)


def _report(progress: Progress, before: int, total: int, now: int) -> None:
    progress("capture", before + now, total)


def _told(tell: Tell, group: Sequence[Document], report: Callable[[int], None]) -> list[Told]:
    """Documents of about equal length together: a batch is as long as its longest."""
    order = sorted(range(len(group)), key=lambda i: len(group[i].tokens))
    found: dict[int, Told] = {}
    done = 0
    for batch in _batches(group, order):
        documents = [group[i] for i in batch]
        found.update(zip(batch, tell(documents), strict=True))
        done += _targets(documents)
        report(done)
    return [found[i] for i in range(len(group))]


def _batches(group: Sequence[Document], order: Sequence[int]) -> Iterator[list[int]]:
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * len(group[index].tokens) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


class Live:
    """An open model whose tokens are the student's."""

    def __init__(self, teacher: LiveTeacher, origin: Origin) -> None:
        self.teacher, self.origin = teacher, origin

    def told(self, documents: Sequence[Document]) -> list[Told]:
        """Its likeliest tokens and samples of the others."""
        rows = [Row([d], len(d.tokens)) for d in documents]
        signal = self.teacher.unremembered(collate(rows).to(self.teacher.head.weight.device))
        chance = torch.cat([_chance(d, self.origin.samples) for d in documents])
        blocks = [
            sampled(torch.log_softmax(logits.float(), dim=-1), chance[at], self.origin)
            for at, (logits,) in logit_blocks([Side(signal.hidden, signal.head)])
        ]
        whole = [np.concatenate(column) for column in zip(*blocks, strict=True)]
        cuts = np.cumsum([len(d.tokens) - 1 for d in documents])[:-1]
        return [Told(*parts) for parts in zip(*(np.split(c, cuts) for c in whole), strict=True)]


def _chance(document: Document, samples: int) -> Tensor:
    """Numbers in [0, 1) that choose a document's samples, (targets, samples); the same on every machine."""
    seed = int.from_bytes(document_key(document)[:8], "big") >> 1
    drawn = np.random.default_rng(seed).random((len(document.tokens) - 1, samples))
    return torch.from_numpy(drawn)


def sampled(log_p: Tensor, chance: Tensor, origin: Origin) -> Told:
    """Of a block of distributions (rows, vocab): the likeliest tokens, and samples of the others.

    Samples by inverting the distribution function of the others, which is summed in float64: in float32 a
    token of probability 1e-8 would never be drawn.
    """
    top = log_p.topk(origin.top, dim=-1)
    others = log_p.exp().double().scatter_(1, top.indices, 0.0)
    summed = others.cumsum(dim=-1)
    rest = summed[:, -1:]
    tail = torch.searchsorted(summed, chance.to(rest.device) * rest, right=True)
    tail = tail.clamp_max(log_p.shape[1] - 1)
    negentropy = torch.special.xlogy(others, others).sum(-1)
    found = (top.indices, top.values.half(), tail, rest[:, 0].log().half(), negentropy.half())
    return Told(*(t.cpu().numpy() for t in found))
