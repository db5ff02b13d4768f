"""Who comes in: the host asked for, the admin key, the form's token, and the headers of every answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from understudy.config import Config, Dashboard
from understudy.dashboard.guard import is_loopback
from understudy.dashboard.sessions import FAILURE_WINDOW_S, LIFETIME_S, MOST_FAILURES, Sessions
from understudy.errors import AddressError
from understudy.traffic.store import Store

Browse = Callable[..., Awaitable[Any]]
KEY = "correct horse battery staple"


@pytest.fixture
def locked(config: Config, tmp_path: Path) -> Config:
    (tmp_path / "key").write_text(KEY + "\n")
    return msgspec.structs.replace(config, dashboard=Dashboard(listen="127.0.0.1:0", admin_key="file:key"))


async def sign_in(browser: Any, key: str = KEY, onward: str = "/") -> Any:
    token = (await browser.get("/login")).token
    return await browser.post("/login", {"token": token, "key": key, "next": onward})


async def test_without_the_key_nothing_is_read(browse: Browse, locked: Config) -> None:
    browser = await browse(locked)
    for path in ("/", "/traffic", "/traffic/00/request", "/evaluations/x/certificate", "/nothing"):
        page = await browser.get(path)
        assert (page.status, page.headers["Location"].partition("?")[0]) == (303, "/login"), path
    assert (await browser.get("/login")).status == 200
    assert (await browser.get("/static/dashboard.css")).status == 200


async def test_the_key_opens_and_leaving_closes(browse: Browse, locked: Config) -> None:
    browser = await browse(locked)
    assert (await sign_in(browser, "wrong")).status == 403
    done = await sign_in(browser, onward="/traffic?q=a")
    assert (done.status, done.headers["Location"]) == (303, "/traffic?q=a")
    cookie = done.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    home = await browser.get("/")
    assert home.status == 200
    await browser.post("/logout", {"token": home.token})
    assert (await browser.get("/")).status == 303


async def test_signing_in_changes_the_session(browse: Browse, locked: Config) -> None:
    browser = await browse(locked)
    before = await browser.get("/login")
    await browser.post("/login", {"token": before.token, "key": KEY, "next": "/"})
    after = await browser.get("/")
    assert after.token != before.token  # a cookie planted before signing in opens nothing


@pytest.mark.parametrize(
    "onward", ["//evil.example", "https://evil.example", "/\\evil.example", "/a\r\nb", ""]
)
async def test_signing_in_never_leads_elsewhere(browse: Browse, locked: Config, onward: str) -> None:
    assert (await sign_in(await browse(locked), onward=onward)).headers["Location"] == "/"


async def test_guessing_has_to_wait(browse: Browse, locked: Config) -> None:
    browser = await browse(locked)
    answers = [(await sign_in(browser, f"guess {n}")).status for n in range(MOST_FAILURES + 1)]
    assert answers == [403] * MOST_FAILURES + [429]
    assert (await sign_in(browser)).status == 429


def test_sessions_and_failures_end() -> None:
    clock = [0.0]
    sessions = Sessions(KEY, lambda: clock[0])
    session = sessions.sign_in(KEY)
    assert session is not None
    assert sessions.may_read(session)
    for _ in range(MOST_FAILURES):
        sessions.failed("somewhere")
    assert sessions.must_wait("somewhere")
    assert not sessions.must_wait("elsewhere")
    clock[0] = FAILURE_WINDOW_S + 1
    assert not sessions.must_wait("somewhere")
    clock[0] = LIFETIME_S + 1
    assert not sessions.may_read(session)


def test_no_key_signs_nobody_in() -> None:
    assert Sessions("").sign_in("") is None


MOVE = {"alias": "assistant", "to": "local/student", "version": "0", "do": "move", "confirmed": "yes"}


async def test_forms_need_their_token(browse: Browse, store: Store) -> None:
    browser = await browse()
    token = (await browser.get("/rollouts")).token
    assert (await browser.post("/rollouts", MOVE)).status == 403
    assert (await browser.post("/rollouts", {**MOVE, "token": "0" * 64})).status == 403
    assert (await browser.post("/rollouts", {**MOVE, "token": "é"})).status == 403
    foreign = await browser.post("/rollouts", {**MOVE, "token": token}, Origin="https://evil.example")
    assert foreign.status == 403
    assert (await browser.post("/rollouts", {**MOVE, "token": token}, Origin="null")).status == 403
    other = await browse()
    assert (await other.post("/rollouts", {**MOVE, "token": token})).status == 403
    assert store.routes() == {}
    assert (await browser.post("/rollouts", {**MOVE, "token": token}, Origin=browser.url)).status == 303
    assert store.routes()["assistant"].model == "local/student"


async def test_forms_of_those_signed_out_are_refused(browse: Browse, locked: Config, store: Store) -> None:
    browser = await browse(locked)
    token = (await browser.get("/login")).token
    assert (await browser.post("/rollouts", {**MOVE, "token": token})).status == 403
    assert store.routes() == {}


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8081", "localhost.evil.example"])
async def test_another_name_for_this_machine_is_refused(browse: Browse, host: str) -> None:
    assert (await (await browse()).get("/", Host=host)).status == 421


@pytest.mark.parametrize("host", ["localhost:8081", "127.0.0.1", "[::1]:8081"])
async def test_this_machine_by_its_own_names(browse: Browse, host: str) -> None:
    assert (await (await browse()).get("/", Host=host)).status == 200


@pytest.mark.parametrize("path", ["/", "/nothing", "/static/dashboard.css", "/login", "/traffic/0/request"])
async def test_every_answer_carries_the_headers(browse: Browse, path: str) -> None:
    headers = (await (await browse()).get(path)).headers
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; style-src 'self';")
    assert "script-src" not in policy
    assert "unsafe" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["Cache-Control"] == "no-store"


def test_loopback_is_known() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "localhost", "[::1]", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "[::]", "10.0.0.1", "example.com", "")))


async def test_a_port_in_use_is_an_address_error(browse: Browse, config: Config) -> None:
    taken = (await browse()).url.removeprefix("http://")
    with pytest.raises(AddressError, match="cannot listen"):
        await browse(msgspec.structs.replace(config, dashboard=Dashboard(listen=taken)))
