"""Takes personal data and secrets out of records before anything touches a disk.

Only the text inside JSON strings is looked at, so a body stays JSON; a body without a finding comes back byte
for byte. A stream is judged as a whole, for a finding may be cut in two by its events (pieces).
Log-probabilities spell a text out token by token, so they go where there is a finding.
It ignores who calls it (gateway, imports), looks at no numbers and does not know names or addresses.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import msgspec

from understudy.config import Redact, resolve_secret
from understudy.errors import InputError
from understudy.protocol import Json
from understudy.traffic import documents
from understudy.traffic.pieces import clean_stream
from understudy.traffic.record import Call, Feedback, Record

Mode = Literal["hash", "drop"]
OPAQUE_CHARS = 4096
"""A string this long without a space is data (an image, audio), not text, and is left alone."""


class Rule(NamedTuple):
    """Something to find: a pattern and, where a pattern says too little, a test of what it found."""

    name: str
    pattern: re.Pattern[str]
    holds: Callable[[str], bool]
    mark: str = ""
    """A text without it has no finding and need not be searched."""


def _digits(text: str) -> str:
    return re.sub(r"\D", "", text)


def is_card_number(text: str) -> bool:
    """13 to 19 digits whose last is right (ISO/IEC 7812-1, the Luhn formula)."""
    digits = [int(d) for d in _digits(text)]
    doubled = [d if place % 2 == 0 else d * 2 - 9 * (d > 4) for place, d in enumerate(reversed(digits))]
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and sum(doubled) % 10 == 0


def is_phone_number(text: str) -> bool:
    """9 to 15 digits (ITU-T E.164), or 8 behind a +; a date has 8."""
    return (8 if text.startswith("+") else 9) <= len(_digits(text)) <= 15


def _always(text: str) -> bool:
    return bool(text)


# every repetition is bounded: a body is what a stranger sent, and must not cost time without end
BUILT_IN = (
    Rule(
        "key",
        re.compile(
            r"\b(?:sk-[\w-]{20,200}|us-[0-9a-f]{12}-[\w-]{40,50}|AKIA[0-9A-Z]{16}|AIza[\w-]{35}"
            r"|gh[pousr]_\w{36,255}|github_pat_\w{22,255}|xox[abprs]-[\w-]{10,250}|hf_\w{30,50}"
            r"|eyJ[\w-]{8,2000}\.eyJ[\w-]{8,4000}\.[\w-]{8,2000})"
            r"|-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----[^-]{0,8000}(?:-----END [A-Z ]{0,30}PRIVATE KEY-----)?"
        ),
        _always,
    ),
    Rule(
        "email",
        re.compile(r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b"),
        _always,
        "@",
    ),
    Rule("card", re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-])"), is_card_number),
    Rule(
        "phone",
        re.compile(
            r"\+\d{1,3}(?:[ ./-]?\(?\d{1,5}\)?){1,6}(?!\w)"
            r"|(?<![\w.+-])\(?\d{2,5}\)?(?:[ /-]\d{2,5}){2,4}(?![\w-])"
        ),
        is_phone_number,
    ),
)
"""Looked for in this order: what is inside a key is no phone number."""


class Redactor:
    """Replaces what its rules find by ``[email]``, or by ``[email:1f3a9c0d]`` in mode ``hash``.

    Equal findings get equal hashes as long as ``salt`` is the same; without knowing it a hash cannot be tried
    out against a list of addresses. ``rules`` names built-in ones, ``patterns`` adds one's own (name to
    regular expression). Raises InputError for an unknown rule or a pattern that is no regular expression.
    """

    def __init__(
        self,
        rules: Iterable[str] = ("key", "email", "card", "phone"),
        *,
        patterns: Mapping[str, str] | None = None,
        mode: Mode = "hash",
        salt: bytes = b"",
    ) -> None:
        if mode == "hash" and not salt:
            raise InputError(
                "hashes without a salt can be tried out", expected="a secret salt, or the mode drop"
            )
        self._rules = [*_built_in(rules), *(_own(n, p) for n, p in (patterns or {}).items())]
        self._mode: Mode = mode
        self._salt = salt

    def record(self, record: Record) -> Record:
        """A call without findings in its bodies, tags and task id; feedback without any in its texts."""
        if isinstance(record, Feedback):
            comment, expected = self.text(record.comment), self.text(record.expected)
            return msgspec.structs.replace(record, comment=comment, expected=expected)
        return self.call(record)

    def call(self, call: Call) -> Call:
        """See `record`."""
        response = self.stream(call.response) if _is_stream(call) else self.body(call.response)
        return msgspec.structs.replace(
            call,
            request=self.body(call.request),
            response=response,
            tags={self.text(name): self.text(value) for name, value in call.tags.items()},
            task_id=self.text(call.task_id),
        )

    def body(self, body: bytes) -> bytes:
        """A JSON body, or text that is none (an error page). What is nested too deep to read is not kept."""
        try:
            document, repeated = documents.read(body) if body else (None, False)
            clean = self._clean(document)
        except RecursionError:
            return b""
        except ValueError:
            return self.text(body.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")
        if clean == document:
            # of a repeated name only the last value was looked at, so only that one is kept
            return documents.write(document) if repeated else body
        return documents.write(_without_logprobs(clean))

    def stream(self, raw: bytes) -> bytes:
        """Server-sent events, of any vendor's form. What is nested too deep to read is not kept."""
        lines = raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        try:
            clean = clean_stream(lines, self._said)
        except RecursionError:
            return b""
        return raw if clean == lines else clean

    def text(self, text: str) -> str:
        """Plain text."""
        if len(text) >= OPAQUE_CHARS and " " not in text:
            return text
        for rule in self._rules:
            if rule.mark in text:
                text = rule.pattern.sub(lambda found, rule=rule: self._replacement(rule, found[0]), text)
        return text

    def _said(self, text: str) -> str:
        """`text` for a string of a document, which may be a document itself: arguments of a tool."""
        clean = self.text(text)
        if clean == text and text[:1] in ("{", "[") and "\\u" in text:
            try:
                inner = documents.read(text).value
            except ValueError:
                return clean
            found = self._clean(inner)
            return clean if found == inner else documents.write(found).decode()
        return clean

    def _replacement(self, rule: Rule, found: str) -> str:
        if not rule.holds(found):
            return found
        if self._mode == "drop":
            return f"[{rule.name}]"
        digest = hmac.digest(self._salt, found.encode("utf-8", "surrogatepass"), "sha256")
        return f"[{rule.name}:{digest[:4].hex()}]"

    def _clean(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._said(value)
        if isinstance(value, list):
            return [self._clean(item) for item in cast(list[Any], value)]
        if isinstance(value, dict):
            return {self.text(name): self._clean(item) for name, item in cast(Json, value).items()}
        return value


def redactor_of(settings: Redact, root: Path) -> Redactor | None:
    """What `[redact]` asks for; None when it asks for nothing.

    Raises InputError when the salt cannot be read.
    """
    if not settings.rules and not settings.patterns:
        return None
    salt = resolve_secret(settings.salt, root).encode()
    return Redactor(settings.rules, patterns=settings.patterns, mode=settings.mode, salt=salt)


def _without_logprobs(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_logprobs(item) for item in cast(list[Any], value)]
    if isinstance(value, dict):
        return {
            name: None if name == "logprobs" and isinstance(item, dict | list) else _without_logprobs(item)
            for name, item in cast(Json, value).items()
        }
    return value


def _is_stream(call: Call) -> bool:
    return call.stream and not call.response.lstrip().startswith(b"{")


def _built_in(names: Iterable[str]) -> list[Rule]:
    known = {rule.name: rule for rule in BUILT_IN}
    wanted = set(names)
    for name in wanted - known.keys():
        raise InputError(f"unknown redaction rule {name!r}", expected=f"one of {', '.join(known)}")
    return [rule for rule in BUILT_IN if rule.name in wanted]


def _own(name: str, pattern: str) -> Rule:
    try:
        return Rule(name, re.compile(pattern), _always)
    except re.error as error:
        raise InputError(f"redaction pattern {name!r}: {error}", expected="a regular expression") from error
