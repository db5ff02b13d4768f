"""The OpenAI routes over the served models.

POST /v1/chat/completions, POST /v1/completions (``echo`` and ``logprobs`` included, as
``lm_eval --model local-completions`` asks), GET /v1/models, GET /health. When a client goes, its generation
is cancelled. It ignores keys and limits per caller: that is the gateway's, in front.

Source: OpenAI API reference; server-sent events as in `protocol`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import cast

import msgspec
from aiohttp import web

from understudy.protocol import Json, assemble_chunks
from understudy.serve.completions import completion_chunks
from understudy.serve.engine import Engine
from understudy.serve.models import Models
from understudy.serve.request import RequestError, Sampling, chat_request, completion_request

MODELS: web.AppKey[Models] = web.AppKey("models", Models)
MAX_BODY = 32 * 2**20
"""Bytes of a request; a full context of text and tools is far smaller."""

Chunks = AsyncGenerator[Json, None]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(models: Models) -> web.Application:
    """The web application; it closes the models when it is cleaned up."""
    app = web.Application(middlewares=[_answer_errors], client_max_size=MAX_BODY)
    app[MODELS] = models
    app.add_routes(
        [
            web.post("/v1/chat/completions", _chat),
            web.post("/v1/completions", _complete),
            web.get("/v1/models", _list_models),
            web.get("/v1/models/{name:.+}", _show_model),
            web.get("/health", _health),
        ]
    )
    app.on_cleanup.append(_close)
    return app


async def _close(app: web.Application) -> None:
    await app[MODELS].close()


@web.middleware
async def _answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Errors in OpenAI's shape; a bug is logged with its traceback and answered without it."""
    try:
        return await handler(request)
    except RequestError as error:
        return _json(error.body, error.status)
    except web.HTTPException as error:
        refusal = RequestError(f"{error.reason}: {request.method} {request.path}", status=error.status)
        return _json(refusal.body, error.status)


def _json(body: Json, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json")


async def _health(request: web.Request) -> web.Response:
    return _json({"status": "ok", "models": [file.name for file in request.app[MODELS].files()]})


def _described(name: str, created: int) -> Json:
    return {"id": name, "object": "model", "created": created, "owned_by": "understudy"}


async def _list_models(request: web.Request) -> web.Response:
    listed = [_described(file.name, file.created) for file in request.app[MODELS].files()]
    return _json({"object": "list", "data": listed})


async def _show_model(request: web.Request) -> web.Response:
    name = request.match_info["name"]
    for file in request.app[MODELS].files():
        if file.name == name:
            return _json(_described(name, file.created))
    raise RequestError(f"no such model: {name!r}", status=404, param="model", code="model_not_found")


async def _body(request: web.Request) -> Json:
    try:
        body = msgspec.json.decode(await request.read())
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"the request is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise RequestError("the request is not a JSON object")
    return cast(Json, body)


async def _chat(request: web.Request) -> web.StreamResponse:
    asked = chat_request(await _body(request))
    engine = await request.app[MODELS].engine(asked.model)
    return await _respond(request, asked, engine.chat(asked), _Stamp("chat.completion", asked.model))


async def _complete(request: web.Request) -> web.StreamResponse:
    asked = completion_request(await _body(request))
    engine: Engine = await request.app[MODELS].engine(asked.model)
    return await _respond(
        request, asked, completion_chunks(engine, asked), _Stamp("text_completion", asked.model)
    )


class _Stamp:
    """What every chunk of one answer carries, and the usage summed over its choices and prompts."""

    def __init__(self, kind: str, model: str) -> None:
        self.kind = kind
        self._fields: Json = {
            "id": ("chatcmpl-" if kind == "chat.completion" else "cmpl-") + secrets.token_hex(12),
            "object": "chat.completion.chunk" if kind == "chat.completion" else kind,
            "created": int(time.time()),
            "model": model,
        }
        self._usage = {"prompt_tokens": 0, "completion_tokens": 0, "cached": 0}

    def chunk(self, choices: list[Json]) -> Json:
        return {**self._fields, "choices": choices}

    def count(self, usage: Json) -> None:
        self._usage["prompt_tokens"] += int(usage.get("prompt_tokens", 0))
        self._usage["completion_tokens"] += int(usage.get("completion_tokens", 0))
        self._usage["cached"] += int((usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0))

    @property
    def usage(self) -> Json:
        prompt, completion = self._usage["prompt_tokens"], self._usage["completion_tokens"]
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self._usage["cached"]},
        }


async def _respond(
    request: web.Request, asked: Sampling, chunks: Chunks, stamp: _Stamp
) -> web.StreamResponse:
    async with aclosing(_stamped(chunks, stamp)) as stamped:
        if asked.stream:
            return await _stream(request, asked, stamped, stamp)
        collected = [chunk async for chunk in stamped]
    body = assemble_chunks(collected)
    return _json({**body, "object": stamp.kind, "usage": stamp.usage})


async def _stamped(chunks: Chunks, stamp: _Stamp) -> Chunks:
    """The engine's chunks under our id, model and time; its usage is counted and taken out."""
    async with aclosing(chunks) as source:
        async for chunk in source:
            if chunk.get("usage"):
                stamp.count(chunk["usage"])
            if chunk.get("choices"):
                yield stamp.chunk(chunk["choices"])


async def _stream(request: web.Request, asked: Sampling, chunks: Chunks, stamp: _Stamp) -> web.StreamResponse:
    """Server-sent events. An error before the first chunk is an ordinary error; later, an event."""
    first = await anext(chunks, None)
    response = web.StreamResponse(
        headers={"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"}
    )
    await response.prepare(request)
    try:
        if first is not None:
            await response.write(_event(first))
        async for chunk in chunks:
            await response.write(_event(chunk))
        if asked.include_usage:
            await response.write(_event({**stamp.chunk([]), "usage": stamp.usage}))
    except RequestError as error:
        await response.write(_event(error.body))
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


def _event(body: Json) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
