"""Every page over real HTTP: on nothing, on traffic, and on traffic that attacks."""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable
from html.parser import HTMLParser
from typing import Any, get_args

import aiohttp
import msgspec
import pytest

from understudy import config as configuration
from understudy.catalog.bindings import Level
from understudy.cli.dashboard import moves_of
from understudy.config import Config, Rollout
from understudy.dashboard import today
from understudy.dashboard.server import start
from understudy.errors import InputError, StoreError
from understudy.protocol import Cost, Usage
from understudy.rollout.trials import Order, begin
from understudy.traffic.record import Attempt, Call, Feedback, new_key
from understudy.traffic.store import Store

MakeCall = Callable[..., Call]
Browse = Callable[..., Awaitable[Any]]
PAGES = ("/", "/traffic", "/models", "/plan", "/evaluations", "/rollouts", "/own")
HOSTILE = "</div><script>alert('x')</script><img src=x onerror=alert(1)>{{ 7*7 }}\" onmouseover=\"alert(2)"


class Elements(HTMLParser):
    """Every element and attribute of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def assert_inert(text: str) -> None:
    """No script, no event handler, no inline style, nothing loaded from elsewhere."""
    for tag, attributes in Elements(text).tags:
        assert tag not in ("script", "iframe", "object", "embed", "base", "style"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name != "style", tag
            if name in ("src", "href", "action", "formaction"):
                assert (value or "").startswith(("/", "#", "data:image/", "data:audio/")), (tag, name, value)


@pytest.mark.parametrize("path", PAGES)
async def test_every_page_opens_on_an_empty_store(browse: Browse, path: str) -> None:
    page = await (await browse()).get(path)
    assert page.status == 200
    assert_inert(page.text)
    assert page.text.count("<h1") == 1
    assert f'href="{path}" aria-current="page"' in page.text


async def test_every_page_opens_without_any_alias(browse: Browse, config: Config) -> None:
    bare = msgspec.structs.replace(config, aliases={}, drill=configuration.Drill())
    browser = await browse(bare)
    for path in PAGES:
        page = await browser.get(path)
        assert page.status == 200, path
    assert "understudy up" in (await browser.get("/")).text


async def test_today_counts_the_last_day_and_month(browse: Browse, store: Store, make_call: MakeCall) -> None:
    now = time.time()
    usage = Usage(prompt_tokens=1000, completion_tokens=200)
    calls = [make_call(at=now - n * 60, usage=usage) for n in range(3)]
    calls.append(make_call(at=now - 60, status=503, usage=None))
    calls += [make_call(at=now - 5 * 86_400, usage=usage) for _ in range(6)]
    store.insert(calls, "s", 1, price=lambda call: Cost(0.5, "", "") if call.usage else None)
    store.insert([Feedback(key=new_key(), call=calls[0].key, at=now, metric="success", value=0.25)], "s", 2)
    text = (await (await browse()).get("/")).text
    stats = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text))
    assert "Calls, 24 h 4 10 in 30 days" in stats
    assert "Failed, 24 h 25.0% 1 of 4" in stats
    assert "Spend, 24 h $1.50 $4.50 in 30 days; 1 without a price" in stats
    assert "Tokens, 24 h 3.6 k 10.8 k in 30 days" in stats
    assert "assistant success 0.250 1" in stats
    assert "the last call was recorded" in stats
    assert "openai/gpt-4-0613" in stats
    assert text.count("<svg") == 2


async def test_an_announced_end_is_counted_down(browse: Browse, config: Config) -> None:
    day = time.strftime("%Y-%m-%d", time.gmtime(time.time() + 40 * 86_400))
    config.path("facts.yaml").write_text(f"models:\n  local/role:\n    retires: {day}\n")
    dying = msgspec.structs.replace(
        config,
        catalog=configuration.Catalog(overlay="facts.yaml"),
        aliases={"assistant": configuration.Alias(model="local/role")},
    )
    text = (await (await browse(dying)).get("/")).text
    assert "<b>40</b> days left" in text
    assert "answers <b>assistant</b>" in text
    assert 'href="/plan?alias=assistant"' in text


def test_every_place_that_names_a_model_has_words() -> None:
    assert set(today.ROLES) == set(get_args(Level))


async def test_ends_of_models_on_trial_and_of_judges_are_shown(
    browse: Browse, config: Config, store: Store
) -> None:
    config.path("facts.yaml").write_text(
        "models:\n  local/student:\n    retires: 2031-01-01\n  local/judge:\n    retires: 2031-01-02\n"
    )
    dying = msgspec.structs.replace(
        config,
        catalog=configuration.Catalog(overlay="facts.yaml"),
        evaluate=configuration.Evaluate(judge="local/judge"),
    )
    order, initial = Order("ada", "it retires"), config.aliases["assistant"]
    begin(store, "assistant", "local/student", order, Rollout(), initial=initial)
    text = (await (await browse(dying)).get("/")).text
    assert "on trial for <b>assistant</b>" in text
    assert "judge in <b>" in text


async def test_one_call_shows_everything(browse: Browse, store: Store, make_call: MakeCall) -> None:
    call = make_call(
        prompt="How long does the night last?",
        answer="Until morning.",
        task_id="t-1",
        tags={"team": "care"},
        usage=Usage(prompt_tokens=12, completion_tokens=3, cached_tokens=8),
        answered_by="gpt-4-0613-preview",
        attempts=[
            Attempt(target="openai/a", status=503, billed="no", started=1.0, ended=2.0, error="overloaded"),
            Attempt(target="openai/b", status=200, billed="unknown", started=2.0, ended=3.5),
        ],
    )
    store.insert([call], "s", 1, price=lambda _: Cost(0.0123, "2026-01-01", "overlay"))
    said = Feedback(key=new_key(), call=call.key, at=call.at, metric="expected", expected="till dawn")
    store.insert([said], "s", 2)
    page = await (await browse()).get(f"/traffic/{call.key}")
    for shown in (
        "How long does the night last?", "Until morning.", "t-1", "care", "overloaded", "billed: unknown",
        "gpt-4-0613-preview", "$0.012", "overlay", "till dawn", "of them cached",
    ):  # fmt: skip
        assert shown in page.text, shown


async def test_hostile_records_are_text(browse: Browse, store: Store, make_call: MakeCall) -> None:
    calls = [
        make_call(
            prompt=HOSTILE,
            answer=HOSTILE,
            alias=HOSTILE,
            target=HOSTILE,
            task_id=HOSTILE,
            tags={HOSTILE: HOSTILE},
            answered_by=HOSTILE,
            finish_reason=HOSTILE,
            caller=HOSTILE,
            at=time.time(),
            attempts=[
                Attempt(target=HOSTILE, status=500, billed="no", started=0, ended=0, error=HOSTILE),
            ],
        ),
        make_call(response=msgspec.json.encode({"error": {"message": HOSTILE}}), status=500),
    ]
    store.insert(calls, "s", 1, price=lambda _: Cost(1.0, HOSTILE, HOSTILE))
    said = Feedback(key=new_key(), call=calls[0].key, at=0, metric=HOSTILE, expected=HOSTILE, comment=HOSTILE)
    store.insert([said], "s", 2)
    store.set_route(HOSTILE, HOSTILE, expected_version=0, by=HOSTILE, reason=HOSTILE, evidence=HOSTILE)
    browser = await browse()
    paths = [*PAGES, *(f"/traffic/{c.key}" for c in calls), "/plan?alias=" + HOSTILE, "/traffic?q=" + HOSTILE]
    texts: list[str] = []
    for path in paths:
        page = await browser.get(path)
        assert page.status == 200, path
        assert_inert(page.text)
        assert "49" not in re.findall(r"onerror=alert\(1\)&gt;(.{2})", page.text)
        texts.append(page.text)
    assert "&lt;script&gt;alert" in texts[-1]


def stream(*events: object) -> bytes:
    return b"".join(b"data: %s\n\n" % msgspec.json.encode(event) for event in events)


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"request": b"", "response": b""}, "No text"),
        ({"request": b"\xff\xfe not json", "response": b"<html>502</html>"}, "&lt;html&gt;502"),
        ({"request": b"[" * 100_000, "response": b'{"a":' * 50_000}, "more characters"),
        ({"request": b'{"messages":' + b"[" * 50_000 + b"]" * 50_000 + b"}"}, "as it was sent"),
        ({"request": b'{"messages": [{"role": "user", "content": "to [email:1f3a9c0d] [1]"}]}'},
         "to <mark>[email:1f3a9c0d]</mark> [1]"),
        ({"request": b'{"messages": "x", "input": 3}', "response": b'{"choices": [3, {}]}'}, "As recorded"),
        ({"response": b'{"choices":[{"message":"no object"}]}'}, "no object"),
        ({"stream": True, "response": b'data: {"choices":[3]}\n\n'}, "choices"),
        ({"stream": True, "response": stream({"choices": [{"delta": {"content": "in "}}]},
                                             {"choices": [{"delta": {"content": "parts"}}]})}, "in parts"),
        ({"route": "messages", "stream": True, "response": stream(
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            {"type": "content_block_delta", "index": 0, "delta": {"text": "Bon"}},
            {"type": "content_block_delta", "index": 0, "delta": {"text": "jour"}})}, "Bonjour"),
        ({"route": "responses", "stream": True, "response": stream(
            {"type": "response.output_text.delta", "delta": "Gut"},
            {"type": "response.output_text.delta", "delta": "en Tag"})}, "Guten Tag"),
        ({"route": "embeddings", "request": b'{"input": ["one", "two"]}',
          "response": b'{"data": [{"embedding": [0.1]}]}'}, "1 vector(s)"),
        ({"response": msgspec.json.encode({"choices": [{"message": {"content": None, "tool_calls": [
            {"function": {"name": "lookup", "arguments": "{\"q\": 1}"}}]}}]})}, "tool call: lookup"),
        ({"request": msgspec.json.encode({"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}]}]})},
         'src="data:image/png;base64,iVBORw0KGgo="'),
        ({"request": msgspec.json.encode({"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "https://tracker.example/x.png"}}]}]})},
         "image elsewhere, not loaded"),
        ({"request": msgspec.json.encode({"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "data:image/svg+xml;base64,PHN2Zz4="}}]}]})},
         "image elsewhere, not loaded"),
        ({"request": msgspec.json.encode({"messages": [{"role": "user", "content": [
            {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}]}]})},
         '<audio class="recorded" controls preload="none" src="data:audio/wav;base64,UklGRg=="'),
        ({"request": msgspec.json.encode({"messages": [{"role": "user", "content": [
            {"type": "input_audio", "input_audio": {"data": "\"><script>", "format": "wav"}}]}]})},
         "sound that no browser plays"),
    ],
)  # fmt: skip
async def test_whatever_was_recorded_is_shown(
    browse: Browse, store: Store, make_call: MakeCall, fields: dict[str, object], shown: str
) -> None:
    call = make_call(**fields)
    store.insert([call], "s", 1)
    browser = await browse()
    page = await browser.get(f"/traffic/{call.key}")
    assert page.status == 200
    assert shown in page.text
    assert_inert(page.text)
    assert (await browser.get("/traffic")).status == 200


async def test_redactions_are_marked_in_the_list_too(
    browse: Browse, store: Store, make_call: MakeCall
) -> None:
    store.insert([make_call(prompt="write to [email:1f3a9c0d] <b>", answer="[email:1f3a9c0d] it is")], "s", 1)
    text = (await (await browse()).get("/traffic")).text
    assert "write to <mark>[email:1f3a9c0d]</mark> &lt;b&gt;" in text
    assert "<mark>[email:1f3a9c0d]</mark> it is" in text


async def test_a_newcomer_is_told_three_steps(browse: Browse, store: Store, make_call: MakeCall) -> None:
    browser = await browse()
    first = (await browser.get("/")).text
    assert "OPENAI_BASE_URL=http://127.0.0.1:8080/v1" in first
    assert "model = &#34;assistant&#34;" in first or 'model = "assistant"' in first
    assert "<svg" not in first  # no empty charts
    store.insert([make_call(at=time.time())], "s", 1)
    assert "Three steps" not in (await browser.get("/")).text


async def test_bodies_are_saved_never_shown(browse: Browse, store: Store, make_call: MakeCall) -> None:
    call = make_call(response=b"<script>alert(1)</script>")
    store.insert([call], "s", 1)
    page = await (await browse()).get(f"/traffic/{call.key}/response")
    assert page.text == "<script>alert(1)</script>"
    assert page.headers["Content-Type"] == "application/octet-stream"
    assert page.headers["Content-Disposition"].startswith("attachment")


async def test_a_plan_is_made_for_the_traffic(browse: Browse, store: Store, make_call: MakeCall) -> None:
    store.insert([make_call(at=time.time() - 60)], "s", 1)
    browser = await browse()
    page = await browser.get("/plan")
    assert "weighed on 1 answered calls" in page.text
    assert "Fits every call" in page.text
    assert "bulk work: the cheapest" in page.text
    assert "of the calls can go to one vendor only" in page.text
    assert "There is no such alias" in (await browser.get("/plan?alias=nobody")).text


async def test_a_plan_is_ranked_by_what_the_reader_chooses(
    browse: Browse, store: Store, make_call: MakeCall
) -> None:
    store.insert([make_call(at=time.time() - 60)], "s", 1)
    browser = await browse()

    async def dollars(rank: str) -> list[float]:
        fitting = (await browser.get(f"/plan?rank={rank}")).text.partition("<h3>Best for")[0]
        rows = fitting.split('<td class="num" data-label="Per month">')
        return [float(found[1]) for row in rows[1:] if (found := re.match(r"\$([0-9.]+)", row))]

    usual, by_cost = await dollars("fit"), await dollars("cost")
    assert by_cost == sorted(by_cost)
    assert usual != by_cost  # those as strong as the incumbent come first, dear or not
    page = (await browser.get("/plan?rank=cost")).text
    assert "<option selected>cost</option>" in page
    assert "rank=cost&amp;fresh=1" in page  # made again by the same order
    assert "<option selected>fit</option>" in (await browser.get("/plan?rank=nonsense")).text


async def test_models_are_filtered(browse: Browse, store: Store, make_call: MakeCall) -> None:
    store.insert([make_call(at=time.time())], "s", 1)
    browser = await browse()
    text = (await browser.get("/models?q=GPT-4-0613")).text
    assert "openai/gpt-4-0613" in text
    assert "100.0%" in text
    for what in ("Calls", "Tokens", "Spend"):
        assert f"{what} by tier, per week" in text
    assert '<td class="num" data-label="of spend">' in text
    one = (await browser.get("/models?q=openai/gpt-4.1")).text
    assert "Others say" in one
    assert "ecologits-estimate, 20" in one
    assert "openai/gpt-4.1-mini</a>" not in one
    assert "No model matches" in (await browser.get("/models?q=no-such-model")).text


async def test_what_is_not_there_is_a_page(browse: Browse) -> None:
    browser = await browse()
    for path in ("/nothing", "/traffic/0123", "/traffic/0123/request", "/evaluations/none", "/own/none"):
        page = await browser.get(path)
        assert page.status == 404, path
        assert "<h1>" in page.text


async def test_a_store_that_fails_is_explained(config: Config) -> None:
    def full(*_: object, **__: object) -> None:
        raise StoreError("traffic.db: disk full", next_step="free some space")

    moves = moves_of(config)._replace(acts={"move": full})
    dashboard = await start(config, moves=moves)
    async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as session:
        async with session.get(f"{dashboard.url}/rollouts") as answer:
            token = re.findall(r'name="token" value="([^"]+)"', await answer.text())[0]
        form = {"token": token, "alias": "assistant", "version": "0", "to": "local/student", "do": "move"}
        form["confirmed"] = "yes"
        async with session.post(f"{dashboard.url}/rollouts", data=form) as answer:
            assert answer.status == 503
            assert "disk full" in await answer.text()
    await dashboard.stop()


async def test_without_moves_it_only_reads(config: Config) -> None:
    dashboard = await start(config)
    async with aiohttp.ClientSession() as session, session.get(f"{dashboard.url}/rollouts") as answer:
        assert "<form" not in await answer.text()
    await dashboard.stop()


def test_an_open_address_needs_a_key(config: Config) -> None:
    from understudy.dashboard.server import serve_dashboard

    wide = msgspec.structs.replace(config, dashboard=configuration.Dashboard(listen="0.0.0.0:0"))
    with pytest.raises(InputError, match="admin_key"):
        serve_dashboard(wide)
