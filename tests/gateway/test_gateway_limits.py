"""Limits of keys: what is let through by several gateways over one store, and what the others are told."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from faulty_upstream import (
    FaultyUpstream,
    Got,
    Served,
    ask,
    calls,
    chat,
    completion,
    config_for,
    echo,
    http,
    raw_client,
    running,
    sends,
    until,
)

from understudy.config import Config
from understudy.errors import StoreError
from understudy.gateway import limits
from understudy.gateway.app import RunningGateway
from understudy.traffic.allowances import Limits
from understudy.traffic.keys import NewKey
from understudy.traffic.store import Store

NOON = 1_800_000_000.0
"""Begins a minute (and lies within a day and a month)."""


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that limits see: it stands still unless a test moves it."""
    now = [NOON + 10]
    monkeypatch.setattr(limits, "_now", lambda: now[0])
    return now


def config(folder: Path, upstream: FaultyUpstream, rest: str = "") -> Config:
    return config_for(folder, {"local": upstream.url}, "require_key = true", rest=rest)


async def many(port: int, key: NewKey, count: int) -> list[Got]:
    header = f"Authorization: Bearer {key.secret}"
    return list(await asyncio.gather(*(ask(port, None, header) for _ in range(count))))


def limits_of(gateway: RunningGateway, key: NewKey) -> Limits:
    """What a gateway knows of a key's limits."""
    purse = gateway.plane.keys and gateway.plane.keys.purse(key.key.id)
    return purse.key.limits if purse else Limits()


def statuses(answers: list[Got]) -> list[int]:
    return sorted(answer.status for answer in answers)


async def test_requests_are_limited_over_all_gateways(
    tmp_path: Path, upstream: FaultyUpstream, store: Store, clock: list[float]
) -> None:
    key = store.create_key("team", Limits(requests_per_minute=30))
    free = store.create_key("free")
    async with running(config(tmp_path, upstream)) as one, running(config(tmp_path, upstream)) as two:
        halves = await asyncio.gather(many(one.port, key, 40), many(two.port, key, 40))
        answers = halves[0] + halves[1]
        assert statuses(answers) == [200] * 30 + [429] * 50
        refused = next(answer for answer in answers if answer.status == 429)
        assert refused.headers["retry-after"] == "50"
        assert refused.json["error"]["code"] == "rate_limit_exceeded"
        assert "(team) has used up its 30 requests a minute" in refused.json["error"]["message"]
        assert statuses(await many(one.port, free, 5)) == [200] * 5
        async with raw_client(one.port) as client:
            header = f"Authorization: Bearer {free.secret}"
            page = await client.ask(f"GET /metrics HTTP/1.1\r\nHost: a\r\n{header}\r\n\r\n".encode())
        assert b'refused_by_limit_total{limit="requests_per_minute"' in page.body
        clock[0] += 50  # the next minute
        assert statuses(await many(two.port, key, 5)) == [200] * 5
    assert len(upstream.served) == 40
    assert len(calls(tmp_path)) == 40


async def test_tokens_are_limited_by_what_calls_spent(
    tmp_path: Path, upstream: FaultyUpstream, store: Store, clock: list[float]
) -> None:
    used = completion("yes")["usage"]
    each = used["prompt_tokens"] + used["completion_tokens"]
    key = store.create_key("team", Limits(tokens_per_minute=5 * each))
    async with running(config(tmp_path, upstream)) as one, running(config(tmp_path, upstream)) as two:
        upstream.script = [sends(http(200, json.dumps(completion("yes")).encode()))]
        answers = [(await many(g.port, key, 1))[0] for g in (one, two) * 6]
        # the least share is more than the limit, so the first gateway has it all until it gives back
        assert [answer.status for answer in answers[::2]] == [200] * 5 + [429]
        assert [answer.status for answer in answers[1::2]] == [429] * 6
        assert "tokens a minute" in answers[-1].json["error"]["message"]
        assert await many(one.port, store.create_key("other"), 1)
        clock[0] += 60
        assert statuses(await many(two.port, key, 1)) == [200]


async def test_calls_in_flight_may_exceed_and_are_owed(
    tmp_path: Path, upstream: FaultyUpstream, store: Store, clock: list[float]
) -> None:
    go = asyncio.Event()

    async def waits(served: Served) -> None:
        await go.wait()
        await echo(served)

    upstream.script = [waits]
    key = store.create_key("team", Limits(tokens_per_minute=1))
    async with running(config(tmp_path, upstream)) as gateway:
        asking = asyncio.ensure_future(many(gateway.port, key, 4))
        await until(lambda: len(upstream.served) == 4)
        go.set()
        assert statuses(await asking) == [200] * 4
        assert statuses(await many(gateway.port, key, 1)) == [429]
        clock[0] += 60
        assert statuses(await many(gateway.port, key, 1)) == [200]


# ten tokens of `completion`: a dollar a call
OVERLAY = "models:\n  local/m: {prices: {input: 100000, output: 100000, start: 2026-01-01}}\n"


async def test_money_is_limited_by_the_catalogs_prices(
    tmp_path: Path, upstream: FaultyUpstream, store: Store
) -> None:
    (tmp_path / "prices.yaml").write_text(OVERLAY)
    key = store.create_key("team", Limits(usd_per_day=2.5))
    unpriced = {**chat(), "model": "local/unpriced"}
    async with running(config(tmp_path, upstream, '[catalog]\noverlay = "prices.yaml"')) as gateway:
        answers = [(await many(gateway.port, key, 1))[0] for _ in range(4)]
        assert [answer.status for answer in answers] == [200, 200, 200, 429]
        assert answers[-1].json["error"]["code"] == "budget_exceeded"
        assert "2.5 US dollars a day" in answers[-1].json["error"]["message"]
        assert store.limit_key(key.key.id, Limits(usd_per_day=9.0))
        await until(lambda: limits_of(gateway, key) == Limits(usd_per_day=9.0))
        assert statuses(await many(gateway.port, key, 1)) == [200]
        got = await ask(gateway.port, unpriced, f"Authorization: Bearer {key.secret}")
        assert (got.status, gateway.plane.keys and gateway.plane.keys.purses.unpriced) == (200, 1)


async def test_what_is_not_spent_is_given_back(
    tmp_path: Path, upstream: FaultyUpstream, store: Store
) -> None:
    key = store.create_key("team", Limits(requests_per_minute=1600))
    async with running(config(tmp_path, upstream)) as gateway:
        assert statuses(await many(gateway.port, key, 3)) == [200] * 3
    # 1,597 are left of 1,600: a share is a sixteenth of them
    period = limits.period_of("requests_per_minute", NOON).number
    assert store.draw(key.key.id, "requests_per_minute", period, limit=1600) == 1597 // 16


async def test_limits_that_cannot_be_checked_refuse(
    tmp_path: Path, upstream: FaultyUpstream, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = store.create_key("team", Limits(requests_per_minute=10))

    def broken(*_: object, **__: object) -> float:
        raise StoreError("the disk is gone")

    async with running(config(tmp_path, upstream)) as gateway:
        monkeypatch.setattr(Store, "draw", broken)
        (got,) = await many(gateway.port, key, 1)
    assert (got.status, got.json["error"]["code"]) == (503, "store_unreachable")
    assert upstream.served == []
