"""Whole trials on a real store under a clock of our own: tasks are dealt by the gateway's own table, answered
by scripted models, indexed, and judged by the controller."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rollout_world import ME, NEW, OLD, World, settings, started

from understudy import config as configuration
from understudy.config import Config, Rollout
from understudy.errors import InputError
from understudy.gateway.routing import Memory, build_table
from understudy.protocol import Cost
from understudy.rollout.course import Step, alarm
from understudy.rollout.move import current
from understudy.rollout.shadow import shadow_alias
from understudy.rollout.standing import Pair, Standing
from understudy.rollout.trials import abort, begin, pause, resume, set_stage
from understudy.traffic.record import Attempt, Call
from understudy.traffic.rows import StoredCall
from understudy.traffic.store import Store, open_store


async def test_an_equal_candidate_goes_through_every_share_and_is_promoted(
    store: Store, config: Config
) -> None:
    world = started(store, config)
    await world.pass_on(3000, until="promoted")
    history = store.route_history("chat")
    assert [(r.stage, r.share) for r in history[1:]] == [
        ("canary", 0.1), ("canary", 0.3), ("canary", 0.5), ("promoted", 0.0),
    ]  # fmt: skip
    assert (history[-1].model, history[-1].candidate, history[-1].changed_by) == (NEW, "", "understudy")
    assert "not worse by 0.2" in history[-1].reason
    assert abort(store, "chat", ME).now.model == OLD


async def test_a_worse_candidate_is_rolled_back(store: Store, config: Config) -> None:
    world = started(store, config, new=0.3)
    await world.pass_on(3000, until="rolled_back")
    route = store.route("chat")
    assert route is not None
    assert (route.model, route.stage, route.candidate) == (OLD, "rolled_back", "")
    assert "outcomes" in route.reason


async def test_an_outage_is_over_within_twenty_requests_and_no_client_sees_it(
    store: Store, config: Config
) -> None:
    world = started(store, config)
    world.fails = {NEW}
    await world.pass_on(2000, until="rolled_back")
    route = store.route("chat")
    assert route is not None
    assert route.stage == "rolled_back"
    assert "errors" in route.reason
    assert world.dealt[NEW] <= 20
    assert all(c.call.status == 200 and c.call.target == OLD for c in store.calls(alias="chat"))


async def test_a_slow_candidate_is_rolled_back_for_that(store: Store, config: Config) -> None:
    world = started(store, config)
    world.seconds[NEW] = 1.9
    await world.pass_on(3000, until="rolled_back")
    route = store.route("chat")
    assert route is not None
    assert route.stage == "rolled_back"
    assert "time" in route.reason


async def test_empty_answers_on_both_sides_are_nobodys_fault(store: Store, config: Config) -> None:
    world = started(store, config)
    world.text = " "
    await world.pass_on(400)
    route = store.route("chat")
    assert route is not None
    assert route.stage in ("canary", "promoted")


async def test_without_outcomes_it_waits_and_says_so_then_is_held(store: Store, config: Config) -> None:
    world = started(store, settings(config, hold_days=1))
    world.speaks = False
    reports = await world.pass_on(400)
    assert any("report right answers" in missing for missing in reports[0].missing)
    assert [r.share for r in store.route_history("chat")][-1] == 0.1  # never beyond without a word
    world.now += 86_500
    await world.controller.step()
    held = store.route("chat")
    assert held is not None
    assert (held.stage, held.share) == ("held", 0.1)
    assert "undecided after 1 days" in held.reason


async def test_a_held_trial_sends_nobody_to_the_candidate_until_it_is_resumed(
    store: Store, config: Config
) -> None:
    world = started(store, config)
    pause(store, "chat", ME)
    await world.pass_on(60)
    assert world.dealt[NEW] == 0
    resume(store, "chat", ME)
    await world.pass_on(60)
    assert world.dealt[NEW] > 0


async def test_a_controller_that_starts_again_knows_the_same(store: Store, config: Config) -> None:
    world = started(store, settings(config, tasks=[50, 50, 50]))
    [before] = await world.pass_on(200)
    [after] = await world.anew().step()
    for name in ("answered", "scored"):
        assert getattr(after.standing, name) == getattr(before.standing, name) > 0
    assert after.standing.difference.e_fine == pytest.approx(before.standing.difference.e_fine)
    assert after.standing.difference.e_worse == pytest.approx(before.standing.difference.e_worse)
    errors = [r.standing.guards["errors"].excess.e_value for r in (before, after)]
    assert errors[0] == pytest.approx(errors[1])


def _die_at_write(tmp_path: Path, config: Config, now: float, nth: int) -> bool:
    """One step of a controller in a process that is gone at its ``nth`` write; whether it came to that."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    try:
        store, left = open_store("sqlite:///understudy.db", tmp_path), [nth]
        connection = store._database._connection  # type: ignore[attr-defined] # where SQLite's words pass

        def count(sql: str) -> None:
            if sql.startswith(("BEGIN", "COMMIT", "INSERT", "DELETE", "UPDATE")):
                left[0] -= 1
                if not left[0]:
                    os._exit(9)

        connection.set_trace_callback(count)
        world = World(store, config)
        world.now = now
        asyncio.run(world.controller.step())
        os._exit(0)
    finally:
        os._exit(1)


