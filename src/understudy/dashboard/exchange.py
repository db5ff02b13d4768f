"""A recorded request and answer as people read them: who said what, which tools, which image.

Whatever was recorded is shown: what has the form of no known protocol is shown as it was sent. It ignores
escaping (the templates do that to everything here) and never fetches what a text points to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple, cast

import msgspec

from understudy.protocol import Json, assemble_stream, iter_events
from understudy.traffic.record import Call

LONGEST = 100_000
"""Characters of one text that a page shows; the file behind the link has all of them."""

_IMAGE = re.compile(r"data:image/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/=\s]+\Z")
"""Pictures that are in the record itself, in formats that hold no script."""
_SOUND = {"wav": "audio/wav", "mp3": "audio/mpeg", "flac": "audio/flac", "opus": "audio/ogg"}
"""OpenAI's names of formats of sound, with what browsers call them."""
_BASE64 = re.compile(r"[A-Za-z0-9+/=\s]+\Z")


_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What reading somebody else's bytes may raise; a thousand brackets are a RecursionError."""


class Part(NamedTuple):
    """One piece of what somebody said."""

    kind: Literal["text", "image", "audio", "tool call", "tool result", "thinking", "data"]
    text: str
    """For an image and for sound its data URL."""
    label: str = ""
    """A tool's name, or what kind of data."""


class Turn(NamedTuple):
    """What one role said at once."""

    role: str
    parts: list[Part]


class Shown(NamedTuple):
    """One call, ready to be read."""

    asked: list[Turn]
    answered: list[Turn]
    settings: list[tuple[str, str]]
    """Fields of the request other than what was said, as JSON."""
    error: str
    """What the vendor said went wrong."""


def shown(call: Call) -> Shown:
    """Read a recorded call of any route."""
    request, body = decoded(call.request), answer_of(call)
    asked = _asked(request) if request is not None else _raw("request", call.request)
    answered = list(_answered(body)) if body is not None else []
    if not answered and not (body and body.get("error")):
        answered = _raw("answer", call.response)
    return Shown(asked, answered, _settings(request or {}), _error(body or {}))


def preview(call: Call) -> tuple[str, str]:
    """The last thing a user asked (else the last thing at all) and the first answered, in one line each."""
    read = shown(call)
    of_users = [turn for turn in reversed(read.asked) if turn.role == "user"]
    asked = _first_text(of_users) or _first_text(reversed(read.asked))
    return _line(asked), _line(read.error or _first_text(read.answered))


def pretty(raw: bytes) -> str:
    """JSON with its fields under each other; anything else as it is."""
    try:
        text = msgspec.json.format(raw, indent=2).decode("utf-8", "replace")
    except _NOT_JSON:
        text = raw.decode("utf-8", "replace")
    return _cut(text)


def decoded(raw: bytes) -> Json | None:
    """A JSON object, or None."""
    try:
        return msgspec.json.decode(raw, type=dict[str, Any])
    except _NOT_JSON:
        return None


def answer_of(call: Call) -> Json | None:
    """The answer's JSON; a stream is put together, whichever of the protocols it speaks."""
    whole = decoded(call.response)
    if whole is not None or not call.stream:
        return whole
    if call.route == "messages":
        return _assembled_messages(call.response)
    if call.route == "responses":
        return _assembled_response(call.response)
    try:
        return assemble_stream(call.response)
    except (TypeError, ValueError, AttributeError, KeyError, RecursionError):
        return None  # chunks of another form than the protocol's: shown as they came


def _events(raw: bytes) -> Iterator[Json]:
    return (event for data in iter_events(raw) if (event := decoded(data)) is not None)


def _assembled_messages(raw: bytes) -> Json:
    """Text and tool input of Anthropic's content_block_delta events, block by block."""
    blocks: dict[int, Json] = {}
    for event in _events(raw):
        at = _number(event.get("index"))
        if event.get("type") == "content_block_start":
            blocks[at] = dict(_object(event.get("content_block")))
        if event.get("type") == "content_block_delta":
            block, delta = blocks.setdefault(at, {"type": "text"}), _object(event.get("delta"))
            for name, into in (("text", "text"), ("thinking", "thinking"), ("partial_json", "input_json")):
                if isinstance(delta.get(name), str):
                    block[into] = str(block.get(into) or "") + delta[name]
    return {"role": "assistant", "content": [blocks[at] for at in sorted(blocks)]}


def _assembled_response(raw: bytes) -> Json:
    """OpenAI's responses stream ends with the whole answer; a cut one leaves its text deltas."""
    text = ""
    for event in _events(raw):
        if _object(event.get("response")).get("output"):
            return _object(event["response"])
        if event.get("type") == "response.output_text.delta":
            text += str(event.get("delta") or "")
    return {"output": [{"type": "message", "role": "assistant", "content": text}]}


