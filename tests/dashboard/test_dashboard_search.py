"""Finding calls: every filter, page after page, and never by reading the whole table."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from understudy.dashboard import search
from understudy.dashboard.search import PAGE, Cursor, Filter, conditions, find, statement
from understudy.traffic.database import Database, open_database
from understudy.traffic.record import Call
from understudy.traffic.store import Store

MakeCall = Callable[..., Call]
Browse = Callable[..., Awaitable[Any]]
DAY = 86_400.0
START = dt.datetime(2026, 10, 1, tzinfo=dt.UTC).timestamp()


@pytest.fixture
def database(store: Store, tmp_path: Path) -> Database:
    return open_database("sqlite:///traffic.db", tmp_path)


@pytest.fixture
def filled(store: Store, make_call: MakeCall) -> list[Call]:
    """130 calls an hour apart; every 10th failed, every 7th of another alias, tags and tasks by turns."""
    calls = [
        make_call(
            at=START + n * 3600,
            prompt=f"question {n}",
            answer="déjà vu" if n == 3 else "fine",
            alias="other" if n % 7 == 0 else "assistant",
            status=503 if n % 20 == 0 else 429 if n % 10 == 0 else 200,
            task_id=f"task-{n % 3}" if n % 3 else "",
            tags={"team": "care" if n % 2 else "growth"},
        )
        for n in range(130)
    ]
    store.insert(calls, "s", 1)
    return calls


def numbers(calls: list[Any]) -> list[int]:
    return [int(re.findall(rb"question (\d+)", c.call.request)[0]) for c in calls]


def all_pages(database: Database, wanted: Filter) -> list[int]:
    cursor, seen = Cursor(), []
    for _ in range(100):
        found = find(database, wanted, cursor)
        seen += numbers(found.calls)
        if found.older is None:
            return seen
        cursor = found.older
    raise AssertionError("pages without end")


@pytest.mark.parametrize(
    ("wanted", "holds"),
    [
        (Filter(), lambda n: True),
        (Filter(alias="other"), lambda n: n % 7 == 0),
        (Filter(status="failed"), lambda n: n % 10 == 0),
        (Filter(status="ok"), lambda n: n % 10),
        (Filter(status="429"), lambda n: n % 20 == 10),
        (Filter(status="200"), lambda n: n % 10),
        (Filter(alias="other", status="failed"), lambda n: n % 70 == 0),
        (Filter(task="task-2"), lambda n: n % 3 == 2),
        (Filter(task="task-2", alias="other", status="failed"), lambda n: n % 3 == 2 and n % 70 == 0),
        (Filter(tag="team=care"), lambda n: n % 2),
        (Filter(tag="team"), lambda n: True),
        (Filter(tag="team=car"), lambda n: False),
        (Filter(tag="te%"), lambda n: False),
        (Filter(since=dt.date(2026, 10, 2), until=dt.date(2026, 10, 3)), lambda n: 24 <= n < 72),
        (Filter(text="QUESTION 12"), lambda n: n == 12 or 120 <= n < 130),
        (Filter(text="déjà"), lambda n: n == 3),
        (
            Filter(text="question 1", alias="other", tag="team=care"),
            lambda n: str(n)[0] == "1" and n % 14 == 7,
        ),
        (Filter(text="no such words"), lambda n: False),
    ],
)
def test_a_filter_finds_its_calls_newest_first(
    database: Database, filled: list[Call], wanted: Filter, holds: Callable[[int], bool]
) -> None:
    assert all_pages(database, wanted) == [n for n in reversed(range(130)) if holds(n)]


@pytest.mark.parametrize(("window", "text_window"), [(1, 1), (7, 3), (50, 50), (130, 130)])
def test_small_windows_lose_nothing(
    database: Database, filled: list[Call], monkeypatch: pytest.MonkeyPatch, window: int, text_window: int
) -> None:
    monkeypatch.setattr(search, "WINDOW", window)
    monkeypatch.setattr(search, "TEXT_WINDOW", text_window)
    for wanted in (Filter(tag="team=care", alias="other"), Filter(text="question 12", status="ok")):
        cursor, seen, pages = Cursor(), [], 0
        while cursor is not None:
            found = find(database, wanted, cursor)
            assert found.looked_back_to is None or found.older is not None
            seen += numbers(found.calls)
            cursor, pages = found.older, pages + 1
            assert pages < 200
        expected = (
            [n for n in reversed(range(130)) if n % 14 == 7]
            if wanted.tag
            else [n for n in reversed(range(130)) if (n == 12 or n >= 120) and n % 10]
        )
        assert seen == expected


def test_newer_leads_back(database: Database, filled: list[Call]) -> None:
    first = find(database, Filter(), Cursor())
    assert first.newer is None
    second = find(database, Filter(), first.older or Cursor())
    assert numbers(second.calls) == list(range(79, 29, -1))
    assert second.newer is not None
    assert find(database, Filter(), second.newer).calls == first.calls
    assert find(database, Filter(), second.newer).newer is None
    last = find(database, Filter(), second.older or Cursor())
    assert last.older is None
    assert len(first.calls) + len(second.calls) + len(last.calls) == 130


@pytest.mark.parametrize("direction", ["older", "newer"])
@pytest.mark.parametrize(
    ("wanted", "index"),
    [
        (Filter(), "PRIMARY KEY (key"),
        (Filter(status="ok"), "PRIMARY KEY (key"),
        (Filter(tag="team=care"), "PRIMARY KEY (key"),
        (Filter(since=dt.date(2026, 10, 2), until=dt.date(2026, 10, 3)), "PRIMARY KEY (key"),
        (Filter(alias="other"), "INDEX calls_by_alias (alias=? AND key"),
        (Filter(alias="other", status="ok", tag="a=b"), "INDEX calls_by_alias (alias=? AND key"),
        (Filter(status="failed"), "INDEX calls_failed (key"),
        (Filter(status="503"), "INDEX calls_failed (key"),
        (Filter(alias="other", status="failed"), "INDEX calls_failed_by_alias (alias=? AND key"),
        (Filter(task="t"), "INDEX calls_by_task (task_id=? AND key"),
        (Filter(task="t", alias="other", status="failed"), "INDEX calls_by_task (task_id=? AND key"),
    ],
)
def test_every_page_is_found_by_an_index(
    database: Database, filled: list[Call], wanted: Filter, index: str, direction: Any
) -> None:
    # with a million rows, whatever SCANs or sorts (TEMP B-TREE) would take seconds
    sql, values = statement(conditions(wanted), Cursor(filled[60].key, direction), "", "key, at, tags", 51)
    plan = " / ".join(row[3] for row in database.query("EXPLAIN QUERY PLAN " + sql, values))
    assert index in plan.replace("COVERING ", ""), plan
    assert "SCAN" not in plan
    assert "TEMP B-TREE" not in plan


def test_the_first_page_walks_its_index_backwards(database: Database, filled: list[Call]) -> None:
    for wanted in (Filter(), Filter(status="failed")):
        sql, values = statement(conditions(wanted), Cursor(), "", "key, at", 51)
        plan = " / ".join(row[3] for row in database.query("EXPLAIN QUERY PLAN " + sql, values))
        assert "TEMP B-TREE" not in plan  # ordered by the index, so LIMIT ends it after 51 rows


def test_sums_and_judgements_use_their_keys(database: Database, filled: list[Call]) -> None:
    sql = (
        "EXPLAIN QUERY PLAN SELECT calls FROM hours WHERE hour >= ? AND hour < ? ORDER BY hour, alias, target"
    )
    plan = " ".join(row[3] for row in database.query(sql, (0, 1)))
    assert "SEARCH hours USING PRIMARY KEY (hour>? AND hour<?)" in plan
    assert "TEMP B-TREE" not in plan


async def test_the_list_over_http(browse: Browse, filled: list[Call]) -> None:
    browser = await browse()
    first = await browser.get("/traffic")
    assert first.text.count('<td class="said"') == PAGE
    older = re.search(r'rel="next" href="([^"]+)"', first.text)
    assert older
    second = await browser.get(older[1].replace("&amp;", "&"))
    assert "question 79" in second.text
    assert 'rel="prev"' in second.text
    found = await browser.get("/traffic?alias=other&status=failed&from=2026-10-01&to=2026-10-02")
    assert numbers_in(found.text) == [0]
    assert "No call matches" in (await browser.get("/traffic?alias=nobody")).text


def numbers_in(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"<p>question (\d+)", text)]


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("status=nonsense", "status &#39;nonsense&#39; is none"),
        ("status=99999", "is none"),
        ("from=yesterday", "expected YYYY-MM-DD"),
        ("to=2026-13-01", "expected YYYY-MM-DD"),
    ],
)
async def test_a_filter_that_cannot_be_read_is_said(
    browse: Browse, filled: list[Call], query: str, says: str
) -> None:
    page = await (await browse()).get(f"/traffic?{query}")
    assert page.status == 200
    assert says in page.text


@pytest.mark.parametrize(
    "query",
    [
        "before=%00",
        "after='%20OR%201=1",
        "before=zzzz",
        "q=%ff%00",
        "tag=%25_%5c",
        "from=9999-12-31",
        "to=0001-01-01",
        "before=x&after=y",
        "task=" + "x" * 5000,
    ],
)
async def test_odd_queries_are_only_queries(browse: Browse, filled: list[Call], query: str) -> None:
    assert (await (await browse()).get(f"/traffic?{query}")).status == 200


def test_streams_are_searched_as_they_read(store: Store, database: Database, make_call: MakeCall) -> None:
    events = [{"choices": [{"delta": {"content": piece}}]} for piece in ("the ket", "tle leaks")]
    response = b"".join(b"data: %s\n\n" % msgspec.json.encode(event) for event in events)
    store.insert([make_call(stream=True, response=response)], "s", 1)
    assert len(find(database, Filter(text="kettle"), Cursor()).calls) == 1
