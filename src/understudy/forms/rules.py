"""What a config declares to be done with parameters that a target cannot take: drop, rename, default.

Rules speak of a chat completion request, and ``drop`` also of the request as it was sent. Each rule that
changed something is named to the application. It ignores which parameters a vendor knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

from understudy.protocol import Json

_LIMITS = ("max_completion_tokens", "max_tokens")
"""Two names of one parameter: a default for one is none where the other was sent."""


class Rules(NamedTuple):
    """The rules of an endpoint, an alias, or both."""

    drop: tuple[str, ...] = ()
    """Parameters by path, e.g. ``seed`` or ``messages.name``; a list on the way means each of its items."""
    rename: tuple[tuple[str, str], ...] = ()
    """Parameter, and what it is sent as."""
    default: tuple[tuple[str, Any], ...] = ()
    """Parameter, and its value where none was sent."""

    def and_then(self, other: Rules) -> Rules:
        """Both; of two defaults or names for one parameter the ``other`` one's."""
        return Rules(
            (*self.drop, *(name for name in other.drop if name not in self.drop)),
            tuple({**dict(self.rename), **dict(other.rename)}.items()),
            tuple({**dict(self.default), **dict(other.default)}.items()),
        )

    def dropped(self, body: Json) -> Iterator[str]:
        """Take out what is to be dropped; names each rule that found something."""
        for path in self.drop:
            if _drop(body, path.split(".")):
                yield f"drop {path}"

    def applied(self, body: Json) -> Iterator[str]:
        """Change a chat completion request; names each rule that changed something."""
        yield from self.dropped(body)
        for name, other in self.rename:
            if name in body:
                body[other] = body.pop(name)
                yield f"rename {name}={other}"
        for name, value in self.default:
            if all(body.get(one) is None for one in (_LIMITS if name in _LIMITS else (name,))):
                body[name] = value
                yield f"default {name}"


NONE = Rules()


def rules_of(drop: list[str], rename: Mapping[str, str], default: Mapping[str, Any]) -> Rules:
    """Rules as a config writes them."""
    return Rules(tuple(drop), tuple(rename.items()), tuple(default.items()))


def _drop(value: object, path: list[str]) -> bool:
    if isinstance(value, list):
        found = [_drop(item, path) for item in cast(list[object], value)]
        return any(found)
    if not isinstance(value, dict):
        return False
    inside = cast(Json, value)
    if len(path) == 1:
        return inside.pop(path[0], None) is not None
    return _drop(inside.get(path[0]), path[1:])
