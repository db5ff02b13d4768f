"""OpenAI chat completions as Anthropic messages, and what comes back as chat completions.

Strict: a parameter without a counterpart there is a 400 that names it, unless its value says the same as
leaving it out. Nothing is dropped, guessed or rounded. It ignores transport, headers and the model's name.

Source: docs.anthropic.com, Messages API (version 2023-06-01) and its streaming events.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, cast

import msgspec

from understudy.gateway.refusal import Refusal, bad_request
from understudy.protocol import Json

_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1, None),
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "logprobs": (False, None),
    "store": (False, None),
    "logit_bias": ({}, None),
    "response_format": ({"type": "text"}, None),
    "modalities": (["text"], None),
}
"""Values that say the same as leaving the parameter out."""
_READ = frozenset(
    {
        "max_completion_tokens",
        "max_tokens",
        "messages",
        "model",
        "parallel_tool_calls",
        "stop",
        "stream",
        "stream_options",
        "temperature",
        "tool_choice",
        "tools",
        "top_p",
        "user",
    }
)
_STOP = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
_DATA_URL = re.compile(r"data:(image/[a-z.+-]+);base64,(.+)", re.DOTALL)


def request_of(body: Json) -> Json:
    """The messages request for a chat completion request. Raises Refusal (400)."""
    try:
        return _request_of(body)
    except (AttributeError, KeyError, TypeError) as error:
        raise bad_request(
            "invalid_value", f"the request is not formed as a chat completion: {error}"
        ) from error


def _request_of(body: Json) -> Json:
    for name, value in body.items():
        if name not in _READ and not any(value is n or value == n for n in _NEUTRAL.get(name, ())):
            raise _no_counterpart(name)
    system, messages = _conversation(body.get("messages"))
    asked: Json = {"model": body["model"], "max_tokens": _max_tokens(body), "messages": messages}
    if system:
        asked["system"] = system
    for name in ("temperature", "top_p", "stream"):
        if body.get(name) is not None:
            asked[name] = body[name]
    if (body.get("temperature") or 0) > 1:
        raise _refused("temperature", "temperature above 1 has no counterpart at this model's vendor")
    if (stop := body.get("stop")) is not None:
        asked["stop_sequences"] = [stop] if isinstance(stop, str) else stop
    if body.get("user") is not None:
        asked["metadata"] = {"user_id": body["user"]}
    return asked | _tools(body)


def _max_tokens(body: Json) -> int:
    found = body.get("max_completion_tokens") or body.get("max_tokens")
    if not isinstance(found, int):
        raise _refused("max_tokens", "this model's vendor needs a limit: send max_tokens")
    return found


def _conversation(said: object) -> tuple[list[Json], list[Json]]:
    """System blocks, and the messages; neighbours of one role become one message, as the vendor wants it."""
    system: list[Json] = []
    messages: list[Json] = []
    for number, message in enumerate(cast(list[Json], said if isinstance(said, list) else [])):
        where = f"messages[{number}]"
        role = message.get("role")
        if unknown := message.keys() - {"role", "content", "tool_calls", "tool_call_id", "refusal"}:
            raise _no_counterpart(f"{where}.{min(unknown)}")
        if message.get("refusal") is not None:
            raise _no_counterpart(f"{where}.refusal")
        if role in ("system", "developer"):
            if messages:
                raise _refused(where, f"{where}: a {role} message can only come first at this model's vendor")
            system += _blocks(message.get("content"), where)
        elif role in ("user", "assistant", "tool"):
            _append(messages, "assistant" if role == "assistant" else "user", _turn(message, where))
        else:
            raise _refused(f"{where}.role", f"{where}.role: {role!r} has no counterpart")
    return system, messages


def _append(messages: list[Json], role: str, blocks: list[Json]) -> None:
    if messages and messages[-1]["role"] == role:
        messages[-1]["content"] += blocks
    else:
        messages.append({"role": role, "content": blocks})


def _turn(message: Json, where: str) -> list[Json]:
    blocks = _blocks(message.get("content"), where)
    if message["role"] == "tool":
        result = {"type": "tool_result", "tool_use_id": message.get("tool_call_id"), "content": blocks}
        return [result]
    for number, call in enumerate(cast(list[Json], message.get("tool_calls") or [])):
        blocks.append(_tool_use(call, f"{where}.tool_calls[{number}]"))
    return blocks


def _tool_use(call: Json, where: str) -> Json:
    function = call.get("function")
    if call.get("type") != "function" or not isinstance(function, dict):
        raise _no_counterpart(where)
    try:
        given = msgspec.json.decode(cast(Json, function).get("arguments") or "{}", type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise _refused(where, f"{where}: the arguments are no JSON object: {error}") from error
    return {
        "type": "tool_use",
        "id": call.get("id"),
        "name": cast(Json, function).get("name"),
        "input": given,
    }


def _blocks(content: object, where: str) -> list[Json]:
    if content is None or content == "":
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    parts = cast(list[Json], content)
    return [_block(part, f"{where}.content[{number}]") for number, part in enumerate(parts)]


def _block(part: Json, where: str) -> Json:
    if part.get("type") == "text" and part.keys() <= {"type", "text"}:
        return {"type": "text", "text": part.get("text")}
    image = part.get("image_url")
    if part.get("type") != "image_url" or not isinstance(image, dict):
        raise _no_counterpart(where)
    if cast(Json, image).get("detail") not in (None, "auto"):
        raise _no_counterpart(f"{where}.image_url.detail")
    url = str(cast(Json, image).get("url"))
    if data := _DATA_URL.fullmatch(url):
        source = {"type": "base64", "media_type": data[1], "data": data[2]}
    else:
        source = {"type": "url", "url": url}
    return {"type": "image", "source": source}


def _tools(body: Json) -> Json:
    asked: Json = {}
    if body.get("tools"):
        tools = cast(list[Json], body["tools"])
        asked["tools"] = [_tool(tool, f"tools[{number}]") for number, tool in enumerate(tools)]
    choice = body.get("tool_choice")
    if choice is not None:
        asked["tool_choice"] = _tool_choice(choice)
    if body.get("parallel_tool_calls") is False:
        asked.setdefault("tool_choice", {"type": "auto"})["disable_parallel_tool_use"] = True
    return asked


def _tool(tool: Json, where: str) -> Json:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict):
        raise _no_counterpart(where)
    told = cast(Json, function)
    if told.get("strict"):
        raise _no_counterpart(f"{where}.function.strict")
    schema = told.get("parameters") or {"type": "object", "properties": {}}
    described = {"description": told["description"]} if told.get("description") else {}
    return {"name": told.get("name"), **described, "input_schema": schema}


def _tool_choice(choice: object) -> Json:
    words = {"auto": "auto", "none": "none", "required": "any"}
    if isinstance(choice, str) and choice in words:
        return {"type": words[choice]}
    if isinstance(choice, dict) and cast(Json, choice).get("type") == "function":
        return {"type": "tool", "name": cast(Json, choice)["function"]["name"]}
    raise _no_counterpart("tool_choice")


def _no_counterpart(name: str) -> Refusal:
    return _refused(name, f"{name} has no counterpart at this model's vendor")


def _refused(name: str, message: str) -> Refusal:
    return bad_request("unsupported_parameter", message, param=name)


# answers


def completion_of(message: Json, created: int) -> Json:
    """The chat completion for a finished message. Raises ValueError for a part of a kind unknown here."""
    said: Json = {"role": "assistant", "content": None}
    for block in cast(list[Json], message["content"]):
        kind = block["type"]
        if kind == "text":
            said["content"] = (said["content"] or "") + block["text"]
        elif kind == "thinking":
            said["reasoning_content"] = said.get("reasoning_content", "") + block["thinking"]
        elif kind == "tool_use":
            arguments = msgspec.json.encode(block["input"]).decode()
            said.setdefault("tool_calls", []).append(_call(block, arguments))
        elif kind != "redacted_thinking":
            raise ValueError(f"content of type {kind!r}")
    return {
        "id": message["id"],
        "object": "chat.completion",
        "created": created,
        "model": message["model"],
        "choices": [{"index": 0, "message": said, "finish_reason": _finish(message["stop_reason"])}],
        "usage": usage_of(message["usage"]),
    }


def usage_of(usage: Json) -> Json:
    """There, input tokens leave out what a cache gave or took; here, prompt tokens are all of them."""
    cached, written = (int(usage.get(f"cache_{n}_input_tokens") or 0) for n in ("read", "creation"))
    prompt = int(usage.get("input_tokens") or 0) + cached + written
    completion = int(usage.get("output_tokens") or 0)
    details: Json = {"cached_tokens": cached}
    if written:  # dearer than other prompt tokens, and the dearer the longer they are kept
        details |= {"cache_write_tokens": written}
        details |= (
            {"cache_creation_token_details": usage["cache_creation"]} if "cache_creation" in usage else {}
        )
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": details,
    }


def _call(block: Json, arguments: str) -> Json:
    return {
        "id": block["id"],
        "type": "function",
        "function": {"name": block["name"], "arguments": arguments},
    }


def _finish(reason: str) -> str:
    if reason not in _STOP:
        raise ValueError(f"stop_reason {reason!r}")
    return _STOP[reason]


class Stream:
    """Turns the events of one streamed message into chunks, in order; `feed` each event's JSON.

    ``include_usage`` adds the last chunk with usage, as `stream_options` asks. Raises ValueError for a kind
    of content unknown here.
    """

    def __init__(self, created: int, *, include_usage: bool) -> None:
        self._base: Json = {"object": "chat.completion.chunk", "created": created}
        self._include_usage = include_usage
        self._usage: Json = {}
        self._calls = -1
        self._on: dict[str, Callable[[Json], Iterator[Json]]] = {
            "message_start": self._started,
            "content_block_start": self._block_started,
            "content_block_delta": self._grown,
            "message_delta": self._ending,
        }

    def feed(self, event: Json) -> Iterator[Json]:
        """Chunks for one event; an error event becomes ``{"error": …}``, a ping nothing."""
        if event["type"] == "error":
            yield {"error": event["error"]}
        elif event["type"] in self._on:
            yield from self._on[event["type"]](event)

    def _started(self, event: Json) -> Iterator[Json]:
        message = event["message"]
        self._base = {"id": message["id"], **self._base, "model": message["model"]}
        self._usage = dict(message["usage"])
        yield self._chunk({"role": "assistant", "content": ""})

    def _block_started(self, event: Json) -> Iterator[Json]:
        block = event["content_block"]
        if block["type"] == "tool_use":
            self._calls += 1
            yield self._chunk({"tool_calls": [{"index": self._calls, **_call(block, "")}]})
        elif block["type"] not in ("text", "thinking", "redacted_thinking"):
            raise ValueError(f"content of type {block['type']!r}")

    def _grown(self, event: Json) -> Iterator[Json]:
        delta = event["delta"]
        kind = delta["type"]
        if kind == "text_delta":
            yield self._chunk({"content": delta["text"]})
        elif kind == "thinking_delta":
            yield self._chunk({"reasoning_content": delta["thinking"]})
        elif kind == "input_json_delta":
            piece = {"arguments": delta["partial_json"]}
            yield self._chunk({"tool_calls": [{"index": self._calls, "function": piece}]})

    def _ending(self, event: Json) -> Iterator[Json]:
        self._usage |= event["usage"]
        yield self._chunk({}, _finish(event["delta"]["stop_reason"]))
        if self._include_usage:
            yield {**self._base, "choices": [], "usage": usage_of(self._usage)}

    def _chunk(self, delta: Json, finish: str | None = None) -> Json:
        return {**self._base, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
