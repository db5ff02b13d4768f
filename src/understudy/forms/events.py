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
        return msgspec.json.decode(raw, type=dict)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Unreadable(f"not a JSON object: {error}") from error


def data_event(data: Json) -> bytes:
    """An event without a name."""
    return b"data: %b\n\n" % msgspec.json.encode(data)


def named_event(data: Json) -> bytes:
    """An event whose name is its data's ``type``."""
    return b"event: %b\ndata: %b\n\n" % (str(data["type"]).encode(), msgspec.json.encode(data))
