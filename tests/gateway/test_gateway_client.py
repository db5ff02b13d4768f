"""The official openai client against a gateway over real sockets: what it gets, and what is recorded."""

from __future__ import annotations

import asyncio
from pathlib import Path

import openai
import pytest
from faulty_upstream import FINGERPRINT, FaultyUpstream, calls, config_for, feedback, running

from understudy.protocol import Usage


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="unused", max_retries=0)


async def test_chat_without_streaming(tmp_path: Path, upstream: FaultyUpstream) -> None:
    def ask(url: str) -> str | None:
        with client_of(url) as client:
            answer = client.chat.completions.create(
                model="assistant",
                messages=[{"role": "user", "content": "hello"}],
                extra_headers={"x-task-id": "t-1", "x-tags": "team=a, empty"},
            )
        return answer.choices[0].message.content

    async with running(config_for(tmp_path, {"local": upstream.url})) as gateway:
        assert await asyncio.to_thread(ask, gateway.url) == "You said: hello"
    (call,) = calls(tmp_path)
    assert (call.alias, call.target, call.route, call.status) == (
        "assistant",
        "local/m",
        "chat.completions",
        200,
    )
    assert (call.answered_by, call.finish_reason, call.stream) == ("m-2026", "stop", False)
    assert call.fingerprint == FINGERPRINT
    assert call.usage == Usage(prompt_tokens=7, completion_tokens=3)
    assert not call.usage_estimated
    assert (call.task_id, call.tags) == ("t-1", {"team": "a", "empty": ""})
    assert [(a.target, a.status, a.billed) for a in call.attempts] == [("local/m", 200, "yes")]
    assert 0 < call.ttft_s <= call.total_s
    (served,) = upstream.served
    assert served.json["model"] == "m"
    assert call.request == served.body.replace(b'"m"', b'"assistant"', 1)
    assert "authorization" not in served.headers
    assert "x-task-id" not in served.headers


async def test_chat_with_streaming(tmp_path: Path, upstream: FaultyUpstream) -> None:
    def ask(url: str) -> str:
        with client_of(url) as client:
            stream = client.chat.completions.create(
                model="assistant",
                messages=[{"role": "user", "content": "one two three"}],
                stream=True,
                stream_options={"include_usage": True},
            )
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)

    async with running(config_for(tmp_path, {"local": upstream.url})) as gateway:
        assert await asyncio.to_thread(ask, gateway.url) == "You said: one two three "
    (call,) = calls(tmp_path)
    assert (call.stream, call.status, call.finish_reason) == (True, 200, "stop")
    assert call.fingerprint == FINGERPRINT
    assert call.usage == Usage(prompt_tokens=7, completion_tokens=3)
    assert call.response.endswith(b"data: [DONE]\n\n")


async def test_other_routes_and_an_endpoint_asked_directly(tmp_path: Path, upstream: FaultyUpstream) -> None:
    def ask(url: str) -> list[str]:
        with client_of(url) as client:
            client.completions.create(model="local/other-model", prompt="say")
            raw = client.embeddings.with_raw_response.create(
                model="assistant", input="x", encoding_format="float"
            )
            return [raw.headers["x-understudy-model"], *(model.id for model in client.models.list())]

    async with running(config_for(tmp_path, {"local": upstream.url})) as gateway:
        assert await asyncio.to_thread(ask, gateway.url) == ["local/m", "assistant"]
    assert [(c.route, c.alias, c.target) for c in calls(tmp_path)] == [
        ("completions", "local/other-model", "local/other-model"),
        ("embeddings", "assistant", "local/m"),
    ]
    assert [served.line for served in upstream.served] == [
        "POST /v1/completions HTTP/1.1",
        "POST /v1/embeddings HTTP/1.1",
    ]
    assert upstream.served[0].json["model"] == "other-model"


async def test_feedback_is_recorded_for_the_call_it_names(tmp_path: Path, upstream: FaultyUpstream) -> None:
    def ask(url: str) -> str:
        with client_of(url) as client:
            raw = client.chat.completions.with_raw_response.create(
                model="assistant", messages=[{"role": "user", "content": "is it?"}]
            )
            key = raw.headers["x-understudy-call"]
            client.post("/feedback", cast_to=object, body={"call": key, "expected": "yes"})
            client.post("/feedback", cast_to=object, body={"call": key, "metric": "ok", "value": 1})
            with pytest.raises(openai.BadRequestError, match="x-understudy-call"):
                client.post("/feedback", cast_to=object, body={"call": "chatcmpl-1", "expected": "yes"})
            return key

    async with running(config_for(tmp_path, {"local": upstream.url})) as gateway:
        key = await asyncio.to_thread(ask, gateway.url)
    (call,) = calls(tmp_path)
    assert call.key == key
    assert [(f.call, f.metric, f.value, f.expected) for f in feedback(tmp_path)] == [
        (key, "expected", None, "yes"),
        (key, "ok", 1.0, ""),
    ]


async def test_an_unknown_model_is_named_with_the_known_ones(
    tmp_path: Path, upstream: FaultyUpstream
) -> None:
    def ask(url: str) -> None:
        with client_of(url) as client:
            client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "x"}])

    async with running(config_for(tmp_path, {"local": upstream.url})) as gateway:
        with pytest.raises(openai.NotFoundError, match=r"gpt-9.*assistant.*local/") as caught:
            await asyncio.to_thread(ask, gateway.url)
    assert caught.value.code == "model_not_found"
    assert upstream.served == []
    assert calls(tmp_path) == []
