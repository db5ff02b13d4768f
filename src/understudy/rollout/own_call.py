"""A call that a trial makes by itself, recorded in the form of those that the gateway relays.

It ignores what is asked and of whom (shadow, judging).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple

import msgspec

from understudy.endpoint import Endpoint
from understudy.errors import EndpointError
from understudy.evaluate.evidence import finish_reason
from understudy.traffic.record import Attempt, Call, new_key
from understudy.traffic.redact import Redactor
from understudy.traffic.store import Price


class Means(NamedTuple):
    """What asking a model takes."""

    connect: Callable[[], AbstractAsyncContextManager[Endpoint]]
    price: Price
    redactor: Redactor | None
    """Applied to what is recorded, as the gateway does to its own."""


async def ask(
    client: Endpoint, request: dict[str, Any], alias: str, target: str, tags: dict[str, str]
) -> Call:
    """Put a chat request to ``target`` (ENDPOINT/MODEL); returns its record under ``alias``, of a failure
    too."""
    begun = time.time()
    record = Call(
        key=new_key(),
        at=begun,
        route="chat.completions",
        alias=alias,
        target=target,
        status=502,
        request=msgspec.json.encode(request),
        tags=tags,
    )
    try:
        answer = await client.chat(request)
    except EndpointError as error:
        return _unanswered(record, error)
    return msgspec.structs.replace(
        record,
        status=answer.status,
        response=msgspec.json.encode(answer.body),
        attempts=[
            Attempt(target=target, status=answer.status, billed="yes", started=begun, ended=time.time())
        ],
        answered_by=str(answer.body.get("model", "")),
        fingerprint=str(answer.body.get("system_fingerprint") or ""),
        usage=answer.usage,
        ttft_s=answer.ttft_s,
        total_s=answer.total_s,
        finish_reason=finish_reason(answer.body),
    )


def _unanswered(record: Call, error: EndpointError) -> Call:
    attempt = Attempt(
        target=record.target,
        status=error.status or 0,
        billed="unknown",
        started=record.at,
        ended=time.time(),
        error=str(error),
    )
    return msgspec.structs.replace(record, status=error.status or 502, attempts=[attempt])
