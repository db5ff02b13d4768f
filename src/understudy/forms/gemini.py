"""Asking Gemini in its own form for an application that speaks chat completions.

Strict, as `anthropic` is. A function call's ``thoughtSignature`` travels in the tool call's
``extra_content``, where Google's own OpenAI-compatible endpoint has it; a call that comes back without one,
because another model made it or its client keeps no extras, is given the value that Google documents for it.
``thinking`` is read in Anthropic's form. It ignores transport and rules (gateway).

Sources: ai.google.dev, generateContent and streamGenerateContent (v1beta), "Thought signatures", "OpenAI
compatibility" (reasoning_effort), "File input methods".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from hashlib import blake2b
from typing import cast
from urllib.parse import quote

import msgspec

from understudy.forms import chat
from understudy.forms.chat import Counts, Left
from understudy.forms.events import read_object
from understudy.forms.fault import Told, Unmappable, Unreadable, VendorError
from understudy.protocol import Json

_CONFIG = {
    "temperature": "temperature",
    "top_p": "topP",
    "top_k": "topK",
    "n": "candidateCount",
    "seed": "seed",
    "presence_penalty": "presencePenalty",
    "frequency_penalty": "frequencyPenalty",
}
"""Parameters that generationConfig has under its own names."""
_READ = frozenset(
    {
        *_CONFIG,
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "messages",
        "model",
        "reasoning_effort",
        "response_format",
        "stop",
        "stream",
        "stream_options",
        "thinking",
        "tool_choice",
        "tools",
        "top_logprobs",
    }
)
_BUDGETS = {"none": 0, "minimal": 1024, "low": 1024, "medium": 8192, "high": 24_576}
"""Thinking tokens of reasoning_effort for models that take a budget, by Google's own table."""
_LEVELS = frozenset({"minimal", "low", "medium", "high"})
_LEVELLED = re.compile(r"(?:models/)?gemini-(?:[3-9]|\d\d)")
"""Models that take a level of thinking in place of a budget, and insist on signatures."""
UNSIGNED = "skip_thought_signature_validator"
"""The signature of a function call that this vendor did not make, or whose signature is lost."""
_FINISH = {
    "STOP": "stop",
    "MAX_TOKENS": "length",
    "SAFETY": "content_filter",
    "RECITATION": "content_filter",
    "BLOCKLIST": "content_filter",
    "PROHIBITED_CONTENT": "content_filter",
    "SPII": "content_filter",
    "IMAGE_SAFETY": "content_filter",
}
"""Another reason, such as ``MALFORMED_FUNCTION_CALL``, is passed on in the vendor's word, in lower case."""
_AUDIO = {"wav": "audio/wav", "mp3": "audio/mp3"}
_BY_ENDING = {
    "gif": "image/gif",
    "heic": "image/heic",
    "jpeg": "image/jpeg",
    "jpg": "image/jpeg",
    "pdf": "application/pdf",
    "png": "image/png",
    "webp": "image/webp",
}
_STATUSES = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}


def request(asked: Json, left: Left) -> Json:
    """The generateContent request for a chat completion request. Raises Unmappable."""
    chat.check_parameters(asked, _READ, left)
    system, contents = _conversation(asked, left)
    body: Json = {"contents": contents}
    if system:
        body["systemInstruction"] = {"parts": system}
    if config := _config(asked):
        body["generationConfig"] = config
    return body | _tools(asked)


def _config(asked: Json) -> Json:
    config = {there: asked[here] for here, there in _CONFIG.items() if asked.get(here) is not None}
    if (limit := chat.max_tokens_of(asked)) is not None:
        config["maxOutputTokens"] = limit
    if stops := chat.stops_of(asked):
        config["stopSequences"] = stops
    if asked.get("logprobs"):
        config["responseLogprobs"] = True
        if asked.get("top_logprobs"):
            config["logprobs"] = asked["top_logprobs"]
    if thinking := _thinking(asked):
        config["thinkingConfig"] = thinking
    return config | _format(asked)


