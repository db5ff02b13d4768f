"""Attacks on the dashboard: what others may send it, or leave in what it shows."""

from __future__ import annotations

import asyncio
import re
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from test_dashboard_guard import KEY, sign_in
from test_dashboard_pages import PAGES, assert_inert

from understudy.config import Config, Dashboard
from understudy.dashboard.sessions import MOST_FAILURES, Sessions
from understudy.traffic.record import Attempt, Call, Feedback, new_key
from understudy.traffic.store import Store

Browse = Callable[..., Awaitable[Any]]
MakeCall = Callable[..., Call]
ORDER = {"alias": "assistant", "to": "local/student", "version": "0", "do": "start", "confirmed": "yes"}
PAYLOADS = (
    "<svg onload=alert(1)><script>alert(2)</script>",
    "'\"><img src=x onerror=alert(3)>",
    "</pre></textarea></title></style><iframe srcdoc='<script>alert(4)</script>'>",
    "[click](javascript:alert(5)) ![x](https://evil.example/x.png)",
    "{{ ''.__class__.__mro__ }}{% raw %}{{ 7 * 7 }}",
    "\u202egnp.exe\u0000\ud83d\r\nSet-Cookie: a=b",
    "javascript:alert(6)",
    "data:text/html;base64,PHNjcmlwdD5hbGVydCg3KTwvc2NyaXB0Pg==",
)


@pytest.fixture
def locked(config: Config, tmp_path: Path) -> Config:
    (tmp_path / "key").write_text(KEY)
    return msgspec.structs.replace(config, dashboard=Dashboard(listen="127.0.0.1:0", admin_key="file:key"))


