"""Watch and plan: severities, exclusions, sums and ranks, counted by hand."""

from __future__ import annotations

import datetime as dt
import math
import random
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from understudy.catalog.bindings import Binding, answering, bindings_of
from understudy.catalog.facts import Catalog, ModelFacts, load_catalog
from understudy.catalog.plan import Latency, Plan, Reason, TokenRatio, make_plan
from understudy.catalog.prices import Rates, Sums, Tier, charge, rates_at, sums_of
from understudy.catalog.purpose import purpose_of
from understudy.catalog.tokens import Counted, token_ratio
from understudy.catalog.watch import severity, watch
from understudy.catalog.workload import Workload
from understudy.config import parse
from understudy.errors import InputError
from understudy.protocol import CallShape, Usage

NOW = dt.datetime(2026, 6, 1, 12, tzinfo=dt.UTC).timestamp()
DAY = 86_400.0


class Led(NamedTuple):
    """A route as far as bindings look at it."""

    model: str
    fallback: tuple[str, ...]
    candidate: str = ""


OVERLAY = """
models:
  v/old: {context_window: 8000, output_limit: 1000, inputs: [text], features: [tools], retires: 2026-06-21,
          prices: {input: 10.0, output: 30.0}, successor: v/new}
  v/new: {context_window: 8000, output_limit: 1000, inputs: [text], features: [tools],
          prices: {input: 1.0, output: 3.0}}
  w/cheap: {context_window: 10400, output_limit: 1300, inputs: [text, image], features: [tools, json_schema],
            prices: {input: 0.1, output: 0.3}}
  w/dear: {context_window: 9000, inputs: [text], features: [tools], prices: {input: 1.0, output: 3.0}}
  w/small: {context_window: 1000, inputs: [text], features: [tools], prices: {input: 0.1, output: 0.3}}
  w/mute: {context_window: 8000, inputs: [text], features: [], prices: {input: 0.1, output: 0.3}}
  w/dying: {context_window: 99000, inputs: [text], features: [tools], retires: 2026-09-01,
            prices: {input: 0.01, output: 0.03}}
  w/gone: {context_window: 99000, inputs: [text], features: [tools], retires: 2026-05-01,
           prices: {input: 0.01, output: 0.03}}
  w/unpriced: {context_window: 99000, inputs: [text], features: [tools]}
  w/unknown: {prices: {input: 1.0, output: 1.0}}
  x/announced: {deprecated: 2026-05-01}
"""


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    path = tmp_path / "facts.yaml"
    path.write_text(OVERLAY)
    return load_catalog(path)


def shape(prompt: int = 100, answer: int = 10, *features: str, **fields: object) -> CallShape:
    base = CallShape(
        at=NOW - 10 * DAY,
        usage=Usage(prompt_tokens=prompt, completion_tokens=answer),
        modalities=frozenset({"text"}),
        features=frozenset(features),
        max_tokens=0,
        task="",
        completed=None,
    )
    return msgspec.structs.replace(base, **fields)


@pytest.mark.parametrize(
    ("days", "word"),
    [
        (-5, "retired"),
        (0, "retired"),
        (1, "critical"),
        (30, "critical"),
        (31, "high"),
        (90, "high"),
        (91, "medium"),
        (180, "medium"),
        (181, "low"),
        (None, "announced"),
    ],
)
def test_severity(days: int | None, word: str) -> None:
    assert severity(days) == word


BOUND = """
[endpoints.v]
base_url = "http://127.0.0.1:1/v1"
[endpoints.w]
base_url = "http://127.0.0.1:2/v1"
[endpoints.local]
base_url = "http://127.0.0.1:8091/v1"
[aliases.assistant]
model = "v/old"
fallback = ["w/cheap"]
weights = {"v/old" = 0.9, "v/new" = 0.1}
[aliases.moved]
model = "v/left"
weights = {"v/forgotten" = 1.0}
[evaluate]
judge = "w/judge"
[drill]
candidates = ["w/understudy"]
[own]
teacher = "HuggingFaceTB/SmolLM2-135M-Instruct"
[serve]
models = {student = "own/student.gguf"}
"""


