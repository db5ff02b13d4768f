"""Moving an alias: history, races, rolling back, and the commands as a user types them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from understudy.cli.rollout import rollout
from understudy.config import Alias
from understudy.errors import InputError
from understudy.rollout.move import move, roll_back
from understudy.traffic.store import Store, open_store

INITIAL = Alias(model="openai/gpt-4.1", fallback=["local/student", "openai/gpt-4o"])
CONFIG = """
[endpoints.openai]
base_url = "https://api.openai.com/v1"
[endpoints.local]
base_url = "http://127.0.0.1:8091/v1"
[aliases.assistant]
model = "openai/gpt-4.1"
fallback = ["local/student"]
[aliases.other]
model = "openai/gpt-4o"
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store("sqlite:///understudy.db", tmp_path) as opened:
        yield opened


def test_a_first_move_keeps_the_configs_route_in_the_history(store: Store) -> None:
    moved = move(store, "a", "local/student", by="me", reason="retired", evidence="c.json", initial=INITIAL)
    assert moved.changed
    assert (moved.was.model, moved.now.model) == ("openai/gpt-4.1", "local/student")
    assert moved.now.fallback == ("openai/gpt-4o",)  # not a fallback of itself
    assert [(r.version, r.changed_by, r.evidence) for r in store.route_history("a")] == [
        (1, "understudy.toml", ""),
        (2, "me", "c.json"),
    ]


def test_a_move_to_where_the_alias_is_changes_nothing(store: Store) -> None:
    move(store, "a", "local/student", by="me", reason="r", initial=INITIAL)
    again = move(store, "a", "local/student", by="me", reason="r", initial=INITIAL)
    assert not again.changed
    assert len(store.route_history("a")) == 2


def test_rolling_back_restores_model_and_fallbacks_once(store: Store) -> None:
    move(store, "a", "local/student", by="me", reason="r", initial=INITIAL)
    back = roll_back(store, "a", by="me", reason="worse")
    assert (back.now.model, back.now.fallback) == (INITIAL.model, tuple(INITIAL.fallback))
    assert (back.now.stage, back.now.version) == ("rolled_back", 3)
    with pytest.raises(InputError, match="no move"):
        roll_back(store, "a", by="me", reason="again")
    move(store, "a", "local/other", by="me", reason="second try", initial=INITIAL)
    assert roll_back(store, "a", by="me", reason="worse").now.model == INITIAL.model


def test_an_alias_without_a_route_is_named(store: Store) -> None:
    with pytest.raises(InputError, match="nobody"):
        move(store, "nobody", "local/student", by="me", reason="r")
    with pytest.raises(InputError, match="no move"):
        roll_back(store, "nobody", by="me", reason="r")


def test_of_two_movers_one_is_told_that_the_route_changed(store: Store, tmp_path: Path) -> None:
    move(store, "a", "x/start", by="me", reason="r", initial=INITIAL)
    gate = threading.Barrier(2)
    lost: list[str] = []

    class Slow(Store):
        """Both movers have read the route before either writes."""

        def set_route(self, *args: Any, **values: Any) -> bool:
            gate.wait()
            return super().set_route(*args, **values)

    def run(to: str) -> None:
        with open_store("sqlite:///understudy.db", tmp_path) as own:
            try:
                move(Slow(own._database), "a", to, by=to, reason="race")
            except InputError:
                lost.append(to)

    threads = [threading.Thread(target=run, args=(f"x/{n}",)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lost) == 1
    assert len(store.route_history("a")) == 3


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)
    Path("understudy.toml").write_text(CONFIG)

    def invoke(*words: str) -> Result:
        return CliRunner().invoke(rollout, words)

    return invoke


def test_start_status_abort_history(run: Callable[..., Result]) -> None:
    assert "never changed" in run("status").output
    moved = run("start", "assistant", "--to", "local/student", "--now", "--json")
    now = msgspec.json.decode(moved.output)["now"]
    assert (now["model"], now["version"]) == ("local/student", 2)
    assert "already at local/student" in run("start", "assistant", "--to", "local/student", "--now").output
    status = {r["alias"]: r["model"] for r in msgspec.json.decode(run("status", "--json").output)}
    assert status == {"assistant": "local/student", "other": "openai/gpt-4o"}
    assert "local/student -> openai/gpt-4.1, rolled back; version 3" in run("abort", "assistant").output
    assert len(run("history", "assistant").output.splitlines()) == 3


def test_a_trial_is_begun_held_resumed_and_ended(run: Callable[..., Result]) -> None:
    assert (
        "canary share 0.25 tasks 100"
        in run("start", "assistant", "--to", "local/student", "--dry-run").output
    )
    assert "never changed" in run("status").output
    begun = run("start", "assistant", "--to", "local/student")
    assert "local/student replay without evidence; version 2" in begun.output
    assert "understudy rollout run" in begun.output
    told = run("status", "assistant").output
    assert "openai/gpt-4.1" in told
    assert "waits for 40 more answers to recorded calls" in told
    assert "on trial for 'assistant' already" in str(run("start", "assistant", "--to", "local/b").exception)
    assert "held" in run("pause", "assistant").output
    assert "waits for a person" in run("status", "assistant").output
    assert "replay" in run("resume", "assistant").output
    assert "shadow" in run("run", "--once").output  # nothing was recorded, so nothing is replayed
    assert "waits for 40 more copies" in run("run", "--once").output
    ended = msgspec.json.decode(run("abort", "assistant", "--json").output)["now"]
    assert (ended["stage"], ended["model"], ended["candidate"]) == ("rolled_back", "openai/gpt-4.1", "")
    assert isinstance(run("abort", "assistant").exception, InputError)


def test_every_change_is_told_to_the_webhook(
    run: Callable[..., Result], webhook: queue.Queue[dict[str, Any]]
) -> None:
    Path("understudy.toml").write_text(CONFIG + '[rollout]\nwebhook = "env:HOOK"\n')
    run("start", "assistant", "--to", "local/student")
    done = run("run", "--once")
    run("pause", "assistant", "--reason", "a fair")
    run("pause", "assistant")  # is paused already
    run("abort", "assistant")
    heard = list(webhook.queue)
    assert done.exit_code == 0
    assert {told["source"] for told in heard} == {"understudy rollout"}
    stages = [(told["route"]["stage"], told["route"]["reason"]) for told in heard]
    assert [stage for stage, _ in stages] == ["replay", "shadow", "held", "rolled_back"]
    assert ("held", "a fair") in stages


def test_a_certificate_that_does_not_verify_starts_nothing(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    (tmp_path / "certificate.json").write_text("{}")
    refused = run("start", "assistant", "--to", "local/student", "--evidence", "certificate.json")
    assert isinstance(refused.exception, InputError)
    assert "never changed" in run("status").output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("start", "asistant", "--to", "local/student"), "such as assistant"),
        (("start", "assistant", "--to", "nowhere/model"), "unknown endpoint"),
        (("start", "assistant", "--to", "local"), "unknown endpoint"),
        (("abort", "assistant"), "no move"),
        (("status", "nobody"), "unknown alias"),
        (("pause", "assistant"), "nothing is on trial"),
        (("start", "assistant", "--to", "openai/gpt-4.1"), "answers 'assistant' already"),
    ],
)
def test_bad_input_is_named(run: Callable[..., Result], words: tuple[str, ...], message: str) -> None:
    error = run(*words).exception
    assert isinstance(error, InputError)
    assert message in str(error)
