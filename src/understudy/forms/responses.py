"""Answering an application that speaks OpenAI's responses, whoever answers behind it.

A request becomes a chat completion request, a completion a response, chunks the events of a streamed
response. Strict: what chat completions have no word for is refused by name, and what needs a server that
remembers (``previous_response_id``, ``conversation``, ``background``, ``store = true``) with the reason.
Nothing is kept, so a response says ``store: false``. It ignores which vendor answers.

Source: OpenAI API reference, responses (create, the response object, streaming events).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import msgspec

from understudy.forms import chat
from understudy.forms.chat import Left, Neutral
from understudy.forms.events import named_event
from understudy.forms.fault import Unmappable, VendorError, openai_error
from understudy.protocol import Json

_SAME = ("temperature", "top_p", "stream", "user", "safety_identifier", "parallel_tool_calls", "service_tier")
_READ = frozenset(
    {
        *_SAME,
        "input",
        "instructions",
        "max_output_tokens",
        "metadata",
        "model",
        "reasoning",
        "stream_options",
        "text",
        "tool_choice",
        "tools",
    }
)
_NEUTRAL: Neutral = {
    "background": (False, None),
    "context_management": (None, []),
    "conversation": (None,),
    "include": (None, []),
    "max_tool_calls": (None,),
    "moderation": (None,),
    "previous_response_id": (None,),
    "prompt": (None,),
    "store": (False, None),
    "top_logprobs": (0, None),
    "truncation": ("disabled", None),
}
_NEEDS_MEMORY = {
    "background": "a response that is fetched later",
    "conversation": "a conversation that is kept",
    "previous_response_id": "an earlier response that was kept",
    "prompt": "a prompt that is kept",
    "store": "a response that is kept",
}
_ROLES = frozenset({"user", "assistant", "system", "developer"})


def request(body: Json, left: Left) -> Json:
    """The chat completion request for a responses request. Raises Unmappable."""
    for name, thing in _NEEDS_MEMORY.items():
        if not chat.is_neutral(_NEUTRAL, name, body.get(name)):
            raise Unmappable(
                name, f"{name} needs {thing}, and nothing is kept for this model: send the whole input"
            )
    chat.check_parameters(body, _READ, left, _NEUTRAL)
    asked: Json = {"model": body.get("model"), "messages": [*_instructions(body), *_conversation(body, left)]}
    for name in _SAME:
        if body.get(name) is not None:
            asked[name] = body[name]
    if body.get("max_output_tokens") is not None:
        asked["max_completion_tokens"] = body["max_output_tokens"]
    return asked | _text(body) | _reasoning(body) | _tools(body)


def _instructions(body: Json) -> list[Json]:
    said = body.get("instructions")
    if said is not None and not isinstance(said, str):
        raise Unmappable("instructions", "instructions: expected text")
    return [{"role": "system", "content": said}] if said else []


def _conversation(body: Json, left: Left) -> list[Json]:
    given = body.get("input")
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in cast(list[object], given)):
        raise Unmappable("input", "input: expected text or a list of items")
    messages: list[Json] = []
    for number, item in enumerate(cast(list[Json], given)):
        _add_item(messages, item, f"input[{number}]", left)
    return messages


def _add_item(messages: list[Json], item: Json, where: str, left: Left) -> None:
    kind = item.get("type") or "message"
    if kind == "message":
        message = _message(item, where)
        if message["role"] == "assistant" and _speaks(messages) and "content" not in messages[-1]:
            messages[-1]["content"] = message["content"]
        else:
            messages.append(message)
    elif kind == "function_call":
        chat.only(item, where, "type", "id", "call_id", "name", "arguments", "status")
        call = chat.tool_call(str(item.get("call_id")), str(item.get("name")), str(item.get("arguments")))
        if not _speaks(messages):
            messages.append({"role": "assistant"})
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        chat.only(item, where, "type", "id", "call_id", "output", "status")
        content = _content(item.get("output"), f"{where}.output")
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
    elif kind == "reasoning":
        left.out("input.reasoning")  # thoughts that only their own vendor can read
    else:
        raise Unmappable(
            where, f"{where}: an item of type {kind!r} has no counterpart at this model's vendor"
        )


def _speaks(messages: list[Json]) -> bool:
    return bool(messages) and messages[-1]["role"] == "assistant"


def _message(item: Json, where: str) -> Json:
    chat.only(item, where, "type", "id", "role", "content", "status", "phase")
    role = item.get("role")
    if role not in _ROLES:
        raise Unmappable(f"{where}.role", f"{where}.role: {role!r} has no counterpart")
    content = _content(item.get("content"), f"{where}.content")
    if role == "assistant" and isinstance(content, list):
        content = "".join(chat.text_part(part, where) for part in content)
    return {"role": role, "content": content}


def _content(content: object, where: str) -> str | list[Json]:
    if isinstance(content, str):
        return content
    parts = [_part(part, path) for path, part in chat.parts_of(content, where)]
    if len(parts) == 1 and parts[0]["type"] == "text":
        return str(parts[0]["text"])
    return parts


def _part(part: Json, where: str) -> Json:
    kind = part.get("type")
    if kind in ("input_text", "output_text", "text"):
        chat.only(part, where, "type", "text", "annotations", "logprobs")
        return {"type": "text", "text": part.get("text")}
    if kind == "refusal":
        return {"type": "refusal", "refusal": part.get("refusal")}
    if kind == "input_image":
        chat.only(part, where, "type", "image_url", "detail")
        if not part.get("image_url"):
            raise Unmappable(where, f"{where}: expected an image_url")
        detailed = {"detail": part["detail"]} if part.get("detail") not in (None, "auto") else {}
        return {"type": "image_url", "image_url": {"url": part["image_url"], **detailed}}
    if kind == "input_file":
        chat.only(part, where, "type", "filename", "file_data")
        file = {name: part[name] for name in ("filename", "file_data") if part.get(name)}
        return {"type": "file", "file": file}
    if kind == "input_audio":
        return {"type": "input_audio", "input_audio": part.get("input_audio")}
    raise Unmappable(where, f"{where}: a part of type {kind!r} has no counterpart at this model's vendor")


def _text(body: Json) -> Json:
    text = cast(Json, body.get("text") or {})
    chat.only(text, "text", "format", "verbosity")
    asked: Json = {"verbosity": text["verbosity"]} if text.get("verbosity") else {}
    form = cast(Json, text.get("format") or {})
    if form.get("type") == "json_schema":
        told = {
            name: form[name]
            for name in ("name", "description", "schema", "strict")
            if form.get(name) is not None
        }
        asked["response_format"] = {"type": "json_schema", "json_schema": told}
    elif form:
        asked["response_format"] = {"type": form.get("type")}
    return asked


def _reasoning(body: Json) -> Json:
    """Effort goes along; thoughts are shown where the vendor shows them, which is all ``auto`` asks."""
    reasoning = cast(Json, body.get("reasoning") or {})
    chat.only(reasoning, "reasoning", "effort", "summary")
    if reasoning.get("summary") not in (None, "auto"):
        raise Unmappable("reasoning.summary")
    return {"reasoning_effort": reasoning["effort"]} if reasoning.get("effort") else {}


def _tools(body: Json) -> Json:
    asked: Json = {}
    tools = [_tool(tool, f"tools[{n}]") for n, tool in enumerate(cast(list[Json], body.get("tools") or []))]
    if tools:
        asked["tools"] = tools
    choice = body.get("tool_choice")
    if isinstance(choice, dict):
        chosen = cast(Json, choice)
        if chosen.get("type") != "function":
            raise Unmappable("tool_choice")
        asked["tool_choice"] = {"type": "function", "function": {"name": chosen.get("name")}}
    elif choice is not None and (tools or choice != "auto"):
        asked["tool_choice"] = choice
    return asked


def _tool(tool: Json, where: str) -> Json:
    if tool.get("type") != "function":
        raise Unmappable(where, f"{where}: a tool of type {tool.get('type')!r} runs at another vendor")
    chat.only(tool, where, "type", "name", "description", "parameters", "strict")
    function = {
        name: tool[name] for name in ("name", "description", "parameters") if tool.get(name) is not None
    }
    return {"type": "function", "function": function | ({"strict": True} if tool.get("strict") else {})}


# answers


def answer(completion: Json, body: Json) -> bytes:
    """The response for a chat completion; ``body`` is the request. Raises Unreadable."""
    said, reason = chat.first_message(completion)
    response_id = _response_id(completion)
    items = _items(said, response_id)
    whole = _response(completion, body, response_id) | _ended(reason) | {"output": items}
    return msgspec.json.encode({**whole, "usage": usage_of(completion.get("usage"))})


def _items(said: Json, key: str) -> list[Json]:
    items: list[Json] = []
    if thought := chat.thought_of(said):
        items.append(_reasoning_item(f"rs_{key}_0", thought))
    parts = [_text_of(str(said["content"]))] if said.get("content") else []
    parts += [{"type": "refusal", "refusal": said["refusal"]}] if said.get("refusal") else []
    if parts:
        items.append(_message_item(f"msg_{key}_{len(items)}", parts, "completed"))
    for _, call in chat.calls_of(said, "message"):
        items.append(_call_item(f"fc_{key}_{len(items)}", call.id, call.name, call.arguments, "completed"))
    return items


def _response_id(completion: Json) -> str:
    return str(completion.get("id") or "0")


def _text_of(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _reasoning_item(key: str, thought: str) -> Json:
    return {"id": key, "type": "reasoning", "summary": [{"type": "summary_text", "text": thought}]}


def _message_item(key: str, parts: list[Json], status: str) -> Json:
    return {"id": key, "type": "message", "role": "assistant", "status": status, "content": parts}


def _call_item(key: str, call_id: str, name: str, arguments: str, status: str) -> Json:
    said = {"call_id": call_id, "name": name, "arguments": arguments}
    return {"id": key, "type": "function_call", "status": status, **said}


def _response(completion: Json, body: Json, key: str) -> Json:
    """What a response says of its request and of itself, without what came of it."""
    return {
        "id": f"resp_{key}",
        "object": "response",
        "created_at": completion.get("created") or 0,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "model": completion.get("model") or "",
        "output": [],
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "previous_response_id": None,
        "reasoning": body.get("reasoning") or {"effort": None, "summary": None},
        "store": False,
        "temperature": body.get("temperature"),
        "text": body.get("text") or {"format": {"type": "text"}},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": body.get("tools") or [],
        "top_p": body.get("top_p"),
        "truncation": "disabled",
        "usage": None,
        "metadata": body.get("metadata") or {},
    }


def _ended(reason: str) -> Json:
    reasons = {"length": "max_output_tokens", "content_filter": "content_filter"}
    if reason in reasons:
        return {"status": "incomplete", "incomplete_details": {"reason": reasons[reason]}}
    return {"status": "completed"}


def usage_of(usage: object) -> Json:
    """Tokens under this form's names; it counts as chat completions do."""
    counts = chat.counts_of(cast(Json, usage) if isinstance(usage, dict) else {})
    return {
        "input_tokens": counts.prompt,
        "input_tokens_details": {"cached_tokens": counts.cached, "cache_write_tokens": counts.written},
        "output_tokens": counts.completion,
        "output_tokens_details": {"reasoning_tokens": counts.reasoning},
        "total_tokens": counts.prompt + counts.completion,
    }