def test_bindings_are_found_at_every_level(tmp_path: Path) -> None:
    config = parse(BOUND, "understudy.toml", tmp_path)
    routes = {"moved": Led("v/now", ("v/then",), "v/tried")}
    requested = [("assistant", "v/old"), ("gpt-4o", "openai/gpt-4o"), ("gpt-4o", "openai/gpt-4o")]
    assert bindings_of(config, routes, requested) == [
        Binding("assistant", "v/old", "alias"),
        Binding("assistant", "v/new", "weight"),
        Binding("assistant", "w/cheap", "fallback"),
        Binding("moved", "v/now", "alias"),
        Binding("moved", "v/then", "fallback"),
        Binding("moved", "v/tried", "trial"),
        Binding("drill", "w/understudy", "candidate"),
        Binding("evaluate", "w/judge", "judge"),
        Binding("own", "HuggingFaceTB/SmolLM2-135M-Instruct", "teacher"),
        Binding("serve", "local/student", "served", kept=True),
        Binding("gpt-4o", "openai/gpt-4o", "requested"),
    ]


@pytest.mark.parametrize("teacher", ["package:nowhere/teacher.gguf", "teacher"])
def test_a_teacher_that_is_a_file_of_yours_is_kept(tmp_path: Path, teacher: str) -> None:
    (tmp_path / "teacher").mkdir()
    serving = BOUND.replace("HuggingFaceTB/SmolLM2-135M-Instruct", teacher).replace("8091", "8092")
    bound = bindings_of(parse(serving, "understudy.toml", tmp_path), {}, [])
    assert [b for b in bound if b.kept] == [
        Binding("own", teacher, "teacher", kept=True),
        Binding("serve", "serve/student", "served", kept=True),  # no endpoint reaches it
    ]


class Told(NamedTuple):
    target: str
    answered_by: str
    last_at: float
    calls: int = 1
    first_at: float = 0.0


def test_the_dated_id_that_answers_now_is_bound_where_it_is_a_model_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "facts.yaml"
    path.write_text(
        "models:\n  v/big: {retires: 2030-01-01}\n  v/big-2024-08-06: {retires: 2027-01-01}\n"
        "  v/big-2023-01-01: {retires: 2026-01-01}\n"
    )
    catalog = load_catalog(path)
    bound = [Binding("assistant", "v/big", "alias"), Binding("other", "v/big", "fallback")]
    answers = [
        Told("v/big", "big-2023-01-01", 1.0),
        Told("v/big", "big-2024-08-06", 2.0),
        Told("v/unbound", "big-2024-08-06", 3.0),
    ]
    behind = answering(catalog, bound, answers)
    assert behind == [Binding("v/big", "v/big-2024-08-06", "answering")]
    ends = watch(catalog, [*bound, *behind], {}, NOW)
    assert [(e.target, str(e.retires)) for e in ends] == [
        ("v/big-2024-08-06", "2027-01-01"),
        ("v/big", "2030-01-01"),
    ]
    # a date that nobody tells apart from its family, and a file's name, are no other model
    for name in ("big-2025-05-05", "models/own.gguf", "big"):
        assert answering(catalog, bound, [Told("v/big", name, 1.0)]) == []


def test_watch_tells_days_exposure_and_successor(catalog: Catalog) -> None:
    bound = [
        Binding("assistant", "v/old", "alias"),
        Binding("other", "v/old", "fallback"),
        Binding("b", "x/announced", "alias"),
        Binding("c", "w/gone", "alias"),
        Binding("d", "v/new", "alias"),
    ]
    shapes = {"v/old": [shape(1000, 100, task=f"t{n % 4}") for n in range(20)]}
    gone, old, announced = watch(catalog, bound, shapes, NOW)
    assert [e.severity for e in (gone, old, announced)] == ["retired", "critical", "announced"]
    assert (old.days_left, old.successor, len(old.bindings)) == (20, "v/new", 2)
    months = 10 / 30.44
    assert old.calls_per_month == pytest.approx(20 / months)
    assert old.tokens_per_month == pytest.approx(22_000 / months)
    assert old.tasks_per_month == pytest.approx(4 / months)
    assert old.usd_per_month == pytest.approx(20 * (1000 * 10 + 100 * 30) / 1e6 / months)
    assert (gone.days_left, gone.calls, announced.days_left) == (-31, 0, None)


