"""Chat, completion and usage types of the OpenAI protocol, and the assembly of server-sent events.

Only what rooms need to talk about a call is typed; a request or answer keeps every other field untouched in
its JSON. It ignores transport (endpoint, gateway) and other vendors' forms (forms).

Source: OpenAI API reference, chat completions and completions; WHATWG HTML §9.2 for server-sent events.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import msgspec

Json = dict[str, Any]
Modality = Literal["text", "image", "audio", "file"]


class Usage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Tokens of one call. Cached and cache-write tokens are part of ``prompt_tokens``, reasoning tokens of
    ``completion_tokens``, and ``output_audio_tokens`` of ``audio_tokens``: each can have its own price.

    ``cached_audio_tokens`` are counted in ``cached_tokens`` and in ``audio_tokens``,
    ``cache_write_1h_tokens`` (kept for an hour, not for minutes) in ``cache_write_tokens``.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    audio_tokens: int = 0
    output_audio_tokens: int = 0
    cache_write_tokens: int = 0
    cached_audio_tokens: int = 0
    cache_write_1h_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Cost(NamedTuple):
    """What a call cost, and by which price."""

    usd: float
    price_date: str
    """Day (ISO 8601) from which the price holds; empty where its source names none."""
    source: str
    """Where the price comes from, e.g. ``genai-prices 0.2.3`` or the overlay's file."""


PLANNED_ON = 1_000_000
"""Calls that a plan reads at most unless somebody asks for more."""


class CallShape(msgspec.Struct, frozen=True, gc=False):
    """What planning needs to know of one recorded call; no text.

    There may be hundreds of thousands, and no cycle passes through one: the collector need not walk them.
    """

    at: float
    """Unix seconds."""
    usage: Usage
    modalities: frozenset[Modality]
    """Kinds of input in the request."""
    features: frozenset[str]
    """Of: stream, tools, json_schema, json_object, logprobs, n, seed, stop, system."""
    max_tokens: int
    """Output limit asked for; 0 when none."""
    task: str
    """Task id, or empty."""
    completed: bool | None
    """Whether the task succeeded, by feedback; None when nobody said."""
    parameters: frozenset[str] | None = None
    """What it sends to steer sampling, as `parameters_of` names it; None when that was not kept."""


class Answer(NamedTuple):
    """What one call to an endpoint brought back."""

    status: int
    body: Json
    """The JSON answer; for a stream the assembled chat completion."""
    ttft_s: float
    """Seconds to the first byte."""
    total_s: float
    attempts: int

    @property
    def text(self) -> str:
        return answer_text(self.body)

    @property
    def usage(self) -> Usage:
        return usage_of(self.body) or Usage()


def answer_text(body: Mapping[str, Any]) -> str:
    """The first choice's text of a chat or text completion; empty for tool calls and errors."""
    choices = body.get("choices") or []
    if not choices:
        return ""
    first = choices[0]
    if "message" in first:
        return text_of(first["message"].get("content"))
    return str(first.get("text") or "")


def text_of(content: object) -> str:
    """The text in a message's content, be it a string, None or a list of parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = cast(list[Json], content)
    return "".join(
        str(part.get("text") or "") for part in parts if part.get("type") in ("text", "input_text")
    )


def usage_of(body: Mapping[str, Any]) -> Usage | None:
    """Usage of an answer, details included; None when the answer has none.

    What a cache gave and took is read in OpenAI's words and in those of LiteLLM for Anthropic's
    (``cache_creation_tokens``, ``cache_creation_token_details``).
    """
    raw = body.get("usage")
    if not isinstance(raw, dict):
        return None
    usage = cast(Json, raw)
    prompt_details = cast(Json, usage.get("prompt_tokens_details") or {})
    completion_details = cast(Json, usage.get("completion_tokens_details") or {})
    cached_details = cast(Json, prompt_details.get("cached_tokens_details") or {})
    write_details = cast(Json, prompt_details.get("cache_creation_token_details") or {})
    written = prompt_details.get("cache_write_tokens") or prompt_details.get("cache_creation_tokens") or 0
    spoken = int(completion_details.get("audio_tokens") or 0)
    return Usage(
        prompt_tokens=int(usage.get("prompt_tokens") or 0),
        completion_tokens=int(usage.get("completion_tokens") or 0),
        cached_tokens=int(prompt_details.get("cached_tokens") or 0),
        reasoning_tokens=int(completion_details.get("reasoning_tokens") or 0),
        audio_tokens=int(prompt_details.get("audio_tokens") or 0) + spoken,
        output_audio_tokens=spoken,
        cache_write_tokens=int(written),
        cached_audio_tokens=int(cached_details.get("audio_tokens") or 0),
        cache_write_1h_tokens=int(write_details.get("ephemeral_1h_input_tokens") or 0),
    )


_PART_MODALITY: dict[str, Modality] = {
    "image_url": "image",
    "input_image": "image",
    "input_audio": "audio",
    "file": "file",
    "input_file": "file",
}


def modalities_of(request: Mapping[str, Any]) -> frozenset[Modality]:
    """Kinds of input in a chat request."""
    found: set[Modality] = {"text"}
    for message in request.get("messages") or []:
        content = message.get("content")
        if isinstance(content, list):
            parts = cast(list[Json], content)
            found.update(_PART_MODALITY[p["type"]] for p in parts if p.get("type") in _PART_MODALITY)
    return frozenset(found)


def features_of(request: Mapping[str, Any]) -> frozenset[str]:
    """Protocol features a request uses, as named in `CallShape.features`."""
    found = {name for name in ("stream", "tools", "logprobs", "seed", "stop") if request.get(name)}
    if int(request.get("n") or 1) > 1:
        found.add("n")
    response_format = cast(Json, request.get("response_format") or {})
    if response_format.get("type") in ("json_schema", "json_object"):
        found.add(str(response_format["type"]))
    if any(m.get("role") in ("system", "developer") for m in request.get("messages") or []):
        found.add("system")
    return frozenset(found)


_DEFAULTS: dict[str, float | None] = {
    "temperature": 1,
    "top_p": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "top_k": None,
    "logit_bias": None,
    "reasoning_effort": None,
}
"""OpenAI API reference, "Create chat completion"; None where no value stands for leaving it out."""


def parameters_of(request: Mapping[str, Any]) -> frozenset[str]:
    """What a request sends to steer sampling, as named in `CallShape.parameters`.

    Each parameter whose value is not the protocol's default; a temperature of the default is
    ``temperature=1``, one above it is ``temperature>1`` besides.
    """
    sent = {name: request[name] for name in _DEFAULTS if request.get(name) is not None}
    found = {name for name, value in sent.items() if value != _DEFAULTS[name]}
    if "temperature" in sent and "temperature" not in found:
        found.add("temperature=1")
    elif float(sent.get("temperature", 0)) > 1:
        found.add("temperature>1")
    return frozenset(found)


def prompt_hash(request: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of what the model is asked: messages or prompt and tools, not model or sampling.

    Equal prompts fall on the same side of the train / held-out split.
    """
    asked = {name: request[name] for name in ("messages", "prompt", "input", "tools") if name in request}
    return hashlib.sha256(msgspec.json.encode(asked, order="sorted")).hexdigest()


