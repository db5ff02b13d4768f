"""Facts: which claim is believed, what an overlay may say, what is found under which name."""

from __future__ import annotations

import datetime as dt
import functools
from pathlib import Path

import pytest
import yaml

from understudy.catalog import facts
from understudy.catalog.documents import COMPILED, compile_documents
from understudy.catalog.facts import DATA, Claim, ListPrice, choose, family_of, load_catalog
from understudy.errors import InputError

snapshot = functools.cache(load_catalog)


def overlay(folder: Path, text: str) -> Path:
    path = folder / "facts.yaml"
    path.write_text(text)
    return path


def test_the_claim_read_last_is_believed_and_all_are_kept() -> None:
    old, new = Claim(100, "a", "2026-01-01"), Claim(200, "b", "2026-02-01")
    fact = choose([old, new])
    assert (fact.value, fact.source, fact.disputed) == (200, "b", True)
    assert set(fact.claims) == {old, new}


def test_of_claims_read_on_one_day_the_cautious_one_is_believed() -> None:
    day = "2026-01-01"
    assert choose([Claim(200, "a", day), Claim(100, "b", day)]).value == 100
    early, late = dt.date(2026, 5, 1), dt.date(2026, 6, 1)
    assert choose([Claim(late, "a", day), Claim(early, "b", day)]).value == early
    cheap, dear = ((ListPrice(input=p, output=1.0),) for p in (1.0, 2.0))
    assert choose([Claim(cheap, "a", day), Claim(dear, "b", day)]).value == dear


def test_the_overlay_beats_a_newer_claim() -> None:
    fact = choose([Claim(1, "overlay mine.yaml", "2020-01-01"), Claim(2, "a", "2026-01-01")])
    assert (fact.value, fact.disputed) == (1, True)


def test_the_snapshot_loads_and_every_fact_has_a_source_and_a_day() -> None:
    catalog = snapshot()
    assert len(catalog) > 500
    for model in catalog:
        for name in ("context_window", "retires", "prices", "licence", "parameters"):
            fact = getattr(model, name)
            if fact is not None:
                assert fact.source
                assert dt.date.fromisoformat(fact.read) <= catalog.read


def test_sources_agree_on_at_least_98_percent_of_shared_retirement_dates() -> None:
    shared = [m.retires for m in snapshot() if m.retires and len({c.source for c in m.retires.claims}) > 1]
    assert len(shared) > 100
    assert sum(not fact.disputed for fact in shared) / len(shared) >= 0.98


def test_every_data_file_names_the_licence_and_day_of_each_source() -> None:
    for path in DATA.glob("*.yaml"):
        sources = yaml.load(path.read_bytes(), yaml.CSafeLoader)["sources"]
        assert all(s["licence"] and s["what"] and isinstance(s["read"], dt.date) for s in sources.values()), (
            path
        )


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("openai/gpt-4.1", "openai/gpt-4.1"),
        ("gpt-4.1", "openai/gpt-4.1"),
        ("prod-eu/gpt-4.1", "openai/gpt-4.1"),
        ("gpt-4.1-2025-04-14", "openai/gpt-4.1-2025-04-14"),
        ("gpt-4.1-2031-01-01", "openai/gpt-4.1"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "huggingface/SmolLM2-135M-Instruct"),
        ("nobody/knows", None),
        ("", None),
    ],
)
def test_models_are_found_by_the_ids_configs_use(name: str, found: str | None) -> None:
    model = snapshot().find(name)
    assert (model.id if model else None) == found


def test_a_family_is_the_id_without_its_date() -> None:
    names = ("gpt-4.1-2025-04-14", "claude-sonnet-4-20250514", "gpt-4-0613", "gpt-4.1", "qwen3-32b")
    assert [family_of(n) for n in names] == ["gpt-4.1", "claude-sonnet-4", "gpt-4", "gpt-4.1", "qwen3-32b"]


def test_an_undated_id_ends_with_its_newest_dated_form_and_a_fine_tuned_one_with_its_base() -> None:
    catalog = snapshot()
    heirs = [m for m in catalog if m.retires and ", of " in m.retires.source]
    assert heirs
    for heir in heirs:
        other = catalog.find(heir.retires.source.partition(", of ")[2] if heir.retires else "")
        assert heir.retires
        assert other
        assert other.retires
        assert heir.retires.value == other.retires.value
        assert family_of(other.id) == heir.id or f"ft:{other.model}" == heir.model


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("openai/ft:gpt-4.1-2025-04-14:acme::abc123", "openai/ft:gpt-4.1-2025-04-14"),
        ("ft:gpt-4.1-2025-04-14:acme:support:abc123", "openai/ft:gpt-4.1-2025-04-14"),
        ("prod/ft:gpt-4.1:acme::abc123", "openai/gpt-4.1"),
        ("openai/ft:nobody-knows:acme::abc123", None),
    ],
)
def test_a_fine_tuned_model_of_yours_is_known_by_its_base(name: str, found: str | None) -> None:
    model = snapshot().find(name)
    assert (model.id if model else None) == found


def test_what_can_be_fine_tuned_is_a_fact_with_a_source() -> None:
    tuned = {m.id: m.features for m in snapshot() if m.features and "fine_tuning" in m.features.value}
    assert {"openai/gpt-4.1-2025-04-14", "azure/gpt-4.1", "vertex/gemini-2.5-flash"} <= set(tuned)
    assert all("fine_tuning" in c.value for f in tuned.values() for c in f.claims if c.source == "azure-docs")


