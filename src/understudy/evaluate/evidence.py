"""Evidence files: what was asked, what was answered, one JSON line each under a header.

`exchanges.jsonl` holds the held-out items with the incumbent's answers; one file per candidate holds its
calls. Lines are only ever appended, so a run that was killed goes on where it stopped; a last line that was
cut off is dropped. It ignores what the lines prove (proof).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import time
from collections.abc import Iterable, Sequence
from io import BufferedWriter
from pathlib import Path
from typing import Any, Generic, NamedTuple, Self, TypeVar, cast

import msgspec

from understudy.errors import EvidenceError, InputError
from understudy.evaluate.grade import grade, reply_of, standard, wants_json
from understudy.evaluate.item import Item
from understudy.evaluate.metrics import Metric
from understudy.evaluate.panel import Rates
from understudy.evaluate.sequential import Draws
from understudy.protocol import Json, text_of
from understudy.traffic.sample import Exchange

EXCHANGES = "exchanges.jsonl"
SYNC_S = 0.2
"""Longest time between a line and its fdatasync while lines keep coming."""
PROMPT_CHARS = 4000
"""Characters of the last user message kept for the report's side-by-side view."""


class ExchangesHeader(msgspec.Struct, frozen=True, kw_only=True, tag="exchanges", tag_field="kind"):
    """First line of `exchanges.jsonl`."""

    alias: str
    incumbent: str
    """ENDPOINT/MODEL that answered most of the items."""
    items: int


class ProofHeader(msgspec.Struct, frozen=True, kw_only=True, tag="proof", tag_field="kind"):
    """First line of a candidate's file, written before its first call: the seed is committed here."""

    candidate: str
    incumbent: str
    seed: int
    margin: float
    alpha: float
    beta: float
    candidates: int
    """Candidates tried side by side."""
    metrics: list[Metric]
    """What the verdict rests on, and what is reported beside it."""
    budget: int
    """Most calls; 0: all items."""
    exchanges_sha256: str
    """Of `exchanges.jsonl`: the question this file answers."""
    unit: Draws = "item"
    """What is drawn at once."""

    @property
    def rates(self) -> Rates:
        return Rates(self.alpha, self.beta, self.candidates)


H = TypeVar("H")
R = TypeVar("R")


class Lines(NamedTuple, Generic[H, R]):
    """A file's header and records."""

    header: H
    records: list[R]


def file_name(model: str, prefix: str = "") -> str:
    """Evidence file of a model; distinct models get distinct names whatever characters they hold."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", model)
    mark = "" if plain == model else "-" + hashlib.sha256(model.encode()).hexdigest()[:6]
    return f"{prefix}{plain}{mark}.jsonl"


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_lines(path: Path, header: type[H], record: type[R]) -> Lines[H, R]:
    """Header and records of an evidence file.

    A cut-off last line is left out. Raises EvidenceError when the file is missing, or naming the line that is
    not what it should be.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise EvidenceError(str(path), [f"{path.name} cannot be read: {error.strerror}"]) from error
    if len(lines) < 2:
        raise EvidenceError(str(path), [f"{path.name} has no complete header line"])
    return Lines(
        _decode(path, 1, lines[0], header),
        [_decode(path, number, line, record) for number, line in enumerate(lines[1:-1], start=2)],
    )