def test_a_controller_killed_at_any_write_leaves_a_consistent_stage(tmp_path: Path, config: Config) -> None:
    config = settings(config, shadow_tasks=4, shares=[0.3, 0.45], tasks=[5, 5], margin=0.6)
    now, deaths, stages = time.time(), 0, ["shadow"]
    with open_store("sqlite:///understudy.db", tmp_path) as store:
        started(store, config)
    while stages[-1] != "promoted":
        with open_store("sqlite:///understudy.db", tmp_path) as store:
            world = World(store, config)
            world.rng, world.now = random.Random(now), now
            for number in range(40):
                world.add_task(f"t{now:.0f}-{number}")
                world.now += 1.0
            now = world.now + 6.0
        nth = 1
        while _die_at_write(tmp_path, config, now, nth):
            nth, deaths = nth + 1, deaths + 1
            with open_store("sqlite:///understudy.db", tmp_path) as store:
                history, route = store.route_history("chat"), store.route("chat")
                assert route == history[-1]
                assert [r.version for r in history] == list(range(1, len(history) + 1))
                copied = [c.call.tags["shadow_of"] for c in store.calls(alias=shadow_alias("chat"))]
                assert len(copied) == len(set(copied))
        with open_store("sqlite:///understudy.db", tmp_path) as store:
            stages = [r.stage for r in store.route_history("chat")][1:]
        assert len(stages) < 12
    assert stages == ["shadow", "canary", "canary", "promoted"]
    assert deaths > 20


async def test_of_two_controllers_one_takes_the_step(store: Store, config: Config) -> None:
    world = started(store, config)
    other = world.anew()
    for _ in range(60):
        await world.pass_on(10)
        await other.step()
    versions = [r.version for r in store.route_history("chat")]
    assert versions == sorted(set(versions))


async def test_the_shadow_pays_for_no_copy_twice_and_leads_to_the_canary(
    store: Store, config: Config
) -> None:
    world = started(store, settings(config, shadow_tasks=12))
    for _ in range(6):
        await world.pass_on(10)
        world.controller = world.anew()
    copies = [c.call for c in store.calls(alias=shadow_alias("chat"))]
    assert len(copies) == len({c.tags["shadow_of"] for c in copies}) >= 12
    assert [r.stage for r in store.route_history("chat")][:3] == ["promoted", "shadow", "canary"]
    assert world.copies.calls == len(copies)


async def test_each_call_is_read_once_however_often_it_is_looked_at(store: Store, config: Config) -> None:
    read: list[str] = []

    class Counting(Store):
        def some(self, keys: Sequence[str], *, texts: bool = False) -> Iterator[StoredCall]:
            read.extend(() if texts else keys)
            return super().some(keys, texts=texts)

    counting = Counting(store._database)  # type: ignore[attr-defined] # the same file
    world = started(counting, settings(config, tasks=[50, 50, 50]))
    await world.pass_on(100)
    assert len(read) == len(set(read)) >= 90


async def test_a_number_counts_where_no_text_was_recorded(store: Store, config: Config) -> None:
    world = started(store, config)
    plain = world.as_call

    def bare(task: str, answered: str, attempts: list[Attempt]) -> Call:
        return msgspec.structs.replace(plain(task, answered, attempts), request=b"", response=b"")

    world.as_call = bare
    [report] = await world.pass_on(100)
    assert report.standing.scored > 3
    assert report.standing.difference.rounds > 3


