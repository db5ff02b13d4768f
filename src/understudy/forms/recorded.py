"""A recorded call of any route as a chat completion: what replay, training, planning and export read.

What has no counterpart in chat completions makes a call unreadable here (None) rather than half read: to
replay half a question would prove nothing. It ignores embeddings, and pages, which show every form as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from understudy.forms import anthropic, messages, responses
from understudy.forms.chat import Left
from understudy.forms.events import read_object
from understudy.forms.fault import Told, Unmappable
from understudy.protocol import Json, assemble_chunks, assemble_stream, iter_events

_ODD = (AttributeError, KeyError, TypeError, ValueError, RecursionError)
"""What reading a record in another form than its route's may raise."""


def request_as_chat(route: str, raw: bytes) -> Json | None:
    """The request as a chat (or text) completion request; None for what is none."""
    try:
        body = msgspec.json.decode(raw, type=dict[str, Any])
        if route == "messages":
            return messages.request(body, Left())
        if route == "responses":
            return responses.request(_without_memory(body), Left())
    except (Unmappable, msgspec.MsgspecError, *_ODD):
        return None
    return body


def _without_memory(body: Json) -> Json:
    """That a response was kept changes nothing of the question; a question that rests on one is no whole."""
    return {name: value for name, value in body.items() if name not in ("store", "include", "truncation")}


def answer_as_chat(route: str, raw: bytes, stream: bool) -> Json | None:
    """The answer as a chat (or text) completion, a stream put together; None for what is none.

    An error stays under ``error``.
    """
    streamed = stream and not raw.lstrip().startswith(b"{")  # an error answers a streaming request in JSON
    try:
        if route == "messages":
            return _of_message(_chunks(raw)) if streamed else _message(read_object(raw))
        if route == "responses":
            return _response(_last_response(raw) if streamed else read_object(raw))
        return assemble_stream(raw) if streamed else read_object(raw)
    except _ODD:
        return None


def _message(body: Json) -> Json:
    return {"error": body["error"]} if body.get("error") else anthropic.answer(body, 0)


def _response(body: Json) -> Json:
    return {"error": body["error"]} if body.get("error") else responses.completion_of(body)


def _chunks(raw: bytes) -> Iterator[Told]:
    reader = anthropic.Stream(0)
    for event in iter_events(raw):
        yield from reader.feed(event)


def _of_message(told: Iterator[Told]) -> Json:
    chunks: list[Json] = []
    for one in told:
        if one.error is not None:
            chunks.append({"error": {"message": one.error.message, "type": one.error.kind}})
        elif one.chunk is not None:
            chunks.append(one.chunk)
    return assemble_chunks(chunks)


def _last_response(raw: bytes) -> Json:
    """The response that the last event holds; of a stream that broke off, the items that were complete."""
    whole: Json = {}
    items: list[Json] = []
    for data in iter_events(raw):
        event = read_object(data)
        if event.get("type") == "error":
            return {"error": event}
        if event.get("type") == "response.output_item.done":
            items.append(event["item"])
        if isinstance(event.get("response"), dict):
            whole = event["response"]
    return whole if whole.get("output") or not items else {**whole, "output": items}
