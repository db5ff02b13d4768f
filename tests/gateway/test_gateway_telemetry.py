"""Spans sent to a collector over a real socket, and log lines for machines."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from faulty_upstream import FaultyUpstream, answers, ask, chat, config_for, echo, running, sends, until

from understudy.config import Telemetry
from understudy.gateway import logs, spans
from understudy.gateway.app import RunningGateway

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """Keeps what is posted to it; answers ``status``."""

    def __init__(self) -> None:
        self.status = 200
        self.posts: list[tuple[str, dict[str, str], Any]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                collector.posts.append((self.path, dict(self.headers), body))
                self.send_response(collector.status)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                del format, args

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    @property
    def spans(self) -> list[dict[str, Any]]:
        return [
            span
            for _, _, body in self.posts
            for resource in body["resourceSpans"]
            for scope in resource["scopeSpans"]
            for span in scope["spans"]
        ]

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setattr(spans, "INTERVAL_S", 0.01)
    collector = Collector()
    yield collector
    collector.stop()


def telemetry(collector: Collector, more: str = "") -> str:
    return f'[telemetry]\notlp_url = "http://127.0.0.1:{collector.server.server_port}/otlp"\n{more}'


def plain(span: dict[str, Any]) -> dict[str, Any]:
    """Attributes by name, each value without its type."""
    return {one["key"]: next(iter(one["value"].values())) for one in span["attributes"]}


async def test_a_call_is_one_span_of_the_callers_trace(
    tmp_path: Path, upstream: FaultyUpstream, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNDERSTUDY_TEST_TOKEN", "t0k")
    upstream.script = [answers(503), echo]
    rest = telemetry(collector, 'otlp_headers = {x-token = "env:UNDERSTUDY_TEST_TOKEN"}')
    async with running(config_for(tmp_path, {"local": upstream.url}, rest=rest)) as gateway:
        headers = (f"traceparent: 00-{TRACE}-{PARENT}-01", "x-task-id: t1")
        got = await ask(gateway.port, chat("a secret", stream=True), *headers)
    (span,) = collector.spans
    path, sent, body = collector.posts[0]
    assert (path, sent["x-token"]) == ("/otlp/v1/traces", "t0k")
    assert "secret" not in json.dumps(body)
    key = got.headers["x-understudy-call"]
    assert (span["traceId"], span["parentSpanId"], span["spanId"]) == (TRACE, PARENT, key[16:])
    assert (span["name"], span["kind"], span["status"]) == ("chat m", 3, {})
    assert 0 < int(span["endTimeUnixNano"]) - int(span["startTimeUnixNano"]) < 5e9
    found = plain(span)
    assert 0 < found.pop("gen_ai.response.time_to_first_chunk") < 5
    assert found == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "local",
        "gen_ai.request.model": "m",
        "gen_ai.request.stream": True,
        "gen_ai.response.model": "m-2026",
        "gen_ai.response.finish_reasons": {"values": [{"stringValue": "stop"}]},
        "gen_ai.usage.input_tokens": "7",
        "gen_ai.usage.output_tokens": "3",
        "gen_ai.conversation.id": "t1",
        "server.address": "127.0.0.1",
        "server.port": str(upstream.port),
        "understudy.alias": "assistant",
        "understudy.call": key,
        "understudy.attempts": "2",
    }


async def test_failures_say_so_and_unsampled_traces_stay_out(
    tmp_path: Path, upstream: FaultyUpstream, collector: Collector
) -> None:
    cut = sends(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{", then="close")
    upstream.script = [answers(400), cut, echo]
    async with running(config_for(tmp_path, {"local": upstream.url}, rest=telemetry(collector))) as gateway:
        keys = [(await ask(gateway.port)).headers["x-understudy-call"] for _ in range(2)]
        await ask(gateway.port, None, f"traceparent: 00-{TRACE}-{PARENT}-00")
    refused, broken = collector.spans
    assert [span["traceId"] for span in (refused, broken)] == keys
    assert "parentSpanId" not in refused
    assert [plain(span)["error.type"] for span in (refused, broken)] == ["400", "incomplete"]
    assert broken["status"]["code"] == 2
    assert "closed" in broken["status"]["message"]


async def test_a_collector_that_refuses_costs_spans_and_no_answers(
    tmp_path: Path,
    upstream: FaultyUpstream,
    collector: Collector,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(spans, "WAITING", 2)
    collector.status = 500

    def counted(gateway: RunningGateway) -> tuple[int, int]:
        assert gateway.plane.spans is not None
        return gateway.plane.spans.sent, gateway.plane.spans.dropped

    async with running(config_for(tmp_path, {"local": upstream.url}, rest=telemetry(collector))) as gateway:
        for _ in range(3):
            assert (await ask(gateway.port)).status == 200
        await until(lambda: counted(gateway) == (0, 3))
        collector.status = 200
        await ask(gateway.port)
        await until(lambda: counted(gateway) == (1, 3))
    assert [record.message for record in caplog.records if record.name == "understudy.spans"] == [
        f"the collector at 127.0.0.1:{collector.server.server_port} takes no spans: it answered 500"
    ]


@pytest.fixture
def root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.usefixtures("root_logger")
async def test_calls_are_logged_as_json_without_texts(
    tmp_path: Path, upstream: FaultyUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.StringIO()
    monkeypatch.setattr("sys.stderr", written)
    logs.set_up(Telemetry(log="json"))
    rest = '[telemetry]\nlog = "json"\nlog_calls = true'
    async with running(config_for(tmp_path, {"local": upstream.url}, rest=rest)) as gateway:
        got = await ask(gateway.port, chat("a secret"))
    try:
        raise ValueError("odd")
    except ValueError:
        logging.getLogger("understudy.test").exception("it failed")
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    call = next(line for line in lines if line["logger"] == "understudy.calls")
    assert (call["call"], call["status"], call["target"]) == (
        got.headers["x-understudy-call"],
        200,
        "local/m",
    )
    assert (call["prompt_tokens"], call["completion_tokens"], call["error"]) == (7, 3, "")
    assert "secret" not in written.getvalue()
    assert (lines[-1]["level"], lines[-1]["message"]) == ("error", "it failed")
    assert "ValueError: odd" in lines[-1]["traceback"]
