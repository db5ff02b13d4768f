"""Answering an application that speaks chat completions itself: the hub's form is its own.

It ignores which vendor answers, and calls that need no translation: those are passed on byte for byte.
"""

from __future__ import annotations

from typing import cast

import msgspec

from understudy.forms.chat import Left
from understudy.forms.events import data_event
from understudy.forms.fault import VendorError, openai_error
from understudy.protocol import Json


def request(body: Json, left: Left) -> Json:
    """The request as it is."""
    return dict(body)


def answer(completion: Json, body: Json) -> bytes:
    """The completion as it is."""
    return msgspec.json.encode(completion)


def error(told: VendorError) -> bytes:
    """The body of an error."""
    return msgspec.json.encode(openai_error(told))


class Writer:
    """Turns chunks into events; the one with the usage alone is sent where `stream_options` ask for it."""

    def __init__(self, body: Json) -> None:
        options = cast(Json, body.get("stream_options") or {})
        self._include_usage = bool(options.get("include_usage"))

    def chunk(self, chunk: Json) -> bytes:
        """The event of one chunk."""
        if not chunk.get("choices") and not self._include_usage:
            return b""
        return data_event(chunk)

    def end(self) -> bytes:
        """The last event: all has been said."""
        return b"data: [DONE]\n\n"

    def error(self, told: VendorError) -> bytes:
        """The event in place of the rest."""
        return data_event(openai_error(told))
