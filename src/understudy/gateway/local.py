"""What the gateway answers itself: models, feedback, health, metrics.

It ignores model calls (relay) and connections (inbound).
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import msgspec

from understudy.gateway.plane import Plane
from understudy.gateway.refusal import Refusal, bad_request
from understudy.gateway.request import Request
from understudy.gateway.routing import AliasRoute
from understudy.traffic.record import Feedback, new_key

HEALTH = b"/health"

_JSON = b"application/json"


class Reply(NamedTuple):
    """An answer of our own."""

    status: int
    body: bytes
    kind: bytes = _JSON
    """Content-Type."""
    recorded: bool = False
    """Stands for a record; in strict mode it waits for the disk."""


class _Said(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /feedback."""

    call: str
    expected: str | None = None
    metric: str | None = None
    value: float | bool | None = None
    comment: str = ""


_decode_said = msgspec.json.Decoder(_Said).decode


def answer(plane: Plane, request: Request) -> Reply:
    """The answer to anything but a model call. Raises Refusal for unknown paths and bad feedback."""
    path = request.path.rstrip(b"/")
    if path in (b"/feedback", b"/v1/feedback"):
        _only(request, b"POST")
        return _feedback(plane, request.body)
    if path == HEALTH:
        _only(request, b"GET")
        return _health(plane)
    if path == b"/metrics":
        _only(request, b"GET")
        return Reply(200, plane.metrics_text(), b"text/plain; version=0.0.4; charset=utf-8")
    if path in (b"/v1/models", b"/models"):
        _only(request, b"GET")
        return Reply(200, msgspec.json.encode({"object": "list", "data": _models(plane)}))
    if path.startswith(b"/v1/models/"):
        _only(request, b"GET")
        return _one_model(plane, path.removeprefix(b"/v1/models/").decode("latin-1"))
    raise _no_such_path(request)


def not_recordable() -> Refusal:
    """503: the disk is full and the config says to refuse what cannot be recorded."""
    return Refusal(503, "record_log_full", "the record log's disk is full and [store] on_full is refuse")


def _only(request: Request, method: bytes) -> None:
    if request.method != method:
        wanted, path = method.decode(), request.path.decode("latin-1")
        message = f"{path} takes {wanted}, not {request.method.decode('latin-1')}"
        raise Refusal(405, "method_not_allowed", message, headers=((b"allow", method),))


def _no_such_path(request: Request) -> Refusal:
    asked = f"{request.method.decode('latin-1')} {request.path[:200].decode('latin-1')}"
    return Refusal(
        404,
        "unknown_path",
        f"{asked}: no such route; the base URL ends in /v1, and the routes are POST /v1/chat/completions, "
        "/v1/completions, /v1/embeddings, /feedback and GET /v1/models, /health, /metrics",
    )


def _health(plane: Plane) -> Reply:
    state = "draining" if plane.draining else "refusing" if plane.recorder.refusing else "ok"
    full = plane.recorder.writer.full
    body = {"status": state, "in_flight": len(plane.exchanges), "record_log_full": full}
    return Reply(200 if state == "ok" else 503, msgspec.json.encode(body))


def _models(plane: Plane) -> list[dict[str, object]]:
    return [
        {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": route.targets[0].upstream.name,
            "target": route.targets[0].name,
            "fallback": [target.name for target in route.targets[1:]],
            "version": route.version,
            **_shares(route),
        }
        for name, route in plane.table.aliases.items()
    ]


def _shares(route: AliasRoute) -> dict[str, object]:
    begins = [0.0, *(choice.upto for choice in route.choices)]
    shares = {c.targets[0].name: c.upto - begin for c, begin in zip(route.choices, begins, strict=False)}
    return {"weights": shares} if shares else {}


def _one_model(plane: Plane, name: str) -> Reply:
    for model in _models(plane):
        if model["id"] == name:
            return Reply(200, msgspec.json.encode(model))
    plane.table.targets(name)
    return Reply(200, msgspec.json.encode({"id": name, "object": "model", "created": 0, "owned_by": name}))


def _feedback(plane: Plane, body: bytes) -> Reply:
    """Keep what somebody says of a call; that the call exists is not checked, it may be on its way."""
    if plane.recorder.refusing:
        raise not_recordable()
    said = _read_said(body)
    key = new_key()
    feedback = Feedback(
        key=key,
        call=said.call,
        at=time.time(),
        metric=said.metric or "expected",
        value=None if said.value is None else float(said.value),
        expected=said.expected or "",
        comment=said.comment,
    )
    kept = plane.recorder.keep_feedback(feedback)
    plane.metrics.requests["feedback", 202] += 1
    return Reply(202, msgspec.json.encode({"id": key, "object": "feedback", "recorded": kept}), recorded=True)


def _read_said(body: bytes) -> _Said:
    try:
        said = _decode_said(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise bad_request("invalid_feedback", f"the feedback cannot be read: {error}") from error
    if len(said.call) != 32 or not all(c in "0123456789abcdef" for c in said.call):
        message = "call: expected the 32 hex digits of the answer's x-understudy-call header"
        raise bad_request("invalid_feedback", message, param="call")
    if said.expected is None and (said.value is None or said.metric is None):
        raise bad_request("invalid_feedback", "expected either `expected`, or `metric` and `value`")
    if said.value is not None and not math.isfinite(said.value):
        raise bad_request("invalid_feedback", "value: expected a finite number", param="value")
    return said
