"""The page of rollouts: a trial's evidence as the controller left it, and buttons in place of commands."""

from __future__ import annotations

import datetime as dt
import hashlib
import html
import queue
import re
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from click.testing import CliRunner
from dashboard_scene import evaluate

from understudy.catalog.facts import Catalog
from understudy.cli.dashboard import moves_of
from understudy.cli.rollout import rollout
from understudy.config import Config, Rollout
from understudy.dashboard import evaluations
from understudy.dashboard.calendar import KEPT_S, Calendar, Row
from understudy.dashboard.desk import Desk
from understudy.dashboard.orders import Order as Asked
from understudy.dashboard.orders import Terms
from understudy.dashboard.server import start
from understudy.errors import UserError
from understudy.rollout.controller import Controller
from understudy.rollout.look import look_at
from understudy.rollout.own_call import Means
from understudy.rollout.standing import Pair, Standing
from understudy.rollout.trials import Order, begin
from understudy.traffic.record import Call, Feedback, new_key
from understudy.traffic.routes import Route
from understudy.traffic.store import Store, unpriced

Browse = Callable[..., Awaitable[Any]]
MakeCall = Callable[..., Call]


def on_trial(store: Store, config: Config) -> Route:
    initial = config.aliases["assistant"]
    return begin(store, "assistant", "local/student", Order("me", "why"), Rollout(), initial=initial).now


async def pressed(browser: Any, do: str, **more: str) -> Any:
    """Fill in the form on the page as it is now."""
    page = await browser.get("/rollouts")
    version = page.text.partition('name="version" value="')[2].partition('"')[0]
    form = {
        "token": page.token,
        "alias": "assistant",
        "version": version,
        "do": do,
        "confirmed": "yes",
        **more,
    }
    return await browser.post("/rollouts", form)


async def test_a_trial_is_started_paused_resumed_and_ended(browse: Browse, store: Store) -> None:
    browser = await browse()
    stages: list[tuple[str, str]] = []
    for do, more in (
        ("start", {"to": "local/student", "reason": "it is due"}),
        ("pause", {}), ("resume", {}), ("abort", {"reason": "no more"}),
        ("start", {"to": "local/student"}), ("move", {"to": "local/student"}), ("back", {}),
    ):  # fmt: skip
        assert (await pressed(browser, do, **more)).status == 303, do
        route = store.route("assistant")
        assert route is not None
        stages.append((route.stage, route.candidate or route.model))
    assert stages == [
        ("replay", "local/student"), ("held", "local/student"), ("replay", "local/student"),
        ("rolled_back", "openai/gpt-4-0613"), ("replay", "local/student"), ("promoted", "local/student"),
        ("rolled_back", "openai/gpt-4-0613"),
    ]  # fmt: skip
    reasons = [route.reason for route in store.route_history("assistant")]
    assert "it is due" in reasons
    assert "pause by hand" in reasons


async def test_buttons_fit_the_stage(browse: Browse) -> None:
    browser = await browse()
    assert 'value="start"' in (await browser.get("/rollouts")).text
    await pressed(browser, "start", to="local/student")
    under_way = (await browser.get("/rollouts")).text
    assert 'value="pause"' in under_way
    assert 'value="resume"' not in under_way
    assert '<li aria-current="step">replay</li>' in under_way
    await pressed(browser, "pause")
    held = (await browser.get("/rollouts")).text
    assert 'value="resume"' in held
    assert 'value="pause"' not in held


async def test_what_the_controller_saw_is_shown(browse: Browse, store: Store, config: Config) -> None:
    on_trial(store, config)
    means = Means(lambda: pytest.fail("there is nothing to copy"), unpriced, None)
    controller = Controller(store, config, lambda _: means)
    await controller.step()
    await controller.step()
    text = (await (await browse()).get("/rollouts")).text
    assert "40 more copies answered in the shadow" in text  # nothing was recorded, so nothing is replayed
    assert "time to the first byte" in text
    assert "Nobody takes this trial" not in text


