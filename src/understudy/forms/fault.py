"""What can stand in the way of a translation: a request that cannot be said, an answer that cannot be read.

It ignores how either reaches anybody: the gateway answers with it, `endpoint` raises it.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Unmappable(Exception):  # noqa: N818 - an answer to the application, not an accident
    """Something in a request has no counterpart in another form; ``param`` names it by its path."""

    def __init__(self, param: str, message: str = "") -> None:
        self.param = param
        self.message = message or f"{param} has no counterpart at this model's vendor"
        super().__init__(self.message)


class Unreadable(ValueError):  # noqa: N818 - as for Unmappable, said of an answer
    """An answer, or a piece of one, that is not formed as its vendor documents it."""


class VendorError(NamedTuple):
    """What a vendor says went wrong, in words that every form can repeat."""

    status: int
    """HTTP status; for an error within a stream the one its kind has outside of one."""
    message: str
    kind: str = ""
    """The vendor's own word, e.g. ``overloaded_error`` or ``RESOURCE_EXHAUSTED``."""
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None
    """Where the body says it; a Retry-After header is kept as it came."""


class Told(NamedTuple):
    """A piece of a stream: a chunk of a chat completion, or an error in its place."""

    chunk: dict[str, Any] | None = None
    error: VendorError | None = None


OPENAI_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
}
ANTHROPIC_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def openai_error(error: VendorError) -> dict[str, Any]:
    """The error object of OpenAI's API."""
    kind = OPENAI_KINDS.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    said = {"message": error.message, "type": kind, "param": error.param, "code": error.code or error.kind}
    return {"error": said}


def anthropic_error(error: VendorError) -> dict[str, Any]:
    """The error object of Anthropic's API."""
    kind = ANTHROPIC_KINDS.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}
