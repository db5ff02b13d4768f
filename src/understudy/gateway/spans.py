"""OpenTelemetry spans of finished calls, sent to a collector as OTLP over HTTP in its JSON form.

One CLIENT span for a call, all its attempts within. A caller's ``traceparent`` is its parent (one that says
"not sampled" is obeyed); without it the trace has the call's own key as id, so that a trace is found from an
answer's ``x-understudy-call``. A collector that is slow or gone costs spans, which are counted, and never an
answer. It ignores texts: no prompt leaves in a span.

Sources: OpenTelemetry semantic conventions for generative AI (development status, after 1.37); OTLP 1.x,
"JSON Protobuf Encoding"; W3C Trace Context.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import deque
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec

from understudy import __version__
from understudy.config import Config, Endpoint, Telemetry, resolve_secret
from understudy.traffic.record import Call

INTERVAL_S = 1.0
BATCH = 512
WAITING = 4096
"""Spans kept for the collector; beyond it the oldest are dropped and counted."""
TIMEOUT_S = 10.0
COMPLAINTS_S = 60.0
"""A collector that takes nothing is named in the log this often at most."""

_CLIENT, _ERROR = 3, 2
_PARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")
_OPERATIONS = {
    "chat.completions": "chat",
    "responses": "chat",
    "messages": "chat",
    "completions": "text_completion",
    "embeddings": "embeddings",
}
_PROVIDERS = {
    "api.openai.com": "openai",
    "api.anthropic.com": "anthropic",
    "generativelanguage.googleapis.com": "gcp.gemini",
    "aiplatform.googleapis.com": "gcp.vertex_ai",
    "openai.azure.com": "azure.ai.openai",
    "amazonaws.com": "aws.bedrock",
    "api.mistral.ai": "mistral_ai",
    "api.groq.com": "groq",
    "api.deepseek.com": "deepseek",
    "api.cohere.com": "cohere",
    "api.perplexity.ai": "perplexity",
    "api.x.ai": "x_ai",
}
_log = logging.getLogger("understudy.spans")


class _Server(NamedTuple):
    """Where an endpoint is, and whose it is."""

    provider: str
    host: str
    port: int


class _Waiting(NamedTuple):
    call: Call
    """Without its texts."""
    traceparent: str


class SpanExporter:
    """Sends spans in the background; one per process. `close` sends what waits."""

    def __init__(self, settings: Telemetry, endpoints: Mapping[str, Endpoint], root: Path) -> None:
        self.sent = 0
        self.dropped = 0
        self._url = urlsplit(settings.otlp_url)
        self._headers = {name: resolve_secret(value, root) for name, value in settings.otlp_headers.items()}
        self._service = settings.service_name
        self._servers = {name: _server(name, endpoint) for name, endpoint in endpoints.items()}
        self._waiting: deque[_Waiting] = deque()
        self._complained = -COMPLAINTS_S
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="spans", daemon=True)
        self._thread.start()

    def tell(self, call: Call, traceparent: str) -> None:
        """Take a finished call; never waits."""
        if len(self._waiting) >= WAITING:
            self._waiting.popleft()
            self.dropped += 1
        self._waiting.append(_Waiting(msgspec.structs.replace(call, request=b"", response=b""), traceparent))

    def close(self) -> None:
        """Send what waits, once; blocks for as long as the collector may take."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(INTERVAL_S):
            self._send_waiting()
        self._send_waiting()

    def _send_waiting(self) -> None:
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
            spans = [span for one in batch if (span := self._span(one)) is not None]
            if spans and not self._post(export_request(self._service, spans)):
                self.dropped += len(spans)
                return
            self.sent += len(spans)

    def _post(self, body: bytes) -> bool:
        kind = HTTPSConnection if self._url.scheme == "https" else HTTPConnection
        connection = kind(self._url.hostname or "", self._url.port, timeout=TIMEOUT_S)
        try:
            path = f"{self._url.path.rstrip('/')}/v1/traces"
            connection.request("POST", path, body, {**self._headers, "content-type": "application/json"})
            status = connection.getresponse().status
        except (OSError, HTTPException) as error:
            return self._complain(str(error) or type(error).__name__)
        finally:
            connection.close()
        return status < 300 or self._complain(f"it answered {status}")

    def _complain(self, reason: str) -> bool:
        if time.monotonic() - self._complained >= COMPLAINTS_S:
            self._complained = time.monotonic()
            _log.warning("the collector at %s takes no spans: %s", self._url.netloc, reason)
        return False

    def _span(self, one: _Waiting) -> dict[str, Any] | None:
        """The span of a call; None where the caller's trace is not sampled."""
        parent = _PARENT.fullmatch(one.traceparent)
        if parent and not int(parent[3], 16) & 1:
            return None
        endpoint = one.call.target.partition("/")[0]
        server = self._servers.get(endpoint, _Server(endpoint, "", 0))
        return span_of(one.call, server, (parent[1], parent[2]) if parent else (one.call.key, ""))