async def test_a_slow_candidate_in_the_shadow_holds_up_no_other_step(store: Store, config: Config) -> None:
    world = started(store, settings(config, shadow_tasks=12))
    answer, go = world.copies.chat, asyncio.Event()

    async def late(request: Any) -> Any:
        await go.wait()
        return await answer(request)

    world.copies.chat = late  # type: ignore[method-assign] # a candidate that takes its time
    for number in range(20):
        world.add_task(f"t{number}")
        world.now += 1.0
    async with asyncio.timeout(5):
        [report] = await world.controller.step(0.05)
        assert report.missing
        await world.controller.step(0.05)  # none is asked for twice meanwhile
    assert not list(store.calls(alias=shadow_alias("chat")))
    go.set()
    await world.controller.step()
    copies = [c.call for c in store.calls(alias=shadow_alias("chat"))]
    assert len(copies) == len({c.tags["shadow_of"] for c in copies}) > 0


async def test_a_share_of_the_calls_is_copied(store: Store, config: Config) -> None:
    world = started(store, settings(config, shadow_tasks=500, shadow_sample=0.3))
    await world.pass_on(100)
    assert 10 <= len(list(store.calls(alias=shadow_alias("chat")))) <= 50


def test_without_a_task_a_key_keeps_its_model(store: Store, config: Config) -> None:
    world = started(store, config)
    table = build_table(config, world.upstreams, store.routes(), store.staying())
    dealt = {f"key-{n}": table.targets("chat", key=f"key-{n}")[0].name for n in range(100)}
    assert set(dealt.values()) == {OLD, NEW}
    fresh = build_table(config, world.upstreams, store.routes(), store.staying())
    for key, model in dealt.items():
        assert {fresh.targets("chat", key=key)[0].name for _ in range(5)} == {model}


async def test_the_shadows_money_is_capped(store: Store, config: Config) -> None:
    world = started(store, settings(config, shadow_tasks=500, shadow_usd=0.01))

    def price(call: Call) -> Cost:
        return Cost(0.001, "2026-01-01", "test")

    plain = world.means
    world.means = lambda candidate: plain(candidate)._replace(price=price)
    world.controller = world.anew()
    await world.pass_on(120, until="held")
    route = store.route("chat")
    assert route is not None
    assert route.stage == "held"
    assert "shadow_usd" in route.reason
    assert len(list(store.calls(alias=shadow_alias("chat")))) == 10


async def test_recorded_calls_are_replayed_before_the_trial_copies_any(store: Store, config: Config) -> None:
    world = World(store, config)
    current(store, "chat", config.aliases["chat"])
    world.now -= 100
    await world.pass_on(30)
    world.now += 100
    begin(store, "chat", NEW, ME, settings(config, replay_tasks=12, shadow_tasks=8).rollout or Rollout())
    world.config = settings(config, replay_tasks=12, shadow_tasks=8)
    for _ in range(8):
        world.controller = world.anew()  # whoever starts again pays for nothing twice
        await world.pass_on(10)
    copies = [c.call for c in store.calls(alias=shadow_alias("chat"))]
    replayed = [c for c in copies if "replayed" in c.tags]
    began = next(r.changed_at for r in store.route_history("chat") if r.stage == "replay")
    assert len(replayed) == 12
    assert all(store.call(c.tags["shadow_of"]).call.at < began for c in replayed)  # type: ignore[union-attr]
    assert len(copies) - len(replayed) >= 8
    assert [r.stage for r in store.route_history("chat")][1:4] == ["replay", "shadow", "canary"]


async def test_a_certificate_stands_for_the_replay(store: Store, config: Config) -> None:
    rollout = settings(config, replay_tasks=12, shadow_tasks=8).rollout or Rollout()
    proven = begin(store, "chat", NEW, ME, rollout, evidence="c.json", initial=config.aliases["chat"])
    assert proven.now.stage == "shadow"


async def test_replayed_outcomes_end_a_trial_and_never_promote(store: Store, config: Config) -> None:
    standing = Standing(config.rollout or Rollout())
    standing.add_pairs([Pair(False, False, False, 1.0, 1.0, True)] * 400)
    assert standing.difference.e_fine == pytest.approx(1.0)
    standing.add_pairs([Pair(False, False, False, 0.0, 1.0, True)] * 40)
    assert "replayed outcomes" in alarm(standing, config.rollout or Rollout())


