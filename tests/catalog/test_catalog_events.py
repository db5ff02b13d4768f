"""Tiers, price changes, silent swaps, canary prompts and webhooks."""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from understudy import config
from understudy.catalog.bindings import Binding
from understudy.catalog.canary import (
    Reply,
    ask,
    binomial_tail,
    drift_events,
    load_replies,
    read_prompts,
    save_replies,
)
from understudy.catalog.events import Event, fingerprint_events, price_events, swap_events
from understudy.catalog.facts import Catalog, load_catalog
from understudy.catalog.notify import payload, send, slack_payload
from understudy.catalog.tiers import parse_rules, target_tier, tiers_over_time
from understudy.endpoint import ScriptedModel
from understudy.errors import EndpointError, InputError
from understudy.protocol import CallShape, Usage
from understudy.traffic.figures import AnsweredBy
from understudy.traffic.fingerprints import Fingerprint
from understudy.traffic.hours import Hour

NOW = dt.datetime(2026, 6, 10, 12, tzinfo=dt.UTC).timestamp()
DAY = 86_400.0
RULES = parse_rules(config.Catalog().tiers)

OVERLAY = """
models:
  v/big: {scores: {MMLU: 88.0}, prices: {input: 3.0, output: 9.0}}
  v/middle: {scores: {"MMLU (5-shot)": 80.0}, prices: {input: 0.3, output: 0.9}}
  v/tiny: {scores: {MMLU: 60.0}, prices: {input: 0.05, output: 0.1}}
  v/odd: {scores: {MMLU: 90.0}, prices: {input: 0.3, output: 0.9}}
  v/edge: {scores: {MMLU: 85.0}, prices: {input: 0.5, output: 0.9}}
  v/priced: {prices: {input: 4.0, output: 9.0}}
  v/moved: {prices: [{input: 2.0, output: 8.0}, {input: 3.0, output: 12.0, start: 2026-06-01},
            {input: 2.9, output: 12.0, start: 2026-07-01}]}
  v/silent: {context_window: 100}
"""


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    path = tmp_path / "facts.yaml"
    path.write_text(OVERLAY)
    return load_catalog(path)


def shape(prompt: int, answer: int) -> CallShape:
    usage = Usage(prompt_tokens=prompt, completion_tokens=answer)
    return CallShape(NOW - 10 * DAY, usage, frozenset({"text"}), frozenset(), 0, "", None)


@pytest.mark.parametrize(
    ("target", "tier", "without"),
    [
        ("v/big", "frontier", ()),
        ("v/middle", "mid-range", ()),
        ("v/tiny", "ultra-cheap", ()),
        ("v/odd", "between", ()),
        ("v/edge", "mid-range", ()),
        ("v/priced", "frontier", ("mmlu",)),
        ("v/silent", "unknown", ("mmlu", "usd")),
        ("v/nobody", "unknown", ("mmlu", "usd")),
    ],
)
def test_a_model_is_classed_by_the_rule_and_says_what_was_not_known(
    catalog: Catalog, target: str, tier: str, without: tuple[str, ...]
) -> None:
    found = target_tier(catalog, target, RULES, NOW)
    assert (found.tier, found.without) == (tier, without)


@pytest.mark.parametrize("text", ["mmlu", "mmlu >", "> 85", "mmlu ~ 85", "85", ""])
def test_a_condition_that_cannot_be_read_is_named(text: str) -> None:
    with pytest.raises(InputError, match=r"\[catalog\] tiers: mine"):
        parse_rules({"mine": [text]})


