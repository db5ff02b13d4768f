"""A dashboard on a free port, over a store that the test fills, and a browser without scripts."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import NamedTuple

import aiohttp
import msgspec
import pytest

from understudy import config as configuration
from understudy.cli.dashboard import moves_of
from understudy.config import Config
from understudy.dashboard.server import start
from understudy.protocol import Usage
from understudy.traffic.record import Attempt, Call, new_key
from understudy.traffic.store import Store, open_store

CONFIG = """
[store]
url = "sqlite:///traffic.db"
[dashboard]
listen = "127.0.0.1:0"
[endpoints.openai]
base_url = "https://api.openai.com/v1"
[endpoints.local]
base_url = "http://127.0.0.1:8091/v1"
[aliases.assistant]
model = "openai/gpt-4-0613"
fallback = ["local/student"]
[drill]
alias = "assistant"
"""


class Page(NamedTuple):
    """What came back."""

    status: int
    text: str
    headers: dict[str, str]

    @property
    def token(self) -> str:
        """The token of the page's first form."""
        found = re.search(r'name="token" value="([^"]+)"', self.text)
        assert found, "the page has no form"
        return found[1]


class Browser:
    """Keeps cookies; follows no redirect."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.session = session

    async def get(self, path: str, **headers: str) -> Page:
        return await self._send("GET", path, None, headers)

    async def post(self, path: str, form: dict[str, str], **headers: str) -> Page:
        return await self._send("POST", path, form, headers)

    async def _send(
        self, method: str, path: str, form: dict[str, str] | None, headers: dict[str, str]
    ) -> Page:
        request = self.session.request(
            method, self.url + path, data=form, headers=headers, allow_redirects=False
        )
        async with request as answer:
            return Page(answer.status, await answer.text(), dict(answer.headers))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return configuration.parse(CONFIG, "understudy.toml", tmp_path)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """The same as a file, for commands."""
    path = tmp_path / "understudy.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def store(config: Config, tmp_path: Path) -> Iterator[Store]:
    with open_store(config.store.url, tmp_path) as opened:
        yield opened


@pytest.fixture
async def browse(config: Config) -> AsyncIterator[Callable[..., Awaitable[Browser]]]:
    """``await browse()``: a browser at a dashboard of its own; ``await browse(config)`` at another."""
    async with AsyncExitStack() as stack:

        async def open_browser(given: Config = config) -> Browser:
            dashboard = await start(given, moves=moves_of(given))
            stack.push_async_callback(dashboard.stop)
            jar = aiohttp.CookieJar(unsafe=True)
            session = await stack.enter_async_context(aiohttp.ClientSession(cookie_jar=jar))
            return Browser(dashboard.url, session)

        yield open_browser


@pytest.fixture
def make_call() -> Callable[..., Call]:
    """A plausible call; any field can be given."""

    def make(
        at: float = 1_790_000_000.0, prompt: str = "Is the sky blue?", answer: str = "yes", **fields: object
    ) -> Call:
        request = {"model": "assistant", "messages": [{"role": "user", "content": prompt}]}
        response = {"choices": [{"index": 0, "message": {"role": "assistant", "content": answer}}]}
        values: dict[str, object] = {
            "key": f"{int(at * 1000):012x}70008{new_key()[-15:]}",
            "at": at,
            "route": "chat.completions",
            "alias": "assistant",
            "target": "openai/gpt-4-0613",
            "status": 200,
            "request": msgspec.json.encode(request),
            "response": msgspec.json.encode(response),
            "usage": Usage(prompt_tokens=12, completion_tokens=3),
            "attempts": [
                Attempt(target="openai/gpt-4-0613", status=200, billed="yes", started=at, ended=at + 1)
            ],
        }
        return Call(**{**values, **fields})  # type: ignore[arg-type]

    return make
