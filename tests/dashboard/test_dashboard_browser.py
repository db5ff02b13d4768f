"""The pages in a real Chromium: opened, clicked through, held against axe; narrow, wide, dark and on paper.

Skipped where there is no Chromium (`apt-get install chromium`, or UNDERSTUDY_CHROMIUM=PATH) or no Playwright.
With UNDERSTUDY_SCREENSHOTS=FOLDER pictures of every page are left there for a person to look at.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from test_dashboard_evaluations import REPORT, drill  # noqa: F401 - a finished evaluation

from understudy.config import Config, Dashboard, Rollout
from understudy.protocol import Cost, Usage
from understudy.rollout.look import look_at
from understudy.rollout.standing import Pair, Standing
from understudy.rollout.trials import Order, begin
from understudy.traffic.record import Call, Feedback, new_key
from understudy.traffic.store import Store

playwright = pytest.importorskip("playwright.async_api", reason="pip install playwright")
axe = pytest.importorskip(
    "axe_playwright_python.async_playwright", reason="pip install axe-playwright-python"
)

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("UNDERSTUDY_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]

Browse = Callable[..., Awaitable[Any]]
MakeCall = Callable[..., Call]
KEY = "correct horse battery staple"
PAGES = ("/", "/traffic", "/models", "/plan", "/evaluations", "/rollouts", "/own")
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture
def locked(config: Config, tmp_path: Path) -> Config:
    (tmp_path / "key").write_text(KEY)
    settings = Dashboard(listen="127.0.0.1:0", admin_key="file:key")
    return msgspec.structs.replace(config, dashboard=settings)


@pytest.fixture
def filled(store: Store, config: Config, make_call: MakeCall, drill: Path, tmp_path: Path) -> list[Call]:  # noqa: F811
    """A store with a month of traffic and a trial, an evaluation and an own model on disk."""
    now = time.time()
    calls = [
        make_call(
            at=now - number * 2900,
            prompt=f"Is question {number} about the weather in [email:1f3a9c0d]?",
            answer="yes, it is " * (number % 9 + 1),
            status=503 if number % 11 == 0 else 200,
            target="local/student" if number % 7 == 0 else "openai/gpt-4-0613",
            usage=Usage(prompt_tokens=900 + number, completion_tokens=40 + number % 50, cached_tokens=100),
            task_id=f"t-{number // 3}",
            tags={"team": "care"},
            total_s=0.4 + number % 5 / 3,
        )
        for number in range(800)
    ]
    store.insert(
        calls, "s", 1, price=lambda call: Cost(0.004 + len(call.request) / 1e6, "2026-01-01", "test")
    )
    said = [
        Feedback(key=new_key(), call=call.key, at=call.at, metric="success", value=float(n % 4 > 0))
        for n, call in enumerate(calls[:200])
    ]
    store.insert(said, "s", 2)
    begin(
        store,
        "assistant",
        "local/student",
        Order("ada", "it retires"),
        Rollout(),
        initial=config.aliases["assistant"],
    )
    route, standing = store.route("assistant"), Standing(Rollout())
    assert route is not None
    standing.add_pairs([Pair(n == 9, False, False, float(n % 5 > 0), float(n % 7 > 1)) for n in range(300)])
    seen = look_at(route._replace(stage="canary", share=0.05), standing, Rollout())
    store.set_route(
        "assistant", route.model, expected_version=route.version, fallback=route.fallback, stage="canary",
        by="understudy", reason="40 copies answered in the shadow", candidate="local/student", share=0.05,
        origin=route.origin, deadline=now + 40 * 86_400,
    )  # fmt: skip
    store.set_look("assistant", now, msgspec.json.encode(seen).decode())
    (tmp_path / "drill" / "own").mkdir(parents=True, exist_ok=True)
    (tmp_path / "drill" / "own" / "report.json").write_bytes(msgspec.json.encode(REPORT))
    return calls


@pytest.fixture
async def chromium() -> AsyncIterator[Any]:
    async with playwright.async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        await browser.close()


class Visit:
    """One tab, signed in; whatever the console or the network complains of is kept."""

    def __init__(self, tab: Any, url: str) -> None:
        self.tab, self.url = tab, url
        self.complaints: list[str] = []
        tab.on("console", self._said)
        tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        tab.on("requestfailed", self._failed)

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text}")

    def _failed(self, request: Any) -> None:
        # a page left before its picture came; a page asked for in vain is an error of the test itself
        if request.failure != "net::ERR_ABORTED":
            self.complaints.append(f"{request.url}: {request.failure}")

    async def open(self, path: str) -> None:
        answer = await self.tab.goto(self.url + path)
        assert answer.ok, (path, answer.status)

    async def sign_in(self) -> None:
        await self.open("/")
        await self.tab.get_by_label("Admin key").fill(KEY)
        await self.tab.keyboard.press("Enter")
        await self.tab.wait_for_url(self.url + "/")

    async def picture(self, name: str, **how: Any) -> None:
        if folder := os.environ.get("UNDERSTUDY_SCREENSHOTS"):
            await self.tab.screenshot(path=Path(folder) / f"{name}.png", full_page=True, **how)


@pytest.fixture
async def visit(chromium: Any, browse: Browse, locked: Config, filled: list[Call]) -> Visit:
    del filled
    page = Visit(await chromium.new_page(viewport=WIDE), (await browse(locked)).url)
    await page.sign_in()
    return page


async def violations(tab: Any, **options: Any) -> list[str]:
    found = (await axe.Axe().run(tab, options=options or None)).response["violations"]
    return [f"{v['id']}: {[node['html'][:120] for node in v['nodes'][:3]]}" for v in found]


async def beyond(tab: Any) -> int:
    """Pixels by which the page is wider than the screen."""
    return await tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


async def test_every_page_is_accessible_and_fits(visit: Visit, filled: list[Call]) -> None:
    evaluation = await _first_evaluation(visit)
    faults: list[str] = []
    for path in (*PAGES, f"/traffic/{filled[1].key}", evaluation):
        name = f"{path.split('/')[1] or 'today'}{'-one' if path.count('/') > 1 else ''}"
        for width, size in (("wide", WIDE), ("narrow", NARROW)):
            await visit.tab.set_viewport_size(size)
            await visit.open(path)
            if await beyond(visit.tab) > 0:
                faults.append(f"{path}: wider than a {width} screen")
            await visit.picture(f"{name}-{width}")
        faults += [f"{path}: {found}" for found in await violations(visit.tab)]
    assert faults == []
    assert visit.complaints == []


async def test_dark_pages_have_contrast(visit: Visit, filled: list[Call]) -> None:
    await visit.tab.emulate_media(color_scheme="dark")
    faults: list[str] = []
    for path in ("/", "/rollouts", "/own", f"/traffic/{filled[1].key}"):
        await visit.open(path)
        await visit.picture(f"{path.split('/')[1] or 'today'}-dark")
        faults += [f"{path}: {found}" for found in await violations(visit.tab, runOnly=["color-contrast"])]
    assert faults == []


async def test_every_link_of_the_pages_opens(visit: Visit) -> None:
    for name in ("Traffic", "Models", "Plan", "Evaluations", "Rollouts", "Own models", "Today"):
        await visit.tab.get_by_role("link", name=name, exact=True).first.click()
        assert await visit.tab.locator("h1").count() == 1, name
    await visit.tab.get_by_role("link", name="assistant", exact=True).first.click()
    await visit.tab.locator("tbody a[href^='/traffic/']").first.click()
    assert "weather" in await visit.tab.locator("main").inner_text()
    assert visit.complaints == []


async def test_a_trial_is_paused_resumed_and_ended_by_clicks(visit: Visit, store: Store) -> None:
    await visit.open("/rollouts")
    for button, stage in (("Pause", "held"), ("Resume", "canary"), ("End the trial", "rolled_back")):
        await visit.tab.get_by_role("button", name=button).click()
        assert await visit.tab.get_by_role("status").inner_text() == "assistant was changed."
        assert store.route("assistant").stage == stage  # type: ignore[union-attr]
    await visit.tab.get_by_label("Candidate").first.fill("local/student")
    await visit.tab.get_by_label("Because").first.fill("once more")
    async with visit.tab.expect_navigation():
        await visit.tab.keyboard.press("Enter")
    assert store.route("assistant").reason == "once more"  # type: ignore[union-attr]
    assert store.route("assistant").stage == "replay"  # type: ignore[union-attr]
    assert visit.complaints == []


async def test_the_keyboard_reaches_the_content_and_shows_where_it_is(visit: Visit) -> None:
    await visit.open("/rollouts")
    await visit.tab.keyboard.press("Tab")
    assert await visit.tab.evaluate("document.activeElement.textContent") == "Skip to content"
    await visit.tab.keyboard.press("Enter")
    assert await visit.tab.evaluate("document.activeElement.id") == "main"
    reached: list[str] = []
    here = "document.activeElement"
    for _ in range(8):
        await visit.tab.keyboard.press("Tab")
        reached.append(await visit.tab.evaluate(f"{here}.tagName + ' ' + ({here}.value || '')"))
        if not reached[-1].startswith("BODY"):  # beyond the last one
            assert await visit.tab.evaluate(f"getComputedStyle({here}).outlineStyle") != "none", reached
    assert {"BUTTON pause", "BUTTON abort"} <= set(reached)


async def test_pages_read_without_scripts_and_print(
    chromium: Any, browse: Browse, locked: Config, filled: list[Call], tmp_path: Path
) -> None:
    del filled
    tab = await chromium.new_page(java_script_enabled=False, viewport=WIDE)
    visit = Visit(tab, (await browse(locked)).url)
    await visit.sign_in()
    await visit.open("/rollouts")
    assert await tab.get_by_text("Evidence from outcomes").is_visible()
    await tab.emulate_media(media="print")
    assert not await tab.get_by_role("navigation").is_visible()
    assert not await tab.get_by_role("button", name="Pause").is_visible()
    await tab.pdf(path=tmp_path / "page.pdf", format="A4")
    assert (tmp_path / "page.pdf").stat().st_size > 10_000
    await visit.picture("rollouts-print")


async def _first_evaluation(visit: Visit) -> str:
    await visit.open("/evaluations")
    return str(await visit.tab.locator("a[href^='/evaluations/']").first.get_attribute("href"))
