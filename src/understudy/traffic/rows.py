"""A recorded call as a row of ``calls`` and of ``kinds``, and back.

It ignores texts (shelf) and queries (store). Whatever a caller or a vendor sent must fit a row: numbers are
bounded and text is made valid, for one record that cannot be stored would stop all that follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import msgspec

from understudy.forms.recorded import request_as_chat
from understudy.protocol import (
    CallShape,
    Cost,
    Json,
    Modality,
    Usage,
    features_of,
    modalities_of,
    parameters_of,
    prompt_hash,
)
from understudy.traffic.record import Attempt, Call, Feedback, Route
from understudy.traffic.shelf import Bodies, Place

_HASH_BYTES = 16
LARGEST = 2**53
"""Counts beyond this are cut: no model has read as many tokens, and a signed 64-bit column still holds it."""

USAGE_COLUMNS = (
    "prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens, audio_tokens, output_audio_tokens, "
    "cache_write_tokens, cached_audio_tokens, cache_write_1h_tokens"
)
_OWN_COLUMNS = (
    f"key, at, alias, status, ttft_s, total_s, task_id, tags, cost_usd, {USAGE_COLUMNS}, prompt_hash, "
    "max_tokens, frame, messages, response"
)
KIND_COLUMNS = (
    "target, answered_by, route, stream, usage_estimated, finish_reason, caller, price_date, price_source, "
    "modalities, features, parameters, plain"
)
"""What thousands of calls have in common: rows of ``kinds``."""
ROW_COLUMNS = f"{_OWN_COLUMNS}, kind"
"""Of the table ``calls``."""
CALL_COLUMNS = f"{_OWN_COLUMNS}, {KIND_COLUMNS}"
"""Of `CALLS`."""
CALLS = "calls LEFT JOIN kinds ON kinds.id = calls.kind"
"""LEFT: every call has its kind, but so no planner begins with the kinds."""
OWN = _OWN_COLUMNS.count(",") + 1
"""Columns of a call's own; those of its kind stand behind them."""
_PLACE = {name: place for place, name in enumerate(CALL_COLUMNS.split(", "))}
_USAGE = slice(_PLACE["prompt_tokens"], _PLACE["prompt_tokens"] + USAGE_COLUMNS.count(",") + 1)
ATTEMPT_COLUMNS = "call, number, target, status, billed, started, ended, error, form"
FEEDBACK_COLUMNS = "key, call, at, metric, value, expected, comment"


_UNREADABLE = (
    msgspec.MsgspecError,
    UnicodeDecodeError,
    RecursionError,  # thousands of brackets
    TypeError,
    ValueError,
    AttributeError,
    KeyError,
)
"""What a request in another form than the protocol's may raise while it is read."""


class Shape(NamedTuple):
    """What a request asks for; the text is not here."""

    prompt_hash: str = ""
    """The first half of a SHA-256 (hex), see `protocol.prompt_hash`, for 128 bits tell any two prompts apart;
    all of it where an older version kept it, empty when the request was not recorded."""
    modalities: frozenset[Modality] = frozenset({"text"})
    features: frozenset[str] = frozenset()
    max_tokens: int = 0
    parameters: frozenset[str] | None = None
    """None when the request was not recorded, or by a version that did not keep them."""


class StoredCall(NamedTuple):
    """A call as the store knows it. ``call.request`` and ``call.response`` are empty unless texts were
    asked for."""

    call: Call
    cost: Cost | None
    """None when no price is known."""
    shape: Shape


def shape_of(call: Call) -> Shape:
    """Read the shape of a recorded request, whatever its route. What is not in its form, or cannot be said in
    the protocol's, has only what is known."""
    bare = Shape(features=frozenset({"stream"}) if call.stream else frozenset())
    request = request_as_chat(call.route, call.request) if call.request else None
    if request is None:
        return bare
    try:
        return Shape(
            prompt_hash(request),
            modalities_of(request),
            features_of(request),
            _limit(request),
            parameters_of(request),
        )
    except _UNREADABLE:
        return bare


def call_row(call: Call, cost: Cost | None, shape: Shape, place: Place) -> tuple[Any, ...]:
    """Values in the order of `CALL_COLUMNS`."""
    usage = call.usage
    counts = _UNTOLD if usage is None else _counts(usage)
    return (
        call.key,
        call.at,
        text(call.alias),
        call.status,
        call.ttft_s,
        call.total_s,
        text(call.task_id),
        text(msgspec.json.encode(call.tags).decode()) if call.tags else "",
        cost.usd if cost else None,
        *counts,
        bytes.fromhex(shape.prompt_hash)[:_HASH_BYTES] or None,
        _bounded(shape.max_tokens),
        *place,
        text(call.target),
        text(call.answered_by),
        call.route,
        int(call.stream),
        int(call.usage_estimated),
        text(call.finish_reason),
        text(call.caller),
        *((cost.price_date, cost.source) if cost else ("", "")),
        _column(shape.modalities),
        _column(shape.features),
        None if shape.parameters is None else _column(shape.parameters),
        int(_is_plain(call)),
    )


@lru_cache(maxsize=1024)
def _column(words: frozenset[str]) -> str:
    return ",".join(sorted(words))


