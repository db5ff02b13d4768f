"""What the gateway answers itself: models, feedback, health, metrics.

It ignores model calls (relay) and connections (inbound).
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple
from urllib.parse import unquote

import msgspec

from understudy.gateway.plane import Plane
from understudy.gateway.refusal import Refusal, bad_request
from understudy.gateway.request import Request
from understudy.gateway.routing import AliasRoute
from understudy.traffic.record import Feedback, new_key

HEALTH = b"/health"

_JSON = b"application/json"
_ANTHROPIC = b"anthropic-version"
"""Sent by applications that read lists of models in Anthropic's form."""


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
        listed = _listed if request.header(_ANTHROPIC) else _list
        return Reply(200, msgspec.json.encode(listed(_models(plane))))
    if path.startswith(b"/v1/models/"):
        _only(request, b"GET")
        model = _one_model(plane, unquote(path.removeprefix(b"/v1/models/").decode("latin-1")))
        return Reply(200, msgspec.json.encode(_described(model) if request.header(_ANTHROPIC) else model))
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
        f"{asked}: no such route; the base URL ends in /v1 (Anthropic's clients: before it), and the routes "
        "are POST /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/responses, /v1/messages, "
        "/v1/messages/count_tokens, /feedback and GET /v1/models, /health, /metrics",
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


def _one_model(plane: Plane, name: str) -> dict[str, object]:
    for model in _models(plane):
        if model["id"] == name:
            return model
    plane.table.targets(name)
    return {"id": name, "object": "model", "created": 0, "owned_by": name}


def _list(models: list[dict[str, object]]) -> dict[str, object]:
    return {"object": "list", "data": models}


def _listed(models: list[dict[str, object]]) -> dict[str, object]:
    """The same in Anthropic's form, in one page."""
    ends = {"first_id": models[0]["id"], "last_id": models[-1]["id"]} if models else {}
    page = {"first_id": None, "last_id": None, **ends, "has_more": False}
    return {"data": [_described(model) for model in models], **page}


def _described(model: dict[str, object]) -> dict[str, object]:
    """A model in Anthropic's form; when what is behind an alias came out is not said."""
    more = {name: value for name, value in model.items() if name not in ("object", "created", "owned_by")}
    named = {"type": "model", "display_name": model["id"], "created_at": "1970-01-01T00:00:00Z"}
    return {**named, "lifecycle": "active", **more}


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