def _format(asked: Json) -> Json:
    if (schema := chat.schema_of(asked)) is not None:
        return {"responseMimeType": "application/json", "responseJsonSchema": schema}
    form = asked.get("response_format")
    if form == {"type": "json_object"}:
        return {"responseMimeType": "application/json"}
    if not chat.is_neutral(chat.NEUTRAL, "response_format", form):
        raise Unmappable("response_format")
    return {}


def _thinking(asked: Json) -> Json:
    thinking = cast(Json, asked.get("thinking") or {})
    kind = thinking.get("type")
    if kind == "enabled":
        return {"thinkingBudget": thinking.get("budget_tokens"), "includeThoughts": True}
    if kind == "disabled":
        return {"thinkingBudget": 0}
    if kind not in (None, "adaptive"):
        raise Unmappable("thinking", f"thinking of type {kind!r} has no counterpart at this model's vendor")
    shown = {"includeThoughts": True} if kind == "adaptive" else {}
    effort = asked.get("reasoning_effort")
    if effort is None:
        return shown
    if _LEVELLED.match(str(asked["model"])) and effort in _LEVELS:
        return {"thinkingLevel": effort, **shown}
    if effort not in _BUDGETS or _LEVELLED.match(str(asked["model"])):
        raise Unmappable("reasoning_effort", f"reasoning_effort {effort!r} has no counterpart at this model")
    return {"thinkingBudget": _BUDGETS[effort], **shown}


def _conversation(asked: Json, left: Left) -> tuple[list[Json], list[Json]]:
    """System parts, and the contents; neighbours of one role become one, as answers of tools must."""
    system: list[Json] = []
    contents: list[Json] = []
    names: dict[str, str] = {}
    for where, message in chat.messages_of(asked):
        role = message.get("role")
        if role in ("system", "developer"):
            if contents:
                raise Unmappable(where, f"{where}: a {role} message can only come first at this vendor")
            chat.check_message(message, where, ())
            system += _parts(message.get("content"), where, left)
        elif role == "user":
            chat.check_message(message, where, ())
            _append(contents, "user", _parts(message.get("content"), where, left))
        elif role == "tool":
            _append(contents, "user", _tool_result(message, where, names, left))
        elif role == "assistant":
            names |= {call.id: call.name for _, call in chat.calls_of(message, where)}
            signed = bool(_LEVELLED.match(str(asked["model"])))
            _append(contents, "model", _assistant(message, where, left, signed))
        else:
            raise Unmappable(f"{where}.role", f"{where}.role: {role!r} has no counterpart")
    return system, contents


def _append(contents: list[Json], role: str, parts: list[Json]) -> None:
    if contents and contents[-1]["role"] == role:
        contents[-1]["parts"] += parts
    else:
        contents.append({"role": role, "parts": parts})


def _assistant(message: Json, where: str, left: Left, signed: bool) -> list[Json]:
    chat.check_message(message, where, ("tool_calls", "reasoning_content", "thinking_blocks", "refusal"))
    for name in ("reasoning_content", "thinking_blocks"):
        if message.get(name):
            left.out(f"messages.{name}")
    parts = _parts(message.get("content"), where, left)
    if message.get("refusal"):
        parts.append({"text": message["refusal"]})
    for number, (path, call) in enumerate(chat.calls_of(message, where)):
        part: Json = {"functionCall": {"name": call.name, "args": call.given(path)}}
        signature = cast(Json, call.extra.get("google") or {}).get("thought_signature")
        if signature or (signed and number == 0):
            part["thoughtSignature"] = signature or UNSIGNED
        parts.append(part)
    return parts


def _tool_result(message: Json, where: str, names: dict[str, str], left: Left) -> list[Json]:
    chat.check_message(message, where, ("tool_call_id", "is_error"))
    called = str(message.get("tool_call_id"))
    if called not in names:
        raise Unmappable(
            f"{where}.tool_call_id", f"{where}.tool_call_id: no message before it calls a tool as {called!r}"
        )
    parts = _parts(message.get("content"), where, left)
    text = "".join(part["text"] for part in parts if "text" in part)
    told = {"error" if message.get("is_error") else "output": text}
    result: Json = {"name": names[called], "response": told}
    if media := [part for part in parts if "text" not in part]:
        result["parts"] = media
    return [{"functionResponse": result}]


