"""Live lists: servers on loopback answer as vendors do, with the fields their references name."""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest

from understudy.catalog.bindings import Binding
from understudy.catalog.facts import load_catalog
from understudy.catalog.live import LiveEndpoint, refresh
from understudy.catalog.watch import watch
from understudy.errors import InputError

TODAY = dt.date(2026, 11, 24)
MARCH = 1_806_537_600  # 2027-04-01 in Unix seconds

# developers.openai.com/api/reference/resources/models/methods/list
OPENAI = {
    "object": "list",
    "data": [
        {"id": "gpt-x", "object": "model", "created": 1_750_000_000, "shutdown_date": "2027-03-31"},
        {"id": "gpt-y", "object": "model", "created": 1_750_000_000, "shutdown_date": None},
    ],
}
# openrouter.ai/docs/sdks/python/api-reference/components/modelresponse
OPENROUTER = {
    "data": [
        {
            "id": "openai/gpt-x",
            "canonical_slug": "openai/gpt-x",
            "created": 1_750_000_000,
            "context_length": 8192,
            "architecture": {"input_modalities": ["text", "image", "smell"], "output_modalities": ["text"]},
            "pricing": {"prompt": "0.000002", "completion": "0.000008", "input_cache_read": "0.0000005"},
            "top_provider": {"context_length": 8192, "is_moderated": True, "max_completion_tokens": 4096},
            "supported_parameters": ["tools", "structured_outputs", "temperature"],
            "expiration_date": "2027-01-15",
        },
        {"id": "free/one", "pricing": {"prompt": "0", "completion": "0"}, "expiration_date": None},
        {"id": "auto", "pricing": {"prompt": "-1", "completion": "-1"}},
    ]
}
# learn.microsoft.com/en-us/rest/api/azureopenai/models/list
AZURE = {
    "object": "list",
    "data": [
        {
            "id": "gpt-x-2025",
            "status": "succeeded",
            "created_at": 1_646_126_127,
            "lifecycle_status": "generally-available",
            "deprecation": {"fine_tune": 1_677_662_127, "inference": MARCH},
            "capabilities": {"completion": False, "chat_completion": True, "embeddings": False},
        },
        {
            "id": "gpt-ending",
            "lifecycle_status": "deprecating",
            "capabilities": {"completion": False, "chat_completion": True, "fine_tune": True},
        },
        {
            "id": "embedder",
            "capabilities": {"completion": False, "chat_completion": False, "embeddings": True},
        },
    ],
}
# platform.claude.com/docs/en/api/models/list
CLAUDE = [
    {
        "id": "claude-x",
        "type": "model",
        "display_name": "Claude X",
        "created_at": "2026-02-04T00:00:00Z",
        "max_input_tokens": 200_000,
        "max_tokens": 64_000,
        "capabilities": {
            "batch": {"supported": True},
            "image_input": {"supported": True},
            "pdf_input": {"supported": False},
            "structured_outputs": {"supported": True},
            "thinking": {"supported": False},
        },
    },
    {"id": "claude-old", "type": "model", "display_name": "Old", "created_at": "1970-01-01T00:00:00Z"},
]
# ai.google.dev/api/models
GEMINI = [
    {
        "name": "models/gemini-x",
        "inputTokenLimit": 1_048_576,
        "outputTokenLimit": 65_536,
        "supportedGenerationMethods": ["generateContent", "createCachedContent", "batchGenerateContent"],
        "thinking": True,
    },
    {"name": "models/embed-x", "supportedGenerationMethods": ["embedContent"]},
]
# docs.vllm.ai: a server of one's own writes the time of the request into created
VLLM = {
    "object": "list",
    "data": [{"id": "own", "object": "model", "created": 1_790_000_000, "max_model_len": 4096}],
}

Serve = Callable[[str, dict[str, Any]], None]


