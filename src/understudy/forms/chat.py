"""The hub: what every translation needs to know of a chat completion.

Requests reach the hub from `messages` and `responses` and leave it for `anthropic`, `gemini` and `openai`.
The hub's form is OpenAI's, with what others have more of under names that are in use for it: ``thinking`` and
``top_k`` in requests, ``reasoning_content`` and ``thinking_blocks`` in messages, ``is_error`` in messages of
tools, ``extra_content`` in tool calls, ``cache_write_tokens`` in usage. It ignores what any one vendor calls
things.

Source: OpenAI API reference, chat completions (create, streaming).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple, cast

import msgspec

from understudy.forms.fault import Unmappable, Unreadable
from understudy.protocol import Json

Neutral = Mapping[str, tuple[object, ...]]
"""Parameter -> the values that say the same as leaving it out."""

NEUTRAL: Neutral = {
    "audio": (None,),
    "frequency_penalty": (0, None),
    "function_call": (None,),
    "functions": (None, []),
    "logit_bias": ({}, None),
    "logprobs": (False, None),
    "metadata": ({}, None),
    "modalities": (["text"], None),
    "moderation": (None,),
    "n": (1, None),
    "prediction": (None,),
    "presence_penalty": (0, None),
    "reasoning_effort": (None,),
    "response_format": ({"type": "text"}, None),
    "safety_identifier": (None,),
    "seed": (None,),
    "service_tier": ("auto", None),
    "store": (False, None),
    "thinking": (None,),
    "top_k": (None,),
    "top_logprobs": (0, None),
    "user": (None,),
    "verbosity": ("medium", None),
    "web_search_options": (None,),
}
HINTS = frozenset({"prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"})
"""What changes neither an answer nor what is kept of it: left out where it has no counterpart, and named."""

_NEUTRAL_SAID: Neutral = {
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "name": (None,),
    "reasoning_content": (None, ""),
    "refusal": (None, ""),
    "thinking_blocks": (None, []),
    "tool_calls": (None, []),
}


class Left:
    """What a translation left out without changing what is asked for, by name; the application is told."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}

    def out(self, name: str) -> None:
        self._names[name] = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._names)


def check_parameters(body: Json, read: Collection[str], left: Left, neutral: Neutral = NEUTRAL) -> None:
    """Raises Unmappable for the first parameter that is neither read nor says the same as none."""
    for name, value in body.items():
        if name in read:
            continue
        if name in HINTS:
            if value is not None:
                left.out(name)
        elif not is_neutral(neutral, name, value):
            raise Unmappable(name)


def is_neutral(neutral: Neutral, name: str, value: object) -> bool:
    """Whether a value says the same as leaving the parameter out; ``0`` and ``False`` are told apart."""
    return any(
        value == same and isinstance(value, bool) == isinstance(same, bool) for same in neutral.get(name, ())
    )


def check_message(message: Json, where: str, read: Collection[str]) -> None:
    """Raises Unmappable for a field of a message that is neither read nor says nothing."""
    for name, value in message.items():
        if (
            name not in read
            and name not in ("role", "content")
            and not is_neutral(_NEUTRAL_SAID, name, value)
        ):
            raise Unmappable(f"{where}.{name}")


def messages_of(body: Json) -> list[tuple[str, Json]]:
    """Each message with its path. Raises Unmappable for what is no list of them."""
    said = body.get("messages")
    if not isinstance(said, list) or not all(isinstance(m, dict) for m in cast(list[Any], said)):
        raise Unmappable("messages", "messages: expected a list of messages")
    return [(f"messages[{number}]", message) for number, message in enumerate(cast(list[Json], said))]


def parts_of(content: object, where: str) -> list[tuple[str, Json]]:
    """Each part of a message's content with its path; a string is one part of text, nothing none."""
    if content is None or content == "":
        return []
    if isinstance(content, str):
        return [(where, {"type": "text", "text": content})]
    if not isinstance(content, list) or not all(isinstance(p, dict) for p in cast(list[Any], content)):
        raise Unmappable(where, f"{where}: expected text or a list of parts")
    return [(f"{where}[{number}]", part) for number, part in enumerate(cast(list[Json], content))]


def only(part: Json, where: str, *known: str) -> None:
    """Raises Unmappable for a field of an object that is not among those known and holds something."""
    for name, value in part.items():
        if name not in known and value is not None:
            raise Unmappable(f"{where}.{name}")