def _parts(content: object, where: str, left: Left) -> list[Json]:
    at = where if isinstance(content, str) else f"{where}.content"
    return [_part(part, path, left) for path, part in chat.parts_of(content, at)]


def _part(part: Json, where: str, left: Left) -> Json:
    if part.get("cache_control"):
        left.out("cache_control")  # this vendor caches what repeats by itself
    kind = part.get("type")
    if kind == "image_url":
        chat.only(part, where, "type", "image_url", "cache_control")
        return _media(chat.image_url(part, where), f"{where}.image_url")
    if kind == "input_audio":
        return _audio(cast(Json, part.get("input_audio") or {}), where)
    if kind == "file":
        file = cast(Json, part.get("file") or {})
        chat.only(file, f"{where}.file", "file_data", "filename")
        return _media(str(file.get("file_data")), f"{where}.file")
    chat.only(part, where, "type", "text", "refusal", "cache_control")
    return {"text": chat.text_part(part, where)}


def _audio(audio: Json, where: str) -> Json:
    media_type = _AUDIO.get(str(audio.get("format")))
    if media_type is None:
        raise Unmappable(f"{where}.input_audio.format")
    return {"inlineData": {"mimeType": media_type, "data": audio.get("data")}}


def _media(url: str, where: str) -> Json:
    """What a URL points to: the vendor fetches it itself, and wants to know its type before."""
    data = chat.data_url(url)
    if data is not None:
        return {"inlineData": {"mimeType": data.media_type, "data": data.base64}}
    ending = re.sub(r"[?#].*", "", url).rpartition(".")[2].lower()
    if not url.startswith("https://") or ending not in _BY_ENDING:
        raise Unmappable(
            where,
            f"{where}: this vendor takes data, or an https URL ending in .{', .'.join(sorted(_BY_ENDING))}",
        )
    return {"fileData": {"mimeType": _BY_ENDING[ending], "fileUri": url}}


def _tools(asked: Json) -> Json:
    body: Json = {}
    declared: list[Json] = []
    for where, function in chat.functions_of(asked):
        if function.strict:
            raise Unmappable(f"{where}.function.strict")
        described = {"description": function.description} if function.description else {}
        declared.append({"name": function.name, **described, "parametersJsonSchema": function.parameters})
    if declared:
        body["tools"] = [{"functionDeclarations": declared}]
    if asked.get("tool_choice") is not None:
        body["toolConfig"] = {"functionCallingConfig": _tool_choice(asked["tool_choice"])}
    return body


def _tool_choice(choice: object) -> Json:
    name = chat.chosen_function(choice)
    if name is not None:
        return {"mode": "ANY", "allowedFunctionNames": [name]}
    words = {"auto": "AUTO", "none": "NONE", "required": "ANY"}
    if choice not in words:
        raise Unmappable("tool_choice")
    return {"mode": words[str(choice)]}


# answers


def answer(body: Json, created: int) -> Json:
    """The chat completion for a finished answer. Raises Unreadable for a part of a kind unknown here."""
    head = {"id": body.get("responseId") or "", "created": created, "model": body.get("modelVersion") or ""}
    candidates = cast(list[Json], body.get("candidates") or [])
    choices = [_choice(number, candidate, str(head["id"])) for number, candidate in enumerate(candidates)]
    if not choices:
        choices = [_blocked(body)]
    usage = cast(Json, body.get("usageMetadata") or {})
    return chat.completion(head, choices, counts(usage).usage() if usage else None)


def _choice(number: int, candidate: Json, answer_id: str) -> Json:
    said: Json = {"role": "assistant", "content": None}
    index = int(candidate.get("index") or number)
    for part in _candidate_parts(candidate):
        _merge(said, _delta(part, f"{answer_id}/{index}", len(said.get("tool_calls") or [])))
    choice: Json = {
        "index": index,
        "message": said,
        "finish_reason": finish(candidate.get("finishReason"), called="tool_calls" in said),
    }
    if scores := _logprobs(candidate):
        choice["logprobs"] = scores
    return choice


