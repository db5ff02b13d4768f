"""Asking Anthropic in its own form for an application that speaks chat completions.

Strict: a parameter without a counterpart there is refused by name, unless its value says the same as leaving
it out. ``thinking`` (a parameter), ``thinking_blocks`` (of an assistant's message) and ``cache_control`` (of
parts and tools) are the vendor's own and pass as they are, so that what it thought can be given back to it.
It ignores transport and rules (gateway).

Source: platform.claude.com, Messages API (version 2023-06-01), its errors and streaming events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import msgspec

from understudy.forms import chat
from understudy.forms.chat import Counts, Left
from understudy.forms.events import read_object
from understudy.forms.fault import ANTHROPIC_KINDS, Told, Unmappable, Unreadable, VendorError
from understudy.protocol import Json

HEADERS = (("anthropic-version", "2023-06-01"),)
"""What every request says."""

_READ = frozenset(
    {
        "max_completion_tokens",
        "max_tokens",
        "messages",
        "model",
        "parallel_tool_calls",
        "reasoning_effort",
        "response_format",
        "safety_identifier",
        "service_tier",
        "stop",
        "stream",
        "stream_options",
        "temperature",
        "thinking",
        "tool_choice",
        "tools",
        "top_k",
        "top_p",
        "user",
    }
)
_EFFORTS = ("low", "medium", "high", "xhigh", "max")
_FINISH = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
"""Another reason, such as ``pause_turn``, is passed on in the vendor's word."""
_STATUSES = {kind: status for status, kind in ANTHROPIC_KINDS.items() if status not in (408, 422, 529)}
_OVERLOADED = 529
"""The vendor's own status, which means 503 elsewhere."""


def request(asked: Json, left: Left) -> Json:
    """The messages request for a chat completion request. Raises Unmappable."""
    chat.check_parameters(asked, _READ, left)
    system, messages = _conversation(asked)
    body: Json = {"model": asked["model"], "max_tokens": _max_tokens(asked), "messages": messages}
    if system:
        body["system"] = system
    for name in ("temperature", "top_p", "top_k", "stream", "thinking"):
        if asked.get(name) is not None:
            body[name] = asked[name]
    if _number(asked, "temperature") > 1:
        raise Unmappable("temperature", "temperature above 1 has no counterpart at this model's vendor")
    if stops := chat.stops_of(asked):
        body["stop_sequences"] = stops
    user = asked.get("safety_identifier") or asked.get("user")
    if user is not None:
        body["metadata"] = {"user_id": user}
    return body | _service_tier(asked) | _output(asked) | _tools(asked)


def _number(asked: Json, name: str) -> float:
    value = asked.get(name)
    if value is not None and not isinstance(value, int | float):
        raise Unmappable(name, f"{name}: expected a number, got {value!r}")
    return value or 0


def _max_tokens(asked: Json) -> int:
    found = chat.max_tokens_of(asked)
    if found is None:
        raise Unmappable("max_tokens", "max_tokens: this model's vendor needs a limit")
    return found


def _service_tier(asked: Json) -> Json:
    tiers = {None: {}, "auto": {"service_tier": "auto"}, "default": {"service_tier": "standard_only"}}
    if (tier := asked.get("service_tier")) not in tiers:
        raise Unmappable("service_tier")
    return tiers[tier]


def _output(asked: Json) -> Json:
    """Effort and schema of the answer; thinking is switched off by an effort of none."""
    output: Json = {}
    more: Json = {}
    effort = asked.get("reasoning_effort")
    if effort == "none" and asked.get("thinking") is None:
        more["thinking"] = {"type": "disabled"}
    elif effort in _EFFORTS:
        output["effort"] = effort
    elif effort is not None:
        raise Unmappable("reasoning_effort", f"reasoning_effort {effort!r} has no counterpart at this vendor")
    if (schema := chat.schema_of(asked)) is not None:
        output["format"] = {"type": "json_schema", "schema": schema}
    elif not chat.is_neutral(chat.NEUTRAL, "response_format", asked.get("response_format")):
        raise Unmappable("response_format")
    return more | ({"output_config": output} if output else {})


