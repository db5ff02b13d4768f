"""Texts that come in pieces: a stream of events without what was found in it, in whichever vendor's form.

A finding may be cut in two by the events of a stream. So the strings that stand at one place of one item,
event after event, are read as one text; where that text has a finding, the first event says all of it in its
clean form and the later ones say nothing. It ignores what a finding is (redact) and what the events mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

from understudy.protocol import Json
from understudy.traffic import documents

Clean = Callable[[str], str]
_Place = tuple[str | int, ...]

_ITEM = ("index", "output_index", "content_index", "summary_index", "item_id")
"""Fields that say which of several texts an event goes on with (OpenAI, Anthropic)."""
_TOKENS = "logprobs"
"""Spells a text out token by token, so it goes where there is a finding."""


class _Line(NamedTuple):
    """One line of a stream."""

    raw: bytes
    event: Any
    """The JSON of an event's data; None for any other line."""
    repeated: bool = False


def clean_stream(raw: bytes, clean: Clean) -> bytes:
    """The stream without findings, byte for byte the same where it has none; line ends are LF.

    Empty where lines that are no JSON have a finding only together. Raises RecursionError for events nested
    too deeply to be walked.
    """
    lines = [_line(line) for line in raw.split(b"\n")]
    texts: dict[_Place, list[str]] = {}
    for line in lines:
        for place, text in _strings(line.event, ()):
            texts.setdefault(place, []).append(text)
    whole = {place: "".join(said) for place, said in texts.items()}
    changed = {place: new for place, said in whole.items() if (new := clean(said)) != said}
    writer = _Writer(changed, clean)
    written = [writer.line(line) for line in lines]
    others = [
        (_text(line.raw), _text(new)) for line, new in zip(lines, written, strict=True) if line.event is None
    ]
    before, after = ("\n".join(side) for side in zip(*others, strict=True)) if others else ("", "")
    return b"\n".join(written) if clean(before) == after else b""


def _line(raw: bytes) -> _Line:
    if not raw.startswith(b"data:"):
        return _Line(raw, None)
    try:
        return _Line(raw, *documents.read(raw[5:]))
    except ValueError:
        return _Line(raw, None)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _strings(value: Any, place: _Place) -> Iterator[tuple[_Place, str]]:
    """Each string in an event with its place."""
    if isinstance(value, str):
        yield place, value
    for inner, there in _inner(value, place):
        yield from _strings(inner, there)


def _inner(value: Any, place: _Place) -> Iterator[tuple[Any, _Place]]:
    """What a list or an object holds, each with its place: the names that lead to it, and of which item."""
    if isinstance(value, list):
        for number, item in enumerate(cast(list[Any], value)):
            # one that says its number is known by that, wherever in its event it stands
            numbered = isinstance(item, dict) and "index" in item
            yield item, place if numbered else (*place, number)
    elif isinstance(value, dict):
        fields = cast(Json, value)
        item = tuple(f"{name}={fields[name]}" for name in _ITEM if name in fields)
        for name, inner in fields.items():
            yield inner, (*place, *item, name)


class _Writer:
    """Writes lines again; each changed text is said once."""

    def __init__(self, changed: dict[_Place, str], clean: Clean) -> None:
        self._left = dict(changed)
        self._changed = bool(changed)
        self._clean = clean

    def line(self, line: _Line) -> bytes:
        if line.event is None:
            return self._clean(_text(line.raw)).encode("utf-8", "surrogateescape")
        event = self._event(line.event, ())
        # of a repeated name only the last value was looked at, so only that one is kept
        return line.raw if event == line.event and not line.repeated else b"data: " + documents.write(event)

    def _event(self, value: Any, place: _Place) -> Any:
        if isinstance(value, str):
            said = self._left.get(place, value)
            if place in self._left:
                self._left[place] = ""
            return said
        inner = [self._event(one, there) for one, there in _inner(value, place)]
        if isinstance(value, list):
            return inner
        if isinstance(value, dict):
            pairs = zip(cast(Json, value), inner, strict=True)
            return {self._clean(name): self._kept(name, new) for name, new in pairs}
        return value

    def _kept(self, name: str, value: Any) -> Any:
        return None if self._changed and name == _TOKENS and isinstance(value, dict | list) else value
