"""The client of any endpoint, and the scripted model that tests and rehearsals talk to.

A hosted model, an open model behind vLLM and a student of our own are all asked for chat completions through
`Endpoint`; one that speaks another form is asked in that (forms). It ignores routing, fallbacks and recording
(gateway): it asks one model at one URL.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self, cast
from urllib.parse import urlsplit

import msgspec

from understudy.client import Client
from understudy.config import Endpoint as Settings
from understudy.errors import EndpointError, InputError
from understudy.forms.fault import Unmappable, Unreadable
from understudy.forms.rules import NONE, Rules, rules_of
from understudy.forms.translation import Translation, rule_path, vendor_of
from understudy.protocol import Answer, Json, assemble_stream

RETRIED = frozenset({408, 429, 500, 502, 503, 504})
PATIENCE_S = 300.0
"""Longest that one call waits in all, for its turn after a 429 and between tries."""
SPENT = "insufficient_quota"
"""In a 429 of OpenAI's that no waiting mends: the money is gone."""


class Endpoint(Protocol):
    """One model behind one URL."""

    name: str
    """ENDPOINT/MODEL, as written in the config."""

    async def chat(self, request: Mapping[str, Any]) -> Answer:
        """POST chat/completions. Raises EndpointError when no usable answer comes."""
        ...

    async def complete(self, request: Mapping[str, Any]) -> Answer:
        """POST completions (``echo`` and ``logprobs`` included). Raises EndpointError likewise."""
        ...