def error(told: VendorError) -> bytes:
    """The body of an error."""
    return msgspec.json.encode(openai_error(told))


class Writer:
    """Turns chunks into the events of a streamed response; ``body`` is the request.

    Items follow one another: thoughts, text, calls of tools. Each is opened by its first piece and closed
    with its whole when another begins.
    """

    def __init__(self, body: Json) -> None:
        self._body = body
        self._head: Json | None = None
        self._number = 0
        self._items: list[Json] = []
        self._open = ""
        """Kind of the open item; for a call with its place among the calls."""
        self._item: Json = {}
        """The open item, as it was when it was opened."""
        self._text: list[str] = []
        """Pieces of the open item."""
        self._reason = "stop"
        self._usage: object = None

    def chunk(self, chunk: Json) -> bytes:
        """The events of one chunk."""
        out: list[bytes] = []
        if self._head is None:
            self._head = _response(chunk, self._body, _response_id(chunk))
            for kind in ("created", "in_progress"):
                out.append(self._event(f"response.{kind}", response=self._head))
        self._usage = chunk.get("usage") or self._usage
        for choice in cast(list[Json], chunk.get("choices") or []):
            out += self._delta(cast(Json, choice.get("delta") or {}))
            self._reason = str(choice.get("finish_reason") or self._reason)
        return b"".join(out)

    def end(self) -> bytes:
        """The last events: all has been said."""
        closing = list(self._close())
        told = _ended(self._reason)
        whole = {**(self._head or {}), **told, "output": self._items, "usage": usage_of(self._usage)}
        return b"".join([*closing, self._event(f"response.{told['status']}", response=whole)])

    def error(self, told: VendorError) -> bytes:
        """The event in place of the rest."""
        code = told.code or told.kind or "server_error"
        if self._head is None:
            return self._event("error", code=code, message=told.message, param=told.param)
        failed = {**self._head, "status": "failed", "error": {"code": code, "message": told.message}}
        return self._event("response.failed", response={**failed, "output": self._items})

    def _event(self, kind: str, **more: object) -> bytes:
        self._number += 1
        return named_event({"type": kind, "sequence_number": self._number - 1, **more})

    def _delta(self, delta: Json) -> Iterator[bytes]:
        if thought := chat.thought_of(delta):
            yield from self._thought(thought)
        if delta.get("content"):
            yield from self._said("text", str(delta["content"]))
        if delta.get("refusal"):
            yield from self._said("refusal", str(delta["refusal"]))
        for call in cast(list[Json], delta.get("tool_calls") or []):
            yield from self._called(call)

    def _thought(self, text: str) -> Iterator[bytes]:
        if self._open != "thought":
            yield from self._begin("thought", {"id": self._key("rs"), "type": "reasoning", "summary": []})
            part = {"type": "summary_text", "text": ""}
            yield self._of_item("response.reasoning_summary_part.added", summary_index=0, part=part)
        self._text.append(text)
        yield self._of_item("response.reasoning_summary_text.delta", summary_index=0, delta=text)

    def _said(self, kind: str, text: str) -> Iterator[bytes]:
        if self._open != kind:
            yield from self._begin(kind, _message_item(self._key("msg"), [], "in_progress"))
            part = _text_of("") if kind == "text" else {"type": "refusal", "refusal": ""}
            yield self._of_item("response.content_part.added", content_index=0, part=part)
        self._text.append(text)
        if kind == "text":
            yield self._of_item("response.output_text.delta", content_index=0, delta=text, logprobs=[])
        else:
            yield self._of_item("response.refusal.delta", content_index=0, delta=text)

    def _called(self, call: Json) -> Iterator[bytes]:
        function = cast(Json, call.get("function") or {})
        kind = f"call {call.get('index') or 0}"
        if self._open != kind:
            named = (str(call.get("id")), str(function.get("name")))
            yield from self._begin(kind, _call_item(self._key("fc"), *named, "", "in_progress"))
        if function.get("arguments"):
            self._text.append(str(function["arguments"]))
            yield self._of_item("response.function_call_arguments.delta", delta=function["arguments"])

    def _key(self, prefix: str) -> str:
        # `_begin` closes what is open before, which is an item then
        return f"{prefix}_{_tail(self._head)}_{len(self._items) + bool(self._open)}"

    def _begin(self, kind: str, item: Json) -> Iterator[bytes]:
        yield from self._close()
        self._open, self._text, self._item = kind, [], item
        yield self._event("response.output_item.added", output_index=len(self._items), item=item)

    def _of_item(self, kind: str, **more: object) -> bytes:
        return self._event(kind, item_id=self._item["id"], output_index=len(self._items), **more)

    def _close(self) -> Iterator[bytes]:
        kind, text, self._open = self._open, "".join(self._text), ""
        if not kind:
            return
        if kind == "thought":
            part: Json = {"type": "summary_text", "text": text}
            yield self._of_item("response.reasoning_summary_text.done", summary_index=0, text=text)
            yield self._of_item("response.reasoning_summary_part.done", summary_index=0, part=part)
            item = {**self._item, "summary": [part]}
        elif kind in ("text", "refusal"):
            part = _text_of(text) if kind == "text" else {"type": "refusal", "refusal": text}
            yield from self._text_done(kind, text, part)
            item = {**self._item, "status": "completed", "content": [part]}
        else:
            name = self._item["name"]
            yield self._of_item("response.function_call_arguments.done", name=name, arguments=text)
            item = {**self._item, "status": "completed", "arguments": text}
        yield self._event("response.output_item.done", output_index=len(self._items), item=item)
        self._items.append(item)

    def _text_done(self, kind: str, text: str, part: Json) -> Iterator[bytes]:
        if kind == "text":
            yield self._of_item("response.output_text.done", content_index=0, text=text, logprobs=[])
        else:
            yield self._of_item("response.refusal.done", content_index=0, refusal=text)
        yield self._of_item("response.content_part.done", content_index=0, part=part)


