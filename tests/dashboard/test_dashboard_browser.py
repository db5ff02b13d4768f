"""The pages in a real Chromium: opened, clicked through, held against axe; narrow, wide, dark and on paper.

Skipped where there is no Chromium (`apt-get install chromium`, or UNDERSTUDY_CHROMIUM=PATH) or no Playwright.
With UNDERSTUDY_SCREENSHOTS=FOLDER pictures of every page are left there for a person to look at.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from dashboard_scene import CONFIG as SCENE
from dashboard_scene import KEY, build

from understudy import config as configuration
from understudy.config import Config
from understudy.traffic.store import open_store

playwright = pytest.importorskip("playwright.async_api", reason="pip install playwright")
axe = pytest.importorskip("axe_playwright_python.base", reason="pip install axe-playwright-python")

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("UNDERSTUDY_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]

Browse = Callable[..., Awaitable[Any]]
PAGES = ("/", "/traffic", "/models", "/plan", "/evaluations", "/rollouts", "/own")
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dashboard in full use, to be copied by whoever changes it."""
    folder = tmp_path_factory.mktemp("scene")
    build(folder)
    return folder


@pytest.fixture
def config(scene: Path, tmp_path: Path) -> Config:
    folder = tmp_path / "scene"
    shutil.copytree(scene, folder)
    return configuration.parse(SCENE, "understudy.toml", folder)


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
        tab.on("pageerror", self._raised)
        tab.on("requestfailed", self._failed)

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text}")

    def _raised(self, error: Any) -> None:
        self.complaints.append(str(error))

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
async def visit(chromium: Any, browse: Browse, config: Config) -> Visit:
    page = Visit(await chromium.new_page(viewport=WIDE), (await browse(config)).url)
    await page.sign_in()
    return page


async def violations(tab: Any, only: str = "") -> list[str]:
    """What axe finds, by all its rules or by one."""
    if not await tab.evaluate("'axe' in window"):
        await tab.evaluate(axe.AXE_FILE_PATH.read_text())
    options: dict[str, Any] = {"resultTypes": ["violations"]}
    if only:
        options["runOnly"] = [only]
    found = (await tab.evaluate("options => axe.run(document, options)", options))["violations"]
    return [f"{v['id']}: {[node['html'][:120] for node in v['nodes'][:3]]}" for v in found]


async def thin_out(tab: Any) -> None:
    """Open what is folded, and leave of long tables the rows at their ends: the others are of the same kinds,
    and axe takes a second for a hundred of them."""
    await tab.evaluate(
        "document.querySelectorAll('details').forEach(d => { d.open = true });"
        "document.querySelectorAll('tbody').forEach(body => {"
        "  [...body.rows].slice(3, -2).forEach(row => row.remove()) })"
    )


async def beyond(tab: Any) -> int:
    """Pixels by which the page is wider than the screen."""
    return await tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


async def every_page(visit: Visit) -> dict[str, str]:
    """A name and an address for each; of detail pages one of each kind."""
    pages = {path.strip("/") or "today": path for path in PAGES}
    await visit.open("/traffic?alias=receipts")
    calls = await visit.tab.locator("tbody a[href^='/traffic/']").all()
    for name, link in zip(("call", "refused"), calls, strict=False):
        pages[name] = str(await link.get_attribute("href"))
    await visit.open("/evaluations")
    link = visit.tab.locator("h2 a[href^='/evaluations/']", has_text="assistant")
    pages["evaluation"] = str(await link.get_attribute("href"))
    none, model = "/traffic?alias=nobody&status=xx", "/models?q=openai/gpt-4.1"
    return pages | {"none": none, "model": model, "gone": "/nothing"}