def test_watch_shows_what_other_sources_say(catalog: Catalog) -> None:
    disputed = next(m for m in catalog if m.retires and m.retires.disputed)
    exposure = watch(catalog, [Binding("a", disputed.id, "alias")], {}, NOW)[0]
    assert exposure.disputed
    assert str(exposure.retires) not in " ".join(exposure.disputed)


def test_a_burst_is_scaled_as_a_day_not_as_a_minute() -> None:
    assert Workload([shape(at=NOW - 60)], NOW).window_s == DAY
    assert Workload([], NOW).window_s == DAY


def test_hard_misfits_are_excluded_with_reason_and_count(catalog: Catalog) -> None:
    shapes = [
        *[shape(100, 10) for _ in range(6)],
        *[shape(100, 10, "tools") for _ in range(2)],
        shape(900, 200, "tools"),  # 1,100 tokens, 1,430 with a foreign tokenizer
        shape(6000, 10),
    ]
    made = make_plan(catalog, "v/old", shapes, ["v/new", "w/cheap", "w/small", "w/mute", "w/gone"], now=NOW)
    assert [c.model for c in made.candidates] == ["v/new", "w/cheap"]  # the named successor first
    excluded = {c.model: c for c in made.excluded}
    assert excluded["w/small"].misfits == {"context": 2}
    assert excluded["w/small"].fitting == 8
    assert excluded["w/mute"].misfits == {"tools": 3}
    assert excluded["w/gone"].share == 1.0  # it would fit, but it is gone
    assert excluded["w/gone"].days_left == -31
    assert made.excluded[-1].model == "w/gone"
    assert made.reasons == (Reason("context", 1, 2), Reason("retired", 1, 0), Reason("tools", 1, 3))


def test_image_and_schema_and_output_limits_are_counted(catalog: Catalog) -> None:
    shapes = [
        shape(modalities=frozenset({"text", "image"})),
        shape(100, 10, "json_schema"),
        shape(100, 900),
        shape(100, 10, max_tokens=1001),
        shape(),
    ]
    new, cheap = (make_plan(catalog, "x/nobody", shapes, [c], now=NOW) for c in ("v/new", "w/cheap"))
    # 900 tokens may be 1,170 with another tokenizer; the limit asked for is sent as it is
    assert new.excluded[0].misfits == {"image": 1, "json_schema": 1, "output": 2}
    assert (new.excluded[0].fitting, new.excluded[0].share) == (1, 0.2)
    assert cheap.candidates[0].misfits == {}


def test_a_call_that_breaks_for_two_reasons_is_one_call(catalog: Catalog) -> None:
    shapes = [shape(20_000, 5_000), shape(20_000, 10), shape(100, 5_000), shape()]
    candidate = make_plan(catalog, "x/nobody", shapes, ["v/new"], now=NOW).excluded[0]
    assert candidate.misfits == {"context": 2, "output": 2}
    assert candidate.fitting == 1


def test_tolerance_keeps_a_candidate_that_breaks_few(catalog: Catalog) -> None:
    shapes = [shape(6000, 10), *[shape() for _ in range(99)]]
    assert not make_plan(catalog, "v/old", shapes, ["w/small"], now=NOW).candidates
    assert make_plan(catalog, "v/old", shapes, ["w/small"], now=NOW, tolerance=0.01).candidates


def test_ranking_prefers_living_models_then_the_cheaper_and_unpriced_last(catalog: Catalog) -> None:
    made = make_plan(catalog, "v/old", [shape()], ["w/dying", "w/dear", "w/cheap", "w/unpriced"], now=NOW)
    assert [c.model for c in made.candidates] == ["w/cheap", "w/dear", "w/unpriced", "w/dying"]
    assert made.candidates[2].usd_per_month is None
    assert made.candidates[3].days_left == 92


