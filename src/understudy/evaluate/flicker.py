"""How much a model disagrees with itself: the same question put again, and again.

A difference between two models smaller than what each differs from itself is no news. The first questions of
the committed order are asked again with the recorded parameters, of the candidate and of the incumbent; every
repeat is evidence. It ignores the cache (a cached answer cannot flicker) and decides nothing.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from understudy.endpoint import Endpoint
from understudy.errors import EndpointError, InputError
from understudy.evaluate.asking import MISCONFIGURED, asked
from understudy.evaluate.evidence import EXCHANGES, Journal, Lines, file_name, read_lines, sha256_of
from understudy.evaluate.grade import Reply, grade, normalised, reply_of
from understudy.evaluate.item import Call, Item
from understudy.evaluate.proof import Proof
from understudy.evaluate.replay import REPEATED_ITEMS
from understudy.evaluate.sequential import shuffled
from understudy.evaluate.workers import side_by_side
from understudy.protocol import Usage
from understudy.traffic.sample import Exchange

PREFIX = "repeats-"
NORMAL_95 = 1.959963984540054


class RepeatsHeader(msgspec.Struct, frozen=True, kw_only=True, tag="repeats", tag_field="kind"):
    """First line of `repeats-MODEL.jsonl`."""

    model: str
    seed: int
    exchanges_sha256: str


class Repeat(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One answer to a question that was answered before."""

    key: str
    """The item's."""
    repeat: int
    """2 is the first repeat: the answer in the evidence (or the recording) was 1."""
    reply: Reply = Reply()
    score: float
    error: str = ""
    """What went wrong; the score is then 0."""
    usage: Usage | None = None


class Flicker(msgspec.Struct, frozen=True, kw_only=True):
    """One model against itself."""

    model: str
    items: int
    answers: int
    """In all, the first ones included."""
    again: float
    """Mean score of the repeats. On items graded by agreement with the incumbent the incumbent's own value
    is as much as anybody can be expected to reach."""
    first: float
    """Mean score of the first answers to the same items."""
    texts_differ: float
    """Share of pairs of answers to one item that differ (normalised text, tool calls)."""
    scores_differ: float
    """Share of such pairs that were graded differently."""
    variance: float
    """Mean over items of the unbiased variance of the scores within an item."""
    moves: float | None = None
    """Candidates only: 95% of the time the flicker of both arms alone moves the difference over the asked
    items by at most this, 1.96·√((v_candidate + v_incumbent)/calls). None without the incumbent's repeats."""
    difference: float | None = None
    """Candidates only: mean score less the incumbent's over the asked items, to hold against ``moves``."""


Repeats = Lines[RepeatsHeader, Repeat]


class _Due(NamedTuple):
    item: Item
    repeat: int


async def measure(
    endpoint: Endpoint,
    exchanges: Sequence[Exchange],
    items: Sequence[Item],
    *,
    repeats: int,
    seed: int,
    evidence: Path,
    concurrency: int = 8,
) -> Path:
    """Ask the first REPEATED_ITEMS of the order until each has ``repeats`` answers, the first included.

    What the evidence holds is not asked again. A call the endpoint refuses is a repeat with score 0. Raises
    EndpointError when it is out of reach or misconfigured, and InputError when the evidence at hand is of
    another sample.
    """
    header = RepeatsHeader(model=endpoint.name, seed=seed, exchanges_sha256=sha256_of(evidence / EXCHANGES))
    path = evidence / file_name(endpoint.name, PREFIX)
    missing = _missing(items, repeats, seed, _known(path, header))
    requests = {exchange.key: exchange.request for exchange in exchanges}
    with Journal(path, header) as journal:

        async def work() -> None:
            for due in missing:
                journal.append(await _ask(endpoint, due, requests))

        await side_by_side(work, concurrency)
    return path


def _known(path: Path, header: RepeatsHeader) -> set[tuple[str, int]]:
    if not path.exists() or b"\n" not in path.read_bytes():
        return set()
    found, lines = read_lines(path, RepeatsHeader, Repeat)
    if found != header:
        raise InputError(
            f"{path} holds repeats of another sample or seed",
            expected="the traffic and seed this evidence was begun with",
            next_step=f"move {path} away to begin anew",
        )
    return {(line.key, line.repeat) for line in lines}


def _missing(items: Sequence[Item], repeats: int, seed: int, known: set[tuple[str, int]]) -> Iterator[_Due]:
    by_key = {item.key: item for item in items}
    for key in shuffled(by_key, seed)[:REPEATED_ITEMS]:
        for repeat in range(2, repeats + 1):
            if (key, repeat) not in known:
                yield _Due(by_key[key], repeat)


