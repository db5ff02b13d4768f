"""The calendar: what a trial takes, held against trials by simulation and against arithmetic by hand."""

from __future__ import annotations

import datetime as dt
import math
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from understudy.cli.rollout import rollout
from understudy.config import Rollout
from understudy.rollout.calendar import Traffic, entry, tasks_needed, traffic_of
from understudy.traffic.record import Call, Feedback, new_key
from understudy.traffic.store import Store, open_store

PLAIN = Rollout(replay_tasks=0, shadow_tasks=0)
BUSY = Traffic(tasks_per_day=1000.0, told=1.0, variance=0.16)


def test_what_the_proof_takes_is_as_computed_by_hand() -> None:
    # one step of 25%, so each task of the candidate is held against three: g = 0.05² / (2 · 0.16 · 4/3)
    growth = 0.0025 / (2 * 0.16 * 4 / 3)
    a = math.log(20) - math.log(0.7)
    wanted = ((1.2815516 * 2**0.5 + (2 * 1.2815516**2 + 4 * a) ** 0.5) / 2) ** 2
    assert wanted - 1.2815516 * (2 * wanted) ** 0.5 == pytest.approx(a)
    settings = msgspec.structs.replace(PLAIN, shares=(0.25,), tasks=(10,))
    assert tasks_needed(settings, BUSY) == pytest.approx(wanted / growth / 0.25, rel=1e-6)
    # where one task in two is spoken of it takes twice as many
    assert tasks_needed(settings, BUSY._replace(told=0.5)) == pytest.approx(2 * wanted / growth / 0.25)


def test_the_latest_start_leaves_a_week() -> None:
    end = dt.date(2027, 3, 31)
    found = entry("a", "v/m", end, BUSY, PLAIN)
    assert found.days_needed is not None
    assert found.latest_start == end - dt.timedelta(days=math.ceil(found.days_needed) + 7)
    assert entry("a", "v/m", None, BUSY, PLAIN).missing == "no end is announced"
    assert "/feedback" in entry("a", "v/m", end, BUSY._replace(told=0.0), PLAIN).missing
    assert "no traffic" in entry("a", "v/m", end, Traffic(0.0, 0.0, 0.25), PLAIN).missing


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store("sqlite:///understudy.db", tmp_path)


def fill(store: Store, days: int, tasks: int, told: int) -> None:
    """So many tasks a day of two calls each; of every ``told``-th somebody says how it went."""
    now = time.time()
    records: list[Call | Feedback] = []
    for number in range(days * tasks):
        at = now - 60 - number * 86_400 / tasks
        for _ in range(2):
            key = f"{int(at * 1000):012x}7{new_key()[-19:]}"
            call = Call(key=key, at=at, route="chat.completions", alias="a", target="v/m", status=200,
                        request=b"", response=b"", attempts=[], task_id=f"t{number}")  # fmt: skip
            records.append(call)
        if number % told == 0:
            said = Feedback(key=new_key(), call=key, at=at, metric="ok", value=float(number % 5 > 0))
            records.append(said)
    store.insert(records, "s", 1)


def test_traffic_is_counted_in_tasks(store: Store) -> None:
    fill(store, days=3, tasks=100, told=2)
    found = traffic_of(store, "a", time.time())
    assert found.tasks_per_day == pytest.approx(100, rel=0.05)
    assert found.told == pytest.approx(0.5)
    assert found.variance == pytest.approx(0.16, abs=0.01)
    assert traffic_of(store, "nobody", time.time()).tasks_per_day == 0.0


@pytest.fixture
def run(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)
    fill(store, days=2, tasks=400, told=1)
    soon = (dt.datetime.now(dt.UTC) + dt.timedelta(days=400)).date()
    Path("facts.yaml").write_text(f"models:\n  v/m:\n    retires: {soon}\n")
    Path("understudy.toml").write_text(
        '[catalog]\noverlay = "facts.yaml"\n[endpoints.v]\nbase_url = "http://127.0.0.1:1/v1"\n'
        '[aliases.a]\nmodel = "v/m"\n'
    )
    return lambda *words: CliRunner().invoke(rollout, words)


def test_a_trial_that_cannot_be_over_in_time_is_refused(run: Callable[..., Result], store: Store) -> None:
    near = (dt.datetime.now(dt.UTC) + dt.timedelta(days=2)).date().isoformat()
    refused = run("start", "a", "--to", "v/new", "--until-date", near)
    assert "may not be over by" in str(refused.exception)
    assert "no day" in str(run("start", "a", "--to", "v/new", "--until-date", "soon").exception)
    assert store.route("a") is None
    [found] = msgspec.json.decode(run("calendar", "--json").output)
    assert found["latest_start"] < found["retires"]
    assert "begin by" in run("calendar").output
    assert run("start", "a", "--to", "v/new", "--until-date", "retirement").exit_code == 0
    begun = store.route("a")
    assert begun is not None
    assert dt.datetime.fromtimestamp(begun.deadline, dt.UTC).date().isoformat() == found["retires"]
    assert "to be over by" not in begun.reason