def test_an_overlay_adds_models_and_corrects_facts(tmp_path: Path) -> None:
    catalog = load_catalog(
        overlay(
            tmp_path,
            """
            read: 2026-03-01
            models:
              hosted/smol:
                retires: 2026-12-31
                inputs: [text]
                prices:
                  - {input: 0.5, output: 1.0, start: 2026-01-01}
                  - {input: 0.4, output: 0.8, start: 2026-06-01}
              openai/gpt-4.1: {context_window: 4096}
              local/student: {hosting: {usd_per_hour: 0.5, tokens_per_s: 900}}
            """,
        )
    )
    smol, corrected, student = (catalog.find(n) for n in ("hosted/smol", "gpt-4.1", "local/student"))
    assert smol
    assert smol.retires
    assert smol.retires.value == dt.date(2026, 12, 31)
    assert (smol.retires.source, smol.retires.read) == ("overlay facts.yaml", "2026-03-01")
    assert smol.prices
    assert smol.prices.value[1].start == dt.date(2026, 6, 1)
    assert corrected
    assert corrected.context_window
    assert corrected.context_window.value == 4096
    assert corrected.context_window.disputed
    assert student
    assert student.hosting


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models:\n  a/b: {retirs: 2026-01-01}", "retirs"),
        ("models:\n  a/b: {retires: soon}", "retires: 'soon'"),
        ("models:\n  a/b: {prices: {input: 1.0}}", "prices"),
        ("models:\n  a/b: {inputs: [smell]}", "inputs"),
        ("models: [a]", "has no models"),
        ("models: {", "facts.yaml"),
        ("!!python/object/apply:os.getcwd []", "facts.yaml"),
        ("", "holds no facts"),
    ],
)
def test_a_faulty_overlay_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=r"facts\.yaml") as caught:
        load_catalog(overlay(tmp_path, text))
    assert message in str(caught.value)


def test_a_price_in_another_currency_is_turned_into_usd_at_your_rate(tmp_path: Path) -> None:
    text = "models:\n  a/b: {prices: {input: 1.0, output: 2.0, currency: EUR, rate: 1.1}}"
    found = load_catalog(overlay(tmp_path, text)).find("a/b")
    assert found
    assert found.prices
    assert (found.prices.value[0].input, found.prices.value[0].output) == (
        pytest.approx(1.1),
        pytest.approx(2.2),
    )
    with pytest.raises(InputError, match="in EUR without a rate"):
        load_catalog(overlay(tmp_path, text.replace(", rate: 1.1", "")))


def test_a_renamed_model_is_found_by_its_old_name(tmp_path: Path) -> None:
    catalog = load_catalog(overlay(tmp_path, "models:\n  a/new: {names: [old, a/older], context_window: 5}"))
    assert {m.id for name in ("old", "a/older", "prod/old", "a/new") if (m := catalog.find(name))} == {
        "a/new"
    }


def test_what_any_source_says_a_model_has_is_no_longer_denied() -> None:
    sonnet = snapshot().find("anthropic/claude-sonnet-4-5")
    assert sonnet
    assert sonnet.features
    assert {"json_schema", "tools"} <= sonnet.features.value
    assert sonnet.lacks is None or "json_schema" not in sonnet.lacks.value


@pytest.mark.parametrize(
    ("name", "day"),
    [
        ("openai/gpt-4.1-2031-04-14", "2031-04-14"),
        ("anthropic/claude-x-20310514", "2031-05-14"),
        ("cohere/command-z-08-2031", "2031-08-01"),
        ("mistral/mistral-x-2507", "2025-07-01"),
        ("openai/gpt-x-2507", None),
        ("openai/gpt-x-20319914", None),
    ],
)
def test_a_release_is_read_from_an_id_only_where_it_is_certain(
    tmp_path: Path, name: str, day: str | None
) -> None:
    found = load_catalog(overlay(tmp_path, f"models:\n  {name}: {{context_window: 5}}")).find(name)
    assert found
    assert (str(found.released.value) if found.released else None) == day


def test_an_absent_overlay_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        load_catalog(tmp_path / "absent.yaml")


def test_a_snapshot_older_than_thirty_days_says_so() -> None:
    catalog = snapshot()
    assert catalog.stale_days(catalog.read + dt.timedelta(days=30)) == 0
    assert catalog.stale_days(catalog.read + dt.timedelta(days=31)) == 31


def test_the_compiled_facts_are_those_of_the_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = {m.id: m for m in load_catalog()}
    for path in facts.DATA.glob("*.yaml"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shipped = (facts.DATA / COMPILED).read_bytes()
    monkeypatch.setattr(facts, "DATA", tmp_path)
    assert {m.id: m for m in load_catalog()} == compiled
    compile_documents(tmp_path)
    stale = "the YAML was edited: python -m understudy.catalog.documents"
    assert (tmp_path / COMPILED).read_bytes() == shipped, stale


def test_compiled_facts_of_other_yaml_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vendor = tmp_path / "v.yaml"
    said = "sources: {s: {what: w, licence: MIT, read: 2026-01-01}}\nmodels: {a: {licence: {s: MIT}}}\n"
    vendor.write_text(said)
    compile_documents(tmp_path)
    monkeypatch.setattr(facts, "DATA", tmp_path)
    vendor.write_text(said.replace("MIT}}", "Apache}}"))
    model = load_catalog().find("v/a")
    assert model
    assert model.licence
    assert model.licence.value == "Apache"