async def look_at_page(visit: Visit, name: str) -> list[str]:
    """What is wrong with the open page: whether it fits, axe's rules narrow in the light, and those of
    colours wide in the dark."""
    faults: list[str] = []
    for width, size in (("wide", WIDE), ("narrow", NARROW)):
        await visit.tab.set_viewport_size(size)
        if await beyond(visit.tab) > 0:
            faults.append(f"{name}: wider than a {width} screen")
        await visit.picture(f"{name}-{width}-light")
    await visit.tab.emulate_media(color_scheme="dark")
    await visit.picture(f"{name}-narrow-dark")
    await visit.tab.emulate_media(color_scheme="light")
    await thin_out(visit.tab)
    if await beyond(visit.tab) > 0:
        faults.append(f"{name}: wider than a narrow screen when unfolded")
    faults += [f"{name}: {found}" for found in await violations(visit.tab)]
    await visit.tab.set_viewport_size(WIDE)
    await visit.tab.emulate_media(color_scheme="dark")
    await visit.picture(f"{name}-wide-dark")
    faults += [f"{name}, wide and dark: {found}" for found in await violations(visit.tab, "color-contrast")]
    await visit.tab.emulate_media(color_scheme="light")
    return faults


async def test_every_page_is_accessible_and_fits(visit: Visit) -> None:
    faults: list[str] = []
    pages = await every_page(visit)
    assert len(pages) == 13
    for name, path in pages.items():
        await visit.tab.goto(visit.url + path)
        assert await visit.tab.locator("h1").count() == 1, name
        faults += await look_at_page(visit, name)
    assert not faults, "\n".join(faults)
    assert [text for text in visit.complaints if "404" not in text] == []  # /nothing is one on purpose


async def test_forms_and_refusals_are_accessible_and_fit(visit: Visit) -> None:
    await visit.open("/rollouts")
    await visit.tab.locator("details", has_text="Move this alias").last.locator("summary").click()
    form = visit.tab.locator("form", has=visit.tab.get_by_label("Candidate")).last
    await form.get_by_label("Candidate").fill("local/student")
    await form.get_by_role("button", name="Start a trial").click()
    await visit.tab.get_by_role("heading", name="Start a trial of local/student on voice?").wait_for()
    faults = await look_at_page(visit, "confirm")
    await visit.open("/rollouts")
    await visit.tab.get_by_role("button", name="End the trial").first.click()
    faults += await look_at_page(visit, "confirm-end")
    await visit.tab.locator("input[name=version]").evaluate("hidden => { hidden.value = '99' }")
    await visit.tab.get_by_role("button", name="End the trial").click()
    assert "changed by somebody else" in await visit.tab.locator("main").inner_text()
    faults += await look_at_page(visit, "refused-order")
    await visit.tab.get_by_role("button", name="Sign out").click()
    await visit.tab.get_by_label("Admin key").fill("wrong")
    await visit.tab.get_by_role("button", name="Sign in").click()
    assert await visit.tab.get_by_role("alert").inner_text() == "That is not the admin key."
    faults += await look_at_page(visit, "login")
    assert not faults, "\n".join(faults)
    refusals = ("422", "403")
    assert [text for text in visit.complaints if not any(code in text for code in refusals)] == []


async def test_every_page_is_accessible_to_a_newcomer(chromium: Any, browse: Browse, tmp_path: Path) -> None:
    text = '[dashboard]\nlisten = "127.0.0.1:0"\n[endpoints.openai]\nbase_url = "http://127.0.0.1:1/v1"\n'
    bare = configuration.parse(text, "understudy.toml", tmp_path)
    visit = Visit(await chromium.new_page(viewport=NARROW), (await browse(bare)).url)
    faults: list[str] = []
    for path in PAGES:
        await visit.open(path)
        await visit.picture(f"empty-{path.strip('/') or 'today'}")
        await thin_out(visit.tab)
        faults += [f"{path}: {found}" for found in await violations(visit.tab)]
        assert await beyond(visit.tab) <= 0, path
    await visit.open("/")
    assert "Three steps" in await visit.tab.locator("main").inner_text()
    assert not faults, "\n".join(faults)
    assert visit.complaints == []


