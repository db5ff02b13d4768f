"""Shares of an alias's calls, and upstreams that rest after failures."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest
from faulty_upstream import (
    FaultyUpstream,
    answers,
    ask,
    calls,
    chat,
    config_for,
    echo,
    raw_client,
    running,
    until,
)

from understudy.config import Config, parse
from understudy.gateway.app import upstreams_of
from understudy.gateway.breaker import Breaker
from understudy.gateway.routing import Table, build_table
from understudy.traffic.store import open_store

TWO = """
[endpoints.a]
base_url = "http://127.0.0.1:1/v1"
[endpoints.b]
base_url = "http://127.0.0.1:2/v1"
[aliases.assistant]
model = "a/m"
fallback = ["b/spare"]
weights = { "a/m" = 0.9, "b/m" = 0.3, "b/never" = 0 }
"""


@pytest.fixture
def table() -> Table:
    config = parse(TWO, "understudy.toml", Path())
    return build_table(config, upstreams_of(config), {})


def names(table: Table, task: bytes = b"") -> tuple[str, ...]:
    return tuple(target.name for target in table.targets("assistant", task))


# shares


def test_calls_are_shared_out_by_weight(table: Table) -> None:
    drawn = Counter(names(table, b"task %d" % n) for n in range(4000))
    assert set(drawn) == {("a/m", "b/spare"), ("b/m", "a/m", "b/spare")}
    # the tasks are fixed, so this is no chance: 0.75 within four standard errors
    assert abs(drawn["a/m", "b/spare"] / 4000 - 0.75) < 4 * (0.75 * 0.25 / 4000) ** 0.5
    assert {names(table) for _ in range(200)} == set(drawn)


def test_a_task_stays_with_its_model(table: Table) -> None:
    # pinned: another process, another day, the same way
    assert [names(table, b"task-%d" % n)[0] for n in range(8)] == [
        "a/m",
        "a/m",
        "a/m",
        "a/m",
        "b/m",
        "a/m",
        "a/m",
        "b/m",
    ]
    assert all(names(table, b"task-3") == names(table, b"task-3") for _ in range(50))


def test_a_route_of_the_store_replaces_the_shares(tmp_path: Path) -> None:
    config = parse(TWO, "understudy.toml", tmp_path)
    with open_store("sqlite:///understudy.db", tmp_path) as store:
        store.set_route("assistant", "b/new", expected_version=0, by="test", reason="test")
        table = build_table(config, upstreams_of(config), store.routes())
    assert {names(table, b"task %d" % n) for n in range(50)} == {("b/new",)}


async def test_shares_are_shown_and_named_in_the_answer(
    tmp_path: Path, upstream: FaultyUpstream, second: FaultyUpstream
) -> None:
    text = TWO.replace("http://127.0.0.1:1/v1", upstream.url).replace("http://127.0.0.1:2/v1", second.url)
    config = parse('[gateway]\nlisten = "127.0.0.1:0"\n' + text, "understudy.toml", tmp_path)
    async with running(config) as gateway:
        got = [await ask(gateway.port, None, f"x-task-id: {n}") for n in range(20)]
        async with raw_client(gateway.port) as client:
            shown = await client.ask(b"GET /v1/models/assistant HTTP/1.1\r\nHost: a\r\n\r\n")
    assert shown.json["weights"] == pytest.approx({"a/m": 0.75, "b/m": 0.25})
    said = [answer.headers["x-understudy-model"] for answer in got]
    assert set(said) == {"a/m", "b/m"}
    assert [call.target for call in calls(tmp_path)] == said
    assert not any("x-understudy-fallback" in answer.headers for answer in got)
    assert {served.json["model"] for served in (*upstream.served, *second.served)} == {"m"}


# resting


def test_a_breaker_opens_rests_and_lets_one_try() -> None:
    breaker = Breaker(break_after=2, rest_s=10.0)
    breaker.failed(0.0)
    assert breaker.admits(0.0)
    breaker.failed(1.0)
    assert not breaker.admits(10.9)
    assert breaker.rests(10.9)
    assert [breaker.admits(11.0), breaker.admits(11.0)] == [True, False]
    breaker.failed(12.0)
    assert not breaker.admits(21.9)
    assert breaker.admits(22.0)
    breaker.answered()
    assert all(breaker.admits(22.0) for _ in range(3))
    breaker.failed(23.0)
    assert breaker.admits(23.0)


def test_a_breaker_may_be_switched_off() -> None:
    breaker = Breaker(break_after=0)
    for _ in range(100):
        breaker.failed(0.0)
    assert breaker.admits(0.0)
    assert not breaker.rests(0.0)


def resting_config(folder: Path, *upstreams: FaultyUpstream, rest_s: float = 60.0) -> Config:
    endpoints = {name: upstream.url for name, upstream in zip(("one", "two"), upstreams, strict=False)}
    return config_for(folder, endpoints, f"break_after = 3\nrest_s = {rest_s}")


async def test_an_upstream_that_keeps_failing_is_passed_over(
    tmp_path: Path, upstream: FaultyUpstream, second: FaultyUpstream
) -> None:
    upstream.script = [answers(500)]
    async with running(resting_config(tmp_path, upstream, second)) as gateway:
        got = [await ask(gateway.port) for _ in range(5)]
        async with raw_client(gateway.port) as client:
            page = await client.ask(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
    # two tries by the first call, one by the second, then none
    assert len(upstream.served) == 3
    assert [len(call.attempts) for call in calls(tmp_path)] == [3, 2, 1, 1, 1]
    assert {answer.headers["x-understudy-fallback"] for answer in got} == {"two/m"}
    assert b'understudy_upstream_resting{endpoint="one"' in page.body
    resting = {line.split(b'"')[1]: line[-1:] for line in page.body.splitlines() if b"resting{" in line}
    assert resting == {b"one": b"1", b"two": b"0"}


async def test_one_call_finds_out_that_it_is_well_again(
    tmp_path: Path, upstream: FaultyUpstream, second: FaultyUpstream
) -> None:
    upstream.script = [answers(500), answers(500), answers(500), echo]
    async with running(resting_config(tmp_path, upstream, second, rest_s=0.2)) as gateway:
        for _ in range(3):
            assert (await ask(gateway.port)).headers["x-understudy-model"] == "two/m"
        await asyncio.sleep(0.25)
        for _ in range(3):
            assert (await ask(gateway.port)).headers["x-understudy-model"] == "one/m"


async def test_where_nobody_else_may_answer_it_is_asked_all_the_same(
    tmp_path: Path, upstream: FaultyUpstream
) -> None:
    upstream.script = [*[answers(500)] * 6, echo]
    async with running(resting_config(tmp_path, upstream)) as gateway:
        assert [(await ask(gateway.port)).status for _ in range(4)] == [500, 500, 500, 200]


async def test_too_many_requests_are_no_failure(
    tmp_path: Path, upstream: FaultyUpstream, second: FaultyUpstream
) -> None:
    upstream.script = [answers(429, retry_after="9")]
    async with running(resting_config(tmp_path, upstream, second)) as gateway:
        for _ in range(6):
            await ask(gateway.port)
    assert len(upstream.served) == 6


async def test_silence_is_a_failure(tmp_path: Path, upstream: FaultyUpstream, second: FaultyUpstream) -> None:
    async def silent(served: object) -> None:
        await asyncio.sleep(60)

    upstream.script = [silent]
    endpoints = {"one": upstream.url, "two": second.url}
    config = config_for(tmp_path, endpoints, "break_after = 1\nfirst_byte_timeout_s = 0.05")
    async with running(config) as gateway:
        assert (await ask(gateway.port, chat())).status == 504
        await until(lambda: not gateway.plane.exchanges)
        assert (await ask(gateway.port, chat())).headers["x-understudy-model"] == "two/m"