def test_ranking_puts_equals_before_the_uncompared_and_these_before_the_weaker(tmp_path: Path) -> None:
    path = tmp_path / "facts.yaml"
    path.write_text("""
models:
  v/old: {context_window: 9000, prices: {input: 9, output: 9}, scores: {MMLU: 80}, parameters: 100000000000}
  w/equal: {context_window: 9000, prices: {input: 4, output: 4}, scores: {MMLU: 77}, parameters: 1000000000}
  w/half: {context_window: 9000, prices: {input: 3, output: 3}, parameters: 50000000000}
  w/unknown: {context_window: 9000, prices: {input: 2, output: 2}}
  w/weaker: {context_window: 9000, prices: {input: 1, output: 1}, scores: {MMLU: 76.9}}
  w/tiny: {context_window: 9000, prices: {input: 0.5, output: 0.5}, parameters: 49999999999}
""")
    named = ["w/tiny", "w/weaker", "w/unknown", "w/half", "w/equal"]
    made = make_plan(load_catalog(path), "v/old", [shape()], named, now=NOW)
    assert [(c.model, c.peer) for c in made.candidates] == [
        ("w/half", True),
        ("w/equal", True),
        ("w/unknown", None),
        ("w/tiny", False),
        ("w/weaker", False),
    ]
    assert made.candidates[1].strength == "MMLU 77 against 80"
    assert made.candidates[3].strength == "50B parameters against 100B"


@pytest.mark.parametrize(
    ("model", "purpose"),
    [
        ("groq/meta-llama/llama-prompt-guard-2-22m", "classifying"),
        ("groq/openai/gpt-oss-safeguard-20b", "classifying"),
        ("openai/text-moderation-latest", "classifying"),
        ("openai/text-embedding-3-small", "embeddings"),
        ("mistral/mistral-embed", "embeddings"),
        ("cohere/rerank-english-v2.0", "reranking"),
        ("openai/tts-1-hd", "speech"),
        ("openai/gpt-4o-transcribe", "speech"),
        ("openai/gpt-realtime-mini", "voice"),
        ("openai/gpt-image-1.5", "images"),
        ("openai/dall-e-3", "images"),
        ("openai/sora-2", "video"),
        ("openai/o3-deep-research", "research that takes minutes"),
        ("openai/gpt-4o-mini-search-preview", "searching the web"),
        ("openai/gpt-4.1", "chat"),
        ("openai/gpt-5.3-codex", "chat"),
        ("anthropic/claude-haiku-4-5", "chat"),
        ("groq/openai/gpt-oss-120b", "chat"),
        ("mistral/codestral-2508", "chat"),
    ],
)
def test_the_words_of_an_id_tell_what_a_model_is_for(model: str, purpose: str) -> None:
    assert purpose_of(ModelFacts(id=model)) == purpose


def test_a_model_of_another_trade_is_excluded_however_cheap(tmp_path: Path) -> None:
    path = tmp_path / "facts.yaml"
    path.write_text("""
models:
  w/guard-1: {context_window: 9000, prices: {input: 0.01, output: 0.01}}
  w/guard-2: {context_window: 9000, prices: {input: 0.01, output: 0.01}, purpose: chat}
  w/audio: {context_window: 9000, prices: {input: 0.01, output: 0.01}, inputs: [text, audio]}
""")
    heard = shape(modalities=frozenset({"text", "audio"}))
    named = ["w/guard-1", "w/guard-2", "w/audio"]
    made = make_plan(load_catalog(path), "v/old", [shape(), heard], named, now=NOW)
    assert [c.model for c in made.candidates] == ["w/guard-2"]
    assert {c.model: c.misfits for c in made.excluded} == {
        "w/guard-1": {"made for classifying": 2},
        "w/audio": {"made for voice": 1},
    }


def test_every_model_not_weighed_is_counted_with_its_reason(catalog: Catalog) -> None:
    made = make_plan(catalog, "v/old", [shape()], None, now=NOW)
    weighed = len(made.candidates) + len(made.excluded)
    assert sum(made.passed_over.values()) + weighed + 1 == len(catalog)  # and the incumbent itself
    assert made.passed_over["made for embeddings"] > 5
    assert not [c.model for c in made.candidates if purpose_of(ModelFacts(id=c.model)) != "chat"]


def test_what_nobody_says_is_unverified_not_a_misfit(catalog: Catalog) -> None:
    shapes = [shape(100, 10, "tools", "logprobs", "stream", modalities=frozenset({"text", "image"}))]
    unknown = make_plan(catalog, "v/old", shapes, ["w/unknown"], now=NOW).candidates[0]
    assert unknown.unverified == ("image", "logprobs", "tools", "context")
    assert make_plan(catalog, "v/old", shapes, ["own/student"], now=NOW).candidates[0].share == 1.0