def _is_plain(call: Call) -> bool:
    """Whether the one attempt can be told from the call, its times to the millisecond: most can."""
    if len(call.attempts) != 1:
        return False
    told, plain = call.attempts[0], _plain_attempt(call)
    near = abs(told.started - plain.started) < 1e-3 and abs(told.ended - plain.ended) < 1e-3
    return near and msgspec.structs.replace(told, started=plain.started, ended=plain.ended) == plain


def _plain_attempt(call: Call) -> Attempt:
    return Attempt(
        target=call.target,
        status=call.status,
        billed="yes" if call.status < 400 else "no",
        started=call.at,
        ended=call.at + call.total_s,
    )


def attempt_rows(call: Call) -> list[tuple[Any, ...]]:
    """Values in the order of `ATTEMPT_COLUMNS`; none for an attempt that the call's row tells."""
    if _is_plain(call):
        return []
    return [
        (call.key, n, text(a.target), a.status, a.billed, a.started, a.ended, text(a.error), text(a.form))
        for n, a in enumerate(call.attempts)
    ]


def feedback_row(feedback: Feedback) -> tuple[Any, ...]:
    """Values in the order of `FEEDBACK_COLUMNS`."""
    f = feedback
    return (f.key, text(f.call), f.at, text(f.metric), f.value, text(f.expected), text(f.comment))


def stored_call(row: Sequence[Any], attempts: list[Attempt], bodies: Bodies) -> StoredCall:
    """The inverse of `call_row`."""
    said = dict(zip(_PLACE, row, strict=True))
    call = Call(
        key=said["key"],
        at=said["at"],
        alias=said["alias"],
        target=said["target"],
        answered_by=said["answered_by"],
        route=cast(Route, said["route"]),
        status=said["status"],
        stream=bool(said["stream"]),
        usage_estimated=bool(said["usage_estimated"]),
        ttft_s=said["ttft_s"],
        total_s=said["total_s"],
        finish_reason=said["finish_reason"],
        task_id=said["task_id"],
        tags=msgspec.json.decode(said["tags"], type=dict[str, str]) if said["tags"] else {},
        caller=said["caller"],
        usage=usage_of_row(row[_USAGE]),
        attempts=attempts,
        request=bodies.request,
        response=bodies.response,
    )
    if said["plain"]:
        call = msgspec.structs.replace(call, attempts=[_plain_attempt(call)])
    cost = said["cost_usd"]
    priced = None if cost is None else Cost(cost, said["price_date"], said["price_source"])
    return StoredCall(call, priced, _shape(said))


def call_shape(row: Sequence[Any], completed: bool | None) -> CallShape:
    """What planning needs; ``row`` is key, at, modalities, features, max_tokens, task, parameters, then
    `USAGE_COLUMNS`."""
    return CallShape(
        at=row[1],
        usage=usage_of_row(row[7:]) or Usage(),
        modalities=cast(frozenset[Modality], words(row[2])),
        features=words(row[3]),
        max_tokens=row[4],
        task=row[5],
        completed=completed,
        parameters=None if row[6] is None else words(row[6]),
    )


def usage_of_row(counts: Sequence[int | None]) -> Usage | None:
    """Usage from `USAGE_COLUMNS`; None where the vendor said nothing."""
    if counts[0] is None:
        return None
    return Usage(
        prompt_tokens=counts[0],
        completion_tokens=counts[1] or 0,
        cached_tokens=counts[2] or 0,
        reasoning_tokens=counts[3] or 0,
        audio_tokens=counts[4] or 0,
        output_audio_tokens=counts[5] or 0,
        cache_write_tokens=counts[6] or 0,
        cached_audio_tokens=counts[7] or 0,
        cache_write_1h_tokens=counts[8] or 0,
    )


def place_of_row(row: Sequence[Any]) -> Place:
    """Where the bodies of a row of `CALL_COLUMNS` lie."""
    return Place(*row[_PLACE["frame"] : _PLACE["response"] + 1])


@lru_cache(maxsize=1024)
def words(column: str) -> frozenset[str]:
    """A set kept as comma-separated text."""
    return frozenset(column.split(",")) if column else frozenset()


def _shape(said: Json) -> Shape:
    hashed = "" if said["prompt_hash"] is None else bytes(said["prompt_hash"]).hex()
    sent = None if said["parameters"] is None else words(said["parameters"])
    modalities = cast(frozenset[Modality], words(said["modalities"]))
    return Shape(hashed, modalities, words(said["features"]), said["max_tokens"], sent)


def _limit(request: Json) -> int:
    for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"):
        if request.get(name):
            return int(request[name])
    return 0


_UNTOLD = (None,) * 5 + (0,) * 4


def _counts(usage: Usage) -> tuple[int, ...]:
    counts = (
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.cached_tokens,
        usage.reasoning_tokens,
        usage.audio_tokens,
        usage.output_audio_tokens,
        usage.cache_write_tokens,
        usage.cached_audio_tokens,
        usage.cache_write_1h_tokens,
    )
    usual = min(counts) >= 0 and max(counts) <= LARGEST
    return counts if usual else tuple(_bounded(count) for count in counts)


def _bounded(count: int) -> int:
    return min(max(int(count), 0), LARGEST)


def text(value: str) -> str:
    """Valid UTF-8 without NUL, which PostgreSQL refuses in text."""
    if value.isascii() and "\0" not in value:
        return value
    return value.encode("utf-8", "replace").decode().replace("\0", "\ufffd")
