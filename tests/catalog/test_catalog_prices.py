"""Prices: vendors' published list prices, worked by hand, and equality with genai-prices."""

from __future__ import annotations

import datetime as dt
import functools
import random
from pathlib import Path

import msgspec
import pytest
from genai_prices import Usage as TheirUsage
from genai_prices.data_snapshot import get_snapshot

from understudy.catalog.facts import load_catalog
from understudy.catalog.prices import Rates, Tier, charge, cost, priced_model, pricer, rates_at
from understudy.config import Endpoint
from understudy.protocol import Usage
from understudy.traffic.record import Call

snapshot = functools.cache(load_catalog)
NOON = dt.datetime(2026, 11, 20, 12, tzinfo=dt.UTC).timestamp()


def usd(model: str, usage: Usage, at: float = NOON, **context: str) -> float:
    found = cost(snapshot(), model, usage, at, context=context)
    assert found is not None
    return found.usd


M = 1_000_000
OPUS_5 = "platform.claude.com/docs/en/models/opus-5/overview, read 2026-11-23"
CLAUDE = "platform.claude.com/docs/en/docs/about-claude/pricing, read 2026-11-23"
REALTIME = "developers.openai.com/api/docs/models/gpt-4o-mini-realtime-preview.md, read 2026-11-23"


@pytest.mark.parametrize(
    ("source", "model", "usage", "context", "published"),
    [
        (OPUS_5, "anthropic/claude-opus-5", Usage(prompt_tokens=M), {}, 5.00),
        (OPUS_5, "anthropic/claude-opus-5", Usage(completion_tokens=M), {}, 25.00),
        (OPUS_5, "anthropic/claude-opus-5", Usage(prompt_tokens=M, cache_write_tokens=M), {}, 6.25),
        (OPUS_5, "anthropic/claude-opus-5", Usage(prompt_tokens=M, cached_tokens=M), {}, 0.50),
        (OPUS_5, "anthropic/claude-opus-5", Usage(prompt_tokens=M), {"processing": "batch"}, 2.50),
        (OPUS_5, "anthropic/claude-opus-5", Usage(completion_tokens=M), {"processing": "batch"}, 12.50),
        (CLAUDE, "anthropic/claude-opus-4-6", Usage(prompt_tokens=M, cache_write_tokens=M), {}, 6.25),
        (CLAUDE, "anthropic/claude-opus-4-1", Usage(prompt_tokens=100_000), {}, 1.50),
        (CLAUDE, "anthropic/claude-opus-4-1", Usage(completion_tokens=100_000), {}, 7.50),
        (CLAUDE, "anthropic/claude-haiku-4-5", Usage(prompt_tokens=M, cached_tokens=M), {}, 0.10),
        (CLAUDE, "anthropic/claude-haiku-4-5", Usage(completion_tokens=M), {}, 5.00),
        (REALTIME, "openai/gpt-4o-mini-realtime-preview", Usage(prompt_tokens=M), {}, 0.60),
        (REALTIME, "openai/gpt-4o-mini-realtime-preview", Usage(prompt_tokens=M, audio_tokens=M), {}, 10.00),
        (REALTIME, "openai/gpt-4o-mini-realtime-preview", Usage(completion_tokens=M), {}, 2.40),
        (
            REALTIME,
            "openai/gpt-4o-mini-realtime-preview",
            Usage(completion_tokens=M, audio_tokens=M, output_audio_tokens=M),
            {},
            20.00,
        ),
    ],
)
def test_every_kind_of_token_costs_what_the_vendors_page_says(
    source: str, model: str, usage: Usage, context: dict[str, str], published: float
) -> None:
    assert round(usd(model, usage, **context), 4) == published, source


def test_plain_tokens_cost_their_list_price() -> None:
    # gpt-4.1: $2 in, $8 out per million (OpenAI, API pricing)
    assert usd("openai/gpt-4.1", Usage(prompt_tokens=1000, completion_tokens=500)) == pytest.approx(0.006)


