"""Healing by itself, as the commands `distil` and `capture` need it: which teacher, which texts, where to.

A teacher is named by its weights, by the folder of its captured targets, or is `RECORDED`: then the texts'
own answers are all there is. Under torchrun the first process saves. It ignores the whole run (recipe) and
endpoints (answers).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from understudy.cluster import connect
from understudy.compress import checkpoint, curve, distill, targets
from understudy.compress.align import Pair, pairs_of
from understudy.compress.capture import Captured, Part, capture, planned
from understudy.compress.corpus import shared_length, windows
from understudy.compress.curve import Curve
from understudy.compress.decoder import head_weight
from understudy.compress.document import Document
from understudy.compress.fidelity import require_same_tokenizer
from understudy.compress.processes import Processes, processes
from understudy.compress.progress import Progress, silent
from understudy.compress.prompted import TOP, Connect, Prompted
from understudy.compress.spread import Source, capture_on, tell_of
from understudy.compress.targets import CachedTeacher, Origin, Targets, origin_of
from understudy.compress.teacher import LiveTeacher, RecordedTeacher, Teacher
from understudy.config import resolve_path
from understudy.errors import InputError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from understudy.compress.checkpoint import Loaded

RECORDED = "recorded"
"""A teacher of whom only answers are known."""
ASKED_SHARD_TOKENS = 1 << 15
"""Targets in a shard of an endpoint's: what an interruption may cost."""
Texts = Callable[["PreTrainedTokenizerBase"], list[Document]]
Vocabulary = Callable[["PreTrainedTokenizerBase"], list[bytes]]
"""The bytes of every token."""


class HealJob(NamedTuple):
    teacher: str
    """Weights, or `RECORDED`; with ``targets`` the weights they were captured from, or empty."""
    student: Path
    out: Path
    """Folder of the healed checkpoint; the state for resuming stands beside it as NAME.heal, the plot as
    NAME.svg."""
    settings: distill.Settings
    held_out: float
    """Share of documents that are only measured on."""
    texts: Texts
    generic: Texts | None = None
    """Texts mixed in by ``settings.generic``."""
    targets: Path | None = None
    resume: bool = False
    """Refuse to begin: there must be a state to go on from."""


def heal_only(job: HealJob, progress: Progress = silent) -> Curve:
    """Heal a checkpoint and save it; goes on from the state an interrupted run left.

    Raises InputError or ModelError for a teacher, a student or texts that don't belong together.
    """
    state = job.out.with_name(job.out.name + ".heal")
    if job.resume and not (state / "state.json").exists():
        raise ModelError(
            f"nothing to resume in {state}",
            expected="what an interrupted run left",
            next_step="without --resume",
        )
    student, peers = checkpoint.load(job.student), processes()
    documents = job.texts(student.reader)
    count = round(job.held_out * len(documents))
    generic = job.generic(student.reader) if job.generic else []
    corpus = distill.Corpus(documents[count:], documents[:count], generic)
    teacher, settings = _teacher(job, student, [*documents, *generic])
    found = distill.heal(student.model, teacher, corpus, settings, state, progress, peers)
    if peers.rank == 0:
        _save(job, student, settings, state, peers)
        curve.save_plot(found, job.out.with_name(job.out.name + ".svg"))
        distill.forget(state)
    peers.wait()
    return found


def _save(job: HealJob, student: Loaded, settings: distill.Settings, state: Path, peers: Processes) -> None:
    """What is spread over processes is put together from the best weights' file."""
    if peers.size > 1:
        student = checkpoint.load(job.student)
        distill.put_best(student.model, settings, state)
    origin: dict[str, Any] = {"licence_from": student.folder, "processor": student.processor}
    checkpoint.save(student.model, student.tokenizer, job.out, **origin)


def _teacher(
    job: HealJob, student: Loaded, documents: Sequence[Document]
) -> tuple[Teacher, distill.Settings]:
    """The teacher, and the settings it asks for."""
    if job.targets is not None:
        found = Targets(job.targets)
        _require_origin(found, job, student, documents)
        settings = msgspec.structs.replace(job.settings, row_tokens=found.origin.row_tokens)
        return CachedTeacher(found), settings
    if job.teacher == RECORDED:
        return RecordedTeacher(len(head_weight(student.model))), job.settings
    teacher = checkpoint.load(job.teacher)
    require_same_tokenizer(teacher.tokenizer, student.tokenizer)
    return LiveTeacher(teacher.model), job.settings


def _require_origin(found: Targets, job: HealJob, student: Loaded, documents: Sequence[Document]) -> None:
    """Raises ModelError for targets of another teacher, tokenizer, chat template or text."""
    kept = found.origin
    path = resolve_path(job.teacher, Path()) if job.teacher else None
    # a hub id is known by its commit, which needs the hub: it is taken at its word
    by_word = not job.teacher or kept.teacher.startswith("hub:")
    teacher = kept.teacher if by_word else job.teacher
    teacher = checkpoint.digest_of(path) if path is not None and path.exists() else teacher
    own = origin_of(
        teacher, student.tokenizer, kept.vocab, kept.row_tokens, top=kept.top, samples=kept.samples
    )
    targets.require_same(kept, own, found.folder)
    pieces = windows(documents, kept.row_tokens)
    missing = found.missing(pieces)
    if missing:
        raise ModelError(
            f"the targets in {found.folder} are of other texts: {missing:,} of {len(pieces):,} are missing",
            expected="the texts that were captured",
            next_step="capture again with these texts: what is there is kept",
        )