def _conversation(asked: Json) -> tuple[list[Json], list[Json]]:
    """System blocks, and the messages; neighbours of one role become one message, as the vendor wants it."""
    system: list[Json] = []
    messages: list[Json] = []
    for where, message in chat.messages_of(asked):
        role = message.get("role")
        if role in ("system", "developer"):
            if messages:
                raise Unmappable(where, f"{where}: a {role} message can only come first at this vendor")
            chat.check_message(message, where, ())
            system += _blocks(message.get("content"), where)
        elif role == "user":
            chat.check_message(message, where, ())
            _append(messages, "user", _blocks(message.get("content"), where))
        elif role == "tool":
            _append(messages, "user", [_tool_result(message, where)])
        elif role == "assistant":
            _append(messages, "assistant", _assistant(message, where))
        else:
            raise Unmappable(f"{where}.role", f"{where}.role: {role!r} has no counterpart")
    return system, messages


def _append(messages: list[Json], role: str, blocks: list[Json]) -> None:
    if messages and messages[-1]["role"] == role:
        messages[-1]["content"] += blocks
    else:
        messages.append({"role": role, "content": blocks})


def _assistant(message: Json, where: str) -> list[Json]:
    """Thinking first: with tools in use the vendor wants it back as it gave it."""
    chat.check_message(message, where, ("tool_calls", "reasoning_content", "thinking_blocks", "refusal"))
    blocks = list(cast(list[Json], message.get("thinking_blocks") or []))
    blocks += _blocks(message.get("content"), where)
    if message.get("refusal"):
        blocks.append({"type": "text", "text": message["refusal"]})
    for path, call in chat.calls_of(message, where):
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": call.given(path)})
    return blocks


def _tool_result(message: Json, where: str) -> Json:
    chat.check_message(message, where, ("tool_call_id", "is_error"))
    content = _blocks(message.get("content"), where)
    result = {"type": "tool_result", "tool_use_id": message.get("tool_call_id"), "content": content}
    return result | ({"is_error": True} if message.get("is_error") else {})


def _blocks(content: object, where: str) -> list[Json]:
    at = where if isinstance(content, str) else f"{where}.content"
    return [_block(part, path) for path, part in chat.parts_of(content, at) if not _is_empty(part)]


def _is_empty(part: Json) -> bool:
    """The vendor refuses blocks of no text, which say nothing anyway."""
    return part.get("type") == "text" and part.get("text") == ""


def _block(part: Json, where: str) -> Json:
    marked = {"cache_control": part["cache_control"]} if part.get("cache_control") else {}
    kind = part.get("type")
    if kind == "image_url":
        chat.only(part, where, "type", "image_url", "cache_control")
        return {"type": "image", "source": _source(chat.image_url(part, where)), **marked}
    if kind == "file":
        return {**_document(part, where), **marked}
    chat.only(part, where, "type", "text", "refusal", "cache_control")
    return {"type": "text", "text": chat.text_part(part, where), **marked}


def _source(url: str) -> Json:
    data = chat.data_url(url)
    if data is None:
        return {"type": "url", "url": url}
    return {"type": "base64", "media_type": data.media_type, "data": data.base64}


def _document(part: Json, where: str) -> Json:
    file = cast(Json, part.get("file") or {})
    chat.only(file, f"{where}.file", "file_data", "filename")
    data = chat.data_url(str(file.get("file_data")))
    if data is None or data.media_type != "application/pdf":
        raise Unmappable(f"{where}.file", f"{where}.file: this model's vendor takes PDF as a data URL")
    titled = {"title": file["filename"]} if file.get("filename") else {}
    return {"type": "document", "source": _source(str(file["file_data"])), **titled}


