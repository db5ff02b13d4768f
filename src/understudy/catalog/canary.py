"""Canary prompts: the same questions asked again, to see whether a model behaves otherwise than it did.

A model that answers differently from one call to the next is told apart from one that changed: the first
round asks everything twice, and only more changes than that flicker explains count as drift. It ignores
whether the new answers are better (evaluate).
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from math import comb
from pathlib import Path
from typing import Any

import msgspec

from understudy.catalog.bindings import Binding
from understudy.catalog.events import Event
from understudy.endpoint import Endpoint
from understudy.errors import InputError
from understudy.protocol import prompt_hash

ALPHA = 0.01
"""Largest probability of calling drift what is flicker."""
MAX_TOKENS = 256
IN_FLIGHT = 4


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What one target answered to one canary prompt."""

    target: str
    prompt: str
    """SHA-256 of the prompt, see `protocol.prompt_hash`."""
    at: float
    answers: tuple[str, ...]
    """Two in the first round, one in later ones; white space made single."""
    fingerprint: str = ""
    """The vendor's ``system_fingerprint``, where it sends one."""
    answered_by: str = ""


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Chat requests, one JSON object with ``messages`` per line. Raises InputError naming the line."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", expected="a JSON Lines file") from error
    prompts = [_prompt(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise InputError(f"{path} holds no prompts", expected='a line like {"messages": [...]} for each')
    return prompts


async def ask(
    endpoint: Endpoint, prompts: Sequence[Mapping[str, Any]], now: float, times: int
) -> list[Reply]:
    """Each prompt ``times`` times at temperature 0. Raises EndpointError when an answer does not come."""
    gate = asyncio.Semaphore(IN_FLIGHT)

    async def one(prompt: Mapping[str, Any]) -> Reply:
        request = {"temperature": 0, "max_tokens": MAX_TOKENS, **prompt}
        async with gate:
            answers = [await endpoint.chat(request) for _ in range(times)]
        body = answers[-1].body
        return Reply(
            target=endpoint.name,
            prompt=prompt_hash(prompt),
            at=now,
            answers=tuple(" ".join(a.text.split()) for a in answers),
            fingerprint=str(body.get("system_fingerprint") or ""),
            answered_by=str(body.get("model") or ""),
        )

    return list(await asyncio.gather(*(one(p) for p in prompts)))


def drift_events(before: Iterable[Reply], after: Iterable[Reply], bindings: Iterable[Binding]) -> list[Event]:
    """What differs between the first round and a later one, target by target.

    Flicker is estimated from the first round's pairs by Laplace's rule, (changed + 1) / (pairs + 2), and the
    later round's changes are held against a binomial with that probability, one-sided at `ALPHA`.
    """
    then = {(r.target, r.prompt): r for r in before}
    pairs: dict[str, list[tuple[Reply, Reply]]] = {}
    for reply in after:
        if (reply.target, reply.prompt) in then:
            pairs.setdefault(reply.target, []).append((then[reply.target, reply.prompt], reply))
    bound = list(bindings)
    found: list[Event] = []
    for target, rounds in pairs.items():
        names = tuple(b for b in bound if b.target == target)
        found += [event for event in (_drift(target, names, rounds), _swap(target, names, rounds)) if event]
    return found


def load_replies(path: Path) -> list[Reply]:
    """A round kept by `save_replies`; empty when there is none. Raises InputError for a broken file."""
    if not path.exists():
        return []
    try:
        return [msgspec.json.decode(line, type=Reply) for line in path.read_bytes().splitlines()]
    except msgspec.MsgspecError as error:
        raise InputError(
            f"{path}: {error}", expected="the answers kept by an earlier watch", next_step=f"rm {path}"
        ) from error


def save_replies(path: Path, replies: Iterable[Reply]) -> None:
    """Keep a round as JSON Lines."""
    path.write_bytes(msgspec.json.Encoder().encode_lines(list(replies)))


def _prompt(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        prompt = msgspec.json.decode(line, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise InputError(f"{path}, line {number}: {error}", expected='{"messages": [...]}') from error
    if not prompt.get("messages"):
        raise InputError(f"{path}, line {number}: no messages", expected='{"messages": [...]}')
    return prompt


def _drift(target: str, names: tuple[Binding, ...], rounds: Sequence[tuple[Reply, Reply]]) -> Event | None:
    flickers = sum(len(set(then.answers)) > 1 for then, _ in rounds)
    changed = sum(not set(then.answers) & set(now.answers) for then, now in rounds)
    chance = binomial_tail(len(rounds), changed, (flickers + 1) / (len(rounds) + 2))
    if chance >= ALPHA:
        return None
    day = _day(rounds[0][1].at)
    return Event(
        kind="drift",
        severity="high",
        target=target,
        bindings=names,
        day=day,
        text=f"{target}: {changed} of {len(rounds)} canary prompts are answered otherwise than on "
        f"{_day(rounds[0][0].at)} (flicker explains so many with probability {chance:.2g})",
    )


def _swap(target: str, names: tuple[Binding, ...], rounds: Sequence[tuple[Reply, Reply]]) -> Event | None:
    then, now = ({(r.answered_by, r.fingerprint) for r in side} for side in zip(*rounds, strict=True))
    if then & now:
        return None
    before, after = (" ".join(filter(None, min(side))) for side in (then, now))
    return Event(
        kind="swap",
        severity="high",
        target=target,
        bindings=names,
        day=_day(rounds[0][1].at),
        text=f"{target}: canary prompts are answered by {after}, before by {before}",
        before=before,
        after=after,
    )


def binomial_tail(n: int, k: int, p: float) -> float:
    """Probability of at least ``k`` successes in ``n`` tries."""
    return sum(comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


def _day(at: float) -> str:
    return str(dt.datetime.fromtimestamp(at, dt.UTC).date())