def test_costs_per_month_call_and_completed_task(catalog: Catalog) -> None:
    shapes = [
        shape(1000, 100, task="a", completed=True),
        shape(1000, 100, task="a", completed=True),
        shape(1000, 100, task="b", completed=False),
        shape(1000, 100, completed=True),
    ]
    made = make_plan(catalog, "v/old", shapes, ["v/new"], now=NOW)
    new = made.candidates[0]
    usd = 4 * (1000 * 1 + 100 * 3) / 1e6
    assert made.completed_tasks == 2
    assert new.usd_per_call == pytest.approx(usd / 4)
    assert new.usd_per_task == pytest.approx(usd / 2)
    assert new.usd_per_month == pytest.approx(usd / (10 / 30.44))
    assert new.usd_per_million_tokens == pytest.approx(usd / 4400 * 1e6)
    assert made.incumbent.usd_per_call == pytest.approx(10 * usd / 4)


def test_a_workload_costs_what_its_calls_cost_one_by_one() -> None:
    catalog = load_catalog()
    rng = random.Random(1)
    shapes = [
        shape(
            usage=Usage(
                prompt_tokens=(prompt := rng.choice([10, 99_999, 100_000, 100_001, 300_000])),
                completion_tokens=rng.randint(0, 4000),
                cached_tokens=rng.randint(0, prompt),
            )
        )
        for _ in range(300)
    ]
    load = Workload(shapes, NOW)
    for model in (
        "anthropic/claude-haiku-5-5",
        "openai/gpt-6-sol",
        "google/gemini-2.5-pro",
        "openai/gpt-4.1",
    ):
        rates = rates_at(catalog, model, dt.datetime(2026, 11, 20, tzinfo=dt.UTC).timestamp())
        assert rates
        assert load.usd(rates) == pytest.approx(sum(charge(rates, s.usage) for s in shapes), rel=1e-12)