class Data(NamedTuple):
    """What a data URL holds."""

    media_type: str
    base64: str


_DATA_URL = re.compile(r"data:([a-z]+/[a-z0-9.+-]+);base64,(.+)", re.DOTALL)


def data_url(url: str) -> Data | None:
    """The data in a URL; None for one that points elsewhere."""
    found = _DATA_URL.fullmatch(url)
    return Data(found[1], found[2]) if found else None


def image_url(part: Json, where: str) -> str:
    """The URL of an image part. Raises Unmappable for a level of detail nobody else knows."""
    image = part.get("image_url")
    if not isinstance(image, dict):
        raise Unmappable(f"{where}.image_url", f"{where}.image_url: expected an object with url")
    given = cast(Json, image)
    if given.get("detail") not in (None, "auto"):
        raise Unmappable(f"{where}.image_url.detail")
    only(given, f"{where}.image_url", "url", "detail")
    return str(given.get("url"))


class Function(NamedTuple):
    """A function the model may call."""

    name: str
    description: str
    parameters: Json
    strict: bool


def functions_of(body: Json) -> list[tuple[str, Function]]:
    """The tools of a request with their paths. Raises Unmappable for a tool that is no function."""
    found: list[tuple[str, Function]] = []
    for number, tool in enumerate(cast(list[Json], body.get("tools") or [])):
        where = f"tools[{number}]"
        told = tool.get("function")
        if tool.get("type") != "function" or not isinstance(told, dict):
            raise Unmappable(where, f"{where}: a tool of type {tool.get('type')!r} has no counterpart here")
        function = cast(Json, told)
        only(function, f"{where}.function", "name", "description", "parameters", "strict")
        schema = cast(Json, function.get("parameters") or {"type": "object", "properties": {}})
        described = str(function.get("description") or "")
        found.append(
            (where, Function(str(function.get("name")), described, schema, bool(function.get("strict"))))
        )
    return found


class ToolCall(NamedTuple):
    """A call of a function, as the assistant made it."""

    id: str
    name: str
    arguments: str
    """JSON, as it was written."""
    extra: Json
    """What its vendor wants back with it (``extra_content``)."""

    def given(self, where: str) -> Json:
        """The arguments as an object. Raises Unmappable where they are none."""
        try:
            return msgspec.json.decode(self.arguments or "{}", type=dict)
        except msgspec.MsgspecError as error:
            raise Unmappable(where, f"{where}: the arguments are no JSON object: {error}") from error


def calls_of(message: Json, where: str) -> list[tuple[str, ToolCall]]:
    """The tool calls of an assistant's message with their paths."""
    found: list[tuple[str, ToolCall]] = []
    for number, call in enumerate(cast(list[Json], message.get("tool_calls") or [])):
        path = f"{where}.tool_calls[{number}]"
        told = call.get("function")
        if call.get("type", "function") != "function" or not isinstance(told, dict):
            raise Unmappable(path)
        function = cast(Json, told)
        extra = cast(Json, call.get("extra_content") or {})
        made = ToolCall(
            str(call.get("id")), str(function.get("name")), str(function.get("arguments") or ""), extra
        )
        found.append((path, made))
    return found


def chosen_function(choice: object) -> str | None:
    """The name in a tool_choice that wants one function; None for a word. Raises Unmappable for more."""
    if isinstance(choice, str):
        return None
    wanted = cast(Json, choice) if isinstance(choice, dict) else {}
    function = wanted.get("function")
    if wanted.get("type") != "function" or not isinstance(function, dict):
        raise Unmappable("tool_choice")
    return str(cast(Json, function).get("name"))


def schema_of(body: Json) -> Json | None:
    """The JSON schema that an answer must follow; None where none is asked for."""
    form = body.get("response_format")
    if not isinstance(form, dict) or cast(Json, form).get("type") != "json_schema":
        return None
    told = cast(Json, form).get("json_schema")
    if not isinstance(told, dict):
        raise Unmappable("response_format.json_schema", "response_format.json_schema: expected an object")
    return cast(Json, cast(Json, told).get("schema") or {})


def max_tokens_of(body: Json) -> int | None:
    """The limit on an answer, by either of its names."""
    found = body.get("max_completion_tokens", body.get("max_tokens"))
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def stops_of(body: Json) -> list[str]:
    """The stop sequences."""
    stop = body.get("stop")
    return [] if stop is None else [stop] if isinstance(stop, str) else cast(list[str], stop)


