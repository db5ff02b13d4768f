"""A teacher's signal kept on disk: captured once, used by any run on the same texts.

A folder of safetensors shards, each named after the hash of who said it and of what text, beside
`targets.json`, which says who it was. A token costs 148 bytes at a vocabulary up to 65,536: 32 tokens with
their log-probability exactly, 8 samples of the others, the logarithm of the others' probability and their
share of the entropy. Weighting each sample by an eighth of the others' probability makes the whole an
unbiased estimate of the teacher's distribution, and so of the gradient of forward KL. Where nothing was
sampled (a hosted teacher tells its first 20) the others are one bucket. It ignores how signals come about
(capture, align, answers).

Source: importance sampling of logits as in arXiv 2503.16870; format: huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from uuid import uuid4

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from understudy.compress.corpus import Row
from understudy.compress.document import Document
from understudy.compress.signal import Sparse, joined
from understudy.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOP, SAMPLES = 32, 8
SHARD_TOKENS = 1 << 18
"""Targets in a shard: about 37 MiB."""
MANIFEST = "targets.json"


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """targets.json: who said it, and in whose tokens; equal or refused."""

    teacher: str
    """SHA-256 (hex) of its weights, hub:COMMIT, or ENDPOINT/MODEL."""
    tokenizer: str
    """SHA-256 of the student's vocabulary, which the targets are written in."""
    template: str
    """SHA-256 of its chat template."""
    vocab: int
    row_tokens: int
    """Length at which longer documents were cut."""
    top: int = TOP
    samples: int = SAMPLES
    version: int = 1


class Told(NamedTuple):
    """A teacher on one document: arrays with a row for every token but the first."""

    top: NDArray[Any]
    """Tokens, (targets, top), likeliest first."""
    log_p: NDArray[Any]
    """Their log-probabilities, float16; −inf where there are fewer."""
    tail: NDArray[Any]
    """Tokens sampled from the others, with replacement, (targets, samples)."""
    log_rest: NDArray[Any]
    """Log of the others' probability, float16; NaN where the teacher said nothing."""
    tail_negentropy: NDArray[Any]
    """Σ p·log p over the others, float16."""


def origin_of(
    teacher: str, tokenizer: PreTrainedTokenizerBase, vocab: int, row_tokens: int, **more: int
) -> Origin:
    """The manifest of targets in this tokenizer's tokens."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return Origin(
        teacher=teacher,
        tokenizer=hashlib.sha256(msgspec.json.encode(vocabulary)).hexdigest(),
        template=hashlib.sha256(str(tokenizer.chat_template or "").encode()).hexdigest(),
        vocab=vocab,
        row_tokens=row_tokens,
        **more,
    )


def begin(folder: Path, origin: Origin) -> None:
    """Claim a folder for targets of this origin. Raises ModelError when it holds others."""
    path = folder / MANIFEST
    if path.exists():
        require_same(read_origin(folder), origin, folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    _write(path, msgspec.json.format(msgspec.json.encode(origin), indent=1))


def read_origin(folder: Path) -> Origin:
    """Raises ModelError when the folder holds no targets."""
    path = folder / MANIFEST
    try:
        return msgspec.json.decode(path.read_bytes(), type=Origin)
    except OSError as error:
        raise ModelError(
            f"no targets in {folder}: {error.strerror}",
            expected=f"a folder with {MANIFEST}",
            next_step="understudy capture TEACHER --out FOLDER",
        ) from error
    except msgspec.MsgspecError as error:
        raise ModelError(f"{path} is not a manifest of targets: {error}") from error


def require_same(found: Origin, wanted: Origin, folder: Path) -> None:
    """Raises ModelError naming every part in which two origins differ."""
    names = [f for f in Origin.__struct_fields__ if getattr(found, f) != getattr(wanted, f)]
    if names:
        both = ", ".join(f"{n} {_short(getattr(found, n))} ≠ {_short(getattr(wanted, n))}" for n in names)
        raise ModelError(
            f"the targets in {folder} are of another {' and '.join(names)}: {both}",
            expected="the teacher, tokenizer, chat template and row length they were captured with",
            next_step="capture them anew into another folder",
        )


def _short(value: object) -> str:
    return str(value)[:12]


def document_key(document: Document) -> bytes:
    """16 bytes that name a text by its tokens, and by its pictures or sound."""
    digest = hashlib.sha256(np.asarray(document.tokens, dtype=np.int32).tobytes())
    digest.update(document.media.digest.encode() if document.media else b"")
    return digest.digest()[:16]


def shard_path(folder: Path, origin: Origin, keys: Sequence[bytes]) -> Path:
    """Where the targets of these documents lie: the name follows from who is asked about what."""
    digest = hashlib.sha256(msgspec.json.encode(origin))
    for key in keys:
        digest.update(key)
    return folder / f"{digest.hexdigest()[:32]}.safetensors"


def write_shard(path: Path, keys: Sequence[bytes], told: Sequence[Told], vocab: int) -> None:
    """One shard, whole or not at all, with the hash of its content. Raises ModelError on a full disk."""
    from safetensors.numpy import save_file

    narrow = np.uint16 if vocab <= 1 << 16 else np.int32
    columns = [np.concatenate(column) for column in zip(*told, strict=True)]
    tensors = dict(zip(Told._fields, columns, strict=True))
    for name in ("top", "tail"):
        tensors[name] = tensors[name].astype(narrow)
    tensors["documents"] = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 16).copy()
    tensors["lengths"] = np.asarray([len(t.log_rest) for t in told], dtype=np.int32)
    # process ids are not enough: machines that share the folder may give the same one
    partial = path.with_suffix(f".{uuid4().hex}.partial")
    try:
        save_file(tensors, partial, metadata={"sha256": _digest(tensors)})
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ModelError(f"cannot write {path}: {error.strerror}", next_step="free disk space") from error


def _digest(tensors: dict[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape} ".encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()


def read_shard(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays of a shard. Raises ModelError, naming it, when it is not as it was written."""
    from safetensors import SafetensorError, safe_open

    try:
        with cast(Any, safe_open)(path, framework="numpy") as shard:
            tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 -- no mapping
            wanted = (shard.metadata() or {}).get("sha256", "")
        fault = "" if _digest(tensors) == wanted else "its content is not what was written"
    except (OSError, SafetensorError, ValueError) as error:
        tensors, fault = {}, str(error)
    if fault:
        raise ModelError(
            f"the shard {path} is corrupted: {fault}",
            expected="the file as it was captured",
            next_step=f"remove {path.name} and capture again: only this shard is made anew",
        )
    return tensors