def _tools(asked: Json) -> Json:
    body: Json = {}
    tools = [_tool(function) for _, function in chat.functions_of(asked)]
    for tool, given in zip(tools, cast(list[Json], asked.get("tools") or []), strict=True):
        if given.get("cache_control"):
            tool["cache_control"] = given["cache_control"]
    if tools:
        body["tools"] = tools
    if asked.get("tool_choice") is not None:
        body["tool_choice"] = _tool_choice(asked["tool_choice"])
    if asked.get("parallel_tool_calls") is False and tools:
        body.setdefault("tool_choice", {"type": "auto"})["disable_parallel_tool_use"] = True
    return body


def _tool(function: chat.Function) -> Json:
    tool: Json = {"name": function.name, "input_schema": function.parameters}
    if function.description:
        tool["description"] = function.description
    return tool | ({"strict": True} if function.strict else {})


def _tool_choice(choice: object) -> Json:
    name = chat.chosen_function(choice)
    if name is not None:
        return {"type": "tool", "name": name}
    words = {"auto": "auto", "none": "none", "required": "any"}
    if choice not in words:
        raise Unmappable("tool_choice")
    return {"type": words[str(choice)]}


# answers


def answer(message: Json, created: int) -> Json:
    """The chat completion for a finished message. Raises Unreadable for a block of a kind unknown here."""
    said: Json = {"role": "assistant", "content": None}
    for block in cast(list[Json], message["content"]):
        _add_block(said, block)
    head = {"id": message["id"], "created": created, "model": message["model"]}
    choice = {"index": 0, "message": said, "finish_reason": finish(message.get("stop_reason"))}
    usage = cast(Json, message.get("usage") or {})
    return chat.completion(head, [choice], counts(usage).usage() if usage else None)


def _add_block(said: Json, block: Json) -> None:
    kind = block["type"]
    if kind == "text":
        said["content"] = (said["content"] or "") + block["text"]
    elif kind == "thinking":
        said["reasoning_content"] = said.get("reasoning_content", "") + block["thinking"]
        said.setdefault("thinking_blocks", []).append(block)
    elif kind == "redacted_thinking":
        said.setdefault("thinking_blocks", []).append(block)
    elif kind == "tool_use":
        arguments = msgspec.json.encode(block["input"]).decode()
        said.setdefault("tool_calls", []).append(chat.tool_call(block["id"], block["name"], arguments))
    else:
        raise Unreadable(f"content of type {kind!r}")


def counts(usage: Json) -> Counts:
    """There, input tokens leave out what a cache gave or took; here, the prompt is all of it."""
    cached = chat.number(usage, "cache_read_input_tokens")
    written = chat.number(usage, "cache_creation_input_tokens")
    return Counts(
        prompt=chat.number(usage, "input_tokens") + cached + written,
        completion=chat.number(usage, "output_tokens"),
        cached=cached,
        written=written,
        reasoning=chat.number(cast(Json, usage.get("output_tokens_details") or {}), "thinking_tokens"),
        written_1h=chat.number(cast(Json, usage.get("cache_creation") or {}), "ephemeral_1h_input_tokens"),
    )


def finish(reason: object) -> str:
    """Why the answer ended, in a chat completion's word where there is one."""
    return _FINISH.get(str(reason), str(reason)) if reason else "stop"


def error(status: int, raw: bytes) -> VendorError:
    """What an error's body says."""
    status = 503 if status == _OVERLOADED else status
    try:
        told = cast(Json, read_object(raw).get("error") or {})
    except Unreadable:
        return VendorError(status, raw[:500].decode(errors="replace"))
    return VendorError(status, str(told.get("message") or ""), str(told.get("type") or ""))


