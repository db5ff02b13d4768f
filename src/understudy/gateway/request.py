"""A client's request once it is complete: what it asks for, and which of its headers travel on.

Everything travels but what belongs to one hop, the client's credentials (they are for us) and our own
headers. It ignores the body.

Source: RFC 9110 §7.6.1 (hop-by-hop), RFC 9112 §6.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from understudy.gateway.upstream import Headers
from understudy.traffic.record import Route

_OURS = frozenset({b"x-task-id", b"x-tags"})
_ONE_HOP = frozenset(
    {
        b"connection",
        b"content-length",
        b"expect",
        b"host",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_CREDENTIALS = frozenset({b"api-key", b"authorization", b"cookie", b"x-api-key", b"x-goog-api-key"})
_STAYS = _ONE_HOP | _CREDENTIALS | _OURS | {b"accept-encoding"}
_STAYS_HERE = _ONE_HOP | {b"set-cookie"}
_NONE = frozenset[bytes]()


class Call(NamedTuple):
    """What one route of ours is called in records and at upstreams."""

    route: Route
    path: bytes
    counts: bool = False
    """It counts tokens and asks no model for an answer: nothing is recorded, nothing is translated."""


class Request(NamedTuple):
    """One complete request."""

    method: bytes
    path: bytes
    query: bytes
    """Without the question mark."""
    headers: Headers
    """Names in lower case."""
    last: dict[bytes, bytes]
    """The last value of each header: most are asked for more than once."""
    body: bytes
    modern: bool
    """HTTP/1.1, not 1.0."""
    keep_alive: bool

    def header(self, name: bytes) -> bytes:
        """The last value of a header; empty when absent."""
        return self.last.get(name, b"")

    def tags(self) -> dict[str, str]:
        """Header ``x-tags: a=b,c=d``; a tag without ``=`` has an empty value."""
        raw = self.header(b"x-tags").decode("latin-1")
        if not raw:
            return {}
        pairs = (item.partition("=") for item in raw.split(",") if item.strip())
        return {key.strip(): value.strip() for key, _, value in pairs}


def forwarded(request: Request) -> bytes:
    """Header lines for the upstream.

    Of content codings only gzip is passed on, because the tapped copy must be read afterwards.
    """
    named = _named_by_connection(request.headers) if b"connection" in request.last else _NONE
    lines: list[bytes] = []
    for name, value in request.headers:
        if name not in _STAYS and name not in named:
            lines.append(b"%b: %b\r\n" % (name, value))
        elif name == b"accept-encoding":
            lines.append(
                b"accept-encoding: gzip\r\n" if b"gzip" in value else b"accept-encoding: identity\r\n"
            )
    return b"".join(lines)


def returned(headers: Headers) -> bytes:
    """Header lines of an upstream's answer for the client, without those that describe its connection."""
    named = _named_by_connection(headers)
    return b"".join(
        [
            b"%b: %b\r\n" % (name, value)
            for name, value in headers
            if name not in _STAYS_HERE and name not in named and not name.startswith(b"x-understudy-")
        ]
    )


@lru_cache(1024)
def header_value(text: str) -> bytes:
    """A model's or a rule's name as a header value: anything but printable ASCII is replaced."""
    return "".join(c if " " <= c <= "~" else "?" for c in text).encode()


def _named_by_connection(headers: Headers) -> frozenset[bytes]:
    """Headers that belong to one hop because Connection says so, be it once or several times."""
    named = frozenset[bytes]()
    for name, value in headers:
        if name == b"connection" and value.lower() not in (b"keep-alive", b"close"):
            named |= {token.strip().lower() for token in value.split(b",")}
    return named
