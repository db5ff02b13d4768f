"""Embeddings for an application that asks OpenAI's route, and Gemini's way of being asked for them.

The hub's form is OpenAI's. Two models' vectors can't be compared, so an index must be made anew when an alias
of embeddings moves; the answer's header says which model it was. It ignores transport (gateway).

Sources: OpenAI API reference, embeddings; ai.google.dev, models.batchEmbedContents (v1beta).
"""

from __future__ import annotations

import struct
from base64 import b64encode
from typing import Any, cast

import msgspec

from understudy.forms import chat, gemini
from understudy.forms.chat import Left
from understudy.forms.fault import Unmappable
from understudy.protocol import Json

_READ = frozenset({"model", "input", "dimensions", "encoding_format"})


def request(body: Json, left: Left) -> Json:
    """The request as it is."""
    return dict(body)


def answer(hub: Json, body: Json) -> bytes:
    """The answer with its vectors written as the request asks, as numbers or as base64 of float32.

    Its model is the one asked for where the vendor does not say which answered.
    """
    hub = {"model": body.get("model"), **hub}
    if body.get("encoding_format") == "base64":
        data = [one | {"embedding": _packed(one["embedding"])} for one in cast(list[Json], hub["data"])]
        hub = hub | {"data": data}
    return msgspec.json.encode(hub)


def _packed(vector: list[float]) -> str:
    return b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


# Gemini


def gemini_request(asked: Json, left: Left) -> Json:
    """The batchEmbedContents request. Raises Unmappable."""
    chat.check_parameters(asked, _READ, left)
    if asked.get("encoding_format") not in (None, "float", "base64"):
        raise Unmappable("encoding_format")
    model = gemini.resource(asked["model"])
    size = {"outputDimensionality": asked["dimensions"]} if asked.get("dimensions") is not None else {}
    return {
        "requests": [
            {"model": model, "content": {"parts": [{"text": text}]}, **size} for text in _texts(asked)
        ]
    }


def _texts(asked: Json) -> list[str]:
    said = asked.get("input")
    texts = cast(list[Any], said if isinstance(said, list) else [said])
    if not texts or not all(isinstance(text, str) for text in texts):
        raise Unmappable("input", "input: expected a text or a list of texts; this vendor takes no token ids")
    return texts


def gemini_answer(body: Json, created: int) -> Json:
    """OpenAI's answer; without usage where the vendor counts none. Raises KeyError, TypeError."""
    data = [
        {"object": "embedding", "index": index, "embedding": one["values"]}
        for index, one in enumerate(cast(list[Json], body["embeddings"]))
    ]
    hub: Json = {"object": "list", "data": data}
    if counted := cast(Json, body.get("usageMetadata") or {}):
        tokens = chat.number(counted, "promptTokenCount")
        hub["usage"] = {"prompt_tokens": tokens, "total_tokens": tokens}
    return hub


def gemini_path(model: str, stream: bool) -> str:
    """Behind the endpoint's base URL."""
    return gemini.method_path(model, "batchEmbedContents")