async def raw(url: str, request: bytes) -> bytes:
    """What comes back for these bytes, whatever they are."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request)
    await writer.drain()
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    return answer


# forms of others


@pytest.mark.parametrize("do", ["start", "pause", "resume", "abort", "move", "back"])
@pytest.mark.parametrize("confirmed", ["", "yes"])
async def test_no_button_works_for_another_session(
    browse: Browse, store: Store, do: str, confirmed: str
) -> None:
    mine, theirs = await browse(), await browse()
    stolen = (await theirs.get("/rollouts")).token
    own = (await mine.get("/rollouts")).token
    for token in (None, "", stolen, own[:-1], own.upper(), "0" * 64, own + "\x00"):
        form = {**ORDER, "do": do, "confirmed": confirmed} | ({} if token is None else {"token": token})
        assert (await mine.post("/rollouts", form)).status == 403, token
    assert store.routes() == {}


async def test_the_token_is_not_taken_from_the_address(browse: Browse, store: Store) -> None:
    browser = await browse()
    token = (await browser.get("/rollouts")).token
    assert (await browser.post(f"/rollouts?token={token}", ORDER)).status == 403
    assert (
        await browser.get(f"/rollouts?do=start&confirmed=yes&token={token}&alias=assistant")
    ).status == 200
    assert store.routes() == {}


async def test_forms_of_other_kinds_are_refused(browse: Browse, store: Store) -> None:
    # a page elsewhere can send text/plain and multipart without being asked by the browser first
    browser = await browse()
    token = (await browser.get("/rollouts")).token
    body = "&".join(f"{name}={value}" for name, value in {**ORDER, "token": token}.items())
    for kind in ("text/plain", "application/json", ""):
        async with browser.session.post(
            f"{browser.url}/rollouts", data=body.encode(), headers={"Content-Type": kind}
        ) as answer:
            assert answer.status == 403, kind
    assert store.routes() == {}


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1", "http://localhost:1"])
async def test_only_our_own_pages_may_send_forms(browse: Browse, store: Store, origin: str) -> None:
    browser = await browse()
    token = (await browser.get("/rollouts")).token
    assert (await browser.post("/rollouts", {**ORDER, "token": token}, Origin=origin)).status == 403
    assert (await browser.post("/logout", {"token": token}, Origin=origin)).status == 403
    assert store.routes() == {}


# sessions


async def test_a_session_planted_before_signing_in_stays_outside(browse: Browse, locked: Config) -> None:
    victim, thief = await browse(locked), await browse(locked)
    planted = "A" * 43
    page = await victim.get("/login", Cookie=f"understudy={planted}")
    token = page.token
    done = await victim.post(
        "/login", {"token": token, "key": KEY, "next": "/"}, Cookie=f"understudy={planted}"
    )
    assert done.status == 303
    assert planted not in done.headers["Set-Cookie"]
    assert (await thief.get("/", Cookie=f"understudy={planted}")).status == 303


@pytest.mark.parametrize("cookie", ["", "x" * 43, "../../etc/passwd", "%00" * 20, "a" * 4000, "' OR 1=1 --"])
async def test_an_invented_session_opens_nothing(browse: Browse, locked: Config, cookie: str) -> None:
    page = await (await browse(locked)).get("/traffic", Cookie=f"understudy={cookie}")
    assert page.status == 303


async def test_cookies_say_all_they_must(browse: Browse, locked: Config) -> None:
    browser = await browse(locked)
    token = (await browser.get("/login")).token
    form = {"token": token, "key": KEY, "next": "/"}
    done = await browser.post("/login", form, **{"X-Forwarded-Proto": "https"})
    flags = {part.strip().partition("=")[0].lower() for part in done.headers["Set-Cookie"].split(";")}
    assert {"httponly", "samesite", "secure", "path"} <= flags
    assert "domain" not in flags  # or every neighbour under the same name would be sent it
    assert "expires" not in flags  # the browser's end is the session's


async def test_signing_out_ends_the_session_on_the_server(browse: Browse, locked: Config) -> None:
    browser = await browse(locked)
    done = await sign_in(browser)
    kept = done.headers["Set-Cookie"].partition(";")[0]
    home = await browser.get("/")
    await browser.post("/logout", {"token": home.token})
    assert (await browser.get("/", Cookie=kept)).status == 303


async def test_guesses_of_one_address_are_counted_across_sessions(browse: Browse, locked: Config) -> None:
    browser = await browse(locked)
    for number in range(MOST_FAILURES):
        browser.session.cookie_jar.clear()
        assert (await sign_in(browser, f"guess {number}")).status == 403
    browser.session.cookie_jar.clear()
    # a forwarded address is anybody's word, so it buys no further guesses
    token = (await browser.get("/login")).token
    form = {"token": token, "key": KEY, "next": "/"}
    assert (await browser.post("/login", form, **{"X-Forwarded-For": "10.9.8.7"})).status == 429


def test_keys_are_compared_in_constant_time() -> None:
    sessions = Sessions("k" * 64)
    guesses = ("x" * 64, "k" * 63 + "x", "", "k" * 100_000)
    took = {guess: statistics.median(_times(sessions, guess)) for guess in guesses[:3]}
    # a comparison that ended at the first difference would be twice as fast for the first as for the second
    assert max(took.values()) < 5 * min(took.values()), took
    assert sessions.sign_in(guesses[3]) is None


def _times(sessions: Sessions, guess: str) -> list[float]:
    times: list[float] = []
    for _ in range(300):
        begun = time.perf_counter()
        sessions.sign_in(guess)
        times.append(time.perf_counter() - begun)
    return times


# ways out


@pytest.mark.parametrize(
    "onward",
    [
        "//evil.example", "https:evil.example", "/\\evil.example", "\\\\evil.example", "/\t/evil.example",
        "///evil.example", "/%0d%0aSet-Cookie:a=b\r\nX: y", "javascript:alert(1)", "/\u2028", "http://",
        "/./\\evil.example",
    ],
)  # fmt: skip
async def test_signing_in_leads_only_to_us(browse: Browse, locked: Config, onward: str) -> None:
    done = await sign_in(await browse(locked), onward=onward)
    assert done.status == 303
    assert re.fullmatch(r"/(?![/\\])[\x21-\x7e]*", done.headers["Location"])
    assert "X" not in done.headers


async def test_where_one_wanted_to_go_is_kept_inert(browse: Browse, locked: Config) -> None:
    browser = await browse(locked)
    sent = await browser.get('/traffic?q="><script>alert(1)</script>%0d%0aX:%20y')
    assert sent.status == 303
    assert "X" not in sent.headers
    page = await browser.get(sent.headers["Location"])
    assert page.status == 200
    assert_inert(page.text)


async def test_names_in_headers_cannot_break_out(browse: Browse, store: Store, make_call: MakeCall) -> None:
    call = make_call(response=b"x")
    store.insert([call], "s", 1)
    browser = await browse()
    for side in ("request", "response"):
        page = await browser.get(f"/traffic/{call.key}/{side}")
        assert page.headers["Content-Disposition"] == f'attachment; filename="{call.key}-{side}.txt"'
        assert page.headers["Content-Type"] == "application/octet-stream"
        assert page.headers["X-Content-Type-Options"] == "nosniff"
        assert page.headers["Cache-Control"] == "no-store"
        assert "sandbox" in page.headers["Content-Security-Policy"] or "default-src 'none'" in str(
            page.headers
        )
    for path in ("/traffic/a%0d%0aX:%20y/request", '/traffic/a"b/request', "/traffic/..%2f..%2fkey/request"):
        assert (await browser.get(path)).status == 404, path


@pytest.mark.parametrize(
    "path",
    [
        "/traffic/..%2f..%2f..%2fetc%2fpasswd", "/traffic/%2e%2e/%2e%2e/key", "/static/%2e%2e/app.py",
        "/static/..%5capp.py", "/static//etc/passwd", "/static/%2fetc%2fpasswd",
        "/static/dashboard.css%00.html",
        "/evaluations/%2e%2e%2fkey", "/evaluations/..%2fdrill%2fcertificate.json/certificate", "/%2e%2e/key",
        "/evaluations/" + "a" * 5000,
    ],
)  # fmt: skip
async def test_no_path_leads_out(browse: Browse, config: Config, path: str) -> None:
    config.path("key").write_text("the secret key")
    page = await (await browse()).get(path)
    assert page.status in (400, 403, 404)
    assert "secret key" not in page.text
    assert "import annotations" not in page.text


# what was recorded


@pytest.mark.parametrize("payload", PAYLOADS)
async def test_whatever_is_recorded_stays_text(
    browse: Browse, store: Store, make_call: MakeCall, payload: str
) -> None:
    text = payload.encode("utf-8", "replace").decode()
    tool = {"id": "1", "type": "function", "function": {"name": text, "arguments": text}}
    request = {
        "model": text, "metadata": {text: text}, "tools": [{"function": {"name": text}}],
        "messages": [
            {"role": text, "content": text},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": text}},
                                         {"type": "input_audio",
                                          "input_audio": {"data": text, "format": text}},
                                         {"type": text, text: text}]},
            {"role": "assistant", "tool_calls": [tool]},
        ],
    }  # fmt: skip
    bad = [Attempt(target=text, status=500, billed="no", started=0, ended=1, error=text, form=text)]
    calls = [
        make_call(
            at=time.time(), alias=text, target=text, task_id=text, tags={text: text}, caller=text,
            answered_by=text, finish_reason=text, attempts=bad, request=msgspec.json.encode(request),
        ),
        make_call(at=time.time(), status=500, response=msgspec.json.encode({"error": {"message": text}})),
        make_call(at=time.time(), response=text.encode("utf-8", "replace")),
    ]  # fmt: skip
    store.insert(calls, "s", 1)
    said = Feedback(key=new_key(), call=calls[0].key, at=1.0, metric=text, expected=text, comment=text)
    store.insert([said], "s", 2)
    store.set_route(text or "x", f"local/{text}", expected_version=0, by=text, reason=text, evidence=text)
    browser = await browse()
    for path in (*PAGES, *(f"/traffic/{call.key}" for call in calls)):
        page = await browser.get(path)
        assert page.status == 200, path
        assert_inert(page.text)
        assert "mro__" not in page.text or "__class__.__mro__" in page.text  # nothing was computed
        assert "a=b" not in str(page.headers)


@pytest.mark.parametrize(
    "url",
    [
        "data:image/svg+xml;base64,PHN2ZyBvbmxvYWQ9YWxlcnQoMSk+", "data:image/png,<script>",
        "javascript:alert(1)",
        "data:text/html;base64,PHNjcmlwdD4=", "DATA:IMAGE/SVG+XML;base64,PHN2Zz4=", "https://evil.example/a.png",
        'data:image/png;base64,AAAA" onerror="alert(1)', "file:///etc/passwd", "//evil.example/a.png",
        "data:image/png;base64,AAAA;https://evil.example",
    ],
)  # fmt: skip
async def test_only_pictures_that_hold_no_script_are_drawn(
    browse: Browse, store: Store, make_call: MakeCall, url: str
) -> None:
    content = [{"type": "image_url", "image_url": {"url": url}}]
    call = make_call(request=msgspec.json.encode({"messages": [{"role": "user", "content": content}]}))
    store.insert([call], "s", 1)
    page = await (await browse()).get(f"/traffic/{call.key}")
    assert page.status == 200
    assert '<img class="recorded"' not in page.text


async def test_a_picture_that_is_none_is_never_taken_for_a_page(
    browse: Browse, store: Store, make_call: MakeCall
) -> None:
    # HTML that claims to be a PNG: drawn by <img>, which runs nothing, and never at an address of its own
    url = "data:image/png;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg=="
    content = [{"type": "image_url", "image_url": {"url": url}}]
    call = make_call(request=msgspec.json.encode({"messages": [{"role": "user", "content": content}]}))
    store.insert([call], "s", 1)
    page = await (await browse()).get(f"/traffic/{call.key}")
    assert f'<img class="recorded" src="{url}"' in page.text
    assert_inert(page.text)
    assert f'href="{url}"' not in page.text


async def test_orders_keep_what_operators_write_as_text(browse: Browse, store: Store) -> None:
    browser = await browse()
    token = (await browser.get("/rollouts")).token
    form = {**ORDER, "token": token, "reason": PAYLOADS[0], "to": f"local/{PAYLOADS[1]}", "confirmed": ""}
    page = await browser.post("/rollouts", form)
    assert page.status == 200
    assert_inert(page.text)
    assert "&lt;svg onload" in page.text
    for evidence in ("../../key", "/etc/passwd", "' OR 1=1", "0" * 16, PAYLOADS[0]):
        refused = await browser.post("/rollouts", {**form, "evidence": evidence, "confirmed": "yes"})
        assert refused.status == 422
        assert "no evaluation" in refused.text
        assert_inert(refused.text)
    assert store.routes() == {}


# shapes of requests


@pytest.mark.parametrize(
    "method", ["OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "BREW", "PROPFIND"]
)
async def test_other_methods_do_nothing(browse: Browse, locked: Config, store: Store, method: str) -> None:
    for config in (locked, None):
        browser = await (browse(config) if config else browse())
        for path in ("/rollouts", "/", "/login", "/static/dashboard.css"):
            line = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            answer = await raw(browser.url, line.encode())
            assert answer.split(b" ", 2)[1] in (b"400", b"403", b"404", b"405", b"421"), (
                method,
                path,
                answer[:80],
            )
            assert b"Access-Control-Allow" not in answer
    assert store.routes() == {}


@pytest.mark.parametrize("path", ["/", "/traffic", "/login", "/nothing"])
async def test_heads_have_headers_and_no_body(browse: Browse, locked: Config, path: str) -> None:
    for config in (locked, None):
        browser = await (browse(config) if config else browse())
        answer = await raw(
            browser.url, f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        head, _, body = answer.partition(b"\r\n\r\n")
        assert body == b""
        assert b"frame-ancestors 'none'" in head


@pytest.mark.parametrize(
    "query",
    [
        "q=" + "a" * 6000, "&".join(f"p{n}={n}" for n in range(500)), "q=" + "%25" * 2000,
        "alias=" + "\u00e9" * 900, "status=" + "9" * 4000, "from=" + "1" * 4000, "before=" + "f" * 4000,
        "tag=" + "%22" * 1500, "q=%ed%a0%80",
    ],
)  # fmt: skip
async def test_huge_and_odd_queries_are_answered(
    browse: Browse, store: Store, make_call: MakeCall, query: str
) -> None:
    store.insert([make_call() for _ in range(3)], "s", 1)
    browser = await browse()
    for path in ("/traffic", "/models", "/plan", "/rollouts", "/login"):
        page = await browser.get(f"{path}?{query}")
        assert page.status in (200, 303, 400), path


async def test_what_is_too_large_is_refused(browse: Browse) -> None:
    browser = await browse()
    assert (await browser.post("/rollouts", {"reason": "x" * 200_000})).status == 413
    line = b"GET /?" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert b" 400 " in (await raw(browser.url, line)).split(b"\r\n")[0]


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "127.0.0.1.evil.example", "evil.example:80", "127.0.0.1@evil.example", "localhost.",
        "2130706433", "0x7f.1", "127.1", "[::ffff:10.0.0.1]", "evil.example#127.0.0.1", "",
    ],
)  # fmt: skip
async def test_a_name_that_is_not_this_machine_reads_nothing(browse: Browse, host: str) -> None:
    browser = await browse()
    answer = await raw(
        browser.url, f"GET /traffic HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
    )
    assert answer.split(b" ", 2)[1] in (b"400", b"421"), answer[:200]
    assert b"<h1>Traffic" not in answer


async def test_two_hosts_are_one_too_many(browse: Browse) -> None:
    browser = await browse()
    lines = b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    answer = await raw(browser.url, lines)
    assert b"evil.example" not in answer.partition(b"\r\n\r\n")[0]


async def test_no_answer_may_be_framed_kept_or_guessed(browse: Browse, locked: Config) -> None:
    browser = await browse(locked)
    await sign_in(browser)
    for path in (*PAGES, "/login", "/nothing", "/static/dashboard.css", "/static/", "/traffic/0/response"):
        headers = (await browser.get(path)).headers
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"], path
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "same-origin"
        assert "Access-Control-Allow-Origin" not in headers
