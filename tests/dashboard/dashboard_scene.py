"""A team's dashboard in full use, for tests and for people who look at the pages.

Three months of traffic of seven aliases and models of every tier, a trial in every stage, an evaluation of
every verdict, two own models. `python dashboard_scene.py FOLDER` builds it, for `understudy dashboard` there
to show. It ignores hostile data (test_dashboard_attacks) and large amounts (bench/dashboard.py).
"""

from __future__ import annotations

import asyncio
import base64
import random
import struct
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from understudy import config as configuration
from understudy.config import Config, Rollout
from understudy.endpoint import ScriptedModel
from understudy.evaluate import certificate as certificates
from understudy.evaluate.benchmarks import Accuracy
from understudy.evaluate.certify import write
from understudy.evaluate.performance import ModelSheet, Sample, write_performance
from understudy.evaluate.replay import prove
from understudy.protocol import Cost, Usage
from understudy.rollout.look import look_at
from understudy.rollout.move import move
from understudy.rollout.standing import Pair, Standing
from understudy.rollout.trials import Order, abort, begin, pause
from understudy.traffic.database import open_database
from understudy.traffic.hours import Hour
from understudy.traffic.record import Attempt, Call, Feedback, Record, new_key
from understudy.traffic.sample import Exchange
from understudy.traffic.store import Store, open_store

CONFIG = """
[store]
url = "sqlite:///traffic.db"
[dashboard]
listen = "127.0.0.1:0"
admin_key = "file:key"
[rollout]
margin = 0.15
shares = [0.05, 0.25, 1.0]
tasks = [20, 50, 50]
[endpoints.openai]
base_url = "http://127.0.0.1:1/v1"
[endpoints.anthropic]
base_url = "http://127.0.0.1:2/v1"
[endpoints.mistral]
base_url = "http://127.0.0.1:4/v1"
[endpoints.local]
base_url = "http://127.0.0.1:3/v1"
[aliases.assistant]
model = "openai/gpt-4.1"
fallback = ["openai/gpt-4.1-mini", "local/student"]
[aliases.summaries]
model = "openai/gpt-4.1-mini"
[aliases.triage]
model = "anthropic/claude-sonnet-4-5"
fallback = ["openai/gpt-4.1"]
[aliases.translate]
model = "openai/o3"
[aliases.receipts]
model = "openai/gpt-4o"
[aliases.search]
model = "openai/gpt-5-nano"
[aliases.voice]
model = "mistral/mistral-large-2512"
[drill]
alias = "assistant"
candidates = ["local/student"]
"""
KEY = "correct horse battery staple"
DAY_S = 86_400.0
BUSY = 400
"""Calls that each recorded one stands for in the sums: figures as a busy team has them, in no time."""
QUESTIONS = (
    "My parcel [order:9f31c07a] was due on Monday. Where is it? You can reach me at [email:1f3a9c0d].",
    "Summarise this ticket in two sentences for the handover: the customer was charged twice for one "
    "subscription, has written three times since Friday and asks for a refund to the card [card:77ab01ff].",
    "Which of our return rules applies to opened headphones bought 40 days ago?",
    "Translate into Portuguese, formal: We are sorry for the delay and have refunded the shipping costs.",
    "Is the attached receipt legible, and what is its total?",
    "Extract name, order and reason as JSON.",
)
ANSWERS = (
    "Your parcel left our warehouse in Leipzig on Tuesday and is with the carrier. It should reach you "
    "tomorrow before 18:00. I have sent the tracking link to [email:1f3a9c0d].",
    "Charged twice for one subscription, three messages since Friday. Wants the second payment refunded.",
    "Opened headphones cannot be returned after 30 days for reasons of hygiene; the warranty still applies.",
    "Lamentamos o atraso e reembolsámos os custos de envio.",
    "Yes. The total is 38.20 EUR, including 6.10 EUR of VAT.",
    '{"name": "[name:51d0aa23]", "order": "9f31c07a", "reason": "late"}',
)


