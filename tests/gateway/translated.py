"""Applications that speak one vendor's form before a gateway whose alias is another vendor's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anthropic
import openai
import vendors
from faulty_upstream import (
    FaultyUpstream,
    Got,
    Handler,
    post,
    raw_client,
)

from understudy.config import Config, parse
from understudy.protocol import Usage

COUNTED = Usage(prompt_tokens=45, completion_tokens=7, cached_tokens=30, reasoning_tokens=2)
CACHE_COUNTED = Usage(
    prompt_tokens=45, completion_tokens=7, cached_tokens=30, reasoning_tokens=2, cache_write_tokens=5
)
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells it.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CLAUDE_TOOL = {"name": "weather", "description": "Tells it.", "input_schema": TOOL["function"]["parameters"]}


def config_of(
    folder: Path, first: tuple[str, FaultyUpstream], *others: tuple[str, FaultyUpstream], more: str = ""
) -> Config:
    """The alias ``assistant`` over endpoints named after their kinds, each with a key of its own."""
    lines = ["[gateway]", 'listen = "127.0.0.1:0"']
    for kind, upstream in (first, *others):
        lines += [
            f"[endpoints.{kind}]",
            f'kind = "{kind}"',
            f'base_url = "{upstream.url}"',
            'api_key = "file:key"',
        ]
        lines += ["default = { max_tokens = 4096 }"] if kind == "anthropic" else []
    fallback = ", ".join(f'"{kind}/m"' for kind, _ in others)
    lines += ["[aliases.assistant]", f'model = "{first[0]}/m"', f"fallback = [{fallback}]", more]
    (folder / "key").write_text("vendor-secret")
    return parse("\n".join(lines), "understudy.toml", folder)


HANDLERS: dict[str, Callable[[int], Handler]] = {
    "anthropic": vendors.anthropic,
    "gemini": vendors.gemini,
    "openai": vendors.openai,
}
KEYS = {
    "anthropic": ("x-api-key", "vendor-secret"),
    "gemini": ("x-goog-api-key", "vendor-secret"),
    "openai": ("authorization", "Bearer vendor-secret"),
}
USAGE = {"anthropic": CACHE_COUNTED, "gemini": COUNTED, "openai": COUNTED}
MODEL = {"anthropic": "claude-2026", "gemini": "gemini-2026", "openai": "gpt-2026"}


def openai_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="unused", max_retries=0)


def anthropic_of(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url.removesuffix("/v1"), api_key="unused", max_retries=0)


async def send(port: int, body: dict[str, Any], path: str, *headers: str) -> Got:
    """One request over a connection of its own."""
    async with raw_client(port) as client:
        return await client.ask(post(body, path, headers))


async def asked(url: str, question: Callable[[str], Any]) -> Any:
    return await asyncio.to_thread(question, url)