@pytest.fixture
def vendor() -> Iterator[tuple[str, dict[str, Any]]]:
    """A server's URL, and a table of path to answer: a body, or a function of query and headers."""
    table: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            answer = table.get(path)
            body = answer(query, self.headers) if callable(answer) else answer
            raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
            self.send_response(401 if body is None else 200)
            self.send_header("content-length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *words: object) -> None:
            del words

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", table
    server.shutdown()
    thread.join()
    server.server_close()


def with_key(name: str, value: str, body: Any) -> Callable[[str, Any], Any]:
    return lambda _, headers: body if headers.get(name) == value else None


def test_each_vendor_is_read_by_its_own_fields(vendor: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    url, table = vendor

    def claude(query: str, headers: Any) -> Any:
        if headers.get("x-api-key") != "k" or not headers.get("anthropic-version"):
            return None
        first = "after_id" not in query
        return {"data": CLAUDE[:1] if first else CLAUDE[1:], "has_more": first, "last_id": "claude-x"}

    def gemini(query: str, headers: Any) -> Any:
        if headers.get("x-goog-api-key") != "k":
            return None
        return (
            {"models": GEMINI[1:]}
            if "pageToken=p2" in query
            else {"models": GEMINI[:1], "nextPageToken": "p2"}
        )

    table["/v1/models"] = with_key("authorization", "Bearer k", OPENAI)
    table["/router/models"] = with_key("authorization", "Bearer k", OPENROUTER)
    table["/openai/models"] = with_key("api-key", "k", AZURE)
    table["/claude/models"] = claude
    table["/gemini/models"] = gemini
    table["/own/models"] = VLLM
    endpoints = [
        LiveEndpoint("openai", "openai", f"{url}/v1", "k"),
        LiveEndpoint("router", "openai", f"{url}/router", "k"),
        LiveEndpoint("cloud", "openai", f"{url}/openai/deployments", "k"),
        LiveEndpoint("claude", "anthropic", f"{url}/claude", "k"),
        LiveEndpoint("gemini", "gemini", f"{url}/gemini", "k"),
        LiveEndpoint("local", "openai", f"{url}/own", ""),
    ]
    path = tmp_path / "live.yaml"
    read = refresh(path, endpoints, TODAY)
    assert [(r.endpoint, r.models, r.ending, r.failure) for r in read] == [
        ("openai", 2, 1, ""),
        ("router", 3, 1, ""),
        ("cloud", 2, 1, ""),
        ("claude", 2, 0, ""),
        ("gemini", 1, 0, ""),
        ("local", 1, 0, ""),
    ]
    catalog = load_catalog(live=path)
    x, routed, azure = (catalog.find(n) for n in ("openai/gpt-x", "router/openai/gpt-x", "cloud/gpt-x-2025"))
    assert x
    assert x.retires
    assert (x.retires.value, x.retires.source, x.retires.read) == (
        dt.date(2027, 3, 31),
        "openai, live",
        "2026-11-24",
    )
    assert routed
    assert routed.retires
    assert routed.retires.value == dt.date(2027, 1, 15)
    assert routed.prices
    price = routed.prices.value[0]
    assert (price.input, price.output, price.cached) == (2.0, 8.0, 0.5)
    assert routed.inputs
    assert routed.inputs.value == {"text", "image"}
    assert routed.features
    assert routed.features.value == {"tools", "json_schema"}
    assert routed.output_limit
    assert routed.output_limit.value == 4096
    assert azure
    assert azure.retires
    assert azure.retires.value == dt.date(2027, 4, 1)
    assert azure.lifecycle
    assert azure.lifecycle.value == "generally-available"
    ending = catalog.find("cloud/gpt-ending")
    assert ending
    assert ending.features
    assert "fine_tuning" in ending.features.value
    (exposure,) = watch(catalog, [Binding("a", "cloud/gpt-ending", "alias")], {}, 0.0)
    assert (exposure.severity, exposure.retires, exposure.source) == (
        "announced",
        None,
        "cloud, live, read 2026-11-24",
    )
    claude_x, old = catalog.find("claude/claude-x"), catalog.find("claude/claude-old")
    assert claude_x
    assert claude_x.inputs
    assert claude_x.inputs.value == {"text", "image"}
    assert claude_x.features
    assert claude_x.features.value == {"batch", "json_schema"}
    assert old
    assert old.released is None  # the epoch stands for unknown
    gem, own = catalog.find("gemini/gemini-x"), catalog.find("local/own")
    assert gem
    assert gem.context_window
    assert gem.context_window.value == 1_048_576
    assert gem.features
    assert gem.features.value == {"batch", "caching", "reasoning"}
    assert own
    assert own.context_window
    assert (own.context_window.value, own.released) == (4096, None)
    free, auto = catalog.find("router/free/one"), catalog.find("router/auto")
    assert free
    assert auto
    assert (free.prices, auto.prices) == (None, None)


def test_a_list_beats_the_snapshot_and_is_beaten_by_the_overlay(
    vendor: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    url, table = vendor
    table["/v1/models"] = {"data": [{"id": "gpt-4.1", "shutdown_date": "2029-01-01"}]}
    path, overlay = tmp_path / "live.yaml", tmp_path / "facts.yaml"
    refresh(path, [LiveEndpoint("openai", "openai", f"{url}/v1", "")], dt.date(2030, 1, 1))
    found = load_catalog(live=path).find("gpt-4.1")
    assert found
    assert found.retires
    assert found.retires.value == dt.date(2029, 1, 1)
    assert found.retires.disputed  # the snapshot's date stays beside it
    overlay.write_text("models:\n  openai/gpt-4.1: {retires: 2028-01-01}\n")
    found = load_catalog(overlay, path).find("gpt-4.1")
    assert found
    assert found.retires
    assert found.retires.value == dt.date(2028, 1, 1)
    assert found.retires.disputed


def test_what_is_no_longer_listed_is_named_and_a_moved_price_keeps_the_old_one(
    vendor: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    url, table = vendor
    path, endpoints = tmp_path / "live.yaml", [LiveEndpoint("router", "openai", f"{url}/router", "")]
    row = {"id": "a", "pricing": {"prompt": "0.000001", "completion": "0.000002"}}
    table["/router/models"] = {"data": [row, {"id": "b"}]}
    refresh(path, endpoints, TODAY)
    refresh(path, endpoints, TODAY + dt.timedelta(days=1))
    table["/router/models"] = {"data": [{**row, "pricing": {"prompt": "0.000003", "completion": "0.000002"}}]}
    (read,) = refresh(path, endpoints, TODAY + dt.timedelta(days=2))
    assert read.gone == ("router/b",)
    found = load_catalog(live=path).find("router/a")
    assert found
    assert found.prices
    assert [(p.input, p.start) for p in found.prices.value] == [(1.0, None), (3.0, dt.date(2026, 11, 26))]


def test_a_broken_source_is_named_and_keeps_what_it_said(
    vendor: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    url, table = vendor
    path = tmp_path / "live.yaml"
    good = LiveEndpoint("good", "openai", f"{url}/v1", "")
    table["/v1/models"] = OPENAI
    refresh(path, [good], TODAY)
    table["/v1/models"] = b"<html>"
    table["/fine/models"] = VLLM
    others = [
        LiveEndpoint("locked", "openai", f"{url}/locked", "k"),
        LiveEndpoint("fine", "openai", f"{url}/fine", ""),
    ]
    broken, locked, fine = refresh(path, [good, *others], TODAY)
    assert broken.failure.startswith("good: DecodeError")
    assert locked.failure == "locked: its list answered 401"
    assert (fine.failure, fine.models) == ("", 1)
    assert load_catalog(live=path).find("good/gpt-x")
    unreachable = refresh(path, [LiveEndpoint("off", "openai", "http://127.0.0.1:1/v1", "")], TODAY)
    assert "off: ClientConnectorError" in unreachable[0].failure


@pytest.mark.parametrize("text", ["{", "models: 3", "[1]"])
def test_a_broken_live_file_is_named_with_what_to_do(tmp_path: Path, text: str) -> None:
    path = tmp_path / "live.yaml"
    path.write_text(text)
    for read in (lambda: load_catalog(live=path), lambda: refresh(path, [], TODAY)):
        with pytest.raises(InputError, match=r"live\.yaml"):
            read()
