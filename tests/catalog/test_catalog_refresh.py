"""The refresh: facts out of wheels, without installing them, into YAML that loads again."""

from __future__ import annotations

import datetime as dt
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import pytest

from understudy.catalog import facts, refresh
from understudy.catalog.facts import Batch, Claim, ListPrice, LongPrompts, load_catalog

LITELLM: dict[str, Any] = {
    "gpt-x": {
        "litellm_provider": "openai",
        "mode": "chat",
        "max_input_tokens": 1000,
        "max_output_tokens": 100,
        "input_cost_per_token": 2e-06,
        "output_cost_per_token": 8e-06,
        "cache_read_input_token_cost": 5e-07,
        "cache_creation_input_token_cost": 2.5e-06,
        "cache_creation_input_token_cost_above_1hr": 4e-06,
        "input_cost_per_audio_token": 3.2e-05,
        "input_cost_per_token_above_200k_tokens": 4e-06,
        "output_cost_per_token_above_200k_tokens": 1.2e-05,
        "input_cost_per_token_above_272k_tokens": 9e-06,
        "input_cost_per_token_batches": 1e-06,
        "output_cost_per_token_batches": 4e-06,
        "supports_vision": True,
        "supports_sampling_params": False,
        "supports_audio_output": True,
        "supports_function_calling": True,
        "deprecation_date": "2027-01-14",
        "successor_model": "openai/gpt-z",
    },
    "gemini/free-one": {
        "litellm_provider": "gemini",
        "mode": "chat",
        "input_cost_per_token": 0,
        "output_cost_per_token": 0,
        "deprecation_date": "date when it ends",
    },
    "dall-e": {"litellm_provider": "openai", "mode": "image_generation"},
    "ft:gpt-x": {"litellm_provider": "openai", "mode": "chat"},
    "song": {"litellm_provider": "openai", "mode": "chat", "supported_output_modalities": ["audio"]},
    "elsewhere": {"litellm_provider": "unheard_of", "mode": "chat"},
}
SUNSET = [
    {
        "provider": "OpenAI",
        "model_id": "gpt-x",
        "shutdown_date": "2027-02-01",
        "deprecation_date": "2026-06-01",
        "replacement_models": ["gpt-y"],
        "last_observed": "2026-09-24",
    }
]
RETIRE = {
    "models": [
        {
            "provider": "aws-bedrock",
            "id": "a: strange, id",
            "checked": "2026-10-16",
            "retires_on": "2026-12-01",
        }
    ]
}


def wheel(folder: Path, name: str, file: str, content: object) -> None:
    with zipfile.ZipFile(folder / f"{name}-1.2.3-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/{file}", msgspec.json.encode(content))


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    sources, out = tmp_path / "sources", tmp_path / "data"
    sources.mkdir()
    wheel(sources, "litellm", "model_prices_and_context_window_backup.json", LITELLM)
    wheel(sources, "llm_sunset", "snapshot.json", SUNSET)
    wheel(sources, "bydtech_model_retire", "models.json", RETIRE)
    refresh.main(sources, out, dt.date(2026, 11, 23))
    monkeypatch.setattr(facts, "DATA", out)
    return out


def test_facts_keep_their_source_and_the_day_it_checked(snapshot: Path) -> None:
    model = load_catalog().find("openai/gpt-x")
    assert model
    assert model.retires
    assert model.retires.value == dt.date(2027, 1, 14)
    assert model.retires.claims[1] == Claim(dt.date(2027, 2, 1), "llm-sunset", "2026-09-24")
    assert model.successor
    assert {c.value for c in model.successor.claims} == {"gpt-y", "gpt-z"}
    assert model.prices
    assert model.prices.value == (
        ListPrice(
            input=2.0,
            output=8.0,
            cached=0.5,
            cache_write=2.5,
            cache_write_1h=4.0,
            input_audio=32.0,
            # a tier of which only the input is told is no price
            tiers=(LongPrompts(above=200_000, input=4.0, output=12.0),),
            batch=Batch(input=1.0, output=4.0),
        ),
    )
    assert model.features
    assert model.features.value == {"tools", "batch", "fine_tuning"}  # for there is a price for ft:gpt-x
    assert model.lacks
    assert model.lacks.value == {"temperature"}
    assert model.outputs
    assert model.outputs.value == {"text", "audio"}
    assert model.inputs
    assert model.inputs.value == {"text", "image"}


