"""Counting a request's tokens for an application that asks Anthropic's route, and Gemini's way of counting.

The hub's request is a chat completion's; the hub's answer is Anthropic's. Each vendor counts with its own
tokenizer. It ignores transport (gateway).

Sources: Anthropic API reference, messages/count_tokens; ai.google.dev, models.countTokens (v1beta).
"""

from __future__ import annotations

import msgspec

from understudy.forms import gemini
from understudy.forms.chat import Left
from understudy.protocol import Json


def answer(hub: Json, body: Json) -> bytes:
    """The count as it is."""
    return msgspec.json.encode(hub)


def gemini_request(asked: Json, left: Left) -> Json:
    """The countTokens request for all that a generateContent request would hold. Raises Unmappable."""
    model = gemini.resource(asked["model"])
    return {"generateContentRequest": {"model": model, **gemini.request(asked, left)}}


def gemini_answer(body: Json, created: int) -> Json:
    """Anthropic's answer. Raises KeyError, TypeError, ValueError."""
    return {"input_tokens": int(body["totalTokens"])}


def gemini_path(model: str, stream: bool) -> str:
    """Behind the endpoint's base URL."""
    return gemini.method_path(model, "countTokens")
