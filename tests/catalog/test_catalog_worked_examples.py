"""Cost equals what vendors work out, or publish the counts and the rates of, in their own documents.

Where a page states the result in dollars, that result is expected. Where it publishes a usage block and,
elsewhere, the rates, the sum is worked here by hand from both; the pages are named beside each example.
"""

from __future__ import annotations

import datetime as dt
import functools
from typing import Any

import pytest

from understudy.catalog.facts import load_catalog
from understudy.catalog.prices import Sums, charge, cost, rates_at, sums_of
from understudy.forms.anthropic import counts
from understudy.protocol import Usage, usage_of

snapshot = functools.cache(load_catalog)
NOON = dt.datetime(2026, 11, 20, 12, tzinfo=dt.UTC).timestamp()
CENT = 0.005

CLAUDE = "platform.claude.com/docs/en/about-claude/pricing, read 2026-11-25"
CACHING = "platform.claude.com/docs/en/build-with-claude/prompt-caching, read 2026-11-25"
REALTIME = "developers.openai.com/api/docs/guides/realtime-costs, read 2026-11-25"
REASONING = "developers.openai.com/api/docs/guides/reasoning, read 2026-11-25"
OPENAI = "developers.openai.com/api/docs/pricing, read 2026-11-23"
GEMINI = "ai.google.dev/gemini-api/docs/pricing, read 2026-11-23"


def usd(model: str, usage: Usage, times: int = 1, **context: str) -> float:
    found = cost(snapshot(), model, usage, NOON, context=context)
    assert found is not None
    return found.usd * times


@pytest.mark.parametrize(
    ("source", "usage", "published"),
    [
        # its section "Worked example", without the session's runtime: $0.705 − $0.08, $0.525 − $0.08
        (f"{CLAUDE}, input", Usage(prompt_tokens=50_000), 0.25),
        (f"{CLAUDE}, output", Usage(completion_tokens=15_000), 0.375),
        (CLAUDE, Usage(prompt_tokens=50_000, completion_tokens=15_000), 0.625),
        (f"{CLAUDE}, uncached", Usage(prompt_tokens=10_000), 0.05),
        (f"{CLAUDE}, cache reads", Usage(prompt_tokens=40_000, cached_tokens=40_000), 0.02),
        (CLAUDE, Usage(prompt_tokens=50_000, cached_tokens=40_000, completion_tokens=15_000), 0.445),
    ],
)
def test_anthropics_session_with_and_without_a_cache(source: str, usage: Usage, published: float) -> None:
    assert usd("anthropic/claude-opus-5", usage) == pytest.approx(published, abs=1e-9), source


def test_anthropics_ten_thousand_support_tickets() -> None:
    # "Average ~3,700 tokens per conversation … Claude Haiku 4.5 at $1/MTok … ~$37.00 per 10,000 tickets"
    found = usd("anthropic/claude-haiku-4-5", Usage(prompt_tokens=3_700), times=10_000)
    assert found == pytest.approx(37.00, abs=CENT), CLAUDE
    # "Batch API … 50% discount on both input and output tokens"
    batch = usd("anthropic/claude-haiku-4-5", Usage(prompt_tokens=3_700), times=10_000, processing="batch")
    assert batch == pytest.approx(18.50, abs=CENT), CLAUDE


MIXED_TTL: dict[str, Any] = {
    "input_tokens": 2048,
    "cache_read_input_tokens": 1800,
    "cache_creation_input_tokens": 248,
    "output_tokens": 503,
    "cache_creation": {"ephemeral_5m_input_tokens": 148, "ephemeral_1h_input_tokens": 100},
}
"""The usage that CACHING shows for a request that writes to both caches."""


@pytest.mark.parametrize(
    ("model", "rates"),  # USD a million: input, read, 5 minutes, 1 hour, output (CLAUDE, "Model pricing")
    [
        ("anthropic/claude-opus-5", (5.00, 0.50, 6.25, 10.00, 25.00)),
        ("anthropic/claude-opus-4-6", (5.00, 0.50, 6.25, 10.00, 25.00)),
        ("anthropic/claude-haiku-4-5", (1.00, 0.10, 1.25, 2.00, 5.00)),
        ("anthropic/claude-fable-5-1", (10.00, 0.25, 12.50, 20.00, 50.00)),
    ],
)
def test_writes_kept_for_an_hour_and_for_minutes_have_their_own_price(
    model: str, rates: tuple[float, ...]
) -> None:
    usage = usage_of({"usage": counts(MIXED_TTL).usage()})
    assert usage is not None
    assert (usage.cache_write_tokens, usage.cache_write_1h_tokens) == (248, 100)
    plain, read, minutes, hour, said = rates
    by_hand = (2048 * plain + 1800 * read + 148 * minutes + 100 * hour + 503 * said) / 1e6
    assert usd(model, usage) == pytest.approx(by_hand, abs=1e-12), CACHING


def test_litellms_words_for_anthropics_cache_are_read() -> None:
    usage = usage_of({"usage": {"prompt_tokens": 4096, "completion_tokens": 503, "prompt_tokens_details": {
        "cached_tokens": 1800, "cache_creation_tokens": 248,
        "cache_creation_token_details": {"ephemeral_1h_input_tokens": 100},
    }}})  # fmt: skip
    assert usage == usage_of({"usage": counts(MIXED_TTL).usage()})


