"""What the official openai client asks and gets beyond text: choices, log-probabilities, sound, schemas.

The upstream answers what it was really asked for, so a parameter lost on the way is an answer that fails.
"""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any, cast

import openai
import pytest
from faulty_upstream import (
    SSE_HEAD,
    FaultyUpstream,
    Served,
    calls,
    chunk,
    completion,
    config_for,
    http,
    running,
)
from pydantic import BaseModel

from understudy.protocol import Usage

SOUND = base64.b64encode(bytes(range(256)) * 8).decode()
SPOKEN = {"id": "audio-1", "data": SOUND, "expires_at": 1_790_000_000, "transcript": "Paris"}
COUNTS = {
    "prompt_tokens": 50,
    "completion_tokens": 30,
    "total_tokens": 80,
    "prompt_tokens_details": {"audio_tokens": 40, "cached_tokens": 10},
    "completion_tokens_details": {"audio_tokens": 25, "reasoning_tokens": 2},
}


class City(BaseModel):
    """What is asked for by a schema."""

    city: str
    inhabitants: int


CITY = '{"city":"Paris","inhabitants":2100000}'


def wanted(asked: dict[str, Any]) -> list[dict[str, Any]]:
    """The choices that a request asks for, as messages."""
    text = CITY if asked.get("response_format", {}).get("type") == "json_schema" else "Paris"
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if "audio" in asked.get("modalities", []) and asked.get("audio", {}).get("voice") == "alloy":
        message |= {"content": None, "audio": SPOKEN}
    logprobs = None
    if asked.get("logprobs"):
        top = [
            {"token": token, "logprob": -0.5 - place, "bytes": list(token.encode())}
            for place, token in enumerate(["Paris", "Lyon", "Nice"][: asked["top_logprobs"]])
        ]
        logprobs = {"content": [{**top[0], "top_logprobs": top}], "refusal": None}
    return [
        {"index": n, "message": message, "logprobs": logprobs, "finish_reason": "stop"}
        for n in range(asked.get("n") or 1)
    ]


async def vendor(served: Served) -> None:
    """Answers what was asked, whole or streamed: each choice in an event, its end in another."""
    choices = wanted(served.json)
    if not served.json.get("stream"):
        await served.send(http(200, json.dumps(completion("", choices=choices, usage=COUNTS)).encode()))
        return
    base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m-2026"}
    told: list[dict[str, Any]] = []
    for choice in choices:
        said = {"index": choice["index"], "delta": choice["message"], "logprobs": choice["logprobs"]}
        told += [
            {**said, "finish_reason": None},
            {**said, "delta": {}, "logprobs": None, "finish_reason": "stop"},
        ]
    events: list[dict[str, Any]] = [{**base, "choices": [one]} for one in told]
    events.append({**base, "choices": [], "usage": COUNTS})
    raw = b"".join(b"data: %b\n\n" % json.dumps(event).encode() for event in events) + b"data: [DONE]\n\n"
    await served.send(SSE_HEAD + chunk(raw) + b"0\r\n\r\n")


QUESTION: dict[str, Any] = {
    "role": "user",
    "content": [
        {"type": "text", "text": "Which city is this?"},
        {"type": "input_audio", "input_audio": {"data": SOUND, "format": "wav"}},
    ],
}
SCHEMA = {
    "name": "city",
    "strict": True,
    "schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
EACH: dict[str, dict[str, Any]] = {
    "several choices": {"n": 3},
    "log-probabilities": {"logprobs": True, "top_logprobs": 2},
    "sound": {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}},
    "a schema": {"response_format": {"type": "json_schema", "json_schema": SCHEMA}},
}
EACH["all at once"] = {name: value for fields in EACH.values() for name, value in fields.items()}


def expected(fields: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**choice["message"], "logprobs": choice["logprobs"]} for choice in wanted(fields)]


@pytest.mark.parametrize("fields", EACH.values(), ids=EACH)
async def test_whole_answers(tmp_path: Path, upstream: FaultyUpstream, fields: dict[str, Any]) -> None:
    upstream.script = [vendor]

    def ask(url: str) -> list[dict[str, Any]]:
        with openai.OpenAI(base_url=url, api_key="unused", max_retries=0) as client:
            create = cast(Any, client.chat.completions.create)
            answer = create(model="assistant", messages=[QUESTION], **fields)
            found = [choice.to_dict() for choice in answer.choices]
        return [{**choice["message"], "logprobs": choice["logprobs"]} for choice in found]

    async with running(config_for(tmp_path, {"local": upstream.url})) as gateway:
        assert await asyncio.to_thread(ask, gateway.url) == expected(fields)
    _kept_whole(tmp_path, upstream, fields)


@pytest.mark.parametrize("fields", EACH.values(), ids=EACH)
async def test_streams(tmp_path: Path, upstream: FaultyUpstream, fields: dict[str, Any]) -> None:
    upstream.script = [vendor]
    streaming = {**fields, "stream": True, "stream_options": {"include_usage": True}}
    said: dict[int, dict[str, Any]] = {}
    async with (
        running(config_for(tmp_path, {"local": upstream.url})) as gateway,
        openai.AsyncOpenAI(base_url=gateway.url, api_key="unused", max_retries=0) as client,
    ):
        create = cast(Any, client.chat.completions.create)
        async for event in await create(model="assistant", messages=[QUESTION], **streaming):
            for choice in event.to_dict()["choices"]:
                if choice["delta"]:
                    said[choice["index"]] = {**choice["delta"], "logprobs": choice["logprobs"]}
    assert [said[index] for index in sorted(said)] == expected(fields)
    _kept_whole(tmp_path, upstream, streaming)


def _kept_whole(folder: Path, upstream: FaultyUpstream, fields: dict[str, Any]) -> None:
    """The vendor was asked, and the record has, what the application sent and got; sound is counted."""
    (served,) = upstream.served
    assert served.json == {"model": "m", "messages": [QUESTION], **fields}
    (call,) = calls(folder)
    assert call.request == served.body.replace(b'"m"', b'"assistant"', 1)
    assert (call.status, call.finish_reason, call.stream) == (200, "stop", "stream" in fields)
    assert call.usage == Usage(
        prompt_tokens=50,
        completion_tokens=30,
        cached_tokens=10,
        reasoning_tokens=2,
        audio_tokens=65,
        output_audio_tokens=25,
    )
    assert (SOUND.encode() in call.response) == ("audio" in fields)


async def test_a_schema_is_parsed_by_the_client(tmp_path: Path, upstream: FaultyUpstream) -> None:
    """`parse` writes a schema of its own from the class and reads the answer into it."""
    upstream.script = [vendor]
    async with (
        running(config_for(tmp_path, {"local": upstream.url})) as gateway,
        openai.AsyncOpenAI(base_url=gateway.url, api_key="unused", max_retries=0) as client,
    ):
        answer = await client.chat.completions.parse(
            model="assistant", messages=[{"role": "user", "content": "A city?"}], response_format=City
        )
    assert answer.choices[0].message.parsed == City(city="Paris", inhabitants=2_100_000)
    assert upstream.served[0].json["response_format"]["json_schema"]["name"] == "City"
