"""The ledger behind per-key limits: periods, shares, and processes that draw at once."""

from __future__ import annotations

import datetime as dt
import threading
from pathlib import Path

import pytest

from understudy.traffic.allowances import KINDS, Kind, Limits, period_of
from understudy.traffic.store import Store, open_store


def at(text: str) -> float:
    return dt.datetime.fromisoformat(text).replace(tzinfo=dt.UTC).timestamp()


@pytest.mark.parametrize(
    ("kind", "begins", "ends"),
    [
        ("requests_per_minute", "2026-12-31T23:59:00", "2027-01-01T00:00:00"),
        ("tokens_per_minute", "2026-12-31T23:59:00", "2027-01-01T00:00:00"),
        ("usd_per_day", "2026-12-31T00:00:00", "2027-01-01T00:00:00"),
        ("usd_per_month", "2026-12-01T00:00:00", "2027-01-01T00:00:00"),
    ],
)
def test_periods_are_those_of_the_calendar(kind: Kind, begins: str, ends: str) -> None:
    inside = period_of(kind, at("2026-12-31T23:59:59.5"))
    assert inside[1:] == (at(begins), at(ends))
    assert period_of(kind, at(begins)) == inside
    assert period_of(kind, at(ends)).number == inside.number + 1


def test_shares_shrink_and_never_exceed_the_limit(store: Store) -> None:
    drawn: list[float] = []
    while share := store.draw("k", "requests_per_minute", 7, limit=100):
        drawn.append(share)
    assert drawn[:3] == [6, 5, 5]  # a sixteenth of 100, of 94, of 89
    assert drawn[-1] == 1
    assert sum(drawn) == 100
    assert store.draw("k", "requests_per_minute", 8, limit=100) == 6
    assert store.draw("other", "requests_per_minute", 7, limit=100) == 6


def test_what_is_owed_or_given_back_is_entered(store: Store) -> None:
    assert store.draw("k", "usd_per_day", 1, limit=1.6) == pytest.approx(0.1)
    assert store.draw("k", "usd_per_day", 1, limit=1.6, owed=1.42) == pytest.approx(0.01)  # the least
    assert store.draw("k", "usd_per_day", 1, limit=1.6, owed=5.0) == 0  # spent beyond the limit
    assert store.draw("k", "usd_per_day", 1, limit=0, owed=-6.43) == 0
    assert store.draw("k", "usd_per_day", 1, limit=1.6) == pytest.approx(1.5 / 16)


def test_processes_that_draw_at_once_share_one_limit(store_url: str, tmp_path: Path) -> None:
    totals: list[float] = []

    def drawer() -> None:
        with open_store(store_url, tmp_path) as own:
            total = 0.0
            while share := own.draw("k", "tokens_per_minute", 1, limit=40_000):
                total += share
            totals.append(total)

    open_store(store_url, tmp_path).close()
    threads = [threading.Thread(target=drawer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(totals) == 40_000


def test_a_key_keeps_its_limits(store: Store) -> None:
    made = store.create_key("team", Limits(requests_per_minute=60, usd_per_month=9.5))
    found = store.lookup_key(made.secret)
    assert found is not None
    assert found == store.keys()[0] == made.key
    assert [found.limits.of(kind) for kind in KINDS] == [60, 0, 0.0, 9.5]
    assert store.limit_key(made.key.id, Limits(tokens_per_minute=1000))
    assert store.keys()[0].limits == Limits(tokens_per_minute=1000)
    assert store.revoke_key(made.key.id)
    assert not store.limit_key(made.key.id, Limits())
