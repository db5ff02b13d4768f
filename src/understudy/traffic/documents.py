"""JSON as redaction needs it: read so that nothing hides in it, written so that nothing else changes.

A name that an object has twice hides its first value from whoever reads it; half a surrogate pair is legal as
an escape and has no UTF-8. It ignores what the documents mean.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from understudy.protocol import Json


class Document(NamedTuple):
    """A JSON value."""

    value: Any
    repeated: bool
    """An object in it has a name twice; only the last of its values is in ``value``."""


def read(text: bytes | str) -> Document:
    """Raises ValueError for what is not JSON, RecursionError for what is nested too deeply."""
    repeated = False

    def members(pairs: list[tuple[str, Any]]) -> Json:
        nonlocal repeated
        found = dict(pairs)
        repeated = repeated or len(found) < len(pairs)
        return found

    return Document(json.loads(text, object_pairs_hook=members), repeated)


def write(value: object) -> bytes:
    """The value without spaces between."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    # half a surrogate pair, legal in JSON as an escape, has no UTF-8 and becomes that escape again
    return text.encode("utf-8", "backslashreplace")