async def test_evidence_is_drawn_with_both_thresholds(browse: Browse, store: Store, config: Config) -> None:
    begin(
        store,
        "assistant",
        "local/student",
        Order("me", "why"),
        Rollout(),
        initial=config.aliases["assistant"],
    )
    route, standing = store.route("assistant"), Standing(Rollout())
    assert route is not None
    standing.add_pairs([Pair(False, False, False, float(n % 5 > 0), float(n % 4 > 0)) for n in range(500)])
    seen = msgspec.json.encode(look_at(route, standing, Rollout()))
    store.set_look("assistant", time.time(), seen.decode())
    text = (await (await browse()).get("/rollouts")).text
    for shown in ("Evidence from outcomes", "may be promoted", "is rolled back", "comparisons", "<polyline"):
        assert shown in text, shown
    assert len(standing.difference.path) <= 200


@pytest.mark.parametrize("seen", ["", "{}", "[" * 5000, '{"candidate": "<script>"}'])
async def test_a_look_that_cannot_be_read_is_none(
    browse: Browse, store: Store, config: Config, seen: str
) -> None:
    begin(
        store,
        "assistant",
        "local/student",
        Order("me", "why"),
        Rollout(),
        initial=config.aliases["assistant"],
    )
    store.set_look("assistant", time.time(), seen)
    page = await (await browse()).get("/rollouts")
    assert page.status == 200
    assert "No evidence yet" in page.text


async def test_a_trial_that_nobody_watches_over_says_so(browse: Browse, store: Store, config: Config) -> None:
    was = on_trial(store, config)
    store.set_route(
        "assistant", was.model, expected_version=was.version, stage="shadow", by="me", reason="old",
        candidate="local/student", origin=was.origin, at=time.time() - 3600,
    )  # fmt: skip
    assert "Nobody takes this trial through its course" in (await (await browse()).get("/rollouts")).text


async def test_a_button_asks_before_anything_is_done(browse: Browse, store: Store) -> None:
    browser = await browse()
    asked = await pressed(browser, "start", to="local/student", reason="it's due", confirmed="")
    assert asked.status == 200
    assert store.routes() == {}
    for shown in (
        "Start a trial of local/student on assistant?", "Nothing was changed yet",
        "replay: 40 recorded calls",
        "canary 1 %: 20 tasks", "nobody proved that it is good enough", 'name="confirmed" value="yes"',
        "understudy rollout start assistant --to local/student --reason 'it'\"'\"'s due'",
    ):  # fmt: skip
        assert shown in html.unescape(asked.text), shown
    await pressed(browser, "start", to="local/student")
    for do, says in (
        ("pause", "Pause the trial on assistant?"), ("abort", "ends for good"), ("move", "without a trial"),
    ):  # fmt: skip
        assert says in (await pressed(browser, do, to="local/student", confirmed="")).text
    assert store.route("assistant").stage == "replay"  # type: ignore[union-attr]


async def test_a_trial_rests_on_a_certificate_of_the_list(
    browse: Browse, store: Store, config: Config
) -> None:
    folder = config.path("proof")
    await evaluate(folder, "assistant", {"local/student": 1.0}, 120)
    browser = await browse()
    page = await browser.get("/rollouts")
    name = re.search(r'<option value="([0-9a-f]{16})">proof: local/student passed', page.text)
    assert name
    asked = await pressed(browser, "start", to="local/student", evidence=name[1], confirmed="")
    digest = hashlib.sha256((folder / "certificate.json").read_bytes()).hexdigest()
    assert f"proof/certificate.json sha256:{digest}" in asked.text
    assert "--evidence proof/certificate.json" in asked.text
    assert "replay:" not in asked.text  # the certificate is the replay
    await pressed(browser, "start", to="local/student", evidence=name[1])
    route = store.route("assistant")
    assert route is not None
    assert (route.stage, route.evidence) == ("shadow", f"proof/certificate.json sha256:{digest}")


