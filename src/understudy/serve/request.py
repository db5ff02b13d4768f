"""What a client may ask of the chat and completion routes, checked before an engine sees it.

Nothing is dropped silently: a parameter that is unknown, or that we cannot honour, is refused by name. null
stands for absent, as in the OpenAI API. It ignores what a model can do (engine) and transport (app).

Source: OpenAI API reference, chat/completions and completions; top_k, min_p and repeat_penalty are
extensions that vLLM and llama.cpp share.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, cast

import msgspec
from msgspec import Meta

from understudy.errors import UnderstudyError
from understudy.protocol import Json

Prompt = str | list[int]
"""Text, or token ids taken as they are."""


class RequestError(UnderstudyError):
    """A request is answered with an error; in the shape of OpenAI's error object."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body: Json = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is drawn, when to stop and what to report; shared by both routes."""

    model: str
    max_tokens: Annotated[int, Meta(ge=0)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Meta(gt=0)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    n: Annotated[int, Meta(ge=1)] | None = None
    stop: str | Annotated[list[str], Meta(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    user: str | None = None
    """Accepted: says who asks, changes no answer. So do metadata and the next two."""
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default"] | None = None

    @property
    def stops(self) -> list[str]:
        """Stop strings, without empty ones (they would stop at once)."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in stop if text]

    @property
    def include_usage(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))


class ChatRequest(Sampling, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Json], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    response_format: Json | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[Json] | None = None
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None

    @property
    def limit(self) -> int | None:
        """Most tokens to generate; None: up to the context."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(Sampling, frozen=True, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[Any]
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    best_of: Annotated[int, Meta(ge=1)] | None = None

    @property
    def limit(self) -> int:
        """Most tokens to generate; the API's default is 16."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts, in order: one string, one list of token ids, or a list of either."""
        return _prompts(self.prompt)


class _Route(NamedTuple):
    kind: type[Sampling]
    served: frozenset[str]


_CHAT = _Route(ChatRequest, frozenset(ChatRequest.__struct_fields__))
_COMPLETION = _Route(CompletionRequest, frozenset(CompletionRequest.__struct_fields__))
R = TypeVar("R", bound=Sampling)


def chat_request(body: Json) -> ChatRequest:
    """A checked chat request. Raises RequestError naming the parameter at fault."""
    request = _checked(body, ChatRequest, _CHAT)
    for index, message in enumerate(request.messages):
        if not isinstance(message.get("role"), str):
            raise RequestError(f"messages[{index}] has no role", param=f"messages[{index}].role")
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs = true", param="top_logprobs")
    return request


def completion_request(body: Json) -> CompletionRequest:
    """A checked completion request. Raises RequestError naming the parameter at fault."""
    request = _checked(body, CompletionRequest, _COMPLETION)
    if request.best_of not in (None, request.n or 1):
        raise RequestError("best_of other than n is not supported", param="best_of")
    _prompts(request.prompt)
    return request


def _checked(body: Json, kind: type[R], route: _Route) -> R:
    given = {name: value for name, value in body.items() if value is not None}
    if unknown := sorted(set(given) - route.served):
        raise RequestError(
            f"unsupported parameter: {unknown[0]!r}; supported: {', '.join(sorted(route.served))}",
            param=unknown[0],
            code="unsupported_parameter",
        )
    if given.get("store"):
        raise RequestError("store = true is not supported: this server keeps nothing", param="store")
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        text, _, where = str(error).partition(" - at `$.")
        param = where.rstrip("`") or _missing(text)
        raise RequestError(f"{param}: {text}" if param else text, param=param) from error


def _missing(text: str) -> str | None:
    found = re.search(r"missing required field `(\w+)`", text)
    return found[1] if found else None


def _prompts(prompt: str | list[Any]) -> list[Prompt]:
    if isinstance(prompt, str):
        return [prompt]
    if _is_tokens(prompt):
        return [prompt]
    if not prompt or not all(isinstance(p, str) or _is_tokens(p) for p in prompt):
        raise RequestError(
            "prompt: expected a string, a list of token ids, or a non-empty list of either", param="prompt"
        )
    return cast(list[Prompt], prompt)


def _is_tokens(value: object) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(type(token) is int and token >= 0 for token in cast(Sequence[object], value))
