"""Logprobs in the two forms of the OpenAI API, from the tokens' bytes.

Chat completions list tokens with their bytes; completions list token texts with offsets. A token that is no
whole UTF-8 text is written ``bytes:\\xe2\\x80`` in the latter, as OpenAI does, so that different tokens keep
different names. It ignores where the numbers come from.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any, cast

from understudy.protocol import Json
from understudy.serve.engine import Scored


def token_text(piece: bytes) -> str:
    """A token's name in the completions route."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def chat_logprobs(raw: Json | None, top: int | None) -> Json | None:
    """A chunk's logprobs in the chat form, cut to ``top`` alternatives; None when not asked for."""
    if top is None or not raw:
        return None
    entries = cast(list[Json], raw.get("content") or [])
    return {"content": [_entry(e, cast(list[Json], e.get("top_logprobs") or [])[:top]) for e in entries]}


def _entry(entry: Json, top: Sequence[Json]) -> Json:
    named = {name: entry[name] for name in ("token", "bytes", "logprob")}
    return named | {"top_logprobs": [{n: t[n] for n in ("token", "bytes", "logprob")} for t in top]}


class TextLogprobs:
    """Logprobs of one choice in the completions form, chunk after chunk, keeping the offset."""

    def __init__(self, top: int, offset: int = 0) -> None:
        self._top = top
        self._offset = offset
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, raw: Json | None) -> Json | None:
        """The next chunk's tokens; ``raw`` is in the chat form."""
        if not raw:
            return None
        form = _empty()
        for entry in cast(list[Json], raw.get("content") or []):
            top = cast(list[Json], entry.get("top_logprobs") or [])[: self._top]
            named = {token_text(bytes(t["bytes"])): float(t["logprob"]) for t in top}
            self._add(form, bytes(entry["bytes"]), float(entry["logprob"]), named)
        return form

    def take_scored(self, scored: Scored, pieces: dict[int, bytes]) -> Json:
        """A scored prompt's tokens; ``pieces`` holds the bytes of every token in it."""
        form = _empty()
        for token, logprob, top in scored.tokens:
            named = {token_text(pieces[other]): value for other, value in top[: self._top]}
            self._add(form, pieces[token], logprob, None if logprob is None else named)
        return form

    def take_following(self, scored: Scored, pieces: dict[int, bytes]) -> Json:
        """The likeliest token after a scored prompt."""
        form = _empty()
        token, logprob = scored.following[0]
        named = {token_text(pieces[other]): value for other, value in scored.following[: self._top]}
        self._add(form, pieces[token], logprob, named)
        return form

    def _add(self, form: Json, piece: bytes, logprob: float | None, top: dict[str, float] | None) -> None:
        text = token_text(piece)
        if top is not None and logprob is not None:
            top.setdefault(text, logprob)  # the token itself is always among them
        form["tokens"].append(text)
        form["token_logprobs"].append(logprob)
        form["top_logprobs"].append(top)
        form["text_offset"].append(self._offset)
        self._offset += len(self._decoder.decode(piece))


def _empty() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