def _asked(request: Json) -> list[Turn]:
    turns: list[Turn] = []
    for name, role in (("system", "system"), ("instructions", "system")):
        if request.get(name):
            turns.append(Turn(role, list(_parts(request[name]))))
    for name in ("messages", "input", "prompt"):
        said = request.get(name)
        if isinstance(said, str):
            turns.append(Turn("user", [Part("text", _cut(said))]))
        else:
            turns += [_turn(message, "user") for message in _items(said)]
    return turns


def _answered(body: Json) -> Iterator[Turn]:
    for choice in _objects(body.get("choices")):
        if "message" in choice:
            yield _turn(choice["message"], "assistant")
        elif choice.get("text") is not None:
            yield Turn("assistant", list(_parts(choice["text"])))
    for item in _objects(body.get("output")):
        yield _turn(item, "assistant")
    if body.get("content"):
        yield _turn(body, "assistant")
    if vectors := _objects(body.get("data")):
        yield Turn("assistant", [Part("data", f"{len(vectors)} vector(s)", "embeddings")])


def _turn(message: object, role: str) -> Turn:
    if not isinstance(message, dict):
        return Turn(role, list(_parts(message)))
    said = cast(Json, message)
    if "role" not in said and "content" not in said:
        return Turn(role, list(_parts([said])))
    parts = list(_parts(said.get("reasoning_content"), "thinking"))
    parts += _parts(said.get("content"), "tool result" if said.get("role") == "tool" else "text")
    parts += _parts(said.get("refusal"))
    parts += [_tool_call(call) for call in _objects(said.get("tool_calls"))]
    return Turn(str(said.get("role") or role), parts)


def _tool_call(call: Json) -> Part:
    function = _object(call.get("function"))
    return Part("tool call", _cut(_text(function.get("arguments"))), str(function.get("name") or ""))


def _parts(content: object, kind: Literal["text", "tool result", "thinking"] = "text") -> Iterator[Part]:
    if content is None or content == "":
        return
    if not isinstance(content, list):
        yield Part(kind, _cut(_text(content)))
        return
    for piece in cast(list[object], content):
        yield _part(cast(Json, piece), kind) if isinstance(piece, dict) else Part(kind, _cut(_text(piece)))


def _part(piece: Json, kind: Literal["text", "tool result", "thinking"]) -> Part:
    form = str(piece.get("type") or "")
    if form in ("text", "input_text", "output_text"):
        return Part(kind, _cut(_text(piece.get("text"))))
    if form == "thinking":
        return Part("thinking", _cut(_text(piece.get("thinking"))))
    if form in ("tool_use", "function_call"):
        given = piece.get("input_json") or piece.get("input") or piece.get("arguments")
        return Part("tool call", _cut(_text(given)), str(piece.get("name") or ""))
    if form in ("tool_result", "function_call_output"):
        return Part("tool result", _cut(_text(piece.get("content") or piece.get("output"))))
    if form in ("image_url", "input_image", "image"):
        return _image(piece)
    if form == "input_audio":
        return _sound(piece)
    return Part("data", _cut(_text(piece)), form)


def _image(piece: Json) -> Part:
    """A recorded picture; one that lies elsewhere is named, never fetched."""
    given = piece.get("image_url")
    url = str(_object(given).get("url") if isinstance(given, dict) else given or "")
    source = _object(piece.get("source"))
    if source.get("data"):
        url = f"data:{source.get('media_type')};base64,{source['data']}"
    if _IMAGE.match(url):
        return Part("image", url)
    return Part("data", _cut(url or _text(piece)), "image elsewhere, not loaded")


def _sound(piece: Json) -> Part:
    """Recorded sound, in formats that browsers play."""
    given = _object(piece.get("input_audio"))
    kind, data = _SOUND.get(str(given.get("format"))), str(given.get("data") or "")
    if kind and _BASE64.match(data):
        return Part("audio", f"data:{kind};base64,{data}")
    return Part("data", _cut(_text(piece)), "sound that no browser plays")


def _settings(request: Json) -> list[tuple[str, str]]:
    said = {"messages", "input", "prompt", "system", "instructions"}
    return [(name, _cut(_text(value))) for name, value in request.items() if name not in said]


def _error(body: Json) -> str:
    error = body.get("error")
    if not error:
        return ""
    return _text(_object(error).get("message") or error)


def _raw(label: str, raw: bytes) -> list[Turn]:
    return [Turn(label, [Part("data", pretty(raw), "as it was sent")])] if raw else []


def _first_text(turns: Iterable[Turn]) -> str:
    for turn in turns:
        for part in turn.parts:
            if part.kind not in ("image", "audio") and part.text:
                return f"{part.label}({part.text})" if part.kind == "tool call" else part.text
    return ""


def _line(text: str) -> str:
    return " ".join(text[:400].split())[:160]


def _cut(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]}\n… {len(text) - LONGEST:,} more characters"


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _object(value: object) -> Json:
    return cast(Json, value) if isinstance(value, dict) else {}


def _items(value: object) -> list[object]:
    return cast(list[object], value) if isinstance(value, list) else []


def _objects(value: object) -> list[Json]:
    return [cast(Json, item) for item in _items(value) if isinstance(item, dict)]
