"""A GGUF model in llama.cpp, inside this process.

`xllamacpp.Server` runs llama.cpp's own server threads: continuous batching over slots, prompt cache, chat
templates, grammars. We reach it over a Unix socket in a private folder, so nothing listens on the network,
closing a connection cancels its generation even while the prompt is read, and the event loop never waits.

It ignores prompt scores, which that server does not offer: they come from `llama_scorer` with the same file
and the same kernels.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import tempfile
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import aiohttp
import msgspec

from understudy.config import Serve
from understudy.errors import MissingExtraError, ModelError
from understudy.protocol import Json
from understudy.serve.engine import Scored, cpu_threads
from understudy.serve.gguf_file import GgufHeader, read_header
from understudy.serve.logprobs import TextLogprobs, chat_logprobs
from understudy.serve.request import ChatRequest, CompletionRequest, Prompt, RequestError, Sampling
from understudy.serve.scoring import ScoreQueue

PROMPT_CACHE_MIB = 64
"""Memory for the states of earlier prompts; llama.cpp's own default of 8 GiB is more than the whole demo."""


class LlamaCppEngine:
    """One GGUF file, served by llama.cpp. Make it with `open`."""

    def __init__(self, path: Path, settings: Serve, header: GgufHeader, folder: Path) -> None:
        architecture = header.metadata.get("general.architecture", "")
        trained = int(header.metadata.get(f"{architecture}.context_length", settings.context))
        self.context = min(settings.context, trained)
        self._path = path
        self._settings = settings
        self._folder = folder
        self._key = secrets.token_hex(16)
        self._server: Any = None
        self._session: aiohttp.ClientSession | None = None
        self._scores = ScoreQueue(self._open_scorer)
        self._supports_tools = False
        self.vocabulary = 0

    @classmethod
    async def open(cls, path: Path, settings: Serve) -> LlamaCppEngine:
        """Load a model. Raises ModelError for a file that is absent, cut off or unknown to llama.cpp."""
        header = await asyncio.to_thread(read_header, path)
        engine = cls(path, settings, header, Path(tempfile.mkdtemp(prefix="understudy-")))
        try:
            engine._server = await asyncio.to_thread(engine._load)
            engine._session = engine._connect()
            await engine._learn()
        except BaseException:
            await engine.close()
            raise
        return engine

    @property
    def _socket(self) -> str:
        return str(self._folder / "llama.sock")

    async def _learn(self) -> None:
        """What only the loaded model tells."""
        props = await self._ask("/props")
        self._supports_tools = bool(props.get("chat_template_caps", {}).get("supports_tools"))
        models = await self._ask("/v1/models")
        self.vocabulary = int(models["data"][0]["meta"]["n_vocab"])

    def _load(self) -> Any:
        # OpenMP threads that wait must sleep soon: spinning on cores that others use, two threads were four
        # times slower than one. Read once, when the library is first loaded.
        os.environ.setdefault("GOMP_SPINCOUNT", "500")
        try:
            xllamacpp: Any = import_module("xllamacpp")  # its stubs are empty
        except ImportError as error:
            raise MissingExtraError("xllamacpp", "serve") from error
        try:
            return xllamacpp.Server(self._params(xllamacpp.CommonParams()))
        except RuntimeError as error:
            raise ModelError(
                f"llama.cpp cannot load {self._path}; its reason stands above on standard error",
                expected="a GGUF model of an architecture it knows, and enough memory",
                next_step="try another --model NAME=PATH",
            ) from error

    def _unload(self) -> None:
        self._server = None  # llama.cpp joins its threads when the last reference goes

    def _params(self, params: Any) -> Any:
        params.model.path = str(self._path)
        params.n_parallel = self._settings.slots
        params.n_ctx = self.context * self._settings.slots
        params.hostnames = [self._socket]
        params.api_keys = [self._key]
        params.cpuparams.n_threads = cpu_threads(self._settings.threads)
        params.cpuparams_batch.n_threads = cpu_threads(self._settings.threads)
        params.cache_ram_mib = PROMPT_CACHE_MIB
        params.fit_params = False  # would load the file once more to see what fits
        params.endpoint_metrics = True
        params.n_threads_http = 8 * self._settings.slots  # a waiting request holds one; they cost nothing
        params.ui = False
        params.verbosity = 1  # errors only
        return params

    def _connect(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            "http://llama",
            # an idle connection would keep one of llama.cpp's threads, and may be closed under us
            connector=aiohttp.UnixConnector(self._socket, limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None),
            headers={"authorization": f"Bearer {self._key}", "content-type": "application/json"},
            read_bufsize=2**20,
        )

    async def _ask(self, route: str, body: Json | None = None) -> Json:
        assert self._session is not None
        data = None if body is None else msgspec.json.encode(body)
        async with self._session.request("GET" if data is None else "POST", route, data=data) as response:
            raw = await response.read()
            if response.status != 200:
                raise _refused(raw)
            return cast(Json, msgspec.json.decode(raw))

    async def chat(self, request: ChatRequest) -> AsyncGenerator[Json, None]:
        if request.tools and not self._supports_tools:
            raise RequestError("this model's chat template takes no tools", param="tools")
        top = (request.top_logprobs or 0) if request.logprobs else None
        body = _sampling(request, request.limit) | {"messages": request.messages}
        for name in ("tools", "tool_choice", "parallel_tool_calls", "response_format"):
            if getattr(request, name) is not None:
                body[name] = getattr(request, name)
        if top is not None:
            # asked for none, llama.cpp would report no logprobs at all
            body |= {"logprobs": True, "top_logprobs": max(top, 1)}
        async with aclosing(self._stream("/v1/chat/completions", body)) as chunks:
            async for chunk in chunks:
                for choice in chunk["choices"]:
                    choice["logprobs"] = chat_logprobs(choice.get("logprobs"), top)
                yield chunk

    async def complete(self, request: CompletionRequest, prompt: Prompt) -> AsyncGenerator[Json, None]:
        body = _sampling(request, request.limit) | {"prompt": prompt}
        if request.logprobs is not None:
            body["logprobs"] = max(request.logprobs, 1)
        forms: dict[int, TextLogprobs] = {}
        async with aclosing(self._stream("/v1/completions", body)) as chunks:
            async for chunk in chunks:
                for choice in chunk["choices"]:
                    form = forms.setdefault(choice["index"], TextLogprobs(request.logprobs or 0))
                    choice["logprobs"] = form.take(choice.get("logprobs"))
                yield chunk

    async def _stream(self, route: str, body: Json) -> AsyncGenerator[Json, None]:
        """Chunks with choices, then one with the usage: n choices report it n times, prompt and all."""
        usages: list[Json] = []
        async with aclosing(self._events(route, body)) as events:
            async for chunk in events:
                if chunk.get("usage"):
                    usages.append(chunk.pop("usage"))
                if chunk.get("choices"):
                    yield chunk
        completion = sum(int(usage.get("completion_tokens", 0)) for usage in usages)
        yield {"choices": [], "usage": {**usages[0], "completion_tokens": completion} if usages else {}}

    async def _events(self, route: str, body: Json) -> AsyncGenerator[Json, None]:
        assert self._session is not None
        async with self._session.post(route, data=msgspec.json.encode(body)) as response:
            if response.status != 200:
                raise _refused(await response.read())
            async for line in response.content:
                name, _, data = line.strip().partition(b": ")
                if name == b"error":
                    raise _refused(data)
                if name == b"data" and data != b"[DONE]":
                    chunk = cast(Json, msgspec.json.decode(data))
                    if "error" in chunk:
                        raise _refused(data)
                    yield chunk

    async def score(self, tokens: Sequence[int], top: int) -> Scored:
        return await self._scores.score(tokens, top)

    def _open_scorer(self) -> Any:
        from understudy.serve.llama_scorer import open_scorer

        return open_scorer(self._path, self.context, cpu_threads(self._settings.threads))

    async def tokenize(self, text: str) -> list[int]:
        answer = await self._ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})
        return cast(list[int], answer["tokens"])

    async def pieces(self, tokens: Sequence[int]) -> list[bytes]:
        scorer = await self._scores.opened()
        return [scorer.piece(token) for token in tokens]

    async def metrics(self) -> dict[str, float]:
        """llama.cpp's counters: tokens and requests since the start, requests in hand."""
        assert self._session is not None
        async with self._session.get("/metrics") as response:
            lines = [line.split() for line in (await response.text()).splitlines()]
        return {line[0].removeprefix("llamacpp:"): float(line[1]) for line in lines if line[0] != "#"}

    async def close(self) -> None:
        await self._scores.close()
        if self._session is not None:
            await self._session.close()
        await asyncio.to_thread(self._unload)
        shutil.rmtree(self._folder, ignore_errors=True)


