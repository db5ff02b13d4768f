"""The forecast: the Weibull formula by hand, features of dated models, and a report that owns up."""

from __future__ import annotations

import datetime as dt
import functools
import math
from pathlib import Path

import msgspec
import pytest

from understudy.catalog import forecast as module
from understudy.catalog.facts import DATA, load_catalog
from understudy.catalog.forecast import (
    FEATURES,
    Fit,
    Score,
    features,
    forecast,
    line_of,
    probability,
    releases_by_line,
)
from understudy.catalog.forecast_fit import (
    Asked,
    Life,
    Row,
    best_penalty,
    kaplan_meier,
    lives,
    prequential,
    report,
)

snapshot = functools.cache(load_catalog)
NOW = dt.datetime(2026, 11, 24, tzinfo=dt.UTC).timestamp()
PAGE = Path(__file__).parents[2] / "docs" / "forecast.md"


def day(text: str) -> dt.date:
    return dt.date.fromisoformat(text)


def test_the_probability_is_the_weibull_distribution() -> None:
    # λ = e^(0.5 + 2·0.25) = e years, ρ = 2: 1 − exp(−(1/e)²) within 12 months
    found = probability((0.5, 2.0), math.log(2), [0.25], 12)
    assert found == pytest.approx(1 - math.exp(-math.exp(-2)))
    assert probability((0.0,), 0.0, [], 6) == pytest.approx(1 - math.exp(-0.5))  # exponential, one a year


def overlay(tmp_path: Path) -> Path:
    path = tmp_path / "facts.yaml"
    path.write_text("""
models:
  openai/zed-mini: {released: 2025-05-24}
  openai/zed-2-mini: {released: 2026-05-24}
  openai/zed-3-mini-preview: {released: 2026-11-01}
  openai/zed-undated: {context_window: 5}
  openai/zed-ending: {released: 2025-05-24, retires: 2027-01-01}
  openai/zed-latest: {released: 2025-05-24}
""")
    return path


def test_features_know_age_size_and_successors(tmp_path: Path) -> None:
    catalog = load_catalog(overlay(tmp_path))
    lines = releases_by_line(catalog)
    mini = catalog.find("openai/zed-mini")
    assert mini
    x = dict(zip(FEATURES, features(mini, lines, day("2026-11-24")) or [], strict=True))
    assert x["log_age"] == pytest.approx(math.log(549 / 365.25 + 0.25))
    assert (x["small"], x["preview"], x["succeeded"], x["openai"], x["other"]) == (1.0, 0.0, 1.0, 1.0, 0.0)
    assert x["log_years_succeeded"] == pytest.approx(math.log1p(184 / 365.25))
    before = dict(zip(FEATURES, features(mini, lines, day("2025-12-01")) or [], strict=True))
    assert (before["succeeded"], before["log_years_succeeded"]) == (0.0, 0.0)  # nothing newer was known then
    assert features(mini, lines, day("2025-01-01")) is None


def test_a_line_ignores_numbers_and_their_order() -> None:
    names = ("anthropic/claude-3-5-haiku-20241022", "anthropic/claude-haiku-4-5")
    one, other = (line_of(m) for n in names if (m := snapshot().find(n)))
    assert one == other == "anthropic claude haiku"


@pytest.mark.parametrize("name", ["zed-undated", "zed-ending", "zed-latest"])
def test_no_forecast_where_it_would_be_a_guess_or_is_announced(tmp_path: Path, name: str) -> None:
    catalog = load_catalog(overlay(tmp_path))
    facts = catalog.find(f"openai/{name}")
    assert facts
    assert forecast(catalog, facts, NOW) is None


def test_a_forecast_grows_with_time_and_names_its_method(tmp_path: Path) -> None:
    catalog = load_catalog(overlay(tmp_path))
    for name in ("zed-mini", "zed-2-mini", "zed-3-mini-preview"):
        facts = catalog.find(f"openai/{name}")
        assert facts
        told = forecast(catalog, facts, NOW)
        assert told
        chances = [c.probability for c in told.chances]
        assert chances == sorted(chances)
        assert all(0 <= c.low <= c.probability <= c.high <= 1 for c in told.chances)
        assert {c.method for c in told.chances} <= {"survival model", "base rate"}