def _merge(said: Json, delta: Json) -> None:
    for name, value in delta.items():
        if name == "tool_calls":
            calls = [{k: v for k, v in call.items() if k != "index"} for call in value]
            said.setdefault("tool_calls", []).extend(calls)
        else:
            said[name] = (said.get(name) or "") + value


def _candidate_parts(candidate: Json) -> list[Json]:
    content = cast(Json, candidate.get("content") or {})
    return cast(list[Json], content.get("parts") or [])


def _delta(part: Json, place: str, made: int) -> Json:
    """What a part adds to the message at ``place``, in which ``made`` tools have been called."""
    call = part.get("functionCall")
    if isinstance(call, dict):
        return {"tool_calls": [_called(cast(Json, call), part.get("thoughtSignature"), place, made)]}
    if "text" in part:
        return {"reasoning_content" if part.get("thought") else "content": str(part["text"])}
    kinds = part.keys() - {"thoughtSignature", "thought", "partMetadata"}
    if kinds:
        raise Unreadable(f"a part of kind {min(kinds)!r}")
    return {}


def _called(call: Json, signature: object, place: str, made: int) -> Json:
    """The vendor names its calls on some models alone; a name of ours tells them apart across answers."""
    arguments = msgspec.json.encode(call.get("args") or {})
    ours = blake2b(f"{place}/{made}/{call['name']}".encode() + arguments, digest_size=12).hexdigest()
    id_ = call.get("id") or f"call_{ours}"
    told = {"index": made, **chat.tool_call(str(id_), str(call["name"]), arguments.decode())}
    return told | ({"extra_content": {"google": {"thought_signature": signature}}} if signature else {})


def _blocked(body: Json) -> Json:
    """The prompt itself was refused: there is no candidate."""
    reason = cast(Json, body.get("promptFeedback") or {}).get("blockReason")
    if reason is None:
        raise Unreadable("an answer with neither candidates nor a reason for it")
    message = {"role": "assistant", "content": None, "refusal": f"the prompt was blocked: {reason}"}
    return {"index": 0, "message": message, "finish_reason": "content_filter"}


def _logprobs(candidate: Json) -> Json:
    result = cast(Json, candidate.get("logprobsResult") or {})
    chosen = cast(list[Json], result.get("chosenCandidates") or [])
    tops = cast(list[Json], result.get("topCandidates") or [{}] * len(chosen))
    scored = [
        {
            **_scored(one),
            "top_logprobs": [_scored(other) for other in cast(list[Json], top.get("candidates") or [])],
        }
        for one, top in zip(chosen, tops, strict=True)
    ]
    return {"content": scored} if scored else {}


def _scored(one: Json) -> Json:
    token = str(one.get("token") or "")
    return {"token": token, "logprob": one.get("logProbability", 0.0), "bytes": list(token.encode())}


def counts(usage: Json) -> Counts:
    """There, thoughts are counted beside the candidates; here, the completion is both."""
    thoughts = chat.number(usage, "thoughtsTokenCount")
    return Counts(
        prompt=chat.number(usage, "promptTokenCount") + chat.number(usage, "toolUsePromptTokenCount"),
        completion=chat.number(usage, "candidatesTokenCount") + thoughts,
        cached=chat.number(usage, "cachedContentTokenCount"),
        reasoning=thoughts,
        heard=_audio_tokens(usage, "promptTokensDetails"),
        spoken=_audio_tokens(usage, "candidatesTokensDetails"),
        cached_heard=_audio_tokens(usage, "cacheTokensDetails"),
    )


def _audio_tokens(usage: Json, name: str) -> int:
    details = cast(list[Json], usage.get(name) or [])
    return sum(chat.number(one, "tokenCount") for one in details if one.get("modality") == "AUDIO")


def finish(reason: object, *, called: bool) -> str:
    """Why the answer ended, in a chat completion's word where there is one."""
    if called and reason in ("STOP", None):
        return "tool_calls"
    return _FINISH.get(str(reason), str(reason).lower()) if reason else "stop"


def error(status: int, raw: bytes) -> VendorError:
    """What an error's body says; on the streaming route it is wrapped in a list."""
    try:
        body = read_object(raw.strip().removeprefix(b"[").removesuffix(b"]"))
    except Unreadable:
        return VendorError(status, raw[:500].decode(errors="replace"))
    return _vendor_error(status, cast(Json, body.get("error") or {}))


