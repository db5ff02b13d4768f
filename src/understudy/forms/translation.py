"""One call between an application and a vendor that speak different forms: there, and back again.

A request goes from the application's form through chat completions to the vendor's, its answer the other
way, whole or piece by piece. It ignores connections and records.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import msgspec

from understudy.forms import (
    anthropic,
    completions,
    counting,
    embeddings,
    gemini,
    messages,
    openai,
    responses,
)
from understudy.forms.chat import Left
from understudy.forms.events import EventReader, read_object
from understudy.forms.fault import Told, Unmappable, Unreadable, VendorError
from understudy.forms.rules import NONE, Rules
from understudy.protocol import Json, Usage, assemble_chunks, usage_of

ROUTES = frozenset({"chat.completions", "messages", "responses"})
"""Routes on which a model is talked with; every vendor can answer each."""
COUNTING = "messages/count_tokens"
"""The route that counts; calls of it are not recorded, so records know no such route."""

_ODD = (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError)
"""What reading something that is not formed as documented may raise."""


class VendorStream(Protocol):
    """Turns the data of a vendor's events into chunks."""

    done: bool
    """The answer is whole, whether or not something comes behind it."""
    complete: bool
    """Nothing comes behind it."""

    def feed(self, data: bytes) -> Iterator[Told]: ...
    def close(self) -> Iterator[Told]: ...


class Writer(Protocol):
    """Turns chunks into the bytes of an application's stream."""

    def chunk(self, chunk: Json) -> bytes: ...
    def end(self) -> bytes: ...
    def error(self, told: VendorError) -> bytes: ...


class Vendor(NamedTuple):
    """How to ask a kind of endpoint."""

    request: Callable[[Json, Left], Json]
    answer: Callable[[Json, int], Json]
    error: Callable[[int, bytes], VendorError]
    stream: Callable[[int], VendorStream]
    path: Callable[[str, bool], str]
    """Of a model and whether it is to stream: behind the endpoint's base URL."""
    credential: Callable[[str], tuple[str, str]]
    """A header, of the secret."""
    headers: tuple[tuple[str, str], ...] = ()
    """What every request says beside it."""
    embeddings: Vendor | None = None
    """How to ask for embeddings, where it has them in a form of its own."""
    counting: Vendor | None = None
    """The same for counting a request's tokens."""

    def asked_for(self, route: str) -> Vendor | None:
        """How to ask it for what a route is for; None for a route that can't be said there."""
        if route in ROUTES:
            return self
        return {"embeddings": self.embeddings, COUNTING: self.counting}.get(route)


class Caller(NamedTuple):
    """How to answer on a route."""

    request: Callable[[Json, Left], Json]
    answer: Callable[[Json, Json], bytes]
    error: Callable[[VendorError], bytes]
    writer: Callable[[Json], Writer]


_ANTHROPIC = Vendor(
    request=anthropic.request,
    answer=anthropic.answer,
    error=anthropic.error,
    stream=anthropic.Stream,
    path=anthropic.path,
    credential=anthropic.credential,
    headers=anthropic.HEADERS,
)
_GEMINI_CHAT = Vendor(
    request=gemini.request,
    answer=gemini.answer,
    error=gemini.error,
    stream=gemini.Stream,
    path=gemini.path,
    credential=gemini.credential,
)
_GEMINI = _GEMINI_CHAT._replace(
    embeddings=_GEMINI_CHAT._replace(
        request=embeddings.gemini_request, answer=embeddings.gemini_answer, path=embeddings.gemini_path
    ),
    counting=_GEMINI_CHAT._replace(
        request=counting.gemini_request, answer=counting.gemini_answer, path=counting.gemini_path
    ),
)
_CALLERS = {
    "chat.completions": Caller(
        completions.request, completions.answer, completions.error, completions.Writer
    ),
    "messages": Caller(messages.request, messages.answer, messages.error, messages.Writer),
    "responses": Caller(responses.request, responses.answer, responses.error, responses.Writer),
    "embeddings": Caller(embeddings.request, embeddings.answer, completions.error, completions.Writer),
    COUNTING: Caller(messages.request, counting.answer, messages.error, messages.Writer),
}


