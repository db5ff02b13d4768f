"""The page of rollouts: a trial's evidence as the controller left it, and buttons in place of commands."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from understudy.config import Config, Rollout
from understudy.rollout.controller import Controller
from understudy.rollout.look import look_at
from understudy.rollout.shadow import Means
from understudy.rollout.standing import Pair, Standing
from understudy.rollout.trials import Order, begin
from understudy.traffic.store import Route, Store, unpriced

Browse = Callable[..., Awaitable[Any]]


def on_trial(store: Store, config: Config) -> Route:
    initial = config.aliases["assistant"]
    return begin(store, "assistant", "local/student", Order("me", "why"), Rollout(), initial=initial).now


async def pressed(browser: Any, do: str, **more: str) -> Any:
    """Fill in the form on the page as it is now."""
    page = await browser.get("/rollouts")
    version = page.text.partition('name="version" value="')[2].partition('"')[0]
    form = {"token": page.token, "alias": "assistant", "version": version, "do": do, **more}
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
