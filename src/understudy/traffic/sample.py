"""What evaluation, training and planning read from recorded traffic.

An `Exchange` is a call that got an answer, with what was said of it; the split keeps equal prompts on one
side. It ignores how a candidate is asked (evaluate) and how a chat is tokenised (compress).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, cast

import msgspec

from understudy.forms.recorded import answer_as_chat, request_as_chat
from understudy.protocol import PLANNED_ON, CallShape, Json, Usage, answer_text
from understudy.traffic.record import Feedback
from understudy.traffic.store import Store, StoredCall

PAGE = 250
SAID = frozenset({"match", "exact", "normalised", "choice", "numeric", "contains", "f1", "similarity"})
"""Graders whose right answer is what the model should have said, not a rule to hold its answer against."""


class Exchange(NamedTuple):
    """A recorded call as evaluation and training need it: a chat completion, whatever form it was made in."""

    key: str
    at: float
    """Unix seconds."""
    alias: str
    target: str
    request: Json
    body: Json
    """The answer; for a stream the assembled completion."""
    answer: str
    """The first choice's text."""
    expected: str | None
    """The right answer, where feedback gave one; the last word counts."""
    grades: dict[str, float]
    """Metric to its last value."""
    task_id: str
    tags: dict[str, str]
    prompt_hash: str
    usage: Usage | None
    status: int
    total_s: float
    ttft_s: float


class Split(NamedTuple):
    """Exchanges to train on, and those no training may see."""

    train: list[Exchange]
    held_out: list[Exchange]


def exchanges(
    store: Store, alias: str | None, *, since: float | None = None, only_ok: bool = True
) -> list[Exchange]:
    """Recorded chat calls of an alias (None: of all) with their texts, in order of time.

    Left out, for nothing can be replayed or learnt from them, are calls recorded without texts, those whose
    request or answer is not JSON, and those that cannot be said in chat completions; under ``only_ok`` also
    those whose answer broke off, whatever their status.
    """
    found: list[Exchange] = []
    calls = store.calls(alias=alias, since=since, ok=True if only_ok else None, texts=True)
    for page in _pages(calls):
        said = _by_call(store.feedback([c.call.key for c in page]))
        whole = (c for c in page if not (only_ok and _cut(c)))
        read = (_exchange(c, said.get(c.call.key, [])) for c in whole)
        found += [exchange for exchange in read if exchange is not None]
    return found


def exchange(store: Store, key: str, *, until: float | None = None) -> Exchange | None:
    """One recorded chat call with its texts, and what was said of it by ``until`` (Unix seconds; None: ever);
    None where there is none or it was recorded without texts."""
    stored = store.call(key)
    if stored is None:
        return None
    said = store.feedback([key])
    return _exchange(stored, [f for f in said if until is None or f.at <= until])


def exchanges_of(store: Store, said: Mapping[str, Sequence[Feedback]]) -> dict[str, Exchange]:
    """Some recorded chat calls (keys) with their texts and what the caller knows was said of each; left out
    are those that are not there or were recorded without texts."""
    read = (_exchange(stored, said[stored.call.key]) for stored in store.some(list(said), texts=True))
    return {found.key: found for found in read if found is not None}


def split(sample: Iterable[Exchange], held_out: float) -> Split:
    """Divide by prompt: the same prompt always falls on the same side, whatever else is in the sample.

    ``held_out`` is the expected share of distinct prompts, in [0, 1]. The side is the prompt's SHA-256 as
    a fraction, so more traffic never moves a prompt across.
    """
    parts = Split([], [])
    for exchange in sample:
        parts.held_out.append(exchange) if _fraction(exchange) < held_out else parts.train.append(exchange)
    return parts