class CaptureJob(NamedTuple):
    teacher: str
    out: Path
    """Folder of the targets."""
    texts: Texts
    vocabulary: Vocabulary
    student: Path | None = None
    """Whose tokens the targets are told in, where they are not the teacher's."""
    part: Part = Part()
    ray: str = ""
    """Address of a cluster that makes the shards; empty: this process does."""
    shard_tokens: int = targets.SHARD_TOKENS


def capture_only(job: CaptureJob, progress: Progress = silent) -> Captured:
    """Capture an open teacher's targets of all texts, here or on a cluster.

    Raises ModelError for targets of another origin, and what `cluster.connect` raises before any is loaded.
    """
    if not job.ray:
        asked, teacher = _asked(job)
        tell = tell_of(asked.source, teacher, asked.pairs)
        origin, size = asked.source.origin, job.shard_tokens
        return capture(
            tell, asked.documents, job.out, origin, part=job.part, shard_tokens=size, progress=progress
        )
    if job.part.of > 1:
        raise InputError("a part of the shards, and a cluster for all of them", expected="--part or --ray")
    with connect(job.ray) as cluster:
        asked, _ = _asked(job)  # the model goes again: the workers have their own
        origin, size = asked.source.origin, job.shard_tokens
        shards = planned(asked.documents, job.out.resolve(), origin, shard_tokens=size)
        pairs = {tuple(pair.student.tokens): pair for pair in asked.pairs}
        return capture_on(cluster, asked.source, shards, pairs, progress=progress)


class _Asked(NamedTuple):
    """What a capture asks of whom."""

    source: Source
    documents: list[Document]
    pairs: list[Pair]
    """The documents in both tokenizers' tokens, where they differ."""


def _asked(job: CaptureJob) -> tuple[_Asked, LiveTeacher]:
    teacher = checkpoint.load(job.teacher)
    own = checkpoint.load(job.student) if job.student else teacher
    documents = job.texts(own.reader)
    if not documents:
        raise InputError("no text to capture", expected="chats or texts")
    name, vocab, live = _everywhere(job.teacher), len(head_weight(own.model)), LiveTeacher(teacher.model)
    if own.tokenizer.get_vocab() == teacher.tokenizer.get_vocab():
        origin = origin_of(teacher.digest, own.tokenizer, vocab, shared_length(documents))
        return _Asked(Source(name, origin), documents, []), live
    origin = _uncut(teacher.digest, own.tokenizer, vocab, documents, targets.TOP)
    vocabularies = job.vocabulary(own.tokenizer), job.vocabulary(teacher.tokenizer)
    pairs = pairs_of(documents, job.texts(teacher.reader))
    return _Asked(Source(name, origin, vocabularies), documents, pairs), live


def _everywhere(teacher: str) -> str:
    """A path made whole: workers start in other folders."""
    path = Path(teacher).expanduser()
    return str(path.resolve()) if path.exists() else teacher


def _uncut(
    teacher: str, tokenizer: PreTrainedTokenizerBase, vocab: int, documents: Sequence[Document], top: int
) -> Origin:
    """Texts in other tokens are told whole: cut in two tokenizers they would not be the same texts."""
    longest = max(len(d.tokens) for d in documents)
    return origin_of(teacher, tokenizer, vocab, longest, top=top, samples=0)


def capture_hosted(
    target: str,
    tokenizer: PreTrainedTokenizerBase,
    vocab: int,
    documents: Sequence[Document],
    tell: Callable[[Sequence[Document]], list[targets.Told]],
    out: Path,
    top: int,
) -> Captured:
    """Write down what an endpoint told of its own answers (answers.Hosted)."""
    return capture(tell, documents, out, _uncut(target, tokenizer, vocab, documents, top))


def uncaptured(folder: Path, documents: Sequence[Document]) -> int:
    """How many of these texts have no targets in a folder, which need not be there yet."""
    if not (folder / targets.MANIFEST).exists():
        return len(documents)
    found = Targets(folder)
    return found.missing(windows(documents, found.origin.row_tokens))


def capture_prompted(
    target: str,
    student: Loaded,
    documents: Sequence[Document],
    connect: Connect,
    out: Path,
    concurrency: int,
    progress: Progress = silent,
) -> Captured:
    """Write down what a vLLM server says of texts as they are (prompted.Prompted)."""
    if not documents:
        raise InputError("no text to capture", expected="chats or texts")
    vocab, length = len(head_weight(student.model)), shared_length(documents)
    origin = origin_of(target, student.tokenizer, vocab, length, top=TOP, samples=0)
    with Prompted(connect, student.tokenizer, vocab, concurrency) as teacher:
        return capture(
            teacher.told, documents, out, origin, shard_tokens=ASKED_SHARD_TOKENS, progress=progress
        )
