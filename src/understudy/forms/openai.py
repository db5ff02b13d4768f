"""Asking an OpenAI-compatible vendor for an application that speaks another form.

What the hub has beyond chat completions is taken out here, and named; nothing else changes. An application
that speaks chat completions itself is passed on byte for byte and never comes here. It ignores transport and
rules (gateway).

Source: OpenAI API reference, chat completions (create, streaming, error object).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast
from urllib.parse import urlsplit

from understudy.forms import chat
from understudy.forms.chat import Left
from understudy.forms.events import read_object
from understudy.forms.fault import Told, Unmappable, Unreadable, VendorError
from understudy.protocol import Json

_OWN_HOSTS = ("api.openai.com", ".openai.azure.com", ".services.ai.azure.com")


def is_openai(base_url: str) -> bool:
    """Whether OpenAI itself (or Azure) is there: it has newer routes and names than those who follow it."""
    host = urlsplit(base_url).hostname or ""
    return any(host == own or (own[0] == "." and host.endswith(own)) for own in _OWN_HOSTS)


def request(asked: Json, left: Left, *, own: bool) -> Json:
    """The chat completion request as it is sent; ``own``: to OpenAI itself. Raises Unmappable."""
    body = {name: value for name, value in asked.items() if name != "thinking"}
    thinking = cast(Json, asked.get("thinking") or {})
    if thinking.get("type") not in (None, "adaptive"):  # adaptive: the model decides, as it does here
        raise Unmappable(
            "thinking", f"thinking of type {thinking['type']!r} has no counterpart at this vendor"
        )
    body["messages"] = [_message(message, where, left) for where, message in chat.messages_of(asked)]
    if asked.get("tools"):
        body["tools"] = [_unmarked(tool, left) for tool in cast(list[Json], asked["tools"])]
    limit = chat.max_tokens_of(asked)
    if limit is not None:
        body.pop("max_tokens", None)
        body.pop("max_completion_tokens", None)
        body["max_completion_tokens" if own else "max_tokens"] = limit
    if asked.get("stream"):
        body["stream_options"] = {"include_usage": True}
    return body


def _message(message: Json, where: str, left: Left) -> Json:
    said = dict(message)
    for name in ("reasoning_content", "thinking_blocks", "is_error"):
        if said.pop(name, None):
            left.out(f"messages.{name}")
    parts = chat.parts_of(message.get("content"), f"{where}.content")
    if message.get("role") == "tool":
        for path, part in parts:
            chat.text_part(part, path)
    if isinstance(message.get("content"), list):
        said["content"] = [_unmarked(part, left) for _, part in parts]
    if message.get("tool_calls"):
        said["tool_calls"] = [_plain_call(call) for call in cast(list[Json], message["tool_calls"])]
    return said


def _unmarked(part: Json, left: Left) -> Json:
    """Without the mark of another vendor's cache: here what repeats is cached by itself."""
    if part.get("cache_control"):
        left.out("cache_control")
    return {name: value for name, value in part.items() if name != "cache_control"}


def _plain_call(call: Json) -> Json:
    return {name: value for name, value in call.items() if name != "extra_content"}


def answer(body: Json, created: int) -> Json:
    """A chat completion is the hub's form already. Raises Unreadable for what is none."""
    chat.first_message(body)
    return body


def error(status: int, raw: bytes) -> VendorError:
    """What an error's body says."""
    try:
        body = read_object(raw)
    except Unreadable:
        return VendorError(status, raw[:500].decode(errors="replace"))
    return _vendor_error(status, body.get("error", body))


def _vendor_error(status: int, told: object) -> VendorError:
    if not isinstance(told, dict):
        return VendorError(status, str(told))
    said = cast(Json, told)
    code = said.get("code")
    return VendorError(
        status,
        str(said.get("message") or ""),
        str(said.get("type") or ""),
        str(said["param"]) if said.get("param") else None,
        str(code) if code else None,
    )


class Stream:
    """Chunks are the hub's form already; the stream is done at ``[DONE]`` or when a choice has a reason."""

    def __init__(self, created: int) -> None:
        self.done = self.complete = False

    def feed(self, data: bytes) -> Iterator[Told]:
        """One event's chunk. Raises Unreadable."""
        if data.strip() == b"[DONE]":
            self.done = self.complete = True
            return
        body = read_object(data)
        if body.get("error"):
            told = body["error"]
            code = cast(Json, told).get("code") if isinstance(told, dict) else None
            yield Told(error=_vendor_error(code if isinstance(code, int) else 500, told))
            return
        for choice in cast(list[Json], body.get("choices") or []):
            self.done = self.done or choice.get("finish_reason") is not None
        yield Told(body)

    def close(self) -> Iterator[Told]:
        """Nothing: what is to be said has been."""
        return iter(())


def path(model: str, stream: bool) -> str:
    """Behind the endpoint's base URL."""
    return "/chat/completions"


def credential(secret: str) -> tuple[str, str]:
    """The header that tells the vendor who asks."""
    return "authorization", f"Bearer {secret}"