async def _ask(endpoint: Endpoint, due: _Due, requests: Mapping[str, dict[str, object]]) -> Repeat:
    request, item = requests[due.item.key], due.item
    ask = endpoint.chat if "messages" in request else endpoint.complete
    try:
        answer = await ask(asked(request))
    except EndpointError as error:
        if error.status is None or error.status in MISCONFIGURED:
            raise
        return Repeat(key=item.key, repeat=due.repeat, score=0.0, error=error.value)
    reply = reply_of(answer.body)
    score = grade(item.grader, reply, item.expected)
    return Repeat(key=item.key, repeat=due.repeat, reply=reply, score=score, usage=answer.usage)


def read_repeats(folder: Path) -> list[Repeats]:
    """All repeats of an evidence folder."""
    return [read_lines(path, RepeatsHeader, Repeat) for path in sorted(folder.glob(f"{PREFIX}*.jsonl"))]


def faults_of(found: Sequence[Repeats], items: Mapping[str, Item], digest: str) -> list[str]:
    """Repeats of another sample, of unknown items, made twice, or scored otherwise than their grader says."""
    faults: list[str] = []
    for header, lines in found:
        file = file_name(header.model, PREFIX)
        if header.exchanges_sha256 != digest:
            faults.append(f"{file}: made for another {EXCHANGES} (its SHA-256 differs)")
        counted = Counter((line.key, line.repeat) for line in lines)
        faults += [
            f"{file}: repeat {r} of {key} is there {n} times" for (key, r), n in counted.items() if n > 1
        ]
        for number, line in enumerate(lines, start=2):
            if line.key not in items:
                faults.append(f"{file} line {number}: no item {line.key!r} in {EXCHANGES}")
            elif _graded(items[line.key], line) != line.score:
                faults.append(f"{file} line {number}: score {line.score} there, not by its grader")
    return faults


def _graded(item: Item, line: Repeat | Call) -> float:
    return 0.0 if line.error else grade(item.grader, line.reply, item.expected)


class _Said(NamedTuple):
    reply: Reply
    score: float
    error: str


def flicker(repeats: Repeats, items: Mapping[str, Item], firsts: Mapping[str, Call] | None) -> Flicker | None:
    """What a model's repeats say; ``firsts`` are its first answers, None for the incumbent's recorded ones.

    None without a question that was answered twice.
    """
    answers: dict[str, list[_Said]] = defaultdict(list)
    for line in repeats.records:
        item = items[line.key]
        answers[line.key].append(_Said(line.reply, _graded(item, line), line.error))
    started = {key: first for key in answers if (first := _first(items[key], firsts)) is not None}
    every = [[first, *answers[key]] for key, first in started.items()]
    if not every:
        return None
    pairs = [pair for said in every for pair in itertools.combinations(said, 2)]
    return Flicker(
        model=repeats.header.model,
        items=len(every),
        answers=sum(len(said) for said in every),
        again=_mean([one.score for said in every for one in said[1:]]),
        first=_mean([said[0].score for said in every]),
        texts_differ=_mean([float(_shown(a) != _shown(b)) for a, b in pairs]),
        scores_differ=_mean([float(a.score != b.score) for a, b in pairs]),
        variance=_mean([_variance([one.score for one in said]) for said in every]),
    )


def _first(item: Item, firsts: Mapping[str, Call] | None) -> _Said | None:
    if firsts is None:
        return _Said(item.reply, grade(item.grader, item.reply, item.expected), "")
    call = firsts.get(item.key)
    return None if call is None else _Said(call.reply, _graded(item, call), call.error)


def _shown(said: _Said) -> tuple[str, tuple[object, ...], str]:
    return normalised(said.reply.text), said.reply.tool_calls, said.error


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _variance(values: Sequence[float]) -> float:
    mean = _mean(values)
    return math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)


def against(candidate: Flicker, incumbent: Flicker | None, proof: Proof) -> Flicker:
    """A candidate's flicker with what both arms' flicker does to the measured difference."""
    moves = None
    if incumbent is not None and proof.calls:
        moves = NORMAL_95 * math.sqrt((candidate.variance + incumbent.variance) / proof.calls)
    difference = proof.candidate_mean - proof.incumbent_mean
    return msgspec.structs.replace(candidate, moves=moves, difference=difference)