async def test_a_task_that_began_before_a_share_grew_stays_where_it_is(store: Store, config: Config) -> None:
    world = started(store, settings(config, tasks=[5, 10, 10]))
    first: dict[str, str] = {}
    # ten tasks that call again and again, while the share grows from 10% to 50%
    while (store.route("chat") or pytest.fail("no route")).share < 0.5:
        for task in [f"long-{n}" for n in range(40)]:
            dealt = world.deal(task)
            assert first.setdefault(task, dealt) == dealt
        await world.pass_on(10)
    assert first["long-0"] in (OLD, NEW)
    assert {first[f"long-{n}"] for n in range(40)} == {OLD, NEW}


def test_tasks_of_other_processes_are_known_from_the_store(store: Store, config: Config) -> None:
    world = started(store, config)
    for number in range(60):
        world.deal(f"t{number}")
    was = store.route("chat")
    assert was is not None
    dealt_before = {f"t{n}": t for n in range(60) if (t := world.first_of(f"t{n}"))}
    set_stage(store, was, Step("canary", 0.5, "growing"), "me", config.rollout or Rollout(), world.now)
    fresh = build_table(config, world.upstreams, store.routes(), store.staying())  # remembers nothing itself
    after = {task: fresh.targets("chat", task.encode())[0].name for task in dealt_before}
    assert after == dealt_before
    newcomers = [fresh.targets("chat", b"new-%d" % n)[0].name for n in range(200)]
    assert 60 < newcomers.count(NEW) < 140


def test_a_processs_memory_is_bounded() -> None:
    memory = Memory(most=10)
    for number in range(1000):
        memory.add(b"%08d" % number)
    assert sum(b"%08d" % n in memory for n in range(1000)) <= 20
    assert b"00000999" in memory


async def test_with_every_task_its_failures_are_still_seen(store: Store, config: Config) -> None:
    world = started(store, settings(config, shares=[0.4, 1.0], tasks=[10, 4000]))
    while (store.route("chat") or pytest.fail("no route")).share < 1.0:
        await world.pass_on(20)
    await world.pass_on(60)
    assert (store.route("chat") or pytest.fail("no route")).share == 1.0
    world.fails = {NEW}
    await world.pass_on(300, until="rolled_back")
    route = store.route("chat")
    assert route is not None
    assert (route.stage, route.model) == ("rolled_back", OLD)
    assert all(c.call.status == 200 for c in store.calls(alias="chat"))


async def test_what_is_undecided_at_its_deadline_is_held(store: Store, config: Config) -> None:
    begin(
        store,
        "chat",
        NEW,
        ME,
        config.rollout or Rollout(),
        deadline=time.time() + 100,
        initial=config.aliases["chat"],
    )
    world = World(store, config)
    world.speaks = False
    await world.pass_on(400, until="held")
    held = store.route("chat")
    assert held is not None
    assert held.stage == "held"
    assert "by which it was to be over" in held.reason
    resumed = resume(store, "chat", ME, settings=config.rollout or Rollout())
    assert resumed.now.deadline in (0.0, held.deadline)


def test_a_version_that_is_gone_is_refused(store: Store, config: Config) -> None:
    begin(store, "chat", NEW, ME, Rollout(), initial=config.aliases["chat"])
    for change in (pause, resume, abort):
        with pytest.raises(InputError, match="changed while we looked"):
            change(store, "chat", ME._replace(version=1))


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("shares = [0.5, 0.1]", "rising shares"),
        ("tasks = [1]", "for each of rollout.shares"),
        ("margin = 1.5", "between 0.0 and 1.0"),
        ("judge_sample = 20", "a share from 0 to 1"),
        ('judge = "nowhere/m"', "no .endpoints.nowhere"),
        ('webhook = "https://hooks.example/secret"', "a key in clear"),
    ],
)
def test_a_course_that_cannot_be_is_named(tmp_path: Path, line: str, fault: str) -> None:
    with pytest.raises(Exception, match=fault):
        configuration.parse(f"[rollout]\n{line}\n", "understudy.toml", tmp_path)