def _sampling(request: Sampling, limit: int | None) -> Json:
    """llama.cpp's names and our defaults, which are OpenAI's: plain sampling at temperature 1."""
    body: Json = {
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "top_k": request.top_k or 0,
        "min_p": request.min_p or 0.0,
        "repeat_penalty": 1.0 if request.repeat_penalty is None else request.repeat_penalty,
        "presence_penalty": request.presence_penalty or 0.0,
        "frequency_penalty": request.frequency_penalty or 0.0,
        "n": request.n or 1,
        "stop": request.stops,
        "max_tokens": -1 if limit is None else limit,
    }
    if request.seed is not None:
        body["seed"] = request.seed
    if request.logit_bias:
        body["logit_bias"] = request.logit_bias
    return body


def _refused(raw: bytes) -> RequestError:
    """llama.cpp's error in OpenAI's words."""
    error = cast(Json, msgspec.json.decode(raw))
    error = cast(Json, error.get("error", error))
    message, kind = str(error.get("message", "")), error.get("type")
    if kind == "exceed_context_size_error":
        return RequestError(message, code="context_length_exceeded")
    unsupported = kind == "server_error" and "not supported" in message
    status = 400 if unsupported else int(error.get("code") or 500)
    return RequestError(
        message, status=status, kind="invalid_request_error" if status < 500 else "server_error"
    )