def _vendor_error(status: int, told: Json) -> VendorError:
    delays = [
        str(detail["retryDelay"])
        for detail in cast(list[Json], told.get("details") or [])
        if str(detail.get("@type")).endswith("RetryInfo") and detail.get("retryDelay")
    ]
    seconds = re.fullmatch(r"(\d{1,6}(?:\.\d{1,9})?)s", delays[0]) if delays else None
    return VendorError(
        status,
        str(told.get("message") or ""),
        str(told.get("status") or ""),
        retry_after_s=float(seconds[1]) if seconds else None,
    )


class Stream:
    """Turns the pieces of a streamed answer into chunks; every piece is an answer of its own.

    This vendor does not say that it is done but by a reason for it, after which the stream ends: the last
    counts may come with it or behind it.
    """

    def __init__(self, created: int) -> None:
        self.done = self.complete = False
        self._head: Json = {"id": "", "created": created, "model": ""}
        self._usage: Json = {}
        self._calls: dict[int, int] = {}
        """Tools called so far, by candidate."""
        self._open: set[int] = set()

    def feed(self, data: bytes) -> Iterator[Told]:
        """What one event's data becomes. Raises Unreadable."""
        body = read_object(data)
        if isinstance(body.get("error"), dict):
            told = cast(Json, body["error"])
            status = _STATUSES.get(str(told.get("status")), int(told.get("code") or 500))
            yield Told(error=_vendor_error(status, told))
            return
        try:
            yield from self._piece(body)
        except (KeyError, TypeError, AttributeError) as fault:
            raise Unreadable(f"a piece that is not formed as documented: {fault}") from fault

    def close(self) -> Iterator[Told]:
        """The counts, which came with every piece and are complete with the last."""
        if self.done and self._usage:
            yield Told(chat.usage_chunk(self._head, counts(self._usage).usage()))

    def _piece(self, body: Json) -> Iterator[Told]:
        self._head["id"] = body.get("responseId") or self._head["id"]
        self._head["model"] = body.get("modelVersion") or self._head["model"]
        self._usage |= cast(Json, body.get("usageMetadata") or {})
        candidates = cast(list[Json], body.get("candidates") or [])
        for number, candidate in enumerate(candidates):
            yield from self._candidate(candidate.get("index") or number, candidate)
        if not candidates and cast(Json, body.get("promptFeedback") or {}).get("blockReason"):
            choice = _blocked(body)
            self.done = True
            yield Told(chat.chunk(self._head, choice["message"], choice["finish_reason"]))

    def _candidate(self, index: int, candidate: Json) -> Iterator[Told]:
        if index not in self._calls:
            self._calls[index] = 0
            self._open.add(index)
            yield Told(chat.chunk(self._head, {"role": "assistant", "content": ""}, index=index))
        for part in _candidate_parts(candidate):
            if delta := _delta(part, f"{self._head['id']}/{index}", self._calls[index]):
                self._calls[index] += "tool_calls" in delta
                yield Told(chat.chunk(self._head, delta, index=index))
        if scores := _logprobs(candidate):
            scored = chat.chunk(self._head, {}, index=index)
            scored["choices"][0]["logprobs"] = scores
            yield Told(scored)
        if reason := candidate.get("finishReason"):
            self._open.discard(index)
            self.done = not self._open
            ended = finish(reason, called=bool(self._calls[index]))
            yield Told(chat.chunk(self._head, {}, ended, index))


def path(model: str, stream: bool) -> str:
    """Behind the endpoint's base URL."""
    return method_path(model, "streamGenerateContent?alt=sse" if stream else "generateContent")


def method_path(model: str, method: str) -> str:
    """Of any method of a model: behind the endpoint's base URL."""
    return f"/models/{quote(model.removeprefix('models/'), safe='')}:{method}"


def resource(model: object) -> str:
    """A model as bodies name it."""
    return f"models/{str(model).removeprefix('models/')}"


def credential(secret: str) -> tuple[str, str]:
    """The header that tells the vendor who asks."""
    return "x-goog-api-key", secret