def test_only_models_that_write_text_and_whose_vendor_we_know_are_kept(snapshot: Path) -> None:
    known = {m.id for m in load_catalog()}
    assert known == {"openai/gpt-x", "openai/ft:gpt-x", "google/free-one", "bedrock/a: strange, id"}


def test_zero_is_no_price_and_words_are_no_date(snapshot: Path) -> None:
    model = load_catalog().find("google/free-one")
    assert model
    assert (model.prices, model.retires) == (None, None)


def test_files_it_did_not_write_stay(snapshot: Path, tmp_path: Path) -> None:
    by_hand = "# kept by hand\nsources: {s: {what: w, licence: MIT, read: 2026-01-01}}\nmodels: {}\n"
    (snapshot / "qwen.yaml").write_text(by_hand)
    refresh.main(tmp_path / "sources", snapshot, dt.date(2026, 11, 24))
    assert (snapshot / "qwen.yaml").read_text() == by_hand
    assert "read: 2026-11-24" in (snapshot / "openai.yaml").read_text()


PROFILES = """
_PROFILES: dict[str, dict] = {
    "gpt-x": {
        "name": "X", "release_date": "2026-03", "open_weights": False,
        "max_input_tokens": 900, "max_output_tokens": 100,
        "text_outputs": True, "image_outputs": True, "image_inputs": True, "audio_inputs": False,
        "reasoning_output": False, "tool_calling": True, "structured_output": False, "temperature": False,
    },
    "only-corrects": {"image_inputs": True, "text_outputs": True},
    "paints": {"name": "P", "text_outputs": False},
}
"""


def test_models_dev_is_read_as_a_literal_and_denies_by_name(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "sources" / "langchain_openai-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("langchain_openai/data/_profiles.py", PROFILES)
    refresh.main(tmp_path / "sources", snapshot, dt.date(2026, 11, 24))
    catalog = load_catalog()
    model = catalog.find("openai/gpt-x")
    assert model
    assert model.released
    assert model.released.value == dt.date(2026, 3, 1)
    assert model.lacks
    assert model.lacks.value == {"json_schema", "reasoning", "temperature"}
    assert model.context_window
    assert (model.context_window.value, model.context_window.disputed) == (900, True)
    assert not catalog.find("openai/only-corrects")
    assert not catalog.find("openai/paints")


def test_a_price_that_moved_is_appended_with_the_day_it_was_read(snapshot: Path, tmp_path: Path) -> None:
    sources = tmp_path / "sources"
    refresh.main(sources, snapshot, dt.date(2026, 11, 30))
    dearer = {**LITELLM, "gpt-x": {**LITELLM["gpt-x"], "input_cost_per_token": 3e-06}}
    wheel(sources, "litellm", "model_prices_and_context_window_backup.json", dearer)
    refresh.main(sources, snapshot, dt.date(2026, 12, 1))
    refresh.main(sources, snapshot, dt.date(2026, 12, 2))
    told_more = {**dearer, "gpt-x": {**dearer["gpt-x"], "output_cost_per_audio_token": 6.4e-05}}
    wheel(sources, "litellm", "model_prices_and_context_window_backup.json", told_more)
    refresh.main(sources, snapshot, dt.date(2026, 12, 3))
    model = load_catalog().find("openai/gpt-x")
    assert model
    assert model.prices
    assert [(p.input, p.start) for p in model.prices.value] == [(2.0, None), (3.0, dt.date(2026, 12, 1))]
    assert model.prices.value[-1].output_audio == 64.0  # told in more detail: no new price