def test_where_the_model_is_no_better_the_base_rate_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = msgspec.json.decode((DATA / "forecast.json").read_bytes(), type=Fit)
    worse = tuple(msgspec.structs.replace(s, brier_model=1.0) for s in fit.scores)
    monkeypatch.setattr(module, "_fit", lambda: msgspec.structs.replace(fit, scores=worse))
    facts = snapshot().find("anthropic/claude-opus-5")
    assert facts
    told = forecast(snapshot(), facts, NOW)
    assert told
    assert [(c.probability, c.method) for c in told.chances] == [
        (fit.base_rates[str(c.months)][0], "base rate") for c in told.chances
    ]


def test_kaplan_meier_is_the_textbook_product() -> None:
    facts = next(iter(snapshot()))
    born = day("2024-01-01")
    # of four, one is gone after a year (3/4); of the two then left, one after two years (3/8)
    ends = ("2024-12-31", "2026-01-01")
    gone = [Life(facts, born, None, day(end)) for end in ends]
    alive = Life(facts, born, None, None)
    young = Life(facts, day("2025-06-01"), None, None)
    survival = kaplan_meier([*gone, alive, young], day("2026-07-01"))
    assert survival(0.5) == 1.0
    assert survival(1.5) == pytest.approx(3 / 4)
    assert survival(3.0) == pytest.approx(3 / 8)


def test_a_row_knows_only_what_had_happened() -> None:
    facts = next(iter(snapshot()))
    row = Row(Life(facts, day("2024-01-01"), None, day("2026-01-01")), day("2025-01-01"), [])
    assert row.lasted(day("2025-07-02")) == (pytest.approx(182 / 365.25), False)
    assert row.lasted(day("2026-06-01")) == (pytest.approx(365 / 365.25), True)


def test_twins_of_one_release_are_one_life() -> None:
    names = [life.facts.id for life in lives(snapshot())]
    assert len(names) == len(set(names)) > 150
    assert ("openai/gpt-4.1" in names) + ("openai/gpt-4.1-2025-04-14" in names) == 1


def test_the_report_says_where_the_model_is_no_better() -> None:
    fit = msgspec.json.decode((DATA / "forecast.json").read_bytes(), type=Fit)
    scores = (
        Score(months=6, models=9, retired=3, brier_model=0.3, brier_kaplan_meier=0.2, brier_base_rate=0.25),
        Score(months=12, models=9, retired=3, brier_model=0.1, brier_kaplan_meier=0.2, brier_base_rate=0.25),
        Score(months=24, models=0, retired=0, brier_model=0.0, brier_kaplan_meier=0.0, brier_base_rate=0.0),
    )
    asked = [Asked(day("2025-01-01"), 6, 0.3, 0.2, 0.25, False)]
    text = report(msgspec.structs.replace(fit, scores=scores), asked, {0.5: asked}, day("2026-01-01"), 181)
    assert "At 6 months the survival model is no better: the base rate is told" in text
    assert "At 12 months the survival model beats both others" in text
    assert "At 24 months nothing can be tested yet" in text


def test_the_ridge_is_chosen_by_what_was_known_on_the_day() -> None:
    def told(start: str, probability: float, retired: bool) -> Asked:
        return Asked(day(start), 6, probability, 0.0, 0.0, retired)

    bold = [told("2025-01-01", 0.9, True), told("2025-07-01", 0.9, False), told("2026-01-01", 0.9, False)]
    shy = [told("2025-01-01", 0.5, True), told("2025-07-01", 0.5, False), told("2026-01-01", 0.5, False)]
    by_penalty = {0.02: bold, 0.5: shy}
    # nothing known: the strongest; then the bold one had been right; then its mistake counts
    assert best_penalty(by_penalty, day("2025-06-30")) == 0.5
    assert best_penalty(by_penalty, day("2025-07-03")) == 0.02
    assert best_penalty(by_penalty, day("2026-01-01")) == 0.5
    assert prequential({0.02: bold[:2], 0.5: shy[:2]}) == [shy[0], shy[1]]
    later = [a._replace(day=a.day + dt.timedelta(days=1)) for a in (bold[1], shy[1])]
    assert prequential({0.02: [bold[0], later[0]], 0.5: [shy[0], later[1]]}) == [shy[0], later[0]]


def test_the_published_page_tells_the_order_of_events() -> None:
    page = PAGE.read_text()
    assert "0.276" in page
    assert "0.267" in page
    assert "25 release dates" in page


def test_the_published_page_shows_the_scores_that_are_used() -> None:
    fit = msgspec.json.decode((DATA / "forecast.json").read_bytes(), type=Fit)
    page = PAGE.read_text()
    for score in fit.scores:
        if score.models:
            assert f"| {score.months} | {score.models} | {score.retired} | " in page
            assert f"{score.brier_base_rate:.3f}" in page