async def test_what_the_command_refuses_the_form_refuses_in_the_same_words(
    browse: Browse, store: Store, config: Config, config_file: Path, make_call: MakeCall
) -> None:
    folder = config.path("proof")
    await evaluate(folder, "assistant", {"local/student": 0.4}, 40)
    calls = [make_call(at=time.time() - 3600 * n) for n in range(1, 40)]
    store.insert(calls, "s", 1)
    told = [Feedback(key=new_key(), call=c.key, at=c.at, metric="success", value=1.0) for c in calls]
    store.insert(told, "s", 2)
    browser = await browse()
    name = evaluations.page(Desk(config), {}).entries[0].name
    tomorrow = time.strftime("%Y-%m-%d", time.gmtime(time.time() + 86_400))
    for form, options in (
        ({"evidence": name}, ["--evidence", str(folder / "certificate.json")]),
        ({"until": tomorrow}, ["--until-date", tomorrow]),
        ({"until": "soon"}, ["--until-date", "soon"]),
        ({"to": "gone/model"}, []),
    ):  # fmt: skip
        page = await pressed(browser, "start", **{"to": "local/student", **form})
        target = form.get("to", "local/student")
        command = ["start", "assistant", "--to", target, *options, "--config", str(config_file)]
        ran = CliRunner().invoke(rollout, command)
        assert isinstance(ran.exception, UserError), ran.output
        assert page.status == 422
        said = html.unescape(page.text).replace("proof/certificate.json", str(folder / "certificate.json"))
        # the two asked seconds apart, and the days left are told to the tenth
        assert str(ran.exception) in said, (str(ran.exception), said)
    assert store.routes() == {}


async def test_the_calendar_says_when_a_trial_must_begin(config: Config) -> None:
    day, soon = dt.datetime.now(dt.UTC).date(), dt.timedelta(days=1)
    row = Row("assistant", "openai/gpt-4-0613", day + 40 * soon, 120.0, 900.0, 7.5, day + 25 * soon, "")
    cases = (
        (row, (">7.5<", "under way", ">late<", "too little"), (1, 0, 0, 0)),
        (row._replace(latest_start=day - soon), (">late<",), (1,)),
        (row._replace(days_needed=4000.0, latest_start=day - 4000 * soon),
         ("over a year", "too little", ">late<"), (1, 1, 0)),
        (row._replace(days_needed=None, latest_start=None, missing="nobody says how tasks went"),
         ("nobody says how tasks went",), (1,)),
    )  # fmt: skip
    for told, shown, times in cases:

        def calendar(store: Store, catalog: Catalog, told: Row = told) -> list[Row]:
            return [told]

        dashboard = await start(config, moves=moves_of(config)._replace(calendar=calendar))
        async with aiohttp.ClientSession() as session, session.get(f"{dashboard.url}/rollouts") as answer:
            text = await answer.text()
        await dashboard.stop()
        assert tuple(min(text.count(each), 1) for each in shown) == times, (told, shown)


def test_the_calendar_is_made_anew_behind_the_reader(config: Config) -> None:
    clock, made = [1000.0], list[float]()

    def read(store: Store, catalog: Catalog) -> list[Row]:
        made.append(clock[0])
        return [Row("a", "m", None, clock[0], None, None, None, "")]

    desk, calendar = Desk(config, lambda: clock[0]), Calendar(read)
    assert calendar.rows(desk)["a"].tasks_per_day == 1000.0
    clock[0] += KEPT_S - 1
    assert calendar.rows(desk)["a"].tasks_per_day == 1000.0
    clock[0] += 2
    assert calendar.rows(desk)["a"].tasks_per_day == 1000.0  # shown at once, made anew meanwhile
    calendar.close()
    assert calendar.rows(desk)["a"].tasks_per_day == clock[0]
    assert made == [1000.0, clock[0]]
    desk.close()


def test_what_a_button_does_is_told_to_the_webhook(
    store: Store, config: Config, webhook: queue.Queue[dict[str, Any]]
) -> None:
    watched = msgspec.structs.replace(config, rollout=Rollout(webhook="env:HOOK"))
    acts, initial = moves_of(watched).acts, config.aliases["assistant"]
    for do in ("start", "pause", "abort"):
        order = Asked(do, "assistant", "local/student", 0, "ada", "why")
        acts[do](store, order, Terms(), initial)
        told = webhook.get(timeout=10)["route"]
        route = store.route("assistant")
        assert route is not None
        assert (told["stage"], told["changed_by"]) == (route.stage, "ada")