class HttpEndpoint:
    """An endpoint over HTTP; use as ``async with``.

    Retries what was not answered (connect failure, 408, 5xx) up to ``retries`` times, honouring Retry-After.
    A 429 is no failure but a pace: every call of this client then waits, each PATIENCE_S at most. Anything
    else is the caller's to see. A streamed answer is assembled before it is returned.
    """

    def __init__(
        self,
        name: str,
        base_url: str,
        model: str,
        *,
        api_key: str = "",
        retries: int = 3,
        timeout_s: float = 120.0,
        connections: int = 64,
        headers: Mapping[str, str] | None = None,
        kind: str = "openai",
        rules: Rules = NONE,
    ) -> None:
        self.name = name
        self.model = model
        self.base_url = base_url.rstrip("/")
        self._shown_url = self.base_url.replace(f"{urlsplit(base_url).netloc.rpartition('@')[0]}@", "")
        """Without a user's name and password: for messages."""
        self.retries = retries
        self._vendor = vendor_of(kind, base_url)
        self._own = kind == "openai"
        """It speaks chat completions itself."""
        self._rules = rules
        self._timeout_s = timeout_s
        self._connections = connections
        self._headers = {"content-type": "application/json", **(headers or {})}
        self._headers |= dict(self._vendor.headers)
        if api_key:
            name_, value = self._vendor.credential(api_key)
            self._headers[name_] = value
        self._client: Client | None = None
        self._quiet_until = 0.0
        """On the monotonic clock: no call is made before, for the server asked for it; 0 for now."""

    async def __aenter__(self) -> Self:
        self._client = Client(
            self.base_url, self._headers, connections=self._connections, timeout_s=self._timeout_s
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._client is not None:
            await self._client.close()

    async def chat(self, request: Mapping[str, Any]) -> Answer:
        if self._own and self._rules == NONE:
            return await self._post(self._plain("/chat/completions", request))
        return await self._post(self._translated(request))

    async def complete(self, request: Mapping[str, Any]) -> Answer:
        if not self._own:
            raise EndpointError(
                f"{self.name}: its vendor has no completions route",
                status=404,
                expected="an endpoint of kind openai",
            )
        return await self._post(self._plain("/completions", request))

    def _plain(self, path: str, request: Mapping[str, Any]) -> _Asked:
        read = assemble_stream if request.get("stream") else self._decode
        return _Asked(path, msgspec.json.encode({**request, "model": self.model}), read)

    def _translated(self, request: Mapping[str, Any]) -> _Asked:
        try:
            said = Translation(
                "chat.completions", self._vendor, dict(request), self.model, self._rules, passing=self._own
            )
        except Unmappable as fault:
            raise self._unmappable(fault) from fault
        if self._own:
            return _Asked(said.path, said.body, assemble_stream if said.streamed else self._decode)
        read = said.assembled if said.streamed else said.completion
        return _Asked(said.path, said.body, read)

    async def _post(self, asked: _Asked) -> Answer:
        attempt, failures, waited = 0, 0, 0.0
        while True:
            attempt += 1
            if self._quiet_until:
                waited += await self._pause()
            outcome = await self._once(asked, attempt)
            if isinstance(outcome, Answer):
                return outcome
            busy = outcome.error.status == 429 and self.retries > 0
            failures += not busy
            wait = outcome.wait_s or min(0.2 * 2**attempt, 30.0)
            if failures > self.retries or waited + wait > PATIENCE_S or SPENT in outcome.error.value:
                raise outcome.error
            waited += wait
            if busy:
                self._quiet_until = max(self._quiet_until, time.monotonic() + wait)
            # spread out: thousands that were refused together must not come back together
            await asyncio.sleep(wait * (1.0 + 0.5 * random.random()))  # noqa: S311  (no secret)

    async def _pause(self) -> float:
        """Wait until the pace that the server asked for lets this call go; the seconds it took."""
        left = self._quiet_until - time.monotonic()
        if left <= 0:
            self._quiet_until = 0.0
            return 0.0
        wait = left * (1.0 + 0.5 * random.random())  # noqa: S311  (no secret)
        await asyncio.sleep(wait)
        return wait

    async def _once(self, asked: _Asked, attempt: int) -> Answer | _Again:
        assert self._client is not None, "use `async with HttpEndpoint(…)`"
        started = time.perf_counter()
        try:
            said = await self._client.post(asked.path, asked.body)
        except OSError as error:
            return _Again(self._unreachable(error), 0.0)
        if said.status in RETRIED:
            return _Again(self._refused(said.status, said.body), wait_of(said.headers))
        if said.status >= 300:
            raise self._refused(said.status, said.body or said.headers.get(b"location", b""))
        try:
            body = asked.read(said.body)
        except Unreadable as fault:
            raise EndpointError(
                f"{self.name}: {fault}", expected="an answer as its vendor documents it"
            ) from fault
        return Answer(said.status, body, said.first_s, time.perf_counter() - started, attempt)

    def _decode(self, raw: bytes) -> Json:
        try:
            return cast(Json, msgspec.json.decode(raw, type=dict))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise EndpointError(
                f"{self.name} answered something that is not JSON: {raw[:80]!r}",
                expected="a JSON object",
                next_step=f"curl {self._shown_url}/models",
            ) from error

    def _unmappable(self, fault: Unmappable) -> EndpointError | InputError:
        """A question that cannot be put to this model; without a limit none can."""
        table = f"[endpoints.{self.name.partition('/')[0]}]"
        if fault.param == "max_tokens":
            return InputError(
                f"{self.name}: {fault.message}",
                expected="requests with max_tokens, or a default",
                next_step=f"write under {table} default = {{ max_tokens = 4096 }}",
            )
        return EndpointError(
            f"{self.name}: {fault.message}",
            status=400,
            expected="parameters that its vendor knows",
            next_step=f'write under {table} drop = ["{rule_path(fault.param)}"]',
        )

    def _unreachable(self, error: Exception) -> EndpointError:
        reason = str(error) or type(error).__name__
        return EndpointError(
            f"{self.name} is out of reach at {self._shown_url}: {reason}",
            expected="a server that answers",
            next_step=f"curl {self._shown_url}/models",
        )

    def _refused(self, status: int, raw: bytes) -> EndpointError:
        return EndpointError(
            f"{self.name} answered {status}: {raw[:300].decode(errors='replace')}",
            status=status,
            expected="status 200",
            next_step="check the key, the model id and the request",
        )


class _Asked(NamedTuple):
    """A request, and how its answer is read as a chat completion."""

    path: str
    body: bytes
    read: Callable[[bytes], Json]


def wait_of(headers: Mapping[bytes, bytes]) -> float:
    """Seconds that Retry-After asks for, as a number or a date (RFC 9110 §10.2.3); 0 where it is silent."""
    text = headers.get(b"retry-after", b"").decode("latin-1").strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0


class _Again:
    """A failure worth another try."""

    def __init__(self, error: EndpointError, wait_s: float) -> None:
        self.error = error
        self.wait_s = wait_s


def http_endpoint(
    target: str, settings: Settings, model: str, *, api_key: str = "", connections: int = 64
) -> HttpEndpoint:
    """The client of an endpoint of a config, in its own form and under its rules; ``target`` names it."""
    return HttpEndpoint(
        target,
        settings.base_url,
        model,
        api_key=api_key,
        connections=connections,
        kind=settings.kind,
        rules=rules_of(settings.drop, settings.rename, settings.default),
    )


Script = Callable[[Json], str]


class ScriptedModel:
    """A model that answers what its script says: the one the tests and rehearsals use.

    ``script`` maps a chat request to the answer's text. ``delay_s`` is waited before each answer;
    ``fail`` decides, given the number of the call (from 1), which calls raise a 503.
    """

    def __init__(
        self,
        name: str,
        script: Script,
        *,
        delay_s: float = 0.0,
        fail: Callable[[int], bool] = lambda call: False,
    ) -> None:
        self.name = name
        self.calls = 0
        self._script = script
        self._delay_s = delay_s
        self._fail = fail

    async def chat(self, request: Mapping[str, Any]) -> Answer:
        self.calls += 1
        if self._delay_s:
            await asyncio.sleep(self._delay_s)
        if self._fail(self.calls):
            raise EndpointError(f"{self.name} answered 503: scripted failure", status=503)
        text = self._script(dict(request))
        return Answer(200, self._body(request, text), self._delay_s, self._delay_s, 1)

    async def complete(self, request: Mapping[str, Any]) -> Answer:
        answer = await self.chat({"messages": [{"role": "user", "content": request.get("prompt", "")}]})
        choice = {"index": 0, "text": answer.text, "finish_reason": "stop"}
        return answer._replace(body={**answer.body, "object": "text_completion", "choices": [choice]})

    def _body(self, request: Mapping[str, Any], text: str) -> Json:
        prompt = sum(len(str(m.get("content", "")).split()) for m in request.get("messages", []))
        completion = len(text.split())
        return {
            "id": f"scripted-{self.calls}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.name.partition("/")[2] or self.name,
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            ],
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "total_tokens": prompt + completion,
            },
        }