def _decode(path: Path, number: int, line: bytes, kind: type[R]) -> R:
    try:
        return msgspec.json.decode(line, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise EvidenceError(str(path), [f"{path.name} line {number}: {error}"]) from error


_ENCODER = msgspec.json.Encoder()


def encode_line(value: msgspec.Struct) -> bytes:
    return _ENCODER.encode(value) + b"\n"


class Journal:
    """An evidence file open for appending.

    The lines of one turn of the event loop are written together at its end, so killing the process loses what
    came within some milliseconds, as it loses what is still in its sockets; without a loop each is written at
    once. They are on disk within SYNC_S seconds.
    """

    def __init__(self, path: Path, header: msgspec.Struct) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not path.exists() or b"\n" not in path.read_bytes()
        if not fresh:
            _drop_cut_line(path)
        self._synced = 0.0
        self._due = False
        """A write at the end of this turn of the loop is arranged."""
        self._fault: OSError | None = None
        self._file: BufferedWriter = path.open("wb" if fresh else "ab")
        if fresh:
            self._file.write(encode_line(header))
            self._sync()

    def append(self, value: msgspec.Struct) -> None:
        """Add a line. Raises OSError, also for a line before that could not be written."""
        if self._fault is not None:
            raise self._fault
        self._file.write(encode_line(value))
        if self._due:
            return
        try:
            asyncio.get_running_loop().call_soon(self._turned)
        except RuntimeError:  # no loop
            self._write()
        else:
            self._due = True

    def _turned(self) -> None:
        self._due = False
        try:
            if not self._file.closed:
                self._write()
        except OSError as error:
            self._fault = error  # a callback has nobody to raise it to: the next append does

    def _write(self) -> None:
        self._file.flush()
        if time.monotonic() - self._synced > SYNC_S:
            self._sync()

    def _sync(self) -> None:
        self._file.flush()
        os.fdatasync(self._file.fileno())
        self._synced = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._sync()
        finally:
            self._file.close()


def _drop_cut_line(path: Path) -> None:
    content = path.read_bytes()
    keep = content.rfind(b"\n") + 1
    if keep < len(content):
        os.truncate(path, keep)


def write_exchanges(folder: Path, sample: Sequence[Exchange]) -> list[Item]:
    """Freeze the held-out sample as ``folder/exchanges.jsonl`` and grade the incumbent's answers.

    Written once; the same sample again changes nothing. Raises InputError when the folder holds another
    sample, for calls already paid would then answer another question.
    """
    if not sample:
        raise InputError(
            "no held-out exchanges to prove a candidate on",
            expected="recorded chat calls of the alias",
            next_step="record more traffic through `understudy up`, or raise evaluate.held_out",
        )
    items = [item_of(exchange) for exchange in sample]
    header = ExchangesHeader(alias=sample[0].alias, incumbent=incumbent_of(sample), items=len(items))
    content = b"".join(encode_line(x) for x in (header, *items))
    path = folder / EXCHANGES
    if path.exists() and path.read_bytes() != content:
        raise InputError(
            f"{path} holds another sample of traffic",
            expected="the sample this evidence was begun with",
            next_step=f"go on with that traffic, or move {folder} away to begin anew",
        )
    folder.mkdir(parents=True, exist_ok=True)
    _write_whole(path, content)
    return items


def read_exchanges(folder: Path) -> Lines[ExchangesHeader, Item]:
    return read_lines(folder / EXCHANGES, ExchangesHeader, Item)


def item_of(exchange: Exchange) -> Item:
    """The evidence line of an exchange."""
    rule, reply = standard(exchange), reply_of(exchange.body)
    return Item(
        key=exchange.key,
        prompt_hash=exchange.prompt_hash,
        at=exchange.at,
        task=exchange.tags.get("task", ""),
        cluster=exchange.task_id,
        prompt=shown_prompt(exchange.request),
        grader=rule.grader,
        expected=rule.expected,
        agreement=rule.agreement,
        reply=reply,
        score=grade(rule.grader, reply, rule.expected),
        usage=exchange.usage,
        total_s=exchange.total_s,
        finish_reason=finish_reason(exchange.body),
        wants_json=wants_json(exchange.request),
        tools=offered(exchange.request),
    )


def offered(request: Json) -> tuple[str, ...]:
    """Names of the functions a request offers."""
    functions = [cast(Json, t.get("function") or {}) for t in cast(list[Json], request.get("tools") or [])]
    return tuple(str(f.get("name") or "") for f in functions)


def finish_reason(body: Json) -> str:
    choices = cast(list[Json], body.get("choices") or [])
    return str(choices[0].get("finish_reason") or "") if choices else ""


def shown_prompt(request: Json) -> str:
    """The last user message of a request, clipped to PROMPT_CHARS."""
    messages = cast(list[dict[str, Any]], request.get("messages") or [])
    asked = [text_of(m.get("content")) for m in messages if m.get("role") == "user"]
    text = asked[-1] if asked else str(request.get("prompt") or "")
    return text if len(text) <= PROMPT_CHARS else text[:PROMPT_CHARS] + "…"


def incumbent_of(sample: Iterable[Exchange]) -> str:
    """ENDPOINT/MODEL that answered most of a sample."""
    targets = [exchange.target for exchange in sample]
    return max(sorted(set(targets)), key=targets.count)


def _write_whole(path: Path, content: bytes) -> None:
    """All or nothing: a reader never sees half a file."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_bytes(content)
    part.replace(path)