async def test_every_link_of_the_pages_opens(visit: Visit) -> None:
    for name in ("Traffic", "Models", "Plan", "Evaluations", "Rollouts", "Own models", "Today"):
        await visit.tab.get_by_role("link", name=name, exact=True).first.click()
        assert await visit.tab.locator("h1").count() == 1, name
    await visit.tab.get_by_role("link", name="assistant", exact=True).first.click()
    await visit.tab.locator("tbody a[href^='/traffic/']").first.click()
    assert await visit.tab.get_by_role("heading", name="Asked").is_visible()
    await visit.open("/evaluations")
    await visit.tab.locator("h2 a").first.click()
    await visit.tab.get_by_role("link", name="The self-contained page").click()
    assert await visit.tab.locator("h1").count() == 1
    assert visit.complaints == []


async def test_a_trial_is_paused_resumed_and_ended_by_clicks(visit: Visit, config: Config) -> None:
    with open_store(config.store.url, Path(config.root)) as store:
        await visit.open("/rollouts")
        card = visit.tab.locator("section.card", has=visit.tab.locator("h2", has_text="assistant"))
        for button, yes, stage in (
            ("Pause", "Pause", "held"), ("Resume", "Resume", "canary"),
            ("End the trial", "End the trial", "rolled_back"),
        ):  # fmt: skip
            before = store.route("assistant")
            await card.get_by_role("button", name=button).click()
            assert store.route("assistant") == before  # asked, nothing done
            await visit.tab.get_by_role("button", name=yes).click()
            assert await visit.tab.get_by_role("status").inner_text() == "assistant was changed."
            assert store.route("assistant").stage == stage  # type: ignore[union-attr]
        await card.get_by_text("Move this alias").click()
        await card.get_by_label("Candidate").fill("local/student")
        await card.get_by_label("Because").fill("once more")
        await visit.tab.keyboard.press("Enter")
        await visit.tab.get_by_role("link", name="Change nothing").click()
        assert store.route("assistant").stage == "rolled_back"  # type: ignore[union-attr]
        await card.get_by_text("Move this alias").click()
        await card.get_by_label("Candidate").fill("local/student")
        await card.get_by_label("To be over by").fill("retirement")
        await visit.tab.keyboard.press("Enter")
        await visit.tab.get_by_role("button", name="Start the trial").click()
        await visit.tab.get_by_role("status").wait_for()
        route = store.route("assistant")
        assert route is not None
        assert (route.stage, route.candidate) == ("replay", "local/student")
        assert route.deadline > 0
    assert visit.complaints == []


async def test_the_keyboard_reaches_the_content_and_shows_where_it_is(visit: Visit) -> None:
    await visit.open("/rollouts")
    await visit.tab.keyboard.press("Tab")
    assert await visit.tab.evaluate("document.activeElement.textContent") == "Skip to content"
    await visit.tab.keyboard.press("Enter")
    assert await visit.tab.evaluate("document.activeElement.id") == "main"
    reached: list[str] = []
    here = "document.activeElement"
    for _ in range(16):
        await visit.tab.keyboard.press("Tab")
        reached.append(await visit.tab.evaluate(f"{here}.tagName + ' ' + ({here}.value || '')"))
        if not reached[-1].startswith("BODY"):  # beyond the last one
            assert await visit.tab.evaluate(f"getComputedStyle({here}).outlineStyle") != "none", reached
    assert {"BUTTON pause", "BUTTON abort", "SUMMARY "} <= set(reached)


async def test_pages_read_without_scripts_and_print(
    chromium: Any, browse: Browse, config: Config, tmp_path: Path
) -> None:
    tab = await chromium.new_page(java_script_enabled=False, viewport=WIDE)
    visit = Visit(tab, (await browse(config)).url)
    await visit.sign_in()
    for path in PAGES:
        await tab.emulate_media(media="screen")
        await visit.open(path)
        assert await tab.locator("h1").is_visible()
        await tab.emulate_media(media="print")
        assert not await tab.get_by_role("navigation", name="Pages", exact=True).is_visible()
        assert await tab.get_by_role("button").filter(visible=True).count() == 0, path
        await visit.picture(f"{path.strip('/') or 'today'}-print")
    await visit.open("/rollouts")
    assert await tab.get_by_text("Evidence from outcomes").first.is_visible()
    await tab.pdf(path=tmp_path / "page.pdf", format="A4")
    assert (tmp_path / "page.pdf").stat().st_size > 10_000