def span_of(call: Call, server: _Server, context: tuple[str, str]) -> dict[str, Any]:
    """A call as a span in OTLP's JSON; ``context`` is the trace's id and the parent span's (or empty)."""
    model = call.target.partition("/")[2]
    operation = _OPERATIONS[call.route]
    error = _error_of(call)
    span = {
        "traceId": context[0],
        "spanId": call.key[16:],
        "name": f"{operation} {model}",
        "kind": _CLIENT,
        "startTimeUnixNano": str(int(call.at * 1e9)),
        "endTimeUnixNano": str(int((call.at + call.total_s) * 1e9)),
        "attributes": [
            _attribute(name, v) for name, v in _attributes(call, server, error) if v not in ("", None)
        ],
        "status": {"code": _ERROR, "message": call.attempts[-1].error if call.attempts else ""}
        if error
        else {},
    }
    return {**span, "parentSpanId": context[1]} if context[1] else span


def _error_of(call: Call) -> str:
    """A low-cardinality word for what went wrong; empty when nothing did."""
    if call.status == 499:
        return "client_gone"
    if call.status >= 400:
        return str(call.status)
    return "incomplete" if call.attempts and call.attempts[-1].error else ""


def _attributes(call: Call, server: _Server, error: str) -> list[tuple[str, Any]]:
    usage = call.usage
    return [
        ("gen_ai.operation.name", _OPERATIONS[call.route]),
        ("gen_ai.provider.name", server.provider),
        ("gen_ai.request.model", call.target.partition("/")[2]),
        ("gen_ai.request.stream", True if call.stream else None),
        ("gen_ai.response.model", call.answered_by),
        ("gen_ai.response.finish_reasons", [call.finish_reason] if call.finish_reason else None),
        ("gen_ai.response.time_to_first_chunk", call.ttft_s if call.stream and call.ttft_s else None),
        ("gen_ai.usage.input_tokens", usage.prompt_tokens if usage else None),
        ("gen_ai.usage.output_tokens", usage.completion_tokens if usage else None),
        ("gen_ai.usage.cache_read.input_tokens", (usage.cached_tokens or None) if usage else None),
        ("gen_ai.usage.cache_creation.input_tokens", (usage.cache_write_tokens or None) if usage else None),
        ("gen_ai.usage.reasoning.output_tokens", (usage.reasoning_tokens or None) if usage else None),
        ("gen_ai.conversation.id", call.task_id),
        ("server.address", server.host),
        ("server.port", server.port or None),
        ("error.type", error),
        ("understudy.alias", call.alias),
        ("understudy.call", call.key),
        ("understudy.attempts", len(call.attempts)),
        ("understudy.usage_estimated", True if call.usage_estimated else None),
    ]


def _attribute(name: str, value: Any) -> dict[str, Any]:
    return {"key": name, "value": _any_value(value)}


def _any_value(value: Any) -> dict[str, Any]:
    """OTLP's AnyValue; 64-bit integers are strings in JSON."""
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, list):
        return {"arrayValue": {"values": [_any_value(one) for one in value]}}
    return {"stringValue": str(value)}


def export_request(service: str, spans: list[dict[str, Any]]) -> bytes:
    """The body of POST /v1/traces."""
    scope = {"scope": {"name": "understudy", "version": __version__}, "spans": spans}
    resource = {
        "attributes": [_attribute("service.name", service), _attribute("service.version", __version__)]
    }
    return msgspec.json.encode({"resourceSpans": [{"resource": resource, "scopeSpans": [scope]}]})


def _server(name: str, endpoint: Endpoint) -> _Server:
    """Of an endpoint whose host is no known vendor's, the provider is its name in the config."""
    url = urlsplit(endpoint.base_url)
    host = url.hostname or ""
    provider = next((vendor for end, vendor in _PROVIDERS.items() if host.endswith(end)), name)
    return _Server(provider, host, url.port or (443 if url.scheme == "https" else 80))


def exporter_of(config: Config) -> SpanExporter | None:
    """The exporter a config asks for; None where it names no collector. Raises InputError for a secret."""
    if not config.telemetry.otlp_url:
        return None
    return SpanExporter(config.telemetry, config.endpoints, config.path("."))