@pytest.mark.parametrize(
    ("model", "rates"),  # text in, cached, out; sound in, cached, out (OPENAI, "Realtime and audio")
    [
        ("openai/gpt-realtime-2.1", (4.00, 0.40, 24.00, 32.00, 0.40, 64.00)),
        ("openai/gpt-realtime-mini", (0.60, 0.06, 2.40, 10.00, 0.30, 20.00)),
    ],
)
def test_openais_realtime_response(model: str, rates: tuple[float, ...]) -> None:
    # the usage block of REALTIME: 119 text (64 of them cached) and 13 sound in, 30 text and 91 sound out
    usage = Usage(
        prompt_tokens=132,
        completion_tokens=121,
        cached_tokens=64,
        audio_tokens=13 + 91,
        output_audio_tokens=91,
    )
    text, cached, said, heard, _, spoken = rates
    by_hand = (55 * text + 64 * cached + 13 * heard + 30 * said + 91 * spoken) / 1e6
    assert usd(model, usage) == pytest.approx(by_hand, abs=1e-12), (REALTIME, OPENAI)


def test_cached_sound_is_paid_once_and_at_its_own_price() -> None:
    # the usage block of community.openai.com/t/1060242: of 313 text and 476 sound, 256 and 384 were cached
    usage = usage_of({"usage": {"prompt_tokens": 789, "completion_tokens": 32, "prompt_tokens_details": {
        "audio_tokens": 476, "cached_tokens": 640,
        "cached_tokens_details": {"text_tokens": 256, "audio_tokens": 384},
    }, "completion_tokens_details": {"audio_tokens": 23}}})  # fmt: skip
    assert usage is not None
    assert sums_of(usage) == Sums(
        plain=57, cached=256, cached_audio=384, cache_write=0, cache_write_1h=0,
        heard=92, said=9, thought=0, spoken=23,
    )  # fmt: skip
    # gpt-realtime-mini: text $0.60, cached $0.06, out $2.40; sound $10, cached $0.30, out $20 (OPENAI)
    by_hand = (57 * 0.60 + 256 * 0.06 + 384 * 0.30 + 92 * 10 + 9 * 2.40 + 23 * 20) / 1e6
    assert usd("openai/gpt-realtime-mini", usage) == pytest.approx(by_hand, abs=1e-12), OPENAI
    million = Usage(prompt_tokens=10**6, cached_tokens=10**6, audio_tokens=10**6, cached_audio_tokens=10**6)
    assert usd("openai/gpt-realtime-mini", million) == pytest.approx(0.30, abs=CENT), OPENAI
    # gemini-2.5-flash: sound $1.00, out of a cache $0.10 (GEMINI)
    assert usd("google/gemini-2.5-flash", million) == pytest.approx(0.10, abs=CENT), GEMINI


def test_where_nobody_splits_the_cached_tokens_each_is_still_paid_once() -> None:
    # 1,000 prompt tokens of which 800 are sound and 900 came from a cache: at least 700 are both
    usage = Usage(prompt_tokens=1000, audio_tokens=800, cached_tokens=900)
    sums = sums_of(usage)
    assert (sums.plain, sums.cached, sums.cached_audio, sums.heard) == (0, 200, 700, 100)
    assert sum(sums) == 1000


@pytest.mark.parametrize("model", ["openai/o3", "openai/gpt-5"])
def test_openais_reasoning_usage_is_paid_as_output_once(model: str) -> None:
    # the usage block of REASONING: 75 in, 1,186 out, of which 1,024 reasoning
    usage = usage_of({"usage": {"prompt_tokens": 75, "completion_tokens": 1186,
                                "completion_tokens_details": {"reasoning_tokens": 1024}}})  # fmt: skip
    assert usage is not None
    paid = {"openai/o3": (2.00, 8.00), "openai/gpt-5": (1.25, 10.00)}[model]
    assert usd(model, usage) == pytest.approx((75 * paid[0] + 1186 * paid[1]) / 1e6, abs=1e-12), OPENAI


@pytest.mark.parametrize(
    ("prompt", "rates"), [(200_000, (1.25, 0.125, 10.00)), (200_001, (2.50, 0.25, 15.00))]
)
def test_googles_tiers_hold_for_the_whole_call(prompt: int, rates: tuple[float, float, float]) -> None:
    # gemini-2.5-pro, "prompts <= 200k tokens" and above; output "including thinking tokens" (GEMINI)
    usage = Usage(
        prompt_tokens=prompt, cached_tokens=100_000, completion_tokens=2_000, reasoning_tokens=1_500
    )
    plain, cached, said = rates
    by_hand = ((prompt - 100_000) * plain + 100_000 * cached + 2_000 * said) / 1e6
    assert usd("google/gemini-2.5-pro", usage) == pytest.approx(by_hand, abs=1e-9), GEMINI


def test_a_token_is_never_charged_twice_whatever_the_details_say() -> None:
    rates = rates_at(snapshot(), "openai/gpt-realtime-mini", NOON)
    assert rates is not None
    dearest = max(rates.tiers[0].row)
    for cached in range(0, 1001, 100):
        for sound in range(0, 1001, 100):
            usage = Usage(prompt_tokens=1000, cached_tokens=cached, audio_tokens=sound)
            assert sum(sums_of(usage)) == 1000
            assert charge(rates, usage) <= 1000 * dearest / 1e6