def test_cached_tokens_cost_a_quarter() -> None:
    # 10,000 prompt tokens, 8,000 of them cached at $0.50: 2,000 x $2 + 8,000 x $0.5 + 1,000 x $8
    usage = Usage(prompt_tokens=10_000, cached_tokens=8_000, completion_tokens=1_000)
    assert usd("openai/gpt-4.1", usage) == pytest.approx(0.004 + 0.004 + 0.008)


def test_cache_reads_and_writes_have_their_own_price() -> None:
    # claude-sonnet-4-5: $3 in, $15 out, reads $0.30, 5-minute writes $3.75 (Anthropic, pricing)
    usage = Usage(prompt_tokens=803, cached_tokens=380, completion_tokens=18)
    assert usd("anthropic/claude-sonnet-4-5", usage) == pytest.approx(0.001653)
    usage = Usage(prompt_tokens=10_000, cache_write_tokens=9_000, completion_tokens=100)
    assert usd("anthropic/claude-sonnet-4-5", usage) == pytest.approx(0.003 + 0.03375 + 0.0015)


def test_a_batch_costs_half() -> None:
    usage = Usage(prompt_tokens=1_000_000, completion_tokens=1_000_000)
    assert usd("anthropic/claude-opus-5", usage) == pytest.approx(30.0)
    assert usd("anthropic/claude-opus-5", usage, processing="batch") == pytest.approx(15.0)


def test_a_long_prompt_moves_the_whole_call_to_the_higher_tier() -> None:
    # claude-haiku-5-5: $0.10 / $0.50 up to 100k prompt tokens, $0.50 / $2.50 above (Anthropic, pricing)
    at, above = (Usage(prompt_tokens=n, completion_tokens=1000) for n in (100_000, 100_001))
    assert usd("anthropic/claude-haiku-5-5", at) == pytest.approx(0.0105)
    assert usd("anthropic/claude-haiku-5-5", above) == pytest.approx(0.0525005)


def test_reasoning_is_part_of_the_answer_and_paid_once() -> None:
    # o3 since 2025-06-10: $2 in, $8 out
    usage = Usage(prompt_tokens=1000, completion_tokens=1000, reasoning_tokens=900)
    assert usd("openai/o3", usage) == pytest.approx(0.010)


def test_the_price_in_force_on_the_day_counts() -> None:
    usage = Usage(prompt_tokens=1_000_000)
    before, after = (dt.datetime(2025, 6, d, tzinfo=dt.UTC).timestamp() for d in (9, 10))
    assert usd("openai/o3", usage, before) == pytest.approx(10.0)
    found = cost(snapshot(), "openai/o3", usage, after)
    assert found
    assert (found.usd, found.price_date) == (pytest.approx(2.0), "2025-06-10")


def test_audio_has_a_price_of_its_own() -> None:
    # gpt-audio: text $2.50 / $10, audio $32 / $64
    usage = Usage(prompt_tokens=1000, completion_tokens=500, audio_tokens=1200, output_audio_tokens=400)
    assert usd("openai/gpt-audio", usage) == pytest.approx((200 * 2.5 + 800 * 32 + 100 * 10 + 400 * 64) / 1e6)