def scene_config(folder: Path) -> Config:
    """The config, written with its key."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "key").write_text(KEY)
    (folder / "understudy.toml").write_text(CONFIG)
    return configuration.parse(CONFIG, "understudy.toml", folder)


def build(folder: Path) -> Config:
    """Everything."""
    config = scene_config(folder)
    with open_store(config.store.url, folder) as store:
        fill(store, time.time())
        trials(store, config, time.time())
    with closing(open_database(config.store.url, folder)) as database:
        grown = ", ".join(f"{name} = {name} * {BUSY}" for name in Hour._fields[3:])
        for table in ("hours", "days"):
            database.execute(f"UPDATE {table} SET {grown}")
    evaluations(folder)
    own_models(folder)
    return config


def picture() -> str:
    """A data URL: a small receipt, drawn."""
    width, height = 220, 300
    rows: list[bytes] = []
    for y in range(height):
        line = bytearray([0])
        for x in range(width):
            ink = 24 < x < 196 and y > 30 and (y // 14) % 2 == 0 and (x * 7 + y // 14 * 31) % 41 < 26
            line += bytes((40, 44, 52) if ink else (252, 250, 244))
        rows.append(bytes(line))
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"".join(rows), 9)), (b"IEND", b""),
    )  # fmt: skip
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return "data:image/png;base64," + base64.b64encode(png).decode()


def fill(store: Store, now: float, hours: int = 700) -> list[Call]:
    """Traffic that grows over thirteen weeks, newest first, and what was said of it."""
    rng = random.Random(8)
    targets = {
        "assistant": ("openai/gpt-4.1", "openai/gpt-4.1", "local/student"),
        "summaries": ("openai/gpt-4.1-mini", "openai/gpt-4.1-mini", "mistral/mistral-small-2603"),
        "triage": ("anthropic/claude-sonnet-4-5", "anthropic/claude-haiku-4-5", "local/triage-7b"),
        "translate": ("openai/o3",), "receipts": ("openai/gpt-4o",), "search": ("openai/gpt-5-nano",),
        "gpt-4o-mini": ("openai/gpt-4o-mini",),
    }  # fmt: skip
    names = [*targets, "assistant", "assistant", "summaries", "triage"]
    records: list[Record] = list(_specials(now))
    for number in range(hours):
        at = now - 60 - (number / hours) ** 1.6 * 90 * DAY_S
        alias = rng.choice(names)
        records.append(_plain(rng, number, at, alias, targets[alias]))
        if rng.random() < 0.4:
            call = records[-1]
            value = float(rng.random() < 0.86)
            records.append(
                Feedback(key=new_key(), call=call.key, at=call.at + 30, metric="success", value=value)
            )
    store.insert(records, "s", 1, price=_price)
    return [record for record in records if isinstance(record, Call)]


def _plain(rng: random.Random, number: int, at: float, alias: str, targets: tuple[str, ...]) -> Call:
    status = rng.choices((200, 503, 429, 499), (95, 2, 2, 1))[0]
    place = number % len(QUESTIONS)
    target = rng.choice(targets)
    answer = {"choices": [{"index": 0, "message": {"role": "assistant", "content": ANSWERS[place]}}]}
    error = {"error": {"message": "Rate limit reached: 30,000 tokens per minute", "type": "tokens"}}
    took = rng.lognormvariate(0.1, 0.7)
    return Call(
        key=_key(at),
        at=at,
        route="chat.completions",
        alias=alias,
        target=target,
        status=status,
        request=msgspec.json.encode(
            {
                "model": alias,
                "temperature": 0.2,
                "messages": [
                    {"role": "system", "content": "You help the customers of a shop. Be brief and exact."},
                    {"role": "user", "content": QUESTIONS[place]},
                ],
            }
        ),
        response=msgspec.json.encode(answer if status == 200 else error),
        usage=_usage(rng) if status == 200 else None,
        attempts=[
            Attempt(
                target=target, status=status, billed="yes" if status == 200 else "no", started=at,
                ended=at + took,
            )
        ],
        ttft_s=took / 3,
        total_s=took,
        answered_by=target.partition("/")[2],
        finish_reason="stop" if status == 200 else "",
        task_id=f"ticket-{48_200 - number // 3}" if rng.random() < 0.6 else "",
        tags={"team": rng.choice(("care", "growth")), "release": "2026.11"},
    )  # fmt: skip


def _usage(rng: random.Random) -> Usage:
    prompt, completion = rng.randint(90, 4000), rng.randint(20, 600)
    return Usage(prompt_tokens=prompt, completion_tokens=completion, cached_tokens=64)


def _specials(now: float) -> list[Call]:
    """One with a picture and a tool, one that was refused, one recorded without its texts."""
    rich = _rich(now - 42)
    refused = msgspec.structs.replace(
        rich, key=_key(now - 50), at=now - 50, status=429, stream=False, target="openai/gpt-4o", usage=None,
        attempts=rich.attempts[:1], total_s=0.8, finish_reason="", answered_by="",
        response=b'{"error": {"message": "You exceeded your current quota"}}',
    )  # fmt: skip
    silent = msgspec.structs.replace(
        refused, key=_key(now - 55), at=now - 55, status=200, attempts=[], request=b"", response=b"",
        ttft_s=0.7, total_s=2.2,
    )  # fmt: skip
    return [rich, refused, silent]


def _rich(at: float) -> Call:
    messages = [
        {"role": "system", "content": "You read receipts. Amounts in EUR, dates as YYYY-MM-DD."},
        {"role": "user", "content": [
            {"type": "text", "text": "What did [name:51d0aa23] pay, and when? Card [card:77ab01ff]."},
            {"type": "image_url", "image_url": {"url": picture()}}]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function", "function": {
                "name": "lookup_order", "arguments": '{"customer": "[name:51d0aa23]", "limit": 3}'}}]},
        {"role": "tool", "tool_call_id": "c1", "content": '{"orders": [{"id": "9f31c07a", "total": 38.2}]}'},
    ]  # fmt: skip
    schema = {"type": "object", "properties": {"total": {"type": "number"}, "day": {"type": "string"}}}
    told = "38.20 EUR on 2026-11-21. It belongs to order **9f31c07a**."
    events = [{"choices": [{"delta": {"content": piece}}]} for piece in (told[:20], told[20:])]
    first = Attempt(
        target="openai/gpt-4o", status=503, billed="no", started=at, ended=at + 0.8,
        error="upstream overloaded",
    )  # fmt: skip
    second = Attempt(
        target="anthropic/claude-sonnet-4-5", status=200, billed="yes", started=at + 0.8, ended=at + 4,
        form="messages",
    )  # fmt: skip
    return Call(
        key=_key(at), at=at, route="chat.completions", alias="receipts", status=200, stream=True,
        target="anthropic/claude-sonnet-4-5", attempts=[first, second], caller="us-3fa9",
        request=msgspec.json.encode({
            "model": "receipts", "messages": messages, "stream": True, "temperature": 0,
            "response_format": {"type": "json_schema", "json_schema": {"name": "receipt", "schema": schema}},
        }),
        response=b"".join(b"data: %s\n\n" % msgspec.json.encode(event) for event in events),
        ttft_s=1.31, total_s=4.0, finish_reason="stop", answered_by="claude-sonnet-4-5-20250929",
        task_id="ticket-48211", tags={"team": "care", "release": "2026.11"},
        usage=Usage(prompt_tokens=1840, completion_tokens=31, cached_tokens=1024),
    )  # fmt: skip


def _key(at: float) -> str:
    return f"{int(at * 1000):012x}70008{new_key()[-15:]}"


def _price(call: Call) -> Cost | None:
    if call.usage is None:
        return None
    rate = 0.2 if call.target.startswith("local/") else 6.0
    tokens = call.usage.prompt_tokens + 4 * call.usage.completion_tokens
    return Cost(rate * tokens / 1e6, "2026-09-01", "genai-prices 0.0.41")


def trials(store: Store, config: Config, now: float) -> None:
    """Every state an alias can be in: canary, shadow, replay, held, rolled back, promoted, never moved."""
    settings = config.rollout or Rollout()

    def start(alias: str, candidate: str, by: str, reason: str, **more: float) -> None:
        begin(
            store, alias, candidate, Order(by, reason), settings, initial=config.aliases[alias], **more  # type: ignore[arg-type]
        )  # fmt: skip

    def at_stage(alias: str, stage: str, share: float, reason: str, pairs: int, worse: int) -> None:
        route = store.route(alias)
        assert route is not None
        store.set_route(
            alias, route.model, expected_version=route.version, fallback=route.fallback,
            stage=stage, by="understudy", reason=reason, candidate=route.candidate, share=share,  # type: ignore[arg-type]
            origin=route.origin, deadline=route.deadline, evidence=route.evidence,
        )  # fmt: skip
        looked_at(store, alias, pairs, worse, now)

    start("assistant", "local/student", "ada", "gpt-4.1 retires in January", deadline=now + 40 * DAY_S)
    at_stage("assistant", "shadow", 0.0, "40 of 40 recorded calls replayed", 0, 0)
    at_stage("assistant", "canary", 0.05, "40 copies answered in the shadow", 0, 0)
    at_stage("assistant", "canary", 0.25, "20 tasks, no guard against it", 300, 7)
    start("summaries", "mistral/mistral-small-2603", "grace", "a third of the price")
    at_stage("summaries", "canary", 0.25, "100 tasks, no worse", 200, 3)
    abort(store, "summaries", Order("understudy", "errors: e-value 1,204, 1,000 rolls it back"))
    move(
        store, "triage", "local/triage-7b", by="edsger", reason="PASS on 412 held-out tickets",
        evidence="drill-triage/certificate.json sha256:9f2c4e01" + "7" * 56, initial=config.aliases["triage"],
    )  # fmt: skip
    start(
        "translate",
        "anthropic/claude-haiku-4-5",
        "ada",
        "o3 retires on 11 December",
        deadline=now + 9 * DAY_S,
    )
    at_stage("translate", "canary", 0.05, "40 copies answered in the shadow", 120, 6)
    pause(store, "translate", Order("understudy", "undecided after 30 days: 61 more tasks with an outcome"))
    start("receipts", "mistral/mistral-medium-3-5", "grace", "the vendor names no successor that fits")
    at_stage("receipts", "shadow", 0.0, "40 of 40 recorded calls replayed", 12, 0)
    start("search", "local/student", "ada", "to see whether a small one will do")


def looked_at(store: Store, alias: str, pairs: int, worse: int, now: float) -> None:
    """What whoever takes trials through their course saw last."""
    route, standing = store.route(alias), Standing(Rollout())
    assert route is not None
    standing.add_pairs(
        [Pair(n == 9, n == 50, False, float(n % (worse + 4) > 0), float(n % 7 > 1)) for n in range(pairs)]
    )
    seen = look_at(route, standing, Rollout())
    if alias in ("assistant", "translate"):
        trouble = "mistral/mistral-large-2512 answered 503: overloaded" if alias == "translate" else ""
        seen = msgspec.structs.replace(
            seen, judge="mistral/mistral-large-2512", judged=pairs // 3, judge_usd=pairs / 150,
            judge_usd_most=5.0, judge_trouble=trouble,
        )  # fmt: skip
    store.set_look(alias, now - 4, msgspec.json.encode(seen).decode())


def evaluations(folder: Path) -> None:
    """Three certificates, made as `understudy evaluate` makes them: passed, failed, undecided."""
    for name, alias, candidates, items in (
        ("drill", "assistant", {"local/student": 0.97, "openai/gpt-5-nano": 0.94}, 320),
        ("summaries", "summaries", {"mistral/mistral-small-2603": 0.55}, 160),
        ("translate", "translate", {"anthropic/claude-haiku-4-5": 0.9}, 20),
    ):
        asyncio.run(evaluate(folder / name, alias, candidates, items))
        _with_benchmarks(folder / name)


async def evaluate(folder: Path, alias: str, candidates: dict[str, float], items: int) -> None:
    """A certificate on ``items`` tickets of candidates that are right in such shares of them."""
    evidence = folder / certificates.EVIDENCE
    settings = configuration.Evaluate(margin=0.1)
    rng = random.Random(items)
    asked = [_exchange(rng, n, alias) for n in range(items)]
    for name, right in candidates.items():
        model = ScriptedModel(name, _answering(name, right))
        await prove(model, asked, settings, evidence=evidence, candidates=len(candidates))
    sheets = [
        ModelSheet(
            model=name, parameters=parameters, context_length=context, modalities=("text",), wall_s=60.0,
            memory_bytes=512 << 20 if parameters else None, usd_per_million_input=price,
            usd_per_million_output=4 * price, price_source="list price",
            samples=[Sample(prompt_tokens=300, completion_tokens=90, ttft_s=0.3, total_s=1.9)] * 20,
        )
        for name, parameters, context, price in (
            ("openai/gpt-4.1", None, 1_047_576, 2.0), ("local/student", 101_000_000, 8192, 0.03),
            *((name, None, 200_000, 0.4) for name in candidates if name != "local/student"),
        )
    ]  # fmt: skip
    write_performance(evidence, sheets)
    certificates.write_question(
        folder,
        certificates.Question(
            alias=alias, incumbent="openai/gpt-4.1", candidates=list(candidates), created=1.7956e9,
            retires="2027-01-14", reason="openai deprecations page, read 2026-11-20",
        ),
    )  # fmt: skip
    write(folder)


def _with_benchmarks(folder: Path) -> None:
    """Figures of two public benchmarks, which take minutes to measure; with them it verifies no more."""
    path = folder / certificates.CERTIFICATE
    made = msgspec.json.decode(path.read_bytes(), type=certificates.Certificate)

    def measured(model: certificates.Model, shift: float) -> certificates.Model:
        results = {
            suite: certificates.BenchmarkResult(
                accuracy=Accuracy(
                    suite=suite, model=model.name, items=400, population=10_042, accuracy=right - shift,
                    stderr=0.023, seed=1, metric="acc_norm", complete=True, few=False,
                )
            )
            for suite, right in (("hellaswag", 0.712), ("mmlu", 0.634))
        }  # fmt: skip
        return msgspec.structs.replace(model, benchmarks=results)

    made = msgspec.structs.replace(
        made,
        incumbent=measured(made.incumbent, 0.0),
        candidates=[
            msgspec.structs.replace(c, model=measured(c.model, 0.04 * n + 0.03))
            for n, c in enumerate(made.candidates)
        ],
    )
    path.write_bytes(certificates.encode(made))


def _exchange(rng: random.Random, number: int, alias: str) -> Exchange:
    right = ("refund", "replace", "escalate")[number % 3]
    task = ("complaints", "returns", "orders")[number % 3]
    text = f"Ticket {48_000 + number}: {QUESTIONS[number % len(QUESTIONS)]} Answer with one word."
    said = right if rng.random() < 0.95 else "wait"
    return Exchange(
        key=f"key{number:04}", at=1.79e9 + number * 900, alias=alias, target="openai/gpt-4.1",
        request={"messages": [{"role": "user", "content": text}]},
        body={"choices": [{"message": {"role": "assistant", "content": said}}]},
        answer=said, expected=right, grades={}, task_id="", tags={"task": task}, prompt_hash=f"h{number}",
        usage=Usage(prompt_tokens=310, completion_tokens=4), status=200, total_s=1.4, ttft_s=0.5,
    )  # fmt: skip


def _answering(name: str, share: float) -> Callable[[Mapping[str, Any]], str]:
    def answer(request: Mapping[str, Any]) -> str:
        text = str(request["messages"][-1]["content"])
        number = int(text.split(":")[0].split()[1])
        right = ("refund", "replace", "escalate")[(number - 48_000) % 3]
        return (
            right if random.Random(f"{name}{number}").random() < share else "I would first ask a colleague."
        )

    return answer


def own_models(folder: Path) -> None:
    """Two reports as `understudy own` leaves them, and one that is none."""
    for name, kept, steps in (("drill/own", 0.75, 160), ("student-60m", 0.45, 90)):
        report = _report(name, kept, steps)
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "report.json").write_bytes(msgspec.json.encode(report))
    (folder / "half-written").mkdir(exist_ok=True)
    (folder / "half-written" / "report.json").write_text('{"teacher": "Smol')


def _report(name: str, kept: float, steps: int) -> dict[str, object]:
    def fidelity(kl: float, perplexity: float) -> dict[str, float]:
        return {
            "tokens": 9_180, "documents": 64, "kl": kl, "kl_se": kl / 40, "agreement": 0.9 - kl / 4,
            "agreement_se": 0.004, "teacher_perplexity": 7.41, "student_perplexity": perplexity,
            "student_perplexity_se": 0.21,
        }  # fmt: skip

    rng = random.Random(steps)
    end = 0.42 / kept
    curve = [end + 2.2 * (1.0 - n / steps) ** 3 + rng.gauss(0.0, 0.05) for n in range(steps)]
    points = [{"step": n, "tokens": n * 2048, "loss": kl + 1.1, "kl": kl} for n, kl in enumerate(curve)]
    checks = [
        {"step": n, "tokens": n * 2048, "kl": curve[n] + 0.06, "answer_kl": 0.7 * curve[n] + 0.04}
        for n in range(0, steps, 16)
    ]
    return {
        "understudy": "0.1", "teacher": "SmolLM2-135M-Instruct", "parameters_before": 134_515_008,
        "parameters_after": int(134_515_008 * kept), "plan": {"layers": []}, "calibration_tokens": 50_176,
        "training_tokens": steps * 2048, "stopped": "early", "seed": 7, "before": fidelity(2.61, 68.2),
        "after": fidelity(end, 9.25 / kept), "points": points, "checks": checks,
        "seconds": {"calibrate": 41.0, "prune": 30.2, "heal": 1240.0, "export": 3.1},
        "checkpoint": f"{name}/checkpoint",
        "lineage": [
            "SmolLM2-135M-Instruct (Apache-2.0), sha256 5af571cb", "calibrated on 50,176 tokens of assistant",
            "FFN 1,536 → 1,152, heads 9 → 6, 30 → 28 layers; writers refitted",
            f"healed on {steps * 2048:,} tokens, forward KL at T=1", "exported as F16 and Q8_0",
        ],
    }  # fmt: skip


if __name__ == "__main__":
    build(Path(sys.argv[1]))