def vendor_of(kind: str, base_url: str) -> Vendor:
    """How to ask an endpoint of a config."""
    if kind == "anthropic":
        return _ANTHROPIC
    if kind == "gemini":
        return _GEMINI
    return Vendor(
        request=partial(openai.request, own=openai.is_openai(base_url)),
        answer=openai.answer,
        error=openai.error,
        stream=openai.Stream,
        path=openai.path,
        credential=openai.credential,
    )


def caller_of(route: str) -> Caller:
    """How to answer on a route that `Vendor.asked_for` knows."""
    return _CALLERS[route]


class Spoken:
    """What an answer said of itself, in the hub's words."""

    def __init__(self) -> None:
        self.model = ""
        self.finish_reason = ""
        self.usage: Usage | None = None
        self.pieces = 0
        """Pieces with text."""
        self.text_bytes = 0

    def take(self, body: Json) -> None:
        """Note a completion or a chunk of one."""
        self.model = str(body.get("model") or self.model)
        if body.get("usage"):
            self.usage = usage_of(body)
        for choice in cast(list[Json], body.get("choices") or []):
            self.finish_reason = str(choice.get("finish_reason") or self.finish_reason)
            said = cast(Json, choice.get("delta") or choice.get("message") or {})
            size = sum(
                len(str(said[name]).encode()) for name in ("content", "reasoning_content") if said.get(name)
            )
            size += len(msgspec.json.encode(said["tool_calls"])) if said.get("tool_calls") else 0
            self.pieces += size > 0
            self.text_bytes += size


class Translation:
    """One call on its way between two forms.

    ``passing``: the vendor speaks the application's form, and rules alone change the request; its answer is
    not read. Raises Unmappable (when made) for what cannot be said there.
    """

    def __init__(
        self,
        route: str,
        vendor: Vendor,
        body: Json,
        model: str,
        rules: Rules = NONE,
        *,
        passing: bool = False,
    ) -> None:
        self.passing = passing
        self.spoken = Spoken()
        self.streamed = body.get("stream") is True
        self.path = vendor.path(model, self.streamed)
        self.headers = vendor.headers
        self.notes: tuple[str, ...] = ()
        """Rules that changed something."""
        self.left_out: tuple[str, ...] = ()
        """What was left out without changing what is asked for."""
        self._caller = caller_of(route)
        self._vendor = vendor
        self._asked = body
        self.body = self._sent(model, rules)
        """What the vendor gets."""

    def _sent(self, model: str, rules: Rules) -> bytes:
        left = Left()
        try:
            body = _copy(self._asked) if rules.drop else self._asked
            notes = list(rules.dropped(body))
            asked = self._caller.request(body, left) | {"model": model}
            notes += rules.applied(asked)
            sent = asked if self.passing else self._vendor.request(asked, left)
        except (AttributeError, KeyError, TypeError) as error:
            raise Unmappable("", f"the request is not formed as its route documents: {error!r}") from error
        self.notes, self.left_out = tuple(dict.fromkeys(notes)), left.names
        return msgspec.json.encode(sent)

    def answer(self, raw: bytes) -> bytes:
        """A whole answer in the application's form. Raises Unreadable."""
        completion = self.completion(raw)
        try:
            return self._caller.answer(completion, self._asked)
        except _ODD as error:
            raise Unreadable(f"an answer that is not formed as documented: {error}") from error

    def completion(self, raw: bytes) -> Json:
        """A whole answer as a chat completion. Raises Unreadable."""
        body = read_object(raw)
        try:
            completion = self._vendor.answer(body, int(time.time()))
            self.spoken.take(completion)
        except _ODD as error:
            raise Unreadable(f"an answer that is not formed as documented: {error}") from error
        return completion

    def assembled(self, raw: bytes) -> Json:
        """A streamed answer that is there as a whole, as a chat completion. Raises Unreadable."""
        chunks: list[Json] = []
        stream = Streamed(self._vendor.stream(int(time.time())), _Kept(chunks), self.spoken)
        stream.feed(raw)
        if not stream.ended:
            stream.close()
        if stream.failed is not None:
            raise Unreadable(f"the vendor reported within its answer: {stream.failed.message}")
        return assemble_chunks(chunks)

    def error(self, status: int, raw: bytes) -> VendorError:
        """What an error's body says."""
        try:
            return self._vendor.error(status, raw)
        except _ODD:
            return VendorError(status, raw[:500].decode(errors="replace"))

    def error_body(self, told: VendorError) -> bytes:
        """An error in the application's form, outside of a stream."""
        return self._caller.error(told)

    def stream(self) -> Streamed:
        """For an answer that comes piece by piece."""
        return Streamed(self._vendor.stream(int(time.time())), self._caller.writer(self._asked), self.spoken)


