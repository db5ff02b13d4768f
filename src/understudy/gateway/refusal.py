"""What the gateway says no with: a status and an error in OpenAI's JSON shape.

An application that speaks Anthropic's messages is told in that form. It ignores errors that upstreams answer.

Source: OpenAI API reference, error object (message, type, param, code); Anthropic's, errors.
"""

from __future__ import annotations

from http import HTTPStatus

import msgspec

from understudy.forms.fault import VendorError, anthropic_error

_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}


def reason(status: int) -> bytes:
    """The phrase behind a status in an answer's first line."""
    return _REASONS.get(status, b"Unknown")


class Refusal(Exception):  # noqa: N818 - an answer, not an accident
    """An answer of our own in place of a model's.

    ``code`` is the machine-readable reason, ``param`` the request field at fault. ``close`` ends the client's
    connection, for requests after which the framing cannot be trusted.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        close: bool = False,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.close = close
        self.headers = headers

    def body(self, *, anthropic: bool = False) -> bytes:
        """The JSON document the client gets."""
        if anthropic:
            return msgspec.json.encode(anthropic_error(VendorError(self.status, self.message)))
        kind = "invalid_request_error" if self.status < 500 else "gateway_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})


def bad_request(code: str, message: str, *, param: str | None = None) -> Refusal:
    """400, the connection stays."""
    return Refusal(400, code, message, param=param)


def broken_framing(message: str, status: int = 400) -> Refusal:
    """A request whose end cannot be trusted: answered, then the connection is closed."""
    return Refusal(status, "bad_framing", message, close=True)