def iter_events(raw: bytes) -> Iterator[bytes]:
    """The data of each server-sent event in ``raw``, in order, without ``[DONE]``.

    Lines may end in LF, CR or CRLF; several data lines of one event are joined with LF; comments and other
    fields are skipped; an event cut off at the end is still yielded.
    """
    data: list[bytes] = []
    for line in [*raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n"), b""]:
        if line.startswith(b"data:"):
            data.append(line[6:] if line[5:6] == b" " else line[5:])
        elif not line and data:
            event, data = b"\n".join(data), []
            if event.strip() != b"[DONE]":
                yield event


def assemble_stream(raw: bytes) -> Json:
    """One chat (or text) completion from a stream of chunks, as if it had not been streamed.

    Chunks that are not JSON are skipped: the relay already gave them to the client as they were. An error
    event stays under ``error``.
    """
    return assemble_chunks(_iter_chunks(raw))


def _iter_chunks(raw: bytes) -> Iterator[Json]:
    for event in iter_events(raw):
        try:
            chunk = msgspec.json.decode(event)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
        if isinstance(chunk, dict):
            yield cast(Json, chunk)


def assemble_chunks(chunks: Iterable[Json]) -> Json:
    """`assemble_stream` for chunks already decoded."""
    body: Json = {"object": "chat.completion", "choices": []}
    choices: dict[int, Json] = {}
    for chunk in chunks:
        _merge_chunk(body, choices, chunk)
    body["choices"] = [choices[index] for index in sorted(choices)]
    return body


def _merge_chunk(body: Json, choices: dict[int, Json], chunk: Json) -> None:
    for name in ("id", "created", "model", "system_fingerprint", "usage", "error", "service_tier"):
        if chunk.get(name) is not None:
            body[name] = chunk[name]
    if chunk.get("object") == "text_completion":
        body["object"] = "text_completion"
    for piece in cast(list[Json], chunk.get("choices") or []):
        choice = choices.setdefault(int(piece.get("index") or 0), {"index": int(piece.get("index") or 0)})
        if "text" in piece:
            choice["text"] = choice.get("text", "") + (piece["text"] or "")
        if "delta" in piece:
            message = choice.setdefault("message", {"role": "assistant", "content": None})
            _merge_delta(message, cast(Json, piece["delta"] or {}))
        if piece.get("finish_reason") is not None:
            choice["finish_reason"] = piece["finish_reason"]
        if piece.get("logprobs"):
            _merge_logprobs(choice, cast(Json, piece["logprobs"]))


def _merge_delta(message: Json, delta: Json) -> None:
    for name, value in delta.items():
        if name == "tool_calls":
            _merge_tool_calls(message.setdefault("tool_calls", []), cast(list[Json], value or []))
        elif isinstance(value, list):
            message[name] = [*(message.get(name) or []), *cast(list[Any], value)]
        elif isinstance(value, str) and name != "role":
            message[name] = (message.get(name) or "") + value
        elif value is not None:
            message[name] = value


def _merge_tool_calls(calls: list[Json], pieces: Sequence[Json]) -> None:
    for piece in pieces:
        index = int(piece.get("index") or 0)
        while len(calls) <= index:
            calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
        call = calls[index]
        call["id"] = piece.get("id") or call["id"]
        if piece.get("extra_content"):
            call["extra_content"] = piece["extra_content"]
        function = cast(Json, piece.get("function") or {})
        call["function"]["name"] += function.get("name") or ""
        call["function"]["arguments"] += function.get("arguments") or ""


def _merge_logprobs(choice: Json, piece: Json) -> None:
    merged = choice.setdefault("logprobs", {})
    for name, values in piece.items():
        if isinstance(values, list):
            merged[name] = [*(merged.get(name) or []), *cast(list[Any], values)]