def _tail(head: Json | None) -> str:
    return str((head or {}).get("id", "")).removeprefix("resp_")


# recorded answers


def completion_of(response: Json) -> Json:
    """The chat completion that a response amounts to: how readers of recorded calls see it."""
    said: Json = {"role": "assistant", "content": None}
    for item in cast(list[Json], response.get("output") or []):
        _add_output(said, item)
    reason = cast(Json, response.get("incomplete_details") or {}).get("reason")
    finish = {"max_output_tokens": "length", None: "tool_calls" if "tool_calls" in said else "stop"}
    head = {
        "id": response.get("id"),
        "created": int(response.get("created_at") or 0),
        "model": response.get("model"),
    }
    choice = {"index": 0, "message": said, "finish_reason": finish.get(reason, reason)}
    usage = cast(Json, response.get("usage") or {})
    return chat.completion(head, [choice], counts(usage).usage() if usage else None)


def _add_output(said: Json, item: Json) -> None:
    if item.get("type") == "message":
        for part in cast(list[Json], item.get("content") or []):
            name = "refusal" if part.get("type") == "refusal" else "content"
            said[name] = (said.get(name) or "") + str(part.get("text") or part.get("refusal") or "")
    elif item.get("type") == "function_call":
        call = chat.tool_call(
            str(item.get("call_id")), str(item.get("name")), str(item.get("arguments") or "")
        )
        said.setdefault("tool_calls", []).append(call)
    elif item.get("type") == "reasoning":
        thoughts = [str(part.get("text") or "") for part in cast(list[Json], item.get("summary") or [])]
        if any(thoughts):
            said["reasoning_content"] = said.get("reasoning_content", "") + "".join(thoughts)


def counts(usage: Json) -> chat.Counts:
    """The inverse of `usage_of`."""
    given = cast(Json, usage.get("input_tokens_details") or {})
    return chat.Counts(
        prompt=chat.number(usage, "input_tokens"),
        completion=chat.number(usage, "output_tokens"),
        cached=chat.number(given, "cached_tokens"),
        written=chat.number(given, "cache_write_tokens"),
        reasoning=chat.number(cast(Json, usage.get("output_tokens_details") or {}), "reasoning_tokens"),
    )