def test_charges_equal_genai_prices_for_every_model_it_prices_by_token() -> None:
    rng = random.Random(5)
    catalog = snapshot()
    moment = dt.datetime.fromtimestamp(NOON, dt.UTC)
    compared = 0
    for provider in get_snapshot().providers:
        for model in provider.models if provider.id in ("openai", "anthropic", "google", "mistral") else ():
            rates = rates_at(catalog, f"{provider.id}/{model.id}", NOON)
            if (
                rates is None
                or "genai-prices" not in rates.source
                or provider.find_model(model.id) is not model
            ):
                continue
            prompt, said = rng.choice([500, 150_000, 600_000]), rng.randint(0, 9000)
            cached, written = rng.randint(0, prompt // 2), rng.randint(0, prompt // 4)
            theirs = model.get_prices(moment).calc_price(
                TheirUsage(
                    input_tokens=prompt,
                    cache_read_tokens=cached,
                    cache_write_tokens=written,
                    output_tokens=said,
                )
            )
            ours = Usage(
                prompt_tokens=prompt,
                cached_tokens=cached,
                cache_write_tokens=written,
                completion_tokens=said,
            )
            assert charge(rates, ours) == pytest.approx(float(theirs["total_price"]), rel=1e-9), model.id
            compared += 1
    assert compared > 150


def test_models_are_found_as_genai_prices_finds_them() -> None:
    providers = get_snapshot().providers
    ids = {"openai": "openai", "anthropic": "anthropic", "google": "google", "x-ai": "xai", "aws": "bedrock"}
    names = [m.model for m in snapshot()] + [f"{m.model}-20260101" for m in snapshot()] + ["", "GPT-4.1"]
    for provider in providers:
        for name in names if provider.id in ids else ():
            theirs = provider.find_model(name, all_providers=providers) if name else None
            assert priced_model(f"{ids[provider.id]}/{name}") is theirs, (provider.id, name)


def test_counts_that_contradict_each_other_never_cost_less_than_nothing() -> None:
    tier = Tier(
        input=1.0,
        output=1.0,
        cached=0.5,
        cached_audio=0.5,
        cache_write=1.0,
        cache_write_1h=1.0,
        input_audio=1.0,
        output_audio=1.0,
        reasoning=1.0,
    )
    usage = Usage(prompt_tokens=5, cached_tokens=50, completion_tokens=1, reasoning_tokens=9)
    assert charge(Rates(tiers=(tier,)), usage) == pytest.approx((50 * 0.5 + 9) / 1e6)


def test_the_overlay_sets_negotiated_and_self_hosted_prices(tmp_path: Path) -> None:
    path = tmp_path / "facts.yaml"
    path.write_text(
        """
        models:
          openai/gpt-4.1: {prices: {input: 1.0, output: 4.0, start: 2026-01-01}}
          local/student: {hosting: {usd_per_hour: 0.36, tokens_per_s: 100}}
        """
    )
    catalog = load_catalog(path)
    usage = Usage(prompt_tokens=1000, completion_tokens=1000)
    negotiated = cost(catalog, "openai/gpt-4.1", usage, NOON)
    assert negotiated
    assert negotiated.usd == pytest.approx(0.005)
    assert (negotiated.price_date, negotiated.source) == ("2026-01-01", "overlay facts.yaml")
    # 1,000 tokens take 10 s of a machine at $0.0001 a second
    student = cost(catalog, "local/student", usage, NOON)
    assert student
    assert student.usd == pytest.approx(0.001)
    before = dt.datetime(2025, 12, 31, tzinfo=dt.UTC).timestamp()
    assert (cost(catalog, "openai/gpt-4.1", usage, before) or negotiated).source != "overlay facts.yaml"


NEGOTIATED = """
models:
  a/b:
    prices:
      currency: EUR
      rate: 2.0
      input: 1.0
      output: 4.0
      cached: 0.1
      cache_write: 1.25
      cache_write_1h: 2.0
      input_audio: 8.0
      output_audio: 16.0
      tiers: [{above: 1000, input: 2.0, output: 6.0, cached: 0.2}]
      batch: {input: 0.5, output: 2.0}
"""
K = 1000


@pytest.mark.parametrize(
    ("usage", "batch", "euros"),
    [
        (Usage(prompt_tokens=K, completion_tokens=K), False, 1.0 + 4.0),
        (Usage(prompt_tokens=K, cached_tokens=K), False, 0.1),
        (
            Usage(prompt_tokens=K, cache_write_tokens=K, cache_write_1h_tokens=400),
            False,
            0.6 * 1.25 + 0.4 * 2,
        ),
        (Usage(prompt_tokens=K, completion_tokens=K, audio_tokens=2 * K, output_audio_tokens=K), False, 24.0),
        # sound out of a cache: nobody says that it costs less
        (Usage(prompt_tokens=K, audio_tokens=K, cached_tokens=K, cached_audio_tokens=K), False, 8.0),
        (Usage(prompt_tokens=2 * K, completion_tokens=K), False, 2 * 2.0 + 6.0),
        (Usage(prompt_tokens=2 * K, completion_tokens=K), True, 2 * 0.5 + 2.0),
    ],
)
def test_the_overlay_has_a_price_for_every_kind_of_token_tiers_and_batches(
    tmp_path: Path, usage: Usage, batch: bool, euros: float
) -> None:
    path = tmp_path / "facts.yaml"
    path.write_text(NEGOTIATED)
    context = {"processing": "batch"} if batch else {}
    found = cost(load_catalog(path), "a/b", usage, NOON, context=context)
    assert found
    assert found.usd == pytest.approx(2.0 * euros * K / 1e6)


def call(target: str, **tags: str) -> Call:
    return Call(
        key="0" * 32,
        at=NOON,
        route="chat.completions",
        alias="a",
        target=target,
        status=200,
        usage=Usage(prompt_tokens=1_000_000),
        tags=tags,
    )


def test_the_indexers_price_knows_the_vendor_by_its_url() -> None:
    endpoints = {
        "prod": Endpoint(base_url="https://api.openai.com/v1"),
        "openai": Endpoint(base_url="http://127.0.0.1:9/v1"),
    }
    price = pricer(snapshot(), endpoints)
    vendor = price(call("prod/gpt-4.1"))
    assert vendor
    assert vendor.usd == pytest.approx(2.0)
    assert price(call("openai/gpt-4.1")) is None  # our own machine, whatever it is called
    assert price(call("unheard/gpt-4.1")) is None
    batch = price(call("prod/gpt-4.1", processing="batch"))
    assert batch
    assert batch.usd == pytest.approx(1.0)


def test_the_service_tier_named_by_the_answer_selects_the_price() -> None:
    price = pricer(snapshot())
    plain = call("openai/o3")
    answers = {
        "default": b'{"service_tier": "default"}',
        "flex": b'data: {"x":1,"service_tier":"auto"}\n\ndata: {"service_tier":"flex"}\n\n',
        "said": rb'{"content": "\"service_tier\": \"flex\""}',
    }
    found = {
        name: price(msgspec.structs.replace(plain, response=response)) for name, response in answers.items()
    }
    usds = {name: cost.usd for name, cost in found.items() if cost}
    # o3: $2 a million, half by flex (developers.openai.com/api/docs/pricing)
    assert usds == {"default": pytest.approx(2.0), "flex": pytest.approx(1.0), "said": pytest.approx(2.0)}
    tagged = price(
        msgspec.structs.replace(call("openai/o3", service_tier="flex"), response=answers["default"])
    )
    assert tagged
    assert tagged.usd == pytest.approx(1.0)


def test_without_endpoints_an_endpoint_is_called_as_its_vendor() -> None:
    price = pricer(snapshot())
    found = price(call("openai/gpt-4.1"))
    assert found
    assert found.usd == pytest.approx(2.0)
    assert price(call("prod/gpt-4.1")) is None
    assert price(msgspec.structs.replace(call("openai/gpt-4.1"), usage=None)) is None


def test_a_model_only_the_snapshot_prices_is_charged_by_it(tmp_path: Path) -> None:
    catalog = snapshot()
    listed = next(
        m
        for m in catalog
        if m.prices and (r := rates_at(catalog, m.id, NOON)) and r.source.startswith("litellm")
    )
    assert listed.prices is not None
    price = cost(catalog, listed.id, Usage(prompt_tokens=1_000_000), NOON)
    assert price
    assert price.usd == pytest.approx(listed.prices.value[-1].input)
    assert "read 20" in price.source
