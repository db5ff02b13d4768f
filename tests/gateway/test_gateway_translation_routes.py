"""Translated calls beside chats: embeddings, counts, lists of models, routes that a vendor has not, TLS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import vendors
from faulty_upstream import (
    FaultyUpstream,
    ask,
    calls,
    chat,
    running,
)
from translated import anthropic_of, asked, config_of, openai_of, send

from understudy.config import parse
from understudy.protocol import Usage


async def test_connections_are_used_again(tmp_path: Path, upstream: FaultyUpstream) -> None:
    upstream.script = [vendors.anthropic()]
    async with running(config_of(tmp_path, ("anthropic", upstream))) as gateway:
        for stream in (False, True, False):
            assert (await ask(gateway.port, chat(stream=stream))).status == 200
    assert upstream.connections == 1


async def test_models_are_listed_in_the_clients_form(tmp_path: Path, upstream: FaultyUpstream) -> None:
    def question(url: str) -> Any:
        with anthropic_of(url) as client:
            page = client.models.list()
            return [model.id for model in page], client.models.retrieve("assistant").display_name

    async with running(config_of(tmp_path, ("openai", upstream))) as gateway:
        assert await asked(gateway.url, question) == (["assistant"], "assistant")


async def test_an_embeddings_client_is_answered_by_gemini(tmp_path: Path, upstream: FaultyUpstream) -> None:
    upstream.script = [vendors.gemini()]

    def question(url: str) -> Any:
        with openai_of(url) as client:
            two = client.embeddings.create(
                model="assistant", input=["rain", "Bonn!"], dimensions=3, encoding_format="float"
            )
            # a client that is told no form asks for base64 and takes it apart
            return two, client.embeddings.create(model="assistant", input="rain")

    async with running(config_of(tmp_path, ("gemini", upstream))) as gateway:
        two, one = await asked(gateway.url, question)
    assert [vector.index for vector in two.data] == [0, 1]
    assert two.data[0].embedding == pytest.approx([4.0, 0.1, -1.5])
    assert two.data[1].embedding == pytest.approx([5.0, 0.1, -1.5])
    assert (two.usage.prompt_tokens, two.model) == (4, "assistant")
    assert one.data[0].embedding == pytest.approx([4.0, 0.1, -1.5])
    first, _ = upstream.served
    assert first.line == "POST /v1/models/m:batchEmbedContents HTTP/1.1"
    assert first.json["requests"][1] == {
        "model": "models/m",
        "content": {"parts": [{"text": "Bonn!"}]},
        "outputDimensionality": 3,
    }
    counted, guessed = calls(tmp_path)
    assert (counted.route, counted.usage, counted.usage_estimated) == (
        "embeddings",
        Usage(prompt_tokens=4, completion_tokens=0),
        False,
    )
    assert (guessed.usage, guessed.usage_estimated) == (Usage(prompt_tokens=1, completion_tokens=0), True)


@pytest.mark.parametrize(
    ("said", "param"),
    [({"input": [[1, 2]]}, "input"), ({"input": []}, "input"), ({"input": "x", "user": "u"}, "user")],
)
async def test_embeddings_that_gemini_cannot_make_are_refused(
    tmp_path: Path, upstream: FaultyUpstream, said: dict[str, Any], param: str
) -> None:
    async with running(config_of(tmp_path, ("gemini", upstream))) as gateway:
        got = await send(gateway.port, {"model": "assistant", **said}, "/v1/embeddings")
    assert (got.status, got.json["error"]["param"]) == (400, param)
    assert not upstream.served


async def test_gemini_counts_for_a_messages_client(tmp_path: Path, upstream: FaultyUpstream) -> None:
    upstream.script = [vendors.gemini()]

    def question(url: str) -> Any:
        with anthropic_of(url) as client:
            return client.messages.count_tokens(
                model="assistant", system="Be brief.", messages=[{"role": "user", "content": "Weather?"}]
            )

    async with running(config_of(tmp_path, ("gemini", upstream))) as gateway:
        counted = await asked(gateway.url, question)
    assert counted.input_tokens == 31
    (served,) = upstream.served
    assert served.line == "POST /v1/models/m:countTokens HTTP/1.1"
    assert served.json["generateContentRequest"] == {
        "model": "models/m",
        "contents": [{"role": "user", "parts": [{"text": "Weather?"}]}],
        "systemInstruction": {"parts": [{"text": "Be brief."}]},
    }
    assert calls(tmp_path) == []


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("gemini", "/v1/completions"),
        ("anthropic", "/v1/completions"),
        ("anthropic", "/v1/embeddings"),
        ("openai", "/v1/messages/count_tokens"),
    ],
)
async def test_a_route_that_a_vendor_has_not_is_a_404(
    tmp_path: Path, upstream: FaultyUpstream, kind: str, path: str
) -> None:
    async with running(config_of(tmp_path, (kind, upstream))) as gateway:
        got = await send(gateway.port, {"model": "assistant", "input": "x"}, path)
    assert got.status == 404
    assert path.removeprefix("/v1") in got.json["error"]["message"]


async def test_over_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ssl

    pem = Path(__file__).with_name("localhost.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    server = FaultyUpstream()
    server.script = [vendors.gemini(8)]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    await server.start(ssl=context)
    try:
        text = f'[endpoints.google]\nkind = "gemini"\nbase_url = "https://localhost:{server.port}/v1beta"\n'
        text += '[gateway]\nlisten = "127.0.0.1:0"\n'
        async with running(parse(text, "understudy.toml", tmp_path)) as gateway:
            got = await ask(gateway.port, chat(stream=True, model="google/gemini-2.5-pro"))
    finally:
        await server.stop()
    assert b"in Bonn." in got.body
    line = "POST /v1beta/models/gemini-2.5-pro:streamGenerateContent?alt=sse HTTP/1.1"
    assert server.served[0].line == line