class _Kept:
    """A writer that keeps the chunks."""

    def __init__(self, chunks: list[Json]) -> None:
        self._chunks = chunks

    def chunk(self, chunk: Json) -> bytes:
        self._chunks.append(chunk)
        return b""

    def end(self) -> bytes:
        return b""

    def error(self, told: VendorError) -> bytes:
        return b""


class Streamed:
    """The pieces of one streamed answer on their way from one form into the other."""

    def __init__(self, vendor: VendorStream, writer: Writer, spoken: Spoken) -> None:
        self.failed: VendorError | None = None
        """What the vendor said went wrong, in place of the rest."""
        self.begun = False
        """Whether something of an answer has come."""
        self.ended = False
        """The application has the end."""
        self._reader = EventReader()
        self._vendor = vendor
        self._writer = writer
        self._spoken = spoken

    def feed(self, piece: bytes) -> bytes:
        """What a piece of the vendor's stream becomes. Raises Unreadable."""
        return self._read(self._reader.feed(piece))

    def close(self) -> bytes:
        """What the end of the vendor's stream becomes. Raises Unreadable when the answer is not whole."""
        out = self._read(self._reader.close())
        if self.ended:
            return out
        if not self._vendor.done:
            raise Unreadable("the stream ended before its answer did")
        self.ended = True
        return b"".join([out, *map(self._told, self._vendor.close()), self._writer.end()])

    def _read(self, events: Iterator[bytes]) -> bytes:
        out: list[bytes] = []
        for data in events:
            if self.ended:
                continue
            try:
                out += map(self._told, self._vendor.feed(data))
            except Unreadable:
                raise
            except _ODD as error:
                raise Unreadable(f"a piece that is not formed as documented: {error!r}") from error
            if self._vendor.complete and not self.ended:
                self.ended = True
                out.append(self._writer.end())
        return b"".join(out)

    def _told(self, told: Told) -> bytes:
        if told.error is not None:
            status = told.error.status
            self.failed = told.error if 400 <= status <= 599 else told.error._replace(status=502)
            self.ended = True
            return self._writer.error(told.error) if self.begun else b""
        chunk = cast(dict[str, Any], told.chunk)
        self.begun = True
        self._spoken.take(chunk)
        return self._writer.chunk(chunk)


def _copy(value: Any) -> Any:
    """A copy whose objects may be changed."""
    if isinstance(value, dict):
        return {name: _copy(item) for name, item in cast(Json, value).items()}
    if isinstance(value, list):
        return [_copy(item) for item in cast(list[Any], value)]
    return value


def rule_path(param: str) -> str:
    """A parameter's path as a rule has it: without the places in lists that a refusal names."""
    return ".".join(part.partition("[")[0] for part in param.split("."))
