"""Answering an application that speaks Anthropic's messages, whoever answers behind it.

A request becomes a chat completion request, a completion a message, chunks the events of a streamed message.
Strict: what chat completions have no word for is refused by name. Marks for a cache (``cache_control``) ask
for no other answer: they go along and are left out where a vendor caches by itself. It ignores which vendor
answers.

Source: platform.claude.com, Messages API (version 2023-06-01), its errors and streaming events.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import msgspec

from understudy.forms import chat
from understudy.forms.chat import Left, Neutral
from understudy.forms.events import named_event
from understudy.forms.fault import Unmappable, Unreadable, VendorError, anthropic_error
from understudy.protocol import Json

_READ = frozenset(
    {
        "max_tokens",
        "messages",
        "metadata",
        "model",
        "output_config",
        "service_tier",
        "stop_sequences",
        "stream",
        "system",
        "temperature",
        "thinking",
        "tool_choice",
        "tools",
        "top_k",
        "top_p",
    }
)
_NEUTRAL: Neutral = {
    "container": (None,),
    "context_management": (None, {}),
    "diagnostics": (None,),
    "inference_geo": (None,),
    "mcp_servers": (None, []),
    "speed": (None, "standard"),
}
_STOP = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}
_TOOL_CHOICE = {"auto": "auto", "any": "required", "none": "none"}


def request(body: Json, left: Left) -> Json:
    """The chat completion request for a messages request. Raises Unmappable."""
    if body.get("cache_control"):
        left.out("cache_control")
    chat.check_parameters(body, _READ | {"cache_control"}, left, _NEUTRAL)
    asked: Json = {"model": body.get("model"), "messages": [*_system(body), *_conversation(body)]}
    for here, there in (
        ("max_tokens", "max_completion_tokens"),
        ("temperature", "temperature"),
        ("top_p", "top_p"),
        ("top_k", "top_k"),
        ("stream", "stream"),
        ("stop_sequences", "stop"),
        ("thinking", "thinking"),
    ):
        if body.get(here) not in (None, []):
            asked[there] = body[here]
    return asked | _metadata(body) | _output(body) | _service_tier(body) | _tools(body)


def _metadata(body: Json) -> Json:
    metadata = cast(Json, body.get("metadata") or {})
    chat.only(metadata, "metadata", "user_id")
    return {"user": metadata["user_id"]} if metadata.get("user_id") else {}


def _service_tier(body: Json) -> Json:
    tiers: dict[object, Json] = {None: {}, "auto": {}, "standard_only": {"service_tier": "default"}}
    if (tier := body.get("service_tier")) not in tiers:
        raise Unmappable("service_tier")
    return tiers[tier]


def _output(body: Json) -> Json:
    output = cast(Json, body.get("output_config") or {})
    chat.only(output, "output_config", "effort", "format")
    asked: Json = {"reasoning_effort": output["effort"]} if output.get("effort") else {}
    form = cast(Json, output.get("format") or {})
    if form.get("type") == "json_schema":
        named = {"name": "answer", "schema": form.get("schema"), "strict": True}
        asked["response_format"] = {"type": "json_schema", "json_schema": named}
    elif form:
        raise Unmappable("output_config.format")
    return asked


def _system(body: Json) -> list[Json]:
    said = body.get("system")
    if not said:
        return []
    parts = [_part(block, path) for path, block in chat.parts_of(said, "system")]
    return [{"role": "system", "content": _plain(parts)}]


def _conversation(body: Json) -> Iterator[Json]:
    for where, message in chat.messages_of(body):
        chat.only(message, where, "role", "content")
        blocks = chat.parts_of(message.get("content"), f"{where}.content")
        if message.get("role") == "assistant":
            yield _assistant(blocks)
        elif message.get("role") in ("user", "system"):
            yield from _user(blocks, str(message["role"]))
        else:
            raise Unmappable(f"{where}.role", f"{where}.role: expected user or assistant")


def _user(blocks: list[tuple[str, Json]], role: str) -> Iterator[Json]:
    """Results of tools are messages of their own; what stands between them stays in order."""
    parts: list[Json] = []
    for where, block in blocks:
        if block.get("type") != "tool_result":
            parts.append(_part(block, where))
            continue
        if parts:
            yield {"role": role, "content": _plain(parts)}
            parts = []
        yield _tool_result(block, where)
    if parts or not blocks:
        yield {"role": role, "content": _plain(parts)}


def _tool_result(block: Json, where: str) -> Json:
    chat.only(block, where, "type", "tool_use_id", "content", "is_error", "cache_control")
    parts = [_part(part, path) for path, part in chat.parts_of(block.get("content"), f"{where}.content")]
    result = {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": _plain(parts)}
    return result | ({"is_error": True} if block.get("is_error") else {})


def _assistant(blocks: list[tuple[str, Json]]) -> Json:
    said: Json = {"role": "assistant", "content": None}
    for where, block in blocks:
        kind = block.get("type")
        if kind == "tool_use":
            chat.only(block, where, "type", "id", "name", "input", "cache_control")
            arguments = msgspec.json.encode(block.get("input") or {}).decode()
            call = chat.tool_call(str(block.get("id")), str(block.get("name")), arguments)
            said.setdefault("tool_calls", []).append(call)
        elif kind in ("thinking", "redacted_thinking"):
            said.setdefault("thinking_blocks", []).append(block)
            if kind == "thinking":
                said["reasoning_content"] = said.get("reasoning_content", "") + str(block.get("thinking"))
        else:
            chat.only(block, where, "type", "text", "citations", "cache_control")
            said["content"] = (said["content"] or "") + chat.text_part(block, where)
    return said


def _part(block: Json, where: str) -> Json:
    marked = {"cache_control": block["cache_control"]} if block.get("cache_control") else {}
    kind = block.get("type")
    if kind == "image":
        chat.only(block, where, "type", "source", "cache_control")
        url = _url(cast(Json, block.get("source") or {}), where)
        return {"type": "image_url", "image_url": {"url": url}, **marked}
    if kind == "document":
        return {**_document(block, where), **marked}
    chat.only(block, where, "type", "text", "cache_control")
    return {"type": "text", "text": chat.text_part(block, where), **marked}


def _url(source: Json, where: str) -> str:
    if source.get("type") == "base64":
        return f"data:{source.get('media_type')};base64,{source.get('data')}"
    if source.get("type") == "url":
        return str(source.get("url"))
    raise Unmappable(f"{where}.source", f"{where}.source: a {source.get('type')} lies at another vendor")


def _document(block: Json, where: str) -> Json:
    chat.only(block, where, "type", "source", "title", "cache_control")
    source = cast(Json, block.get("source") or {})
    if source.get("type") == "text":
        return {"type": "text", "text": source.get("data")}
    if source.get("type") != "base64":
        raise Unmappable(f"{where}.source", f"{where}.source: expected base64 or text")
    file = {"filename": block.get("title") or "document.pdf", "file_data": _url(source, where)}
    return {"type": "file", "file": file}


def _plain(parts: list[Json]) -> str | list[Json]:
    """One text stands for itself; servers that follow OpenAI may take nothing else."""
    if not parts:
        return ""
    if len(parts) == 1 and parts[0].keys() == {"type", "text"}:
        return str(parts[0]["text"])
    return parts


def _tools(body: Json) -> Json:
    asked: Json = {}
    tools = [_tool(tool, f"tools[{n}]") for n, tool in enumerate(cast(list[Json], body.get("tools") or []))]
    if tools:
        asked["tools"] = tools
    choice = cast(Json, body.get("tool_choice") or {})
    if choice.get("type") == "tool":
        asked["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}
    elif choice:
        if choice.get("type") not in _TOOL_CHOICE:
            raise Unmappable("tool_choice")
        asked["tool_choice"] = _TOOL_CHOICE[str(choice["type"])]
    if choice.get("disable_parallel_tool_use"):
        asked["parallel_tool_calls"] = False
    return asked


def _tool(tool: Json, where: str) -> Json:
    if tool.get("type") not in (None, "custom"):
        raise Unmappable(where, f"{where}: a tool of type {tool.get('type')!r} runs at another vendor")
    chat.only(tool, where, "type", "name", "description", "input_schema", "strict", "cache_control")
    function: Json = {"name": tool.get("name"), "parameters": tool.get("input_schema") or {}}
    for name in ("description", "strict"):
        if tool.get(name):
            function[name] = tool[name]
    marked = {"cache_control": tool["cache_control"]} if tool.get("cache_control") else {}
    return {"type": "function", "function": function, **marked}


# answers


def wants_thinking(body: Json) -> bool:
    """Whether thoughts belong into the answer."""
    return cast(Json, body.get("thinking") or {}).get("type") in ("enabled", "adaptive")


def answer(completion: Json, body: Json) -> bytes:
    """The message for a chat completion; ``body`` is the request. Raises Unreadable."""
    said, reason = chat.first_message(completion)
    message = {
        "id": completion.get("id") or "",
        "type": "message",
        "role": "assistant",
        "model": completion.get("model") or "",
        "content": _blocks_of(said, thoughts=wants_thinking(body)),
        "stop_reason": _STOP.get(reason, reason),
        "stop_sequence": None,
        "usage": usage_of(completion.get("usage")),
    }
    return msgspec.json.encode(message)


def _blocks_of(said: Json, *, thoughts: bool) -> list[Json]:
    blocks: list[Json] = []
    if thoughts and (thought := chat.thought_of(said)):
        blocks.append({"type": "thinking", "thinking": thought, "signature": ""})
    text = said.get("content") or said.get("refusal")
    if text:
        blocks.append({"type": "text", "text": text})
    for path, call in chat.calls_of(said, "message"):
        try:
            given = call.given(path)
        except Unmappable as fault:
            raise Unreadable(fault.message) from fault
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": given})
    return blocks


def usage_of(usage: object) -> Json:
    """Tokens as this form counts: what a cache gave or took beside the rest of the input."""
    counts = chat.counts_of(cast(Json, usage) if isinstance(usage, dict) else {})
    told: Json = {
        "input_tokens": counts.prompt - counts.cached - counts.written,
        "cache_creation_input_tokens": counts.written,
        "cache_read_input_tokens": counts.cached,
        "output_tokens": counts.completion,
    }
    if counts.written_1h:
        minutes = counts.written - counts.written_1h
        kept = {"ephemeral_5m_input_tokens": minutes, "ephemeral_1h_input_tokens": counts.written_1h}
        told["cache_creation"] = kept
    return told | (
        {"output_tokens_details": {"thinking_tokens": counts.reasoning}} if counts.reasoning else {}
    )


def error(told: VendorError) -> bytes:
    """The body of an error."""
    return msgspec.json.encode(anthropic_error(told))


class Writer:
    """Turns chunks into the events of a streamed message; ``body`` is the request.

    Blocks are opened when their first piece comes and closed when another begins. The last event with the
    counts waits for the chunk that has them, and for the end of the stream where there is none.
    """

    def __init__(self, body: Json) -> None:
        self._thoughts = wants_thinking(body)
        self._begun = False
        self._block = -1
        self._kind = ""
        """Kind of the open block; for a tool's with its place among the calls."""
        self._reason: str | None = None
        self._usage: object = None

    def chunk(self, chunk: Json) -> bytes:
        """The events of one chunk."""
        out: list[bytes] = []
        if not self._begun:
            self._begun = True
            out.append(self._start(chunk))
        self._usage = chunk.get("usage") or self._usage
        for choice in cast(list[Json], chunk.get("choices") or []):
            for event in self._delta(cast(Json, choice.get("delta") or {})):
                out.append(named_event(event))
            self._reason = choice.get("finish_reason") or self._reason
        return b"".join(out)

    def end(self) -> bytes:
        """The last events: all has been said."""
        reason = _STOP.get(self._reason or "stop", self._reason)
        delta = {"stop_reason": reason, "stop_sequence": None}
        last = [
            {"type": "message_delta", "delta": delta, "usage": usage_of(self._usage)},
            {"type": "message_stop"},
        ]
        return b"".join(named_event(event) for event in [*self._close(), *last])

    def error(self, told: VendorError) -> bytes:
        """The event in place of the rest."""
        return named_event(anthropic_error(told))

    def _start(self, chunk: Json) -> bytes:
        message = {
            "id": chunk.get("id") or "",
            "type": "message",
            "role": "assistant",
            "model": chunk.get("model") or "",
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage_of(chunk.get("usage")),
        }
        return named_event({"type": "message_start", "message": message})

    def _delta(self, delta: Json) -> Iterator[Json]:
        if self._thoughts and (thought := chat.thought_of(delta)):
            yield from self._open("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            yield self._grown({"type": "thinking_delta", "thinking": thought})
        for name in ("content", "refusal"):
            if delta.get(name):
                yield from self._open("text", {"type": "text", "text": ""})
                yield self._grown({"type": "text_delta", "text": delta[name]})
        for call in cast(list[Json], delta.get("tool_calls") or []):
            yield from self._called(call)

    def _called(self, call: Json) -> Iterator[Json]:
        function = cast(Json, call.get("function") or {})
        kind = f"tool {call.get('index') or 0}"
        if kind != self._kind and not call.get("id"):
            raise Unreadable("pieces of two tool calls in turns")
        tool = {"type": "tool_use", "id": call.get("id"), "name": function.get("name"), "input": {}}
        yield from self._open(kind, tool)
        if function.get("arguments"):
            yield self._grown({"type": "input_json_delta", "partial_json": function["arguments"]})

    def _open(self, kind: str, block: Json) -> Iterator[Json]:
        if kind == self._kind:
            return
        yield from self._close()
        self._kind = kind
        self._block += 1
        yield {"type": "content_block_start", "index": self._block, "content_block": block}

    def _grown(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": self._block, "delta": delta}

    def _close(self) -> Iterator[Json]:
        if self._kind:
            self._kind = ""
            yield {"type": "content_block_stop", "index": self._block}