class Stream:
    """Turns the events of one streamed message into chunks, in order.

    ``done`` and ``complete`` once the vendor has said so. An event of a type unknown here is skipped, as the
    vendor asks of its clients; a block or delta of a type unknown here is an error, for it holds a part of
    the answer. Blocks come one after another; a tool's input grows piece by piece.
    """

    def __init__(self, created: int) -> None:
        self.done = self.complete = False
        self._head: Json = {"id": "", "created": created, "model": ""}
        self._usage: Json = {}
        self._calls = -1
        self._thinking: Json | None = None
        """The block of thinking that grows; given once more as a whole, with its signature, when it ends."""
        self._on: dict[str, Callable[[Json], Iterator[Told]]] = {
            "message_start": self._started,
            "content_block_start": self._block_started,
            "content_block_delta": self._grown,
            "content_block_stop": self._block_stopped,
            "message_delta": self._ending,
            "message_stop": self._stopped,
            "error": self._failed,
        }

    def feed(self, data: bytes) -> Iterator[Told]:
        """What one event's data becomes. Raises Unreadable."""
        event = read_object(data)
        handle = self._on.get(str(event.get("type")))
        if handle is None:
            return
        try:
            yield from handle(event)
        except (KeyError, TypeError, AttributeError) as fault:
            raise Unreadable(f"a {event.get('type')} event not formed as documented: {fault}") from fault

    def close(self) -> Iterator[Told]:
        """Nothing: this vendor says when it is done."""
        return iter(())

    def _started(self, event: Json) -> Iterator[Told]:
        message = event["message"]
        self._head |= {"id": message["id"], "model": message["model"]}
        self._usage = dict(message.get("usage") or {})
        yield self._chunk({"role": "assistant", "content": ""})

    def _block_started(self, event: Json) -> Iterator[Told]:
        block = event["content_block"]
        kind = block["type"]
        if kind == "tool_use":
            self._calls += 1
            call = {"index": self._calls, **chat.tool_call(block["id"], block["name"], "")}
            yield self._chunk({"tool_calls": [call]})
        elif kind == "redacted_thinking":
            yield self._chunk({"thinking_blocks": [block]})
        elif kind == "thinking":
            self._thinking = {"type": "thinking", "thinking": "", "signature": "", **block}
        elif kind != "text":
            raise Unreadable(f"content of type {kind!r}")
        elif block.get("text"):
            yield self._chunk({"content": block["text"]})

    def _grown(self, event: Json) -> Iterator[Told]:
        delta = event["delta"]
        kind = delta["type"]
        if kind == "text_delta":
            yield self._chunk({"content": delta["text"]})
        elif kind in ("thinking_delta", "signature_delta") and self._thinking is not None:
            name = kind.removesuffix("_delta")
            self._thinking[name] += delta[name]
            if name == "thinking":
                yield self._chunk({"reasoning_content": delta["thinking"]})
        elif kind == "input_json_delta":
            piece = {"arguments": delta["partial_json"]}
            yield self._chunk({"tool_calls": [{"index": self._calls, "function": piece}]})
        elif kind != "citations_delta":
            raise Unreadable(f"a delta of type {kind!r}")

    def _block_stopped(self, event: Json) -> Iterator[Told]:
        block, self._thinking = self._thinking, None
        if block is not None:
            yield self._chunk({"thinking_blocks": [block]})

    def _ending(self, event: Json) -> Iterator[Told]:
        self._usage |= {k: v for k, v in cast(Json, event.get("usage") or {}).items() if v is not None}
        reason = event["delta"].get("stop_reason")
        if reason is not None:
            yield self._chunk({}, finish(reason))

    def _stopped(self, event: Json) -> Iterator[Told]:
        self.done = self.complete = True
        if self._usage:
            yield Told(chat.usage_chunk(self._head, counts(self._usage).usage()))

    def _failed(self, event: Json) -> Iterator[Told]:
        told = event["error"]
        kind = str(told.get("type") or "")
        yield Told(error=VendorError(_STATUSES.get(kind, 500), str(told.get("message") or ""), kind))

    def _chunk(self, delta: Json, reason: str | None = None) -> Told:
        return Told(chat.chunk(self._head, delta, reason))


def path(model: str, stream: bool) -> str:
    """Behind the endpoint's base URL."""
    return "/messages"


def credential(secret: str) -> tuple[str, str]:
    """The header that tells the vendor who asks."""
    return "x-api-key", secret
