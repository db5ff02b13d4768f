"""Labelling in a browser: only from this machine, only from our page, and only as text."""

from __future__ import annotations

import re
from pathlib import Path

import aiohttp
import pytest
from aiohttp.test_utils import TestClient, TestServer

from understudy.evaluate.certificate import EVIDENCE
from understudy.evaluate.judge import read_labels
from understudy.evaluate.label import Labelling
from understudy.evaluate.label_page import LabelPage

Client = TestClient[aiohttp.web.Request, aiohttp.web.Application]


def token_and_key(page: str) -> dict[str, str]:
    return dict(re.findall(r'name="(token|key)" value="([^"]+)"', page))


async def opened(drill: Path, most: int = 3) -> tuple[Client, LabelPage]:
    page = LabelPage(Labelling(drill / EVIDENCE, "local/small"), most)
    client: Client = TestClient(TestServer(page.app()))
    await client.start_server()
    return client, page


async def test_labels_are_saved_one_by_one_until_the_person_finishes(drill: Path) -> None:
    client, page = await opened(drill)
    async with client:
        seen: set[str] = set()
        for choice in ("1", "2", "skip", "0"):
            text = await (await client.get("/")).text()
            fields = token_and_key(text)
            assert fields["key"] not in seen
            seen.add(fields["key"])
            answer = await client.post("/", data={**fields, "choice": choice})
            assert answer.status == 200  # after the redirect to the next pair
            # sent twice: a label is not given twice
            await client.post("/", data={**fields, "choice": choice})
        assert page.done == len(read_labels(drill / EVIDENCE)) == 3
        text = await (await client.get("/")).text()
        assert "Nothing is left to label" in text
        assert not page.finished.is_set()
        await client.post("/", data={**token_and_key(text), "choice": "finish"})
        assert page.finished.is_set()


async def test_recorded_text_stays_text_and_no_author_is_told(drill: Path) -> None:
    client, _ = await opened(drill)
    async with client:
        answer = await client.get("/")
        text = await answer.text()
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
        assert "<script" not in text
        assert "<img" not in text
        assert "script-src" not in answer.headers["Content-Security-Policy"]
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:80"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
    ],
)
async def test_another_site_can_neither_read_nor_write(drill: Path, headers: dict[str, str]) -> None:
    client, page = await opened(drill)
    async with client:
        fields = token_and_key(await (await client.get("/")).text())
        assert (await client.get("/", headers=headers)).status == 403
        sent = await client.post("/", headers=headers, data={**fields, "choice": "1"})
        assert (sent.status, page.done) == (403, 0)


@pytest.mark.parametrize("token", ["", "guess"])
async def test_a_form_without_our_token_changes_nothing(drill: Path, token: str) -> None:
    client, page = await opened(drill)
    async with client:
        fields = token_and_key(await (await client.get("/")).text())
        sent = await client.post("/", data={"key": fields["key"], "token": token, "choice": "1"})
        assert (sent.status, page.done) == (403, 0)