def text_part(part: Json, where: str) -> str:
    """The text of a part that must be one. Raises Unmappable for another kind."""
    if part.get("type") not in ("text", "refusal"):
        raise Unmappable(where, f"{where}: a part of type {part.get('type')!r} has no counterpart here")
    return str(part.get("text") or part.get("refusal") or "")


# answers


def thought_of(said: Json) -> str:
    """What a message or delta shows of the model's thoughts, under either name that is in use for it."""
    return str(said.get("reasoning_content") or said.get("reasoning") or "")


_1H = "ephemeral_1h_input_tokens"


class Counts(NamedTuple):
    """Tokens of a call as OpenAI counts: what was cached is in the prompt, thoughts are in the completion."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    written: int = 0
    """To a cache."""
    reasoning: int = 0
    heard: int = 0
    """Tokens of audio in the prompt."""
    spoken: int = 0
    written_1h: int = 0
    """Of those written, the ones that are kept for an hour."""
    cached_heard: int = 0
    """Of those cached, the ones that are audio."""

    def usage(self) -> Json:
        """The usage object of a chat completion; details that are nothing are left out."""
        prompt = {
            "cached_tokens": self.cached,
            "cache_write_tokens": self.written,
            "audio_tokens": self.heard,
            "cached_tokens_details": _counted({"audio_tokens": self.cached_heard}),
            "cache_creation_token_details": _counted({_1H: self.written_1h}),
        }
        completion = {"reasoning_tokens": self.reasoning, "audio_tokens": self.spoken}
        told: Json = {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": 0} | _counted(prompt),
        }
        return told | ({"completion_tokens_details": spent} if (spent := _counted(completion)) else {})


def _counted(counts: Mapping[str, int | Json]) -> Json:
    return {name: count for name, count in counts.items() if count}


def counts_of(usage: Json) -> Counts:
    """The inverse of `Counts.usage`."""
    prompt = cast(Json, usage.get("prompt_tokens_details") or {})
    completion = cast(Json, usage.get("completion_tokens_details") or {})
    return Counts(
        prompt=number(usage, "prompt_tokens"),
        completion=number(usage, "completion_tokens"),
        cached=number(prompt, "cached_tokens"),
        written=number(prompt, "cache_write_tokens"),
        reasoning=number(completion, "reasoning_tokens"),
        heard=number(prompt, "audio_tokens"),
        spoken=number(completion, "audio_tokens"),
        written_1h=number(cast(Json, prompt.get("cache_creation_token_details") or {}), _1H),
        cached_heard=number(cast(Json, prompt.get("cached_tokens_details") or {}), "audio_tokens"),
    )


def number(counts: Json, name: str) -> int:
    """A count; 0 where it is not told. Raises Unreadable for one that is no number."""
    try:
        return int(counts.get(name) or 0)
    except (TypeError, ValueError) as error:
        raise Unreadable(f"{name}: {counts.get(name)!r} is no count") from error


def tool_call(id_: str, name: str, arguments: str) -> Json:
    """A tool call of an assistant's message."""
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


def completion(head: Json, choices: Iterable[Json], usage: Json | None) -> Json:
    """A chat completion; ``head`` has id, created and model."""
    whole: Json = {**head, "object": "chat.completion", "choices": list(choices)}
    return whole if usage is None else {**whole, "usage": usage}


def chunk(head: Json, delta: Json, finish: str | None = None, index: int = 0) -> Json:
    """A chunk of a streamed chat completion."""
    choice = {"index": index, "delta": delta, "finish_reason": finish}
    return {**head, "object": "chat.completion.chunk", "choices": [choice]}


def usage_chunk(head: Json, usage: Json) -> Json:
    """The chunk behind the last one, which has the usage alone."""
    return {**head, "object": "chat.completion.chunk", "choices": [], "usage": usage}


def first_message(body: Json) -> tuple[Json, str]:
    """Message and finish reason of a completion's first choice. Raises Unreadable."""
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices:
        raise Unreadable("a chat completion without choices")
    choice = cast(Json, choices[0])
    message = choice.get("message")
    if not isinstance(message, dict):
        raise Unreadable("a choice without a message")
    return cast(Json, message), str(choice.get("finish_reason") or "stop")