def chats(sample: Iterable[Exchange], *, right: bool = False) -> list[list[Json]]:
    """Messages with the recorded answer as the last one; calls that are no chat are left out.

    Earlier answers of the assistant get ``weight`` 0, as in OpenAI's fine-tuning format: they are examples of
    the application's, or were recorded by themselves. With ``right``, the right answer that feedback gave
    stands in place of the recorded one, where it is a text and not a rule to grade by.
    """
    return [
        [*(_unweighted(m) for m in exchange.request["messages"]), _corrected(exchange, message, right=right)]
        for exchange in sample
        if exchange.request.get("messages") and (message := _answered(exchange.body))
    ]


def _unweighted(message: Json) -> Json:
    return message | {"weight": 0} if message.get("role") == "assistant" else message


def _corrected(exchange: Exchange, message: Json, *, right: bool) -> Json:
    if not right or exchange.expected is None or exchange.tags.get("grader", "match") not in SAID:
        return message
    return message | {"content": _first(exchange.expected)}


def _first(expected: str) -> str:
    """The first of several right answers given as a JSON list of strings."""
    try:
        return msgspec.json.decode(expected, type=list[str])[0]
    except (msgspec.DecodeError, IndexError):
        return expected


class Shapes(NamedTuple):
    """Calls to plan on."""

    calls: list[CallShape]
    whole: bool
    """Whether these are all there are in the window that was asked for."""


def shapes(
    store: Store,
    alias: str | None = None,
    *,
    targets: Sequence[str] = (),
    since: float | None = None,
    latest: int = PLANNED_ON,
) -> Shapes:
    """The shape of the ``latest`` answered calls (0: all) of an alias, of ``targets``, or (None) of all,
    without opening a text.

    Of several targets from one moment on: each one's latest calls alone would be of different times.
    """
    most = latest or None
    parts = [store.shapes(alias=alias, target=t, since=since, latest=most) for t in targets or (None,)]
    cut = [part[0].at for part in parts if part and len(part) == most]
    first = max(cut, default=0.0)
    return Shapes([call for part in parts for call in part if call.at >= first], not cut)


def sample_hash(sample: Iterable[Exchange]) -> str:
    """SHA-256 (hex) over keys, prompts, answers and expected answers: names a sample in a certificate."""
    digest = hashlib.sha256()
    for e in sample:
        digest.update(msgspec.json.encode([e.key, e.prompt_hash, e.answer, e.expected]) + b"\n")
    return digest.hexdigest()


def _cut(stored: StoredCall) -> bool:
    """Whether the answer broke off: a stream's status was sent long before it did."""
    attempts = stored.call.attempts
    return bool(attempts) and bool(attempts[-1].error)


def _exchange(stored: StoredCall, said: Sequence[Feedback]) -> Exchange | None:
    call = stored.call
    request = request_as_chat(call.route, call.request)
    body = answer_as_chat(call.route, call.response, call.stream)
    if request is None or body is None:
        return None
    expected = [f.expected for f in said if f.expected]
    return Exchange(
        key=call.key,
        at=call.at,
        alias=call.alias,
        target=call.target,
        request=request,
        body=body,
        answer=answer_text(body),
        expected=expected[-1] if expected else None,
        grades={f.metric: f.value for f in said if f.value is not None},
        task_id=call.task_id,
        tags=call.tags,
        prompt_hash=stored.shape.prompt_hash,
        usage=call.usage,
        status=call.status,
        total_s=call.total_s,
        ttft_s=call.ttft_s,
    )


def _answered(body: Json) -> Json | None:
    choices = cast(list[Json], body.get("choices") or [])
    return cast(Json, choices[0]["message"]) if choices and "message" in choices[0] else None


def _fraction(exchange: Exchange) -> float:
    return int(exchange.prompt_hash[:13] or "0", 16) / 16**13


def _by_call(said: Iterable[Feedback]) -> dict[str, list[Feedback]]:
    by_call: dict[str, list[Feedback]] = {}
    for feedback in said:
        by_call.setdefault(feedback.call, []).append(feedback)
    return by_call


def _pages(calls: Iterator[StoredCall]) -> Iterator[list[StoredCall]]:
    page: list[StoredCall] = []
    for call in calls:
        page.append(call)
        if len(page) == PAGE:
            yield page
            page = []
    if page:
        yield page
