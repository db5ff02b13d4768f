"""Server-sent events as they come in: whatever the pieces, the same events; and events on their way out.

`protocol.iter_events` reads a stream that is there as a whole. It ignores names and ids of events: every
vendor repeats the name in the data.

Source: WHATWG HTML §9.2.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from understudy.forms.fault import Unreadable
from understudy.protocol import Json

_DATA = b"data: "
_decode = msgspec.json.Decoder(dict).decode
_encode = msgspec.json.Encoder().encode
DONE = b"[DONE]"
"""What ends a stream of chat completion chunks."""
LONGEST = 64 << 20
"""Most bytes of one event."""


class EventReader:
    """Takes pieces of a stream, gives the data of each event as soon as it is complete."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        """The line that is not complete."""
        self._held = 0
        self._data: list[bytes] = []
        """Data lines of the event that is not complete."""

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """The data of the events that ``piece`` completes. Raises Unreadable for one without end."""
        alone = self._alone(piece)
        if alone is not None:
            yield alone
            return
        if b"\n" not in piece and b"\r" not in piece:
            self._hold(piece)
            return
        text = b"".join([*self._pieces, piece])
        self._pieces, self._held = [], 0
        if text.endswith(b"\r"):  # half of CRLF, perhaps
            text = text[:-1]
            self._hold(b"\r")
        *lines, rest = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        if rest:
            self._pieces.insert(0, rest)
            self._held += len(rest)
        for line in lines:
            yield from self._line(line)

    def close(self) -> Iterator[bytes]:
        """The event that the end of the stream completes, if any: not every vendor ends with a blank line."""
        yield from self.feed(b"\n\n")

    def _alone(self, piece: bytes) -> bytes | None:
        """The data of a piece that is one event with one line of it: nearly every token comes so."""
        if self._pieces or self._data or not piece.endswith(b"\n\n") or b"\r" in piece:
            return None
        *name, data = piece[:-2].split(b"\n")
        usual = not name or (len(name) == 1 and name[0].startswith(b"event:"))
        return data[len(_DATA) :] if usual and data.startswith(_DATA) else None

    def _hold(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self._held += len(piece)
        if self._held > LONGEST:
            raise Unreadable(f"an event longer than {LONGEST} bytes")

    def _line(self, line: bytes) -> Iterator[bytes]:
        if line.startswith(b"data:"):
            self._data.append(line[6:] if line[5:6] == b" " else line[5:])
        elif not line and self._data:
            event, self._data = b"\n".join(self._data), []
            yield event


def read_object(raw: bytes) -> Json:
    """The JSON object that somebody sent. Raises Unreadable."""
    try:
        return _decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Unreadable(f"not a JSON object: {error}") from error


def data_event(data: Json) -> bytes:
    """An event without a name."""
    return b"data: %b\n\n" % _encode(data)


def named_event(data: Json) -> bytes:
    """An event whose name is its data's ``type``."""
    return b"event: %b\ndata: %b\n\n" % (str(data["type"]).encode(), _encode(data))