def hour(day: str, target: str, calls: int, usd: float) -> Hour:
    at = int(dt.datetime.fromisoformat(day).replace(tzinfo=dt.UTC).timestamp() // 3600)
    return Hour(at, "a", target, calls, 0, calls, 100.0 * calls, 10.0 * calls, 0.0, usd, 1.0)


def test_traffic_is_shared_out_over_tiers_and_months(catalog: Catalog) -> None:
    hours = [
        hour("2026-04-30", "v/big", 10, 5.0),
        hour("2026-05-01", "v/big", 30, 3.0),
        hour("2026-05-31", "v/tiny", 60, 0.6),
        hour("2026-05-31", "v/priced", 10, 0.4),
    ]
    april, frontier, cheap = tiers_over_time(catalog, hours, RULES, NOW)
    assert (april.period, april.tier, april.share_of_calls) == ("2026-04-01", "frontier", 1.0)
    assert (frontier.calls, frontier.share_of_calls, frontier.models) == (40, 0.4, ("v/big", "v/priced"))
    assert frontier.share_of_usd == pytest.approx(3.4 / 4.0)
    assert (cheap.tier, cheap.tokens, cheap.share_of_tokens) == ("ultra-cheap", 6600.0, 0.6)
    weeks = tiers_over_time(catalog, hours, RULES, NOW, "week")
    assert [w.period for w in weeks] == ["2026-04-27", "2026-05-25", "2026-05-25"]


def test_a_price_that_moved_and_one_that_will_are_events_with_their_cost(catalog: Catalog) -> None:
    bound = [Binding("assistant", "v/moved", "alias"), Binding("b", "v/big", "alias")]
    shapes = {"v/moved": [shape(1000, 500)] * 10}
    rise, cut = price_events(catalog, bound, shapes, NOW)
    months = 10 / 30.44
    assert (rise.day, rise.severity, rise.target) == ("2026-06-01", "high", "v/moved")
    assert "dearer by 50%" in rise.text
    assert rise.usd_per_month == pytest.approx(10 * (1000 * 3 + 500 * 12) / 1e6 / months)
    assert (cut.day, cut.severity) == ("2026-07-01", "medium")
    assert "cheaper by 1%" in cut.text
    assert price_events(catalog, bound, shapes, NOW, since_days=5, until_days=5) == []


def test_another_id_answering_is_a_swap_and_side_by_side_from_the_start_is_none() -> None:
    answers = [
        AnsweredBy("v/moved", "moved-2026-01", 900, NOW - 90 * DAY, NOW - 3 * DAY),
        AnsweredBy("v/moved", "moved-2026-05", 40, NOW - 3 * DAY, NOW),
        AnsweredBy("v/both", "b1", 500, NOW - 20 * DAY, NOW),
        AnsweredBy("v/both", "b2", 500, NOW - 20 * DAY + 60, NOW),
        AnsweredBy("v/old", "o1", 5, NOW - 90 * DAY, NOW - 60 * DAY),
        AnsweredBy("v/old", "o2", 5, NOW - 59 * DAY, NOW),
    ]
    (event,) = swap_events(answers, [Binding("assistant", "v/moved", "alias")], NOW)
    assert (event.before, event.after, event.day) == ("moved-2026-01", "moved-2026-05", "2026-06-07")
    assert [b.name for b in event.bindings] == ["assistant"]
    assert len(swap_events(answers, [], NOW, since_days=60)) == 2


def test_fingerprints_of_a_day_are_one_quiet_event() -> None:
    def seen(target: str, name: str, first: float, *, model: str = "m-1", calls: int = 10) -> Fingerprint:
        return Fingerprint(target, model, name, calls, NOW + first * DAY, NOW)

    midnight = (NOW % DAY) / DAY
    prints = [
        seen("v/pool", "fp_1", -20),
        seen("v/pool", "fp_2", -20 + 0.5 / 24),  # within the hour: the pool it always was
        seen("v/pool", "fp_3", -3 - midnight + 0.1),
        seen("v/pool", "fp_4", -3 - midnight + 0.9),
        seen("v/pool", "fp_5", -2 - midnight + 0.1, calls=1),
        seen("v/old", "fp_1", -90),
        seen("v/old", "fp_2", -40),
        seen("v/swapped", "fp_1", -20),
        seen("v/swapped", "fp_2", -1, model="m-2"),  # another id: told as a swap
    ]
    first, second = fingerprint_events(reversed(prints), [Binding("assistant", "v/pool", "alias")], NOW)
    assert (first.kind, first.severity, first.target) == ("fingerprint", "low", "v/pool")
    assert (first.before, first.after) == ("fp_2", "fp_3, fp_4")
    assert "2 new fingerprints" in first.text
    assert "(20 calls)" in first.text
    assert (second.before, second.after, second.day) == ("fp_4", "fp_5", "2026-06-08")
    assert [b.name for b in first.bindings] == ["assistant"]
    assert len(fingerprint_events(prints, [], NOW, since_days=50)) == 3


async def round_of(answer: Callable[[dict[str, Any]], str], times: int, at: float = NOW) -> list[Reply]:
    prompts = [{"messages": [{"role": "user", "content": f"q{n}"}]} for n in range(20)]
    return await ask(ScriptedModel("v/m", answer), prompts, at, times)


def echo(request: dict[str, Any]) -> str:
    return str(request["messages"][-1]["content"])


async def test_a_model_that_answers_otherwise_drifts_and_a_flickering_one_does_not() -> None:
    first = await round_of(echo, 2)
    assert drift_events(first, await round_of(echo, 1), []) == []
    changed = await round_of(lambda r: echo(r) + " now" if echo(r) < "q15" else echo(r), 1, NOW + DAY)
    (event,) = drift_events(first, changed, [Binding("a", "v/m", "alias")])
    assert (event.kind, event.day, len(event.bindings)) == ("drift", "2026-06-11", 1)
    assert "7 of 20" in event.text  # q0, q1, q10 to q14
    calls = iter(range(1000))
    flicker = await round_of(lambda r: f"{echo(r)} {next(calls)}", 2)
    assert drift_events(flicker, await round_of(lambda r: f"{echo(r)} {next(calls)}", 2), []) == []


async def test_canary_answers_by_another_fingerprint_are_a_swap() -> None:
    first = await round_of(echo, 2)
    then = [msgspec.structs.replace(r, fingerprint="fp_1") for r in first]
    now = [msgspec.structs.replace(r, fingerprint="fp_2") for r in first]
    (event,) = drift_events(then, now, [])
    assert (event.kind, event.before, event.after) == ("swap", "m fp_1", "m fp_2")


def test_the_binomial_tail_is_the_hand_computed_one() -> None:
    assert binomial_tail(3, 2, 0.5) == pytest.approx(0.5)
    assert binomial_tail(4, 4, 0.1) == pytest.approx(1e-4)
    assert binomial_tail(5, 0, 0.3) == pytest.approx(1.0)


async def test_canary_rounds_are_kept_and_broken_files_are_named(tmp_path: Path) -> None:
    replies, path = await round_of(echo, 2), tmp_path / "kept.jsonl"
    save_replies(path, replies)
    assert load_replies(path) == replies
    assert load_replies(tmp_path / "absent.jsonl") == []
    path.write_text("{")
    with pytest.raises(InputError, match=r"kept\.jsonl"):
        load_replies(path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"messages": [{"role": "user", "content": "q"}]}\n\n{"prompt": "x"}\n')
    with pytest.raises(InputError, match="line 3: no messages"):
        read_prompts(prompts)


class Posted(NamedTuple):
    url: str
    bodies: list[dict[str, Any]]


@pytest.fixture
def hook() -> Iterator[Posted]:
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(msgspec.json.decode(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200 if self.path == "/secret" else 404)
            self.end_headers()

        def log_message(self, *words: object) -> None:
            del words

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Posted(f"http://127.0.0.1:{server.server_port}/secret", bodies)
    server.shutdown()
    thread.join()
    server.server_close()


def event(number: int = 0) -> Event:
    return Event(
        kind="swap",
        severity="high",
        target="v/m",
        bindings=(Binding("a<b", "v/m", "alias"),),
        day="2026-06-07",
        text=f"v/m: swapped & moved {number}",
        usd_per_month=12.5,
    )


def test_events_reach_a_webhook(hook: Posted) -> None:
    send(hook.url, payload([event()], NOW))
    assert hook.bodies[0]["events"][0]["bindings"][0]["level"] == "alias"


def test_a_webhook_that_refuses_is_named_without_its_secret(hook: Posted) -> None:
    for url in (hook.url + "-wrong", "http://127.0.0.1:1/secret"):
        with pytest.raises(EndpointError) as caught:
            send(url, payload([event()], NOW))
        assert "secret" not in str(caught.value)


def test_slack_gets_text_and_at_most_fifty_blocks() -> None:
    body = slack_payload([event(n) for n in range(60)])
    assert "60 events" in body["text"]
    assert len(body["blocks"]) <= 50
    assert "&amp;" in body["blocks"][1]["text"]["text"]
    assert "a&lt;b (alias) · $12.50/month" in body["blocks"][1]["text"]["text"]
    assert "and 15 more" in body["blocks"][-1]["text"]["text"]