def _of_every_kind(rng: random.Random) -> Usage:
    prompt, said = rng.choice([0, 10, 7_000, 9_001, 200_001]), rng.randint(0, 1_500)
    heard, spoken = rng.choice([(0, 0), (rng.randint(0, prompt), rng.randint(0, said))])
    written = rng.choice([0, prompt // 5])
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=said,
        cached_tokens=rng.choice([0, prompt // 3]),
        audio_tokens=heard + spoken,
        output_audio_tokens=spoken,
        reasoning_tokens=rng.choice([0, (said - spoken) // 2]),
        cache_write_tokens=written,
        cache_write_1h_tokens=written // 2,
    )


def test_tokens_of_every_price_are_summed_as_call_by_call_to_the_token() -> None:
    rng = random.Random(3)
    shapes = [
        shape(usage=_of_every_kind(rng), features=frozenset(rng.choice([(), ("stream",)])))
        for _ in range(400)
    ]
    load = Workload(shapes, NOW)
    prices = [name for name in Tier.__struct_fields__ if name != "above"]
    for name in prices:
        # a dollar a token of this price alone: what they cost is how many there are
        row = {other: 1e6 * (other == name) for other in prices}
        rates = Rates(tiers=(Tier(**row), Tier(above=9_000, **{k: 2 * v for k, v in row.items()})))
        assert load.usd(rates) == sum(charge(rates, s.usage) for s in shapes) > 0, name
        nothing = Rates(tiers=(Tier(**dict.fromkeys(row, 0.0)),))
        waiting = [s for s in shapes if "stream" in s.features]
        assert load.usd_batched(rates, nothing) == sum(charge(rates, s.usage) for s in waiting), name
    assert len(prices) == len(Sums._fields) == len(sums_of(Usage()))


def test_a_plan_counts_what_fits_as_call_by_call(catalog: Catalog) -> None:
    rng = random.Random(4)
    shapes = [
        shape(
            *(rng.choice([10, 700, 7_000, 11_000]), rng.choice([1, 300, 990, 1_200])),
            *rng.sample(["tools", "json_schema", "stream"], rng.randint(0, 2)),
            modalities=frozenset(rng.choice([["text"], ["text", "image"]])),
            max_tokens=rng.choice([0, 900, 1_200]),
        )
        for _ in range(300)
    ]
    made = make_plan(catalog, "v/old", shapes, ["v/new", "w/cheap", "w/dear", "w/small", "w/mute"], now=NOW)
    for candidate in (*made.candidates, *made.excluded):
        facts = catalog.find(candidate.model)
        assert facts
        assert candidate.fitting == sum(_takes(facts, s) for s in shapes), candidate.model


def _takes(facts: ModelFacts, call: CallShape) -> bool:
    """Whether a model of `OVERLAY` can answer a call, as the documentation says it."""
    bound, said = 1.0 if facts.vendor == "v" else 1.3, call.usage.completion_tokens
    assert facts.context_window
    assert facts.inputs
    assert facts.features
    return (
        call.usage.total_tokens * bound <= facts.context_window.value
        and (not facts.output_limit or max(said * bound, call.max_tokens) <= facts.output_limit.value)
        and call.modalities <= facts.inputs.value
        and call.features - {"stream"} <= facts.features.value
    )


def test_two_names_of_one_model_are_weighed_once(tmp_path: Path) -> None:
    path = tmp_path / "facts.yaml"
    terms = "{context_window: 8000, prices: {input: 1.0, output: 3.0}}"
    path.write_text(
        f"models:\n  v/big-4: {terms}\n  v/big-4-0: {terms}\n  v/big-10: {terms}\n  v/big-1: {terms}\n"
        "  v/big-5: {context_window: 8000, prices: {input: 1.0, output: 3.0}}\n"
        "  v/big-5.0: {context_window: 8000, prices: {input: 2.0, output: 3.0}}\n"
    )
    catalog = load_catalog(path)
    big = {"v/big-4", "v/big-4-0", "v/big-10", "v/big-1", "v/big-5", "v/big-5.0"}

    def shown(incumbent: str) -> tuple[set[str], Plan]:
        made = make_plan(catalog, incumbent, [shape()], None, now=NOW)
        return {c.model for c in made.candidates} & big, made

    models, made = shown("openai/gpt-4.1")
    assert models == big - {"v/big-4-0"}  # at another price it is told apart
    assert made.passed_over["another name of one that is weighed"] >= 1
    assert not {"mistral/mistral-large-4-0"} & {c.model for c in made.candidates}
    assert "mistral/mistral-large-4" in {c.model for c in made.candidates}
    models, made = shown("v/big-4-0")
    assert models == big - {"v/big-4", "v/big-4-0"}
    assert made.passed_over["the incumbent under another name"] == 1


def test_a_plan_survives_json_for_it_is_evidence(catalog: Catalog) -> None:
    made = make_plan(catalog, "v/old", [shape()], None, now=NOW)
    assert len(made.candidates) > 50
    assert msgspec.json.decode(msgspec.json.encode(made), type=Plan) == made
    assert not {"w/gone", "v/old", "openai/gpt-4.1-2025-04-14"} & {c.model for c in made.candidates}


def test_silence_on_a_feature_is_unverified_and_a_denial_a_misfit(catalog: Catalog) -> None:
    shapes = [shape(100, 10, "tools")]
    silent = next(
        m for m in catalog if m.features and "tools" not in m.features.value | _lacks(m) and m.context_window
    )
    denied = next(m for m in catalog if "tools" in _lacks(m) and m.context_window)
    made = make_plan(catalog, "x/nobody", shapes, [silent.id, denied.id], now=NOW)
    weighed = {c.model: c for c in (*made.candidates, *made.excluded)}
    assert ("tools" in weighed[silent.id].unverified, weighed[silent.id].misfits) == (True, {})
    assert (weighed[denied.id].unverified, weighed[denied.id].misfits) == ((), {"tools": 1})


def _lacks(facts: ModelFacts) -> frozenset[str]:
    return facts.lacks.value if facts.lacks else frozenset()


def test_the_months_band_is_that_of_the_days(catalog: Catalog) -> None:
    # ten days of 1, 2, 1, 2 … calls of 1,000 prompt tokens at $1 a million
    shapes = [shape(1000, 0, at=NOW - (10 - d) * DAY + 60) for d in range(10) for _ in range(1 + d % 2)]
    shapes[0] = msgspec.structs.replace(shapes[0], at=NOW - 10 * DAY)
    new = make_plan(catalog, "v/old", shapes, ["v/new"], now=NOW).candidates[0]
    middle, spread = 0.0015 * 30.44, math.sqrt(10 * 0.0005**2 / 9) * math.sqrt(30.44)
    assert new.usd_low == pytest.approx(middle - 1.2816 * spread)
    assert new.usd_high == pytest.approx(middle + 1.2816 * spread)
    few = make_plan(catalog, "v/old", [shape(at=NOW - 3 * DAY)], ["v/new"], now=NOW).candidates[0]
    assert (few.usd_low, few.usd_high) == (None, None)


def test_batch_and_caching_have_their_own_monthly_cost(catalog: Catalog) -> None:
    # claude-opus-5: $5 in, $25 out, reads $0.50; by batch half
    usage = Usage(prompt_tokens=1_000_000, cached_tokens=500_000)
    now = dt.datetime(2026, 11, 20, tzinfo=dt.UTC).timestamp()
    then = now - 10 * DAY
    shapes = [shape(usage=usage, at=then), shape(100, 10, "stream", usage=usage, at=then)]
    named = ["anthropic/claude-opus-5", "v/new"]
    made = make_plan(catalog, "v/old", shapes, named, now=now, tolerance=1.0)
    opus = next(c for c in made.candidates if c.model.endswith("opus-5"))
    month = 10 / 30.44
    assert opus.usd_per_month == pytest.approx(2 * 2.75 / month)
    assert opus.usd_per_month_uncached == pytest.approx(2 * 5.0 / month)
    assert opus.usd_per_month_batch == pytest.approx((2.75 + 2.75 / 2) / month)
    assert made.batchable == 0.5
    new = next(c for c in made.candidates if c.model == "v/new")
    assert new.usd_per_month_batch is None


def test_calls_in_minutes_beyond_the_rate_are_misfits(tmp_path: Path) -> None:
    path = tmp_path / "facts.yaml"
    path.write_text("models:\n  v/slow: {context_window: 9000, tokens_per_minute: 250}\n")
    shapes = [shape(100, 10), shape(100, 10), shape(100, 10), shape(100, 10, at=NOW)]
    made = make_plan(load_catalog(path), "x/nobody", shapes, ["v/slow"], now=NOW)
    assert made.excluded[0].misfits == {"rate": 3}
    assert (made.excluded[0].fitting, made.peak_tokens_per_minute) == (1, 330)


def test_parameter_changes_are_counted_and_those_already_made_are_not_told(catalog: Catalog) -> None:
    shapes = [shape(100, 10, "seed"), shape(100, 10, "seed", "n"), shape(max_tokens=50)]
    made = make_plan(
        catalog, "v/old", shapes, ["anthropic/claude-opus-4-5", "openai/o3"], now=NOW, tolerance=1.0
    )
    told = {c.model: {x.text: x.calls for x in c.changes} for c in (*made.candidates, *made.excluded)}
    assert told["anthropic/claude-opus-4-5"]["seed is ignored"] == 2
    assert told["anthropic/claude-opus-4-5"]["n must be 1: ask several times"] == 1
    renamed = [n for text, n in told["openai/o3"].items() if "max_completion_tokens" in text]
    assert renamed == [1]
    within = make_plan(
        catalog, "anthropic/claude-sonnet-4-5", shapes, ["anthropic/claude-opus-4-5"], now=NOW, tolerance=1.0
    )
    assert not [x for c in within.candidates for x in c.changes if "seed" in x.text]


def test_a_refused_temperature_meets_the_calls_that_send_one(catalog: Catalog) -> None:
    def told(*sent: frozenset[str] | None) -> dict[str, int]:
        shapes = [shape(parameters=parameters) for parameters in sent]
        named = ["openai/o3", "anthropic/claude-opus-4-5", "mistral/mistral-large-4"]
        made = make_plan(catalog, "v/old", shapes, named, now=NOW, tolerance=1.0)
        changes = [
            x for c in (*made.candidates, *made.excluded) for x in c.changes if "temperature" in x.text
        ]
        return {x.text.partition(" (")[0]: x.calls for x in changes} | {
            "untold": sum("2 of these calls do not tell" in x.text for x in changes)
        }

    hot, cool, plain, usual, top = (
        frozenset({"temperature", "temperature>1"}),
        frozenset({"temperature", "top_p"}),
        frozenset[str](),
        frozenset({"temperature=1"}),
        frozenset({"top_p"}),
    )
    refused = "temperature and top_p are refused unless they are the default"
    none_sent = "temperature, where you send none, has a default that differs from model to model"
    known = {refused: 3, "temperature above 1 is cut to 1": 1, none_sent: 2, "untold": 0}
    assert told(hot, cool, plain, usual, top) == known
    with_untold = {text: calls + 2 for text, calls in known.items()} | {"untold": 3}
    assert told(hot, cool, plain, usual, top, None, None) == with_untold
    assert told(usual, usual) == {"untold": 0}


def test_energy_is_ecologits_range_for_the_answers(catalog: Catalog) -> None:
    facts = catalog.find("anthropic/claude-opus-5")
    assert facts
    assert facts.energy
    made = make_plan(catalog, "v/old", [shape(100, 1_000_000)], [facts.id], now=NOW, tolerance=1.0)
    low, high = made.candidates[0].kwh_per_month or (0.0, 0.0)
    month = 10 / 30.44
    assert (low, high) == pytest.approx(tuple(e / month for e in facts.energy.value.kwh))
    assert 0 < low <= high


def test_lock_in_counts_calls_only_one_vendor_can_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "facts.yaml"
    path.write_text("""
models:
  v/all: {features: [tools, logprobs], inputs: [text, audio], context_window: 9000}
  w/some: {features: [tools], inputs: [text], context_window: 9000}
""")
    catalog = Catalog([m for m in load_catalog(path) if m.id in ("v/all", "w/some")], dt.date(2026, 6, 1))
    shapes = [shape(100, 10, "tools"), shape(100, 10, "tools", "logprobs"), shape(), shape(100, 10, "seed")]
    made = make_plan(catalog, "x/nobody", shapes, ["v/all"], now=NOW)
    assert (made.lock_in, made.locked_by) == (0.25, ("logprobs", "tools"))


def test_each_lead_is_told_once_and_ranking_follows_the_keys(catalog: Catalog) -> None:
    latencies = {"v/new": Latency(0.1, 0.5, 50.0, 9), "w/cheap": Latency(0.1, 2.0, 50.0, 9)}
    made = make_plan(
        catalog,
        "v/old",
        [shape()],
        ["v/new", "w/cheap", "w/unpriced"],
        now=NOW,
        rank=("latency",),
        latencies=latencies,
    )
    assert [c.model for c in made.candidates] == ["v/new", "w/cheap", "w/unpriced"]
    uses = {c.model: c.best_use for c in made.candidates}
    assert uses["w/cheap"].startswith("bulk work")
    assert uses["w/unpriced"].startswith("long documents")
    assert uses["v/new"].startswith("people waiting")


def test_a_candidates_own_tokenizer_is_counted_with(tmp_path: Path, catalog: Catalog) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    sent = [
        Counted({"messages": [{"role": "user", "content": "a " * 40}]}, 20),
        Counted({"messages": [{"role": "user", "content": "a " * 30}]}, 30),
        Counted({"messages": [{"role": "user", "content": "a"}]}, 3),  # too short to count
        Counted({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 500),
    ]
    ratio = token_ratio(tmp_path / "tokenizer.json", sent)
    assert ratio == TokenRatio(70 / 50, 2.0, 2)
    assert token_ratio(tmp_path / "tokenizer.json", sent[2:]) is None
    with pytest.raises(InputError, match=r"absent\.json"):
        token_ratio(tmp_path / "absent.json", sent)
    # 4,500 tokens may be 9,000 with it, more than the 8,000 it takes; the cost grows by the mean
    plain = make_plan(catalog, "x/nobody", [shape(4500, 0)], ["v/new"], now=NOW).candidates[0]
    made = make_plan(catalog, "x/nobody", [shape(4500, 0)], ["v/new"], now=NOW, ratios={"v/new": ratio})
    assert made.excluded[0].misfits == {"context": 1}
    assert plain.usd_per_call
    assert made.excluded[0].usd_per_call == pytest.approx(plain.usd_per_call * 1.4)
    assert made.excluded[0].tokens.startswith("counted with its tokenizer on 2 calls")


def test_a_bare_name_nobody_knows_is_refused(catalog: Catalog) -> None:
    with pytest.raises(InputError, match="gpt-4o-typo"):
        make_plan(catalog, "v/old", [shape()], ["gpt-4o-typo"], now=NOW)


def test_a_plan_without_calls_has_no_cost_per_call(catalog: Catalog) -> None:
    made = make_plan(catalog, "v/old", [], ["v/new"], now=NOW)
    assert made.candidates[0].usd_per_call is None
    assert made.candidates[0].share == 1.0