class _Place(NamedTuple):
    shard: int
    start: int
    targets: int


class Targets:
    """Captured targets by document; every shard is checked as it is opened."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.origin = folder, read_origin(folder)
        self._shards: list[dict[str, NDArray[Any]]] = []
        self._places: dict[bytes, _Place] = {}
        for path in sorted(folder.glob("*.safetensors")):
            self._add(read_shard(path))

    def _add(self, shard: dict[str, NDArray[Any]]) -> None:
        start = 0
        for key, length in zip(shard["documents"], shard["lengths"].tolist(), strict=True):
            self._places[key.tobytes()] = _Place(len(self._shards), start, length)
            start += length
        self._shards.append(shard)

    def missing(self, documents: Sequence[Document]) -> int:
        """How many of these texts were not captured."""
        return sum(document_key(d) not in self._places for d in documents)

    def told(self, document: Document, start: int, stop: int) -> Told:
        """What was said of a document's tokens ``start``+1 … ``stop``. Raises ModelError if not captured."""
        place = self._places.get(document_key(document))
        if place is None:
            raise ModelError(
                f"a text of {len(document.tokens)} tokens has no targets in {self.folder}",
                expected="the texts that were captured",
                next_step="capture again with this text: what is there is kept",
            )
        shard, at = self._shards[place.shard], slice(place.start + start, place.start + stop)
        return Told(*(shard[name][at] for name in Told._fields))


def sparse(told: Told, vocab: int) -> Sparse:
    """Captured arrays as a signal."""
    log_p, log_rest, tail = (
        torch.from_numpy(a.astype(np.float32)) for a in (told.log_p, told.log_rest, told.tail_negentropy)
    )
    known = ~log_rest.isnan()
    rest, top = log_rest.nan_to_num(0.0).exp() * known, log_p.exp() * known[:, None]
    # float16 moves the sum by a thousandth: what is exact is the share of the others
    top *= ((1 - rest) / top.sum(-1).clamp_min(1e-12))[:, None] if top.shape[1] else 1
    samples = told.tail.shape[1]
    tokens = np.concatenate([told.top, told.tail], axis=1).astype(np.int64)
    mass = torch.cat([top, (rest / max(samples, 1))[:, None].expand(-1, samples)], dim=1)
    negentropy = torch.special.xlogy(top, top).sum(-1) + tail
    left = torch.zeros_like(rest) if samples else rest
    return Sparse(torch.from_numpy(tokens), mass, left, negentropy * known, known, vocab)


class CachedTeacher:
    """A teacher that was asked before; no weights of it are here."""

    exact = False

    def __init__(self, targets: Targets) -> None:
        self.targets = targets

    def may_share(self, length: int) -> bool:
        """Targets belong to documents: how they are laid out changes nothing."""
        del length
        return True

    def signal(self, keys: Sequence[int], rows: Sequence[Row]) -> Sparse:
        del keys
        told = [
            self.targets.told(whole, start, start + len(piece.tokens) - 1)
            for row in rows
            for piece, whole, start in _pieces(row)
        ]
        return joined([sparse(t, self.targets.origin.vocab) for t in told])


def _pieces(row: Row) -> Iterator[tuple[Document, Document, int]]:
    """Each piece of a row, the document it is of, and where in that it starts.

    A beginning that continuations share is the start of any of them.
    """
    wholes: dict[int, Document] = {}
    for number, piece in enumerate(row.documents):
        if piece.after >= 0:
            before = row.documents[piece.after].tokens[: piece.start]
            wholes[number] = Document([*before, *piece.tokens], [])
            wholes.setdefault(piece.after, wholes[number])
    for number, piece in enumerate(row.documents):
        yield piece, wholes.get(number, piece), max(piece.start, 0)


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)
