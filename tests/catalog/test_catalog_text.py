"""Text that fits: columns left out by rank and named, cells folded, every fact with its sources."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest

from understudy.catalog.bindings import Binding
from understudy.catalog.events import WatchReport
from understudy.catalog.facts import load_catalog
from understudy.catalog.plan import make_plan
from understudy.catalog.sheet import Row, sheet
from understudy.catalog.watch import watch
from understudy.cli.catalog_text import print_plan, print_watch
from understudy.cli.columns import Column, draw, fold
from understudy.protocol import CallShape, Usage

NOW = dt.datetime(2026, 11, 25, 12, tzinfo=dt.UTC).timestamp()

COLUMNS = (
    Column("model", least=8),
    Column("calls", right=True),
    Column("$/mo", right=True, rank=1),
    Column("energy", rank=2),
    Column("empty", rank=1),
)
ROWS = [["openai/gpt-4.1-mini", "1,000", "2.00", "0.3–0.5 kWh", ""], ["v/x", "5", "11.25", "", ""]]


def test_a_wide_terminal_shows_all_that_is_filled() -> None:
    drawn = draw(COLUMNS, ROWS, 80)
    assert drawn.text == (
        "model                calls   $/mo  energy\n"
        "───────────────────  ─────  ─────  ───────────\n"
        "openai/gpt-4.1-mini  1,000   2.00  0.3–0.5 kWh\n"
        "v/x                      5  11.25"
    )
    assert drawn.left_out == ()


@pytest.mark.parametrize("width", [15, 16, 20, 22, 30, 40, 46, 47])
def test_what_has_no_room_is_left_out_by_rank_and_named_never_cut(width: int) -> None:
    drawn = draw(COLUMNS, ROWS, width)
    lines = drawn.text.splitlines()
    assert max(map(len, lines)) <= width
    assert drawn.left_out == (("energy", "$/mo") if width < 22 else ("energy",) if width < 35 else ())
    columns = lines[1].split("  ")
    folded = "".join(line[: len(columns[0])].strip() for line in lines[2:])
    assert folded == "openai/gpt-4.1-mini" + "v/x"


def test_columns_that_must_be_shown_are_wider_than_the_terminal_if_need_be() -> None:
    drawn = draw((Column("a"), Column("b", rank=1)), [["x" * 30, "y"]], 10)
    assert drawn.text.splitlines()[-1] == "x" * 30
    assert drawn.left_out == ("b",)


def test_a_paragraph_is_folded_with_an_indent() -> None:
    assert fold("one two three four five six", 20, "  ") == "one two three four\n  five six"
    assert fold("", 20) == ""


def test_a_sheet_shows_who_says_so_and_who_says_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "facts.yaml"
    path.write_text(
        "read: 2026-11-01\nmodels:\n  openai/gpt-4.1:\n"
        "    retires: 2027-03-01\n"
        "    prices: {input: 1, output: 4, cached: 0.5, batch: {input: 0.5, output: 2},"
        " tiers: [{above: 200000, input: 2, output: 6}]}\n"
        "    hosting: {usd_per_hour: 2, tokens_per_s: 900}\n"
    )
    catalog = load_catalog(path)
    facts = catalog.find("openai/gpt-4.1")
    assert facts
    rows = {row.fact: row for row in sheet(catalog, facts, 1_795_500_000.0)}
    assert rows["retires"].value == "2027-03-01"
    assert rows["retires"].source == "overlay facts.yaml, 2026-11-01"
    assert "(litellm, 20" in rows["retires"].otherwise
    assert rows["prices"].value == (
        "$1 in, $4 out, cached $0.5, above 200,000 tokens $2 in, $6 out, batch $0.5 in, $2 out"
    )
    assert rows["hosting"].value == "$2 an hour, 900 tokens a second"
    assert rows["parameters"].source.startswith("ecologits-estimate, ")
    assert "per million answer tokens" in rows["energy"].value
    # models.dev lists fewer features: that is no contradiction
    assert rows["features"].otherwise == ""
    assert rows["price today"] == Row(
        "price today", "$1 in, $4 out; above 200,000 tokens $2 in, $6 out", "overlay facts.yaml", ""
    )
    assert "retired in 12 months" not in rows  # its end is announced


def test_a_sheet_tells_the_chances_of_a_model_without_an_announced_end() -> None:
    catalog = load_catalog()
    facts = catalog.find("anthropic/claude-opus-5")
    assert facts
    rows = {row.fact: row for row in sheet(catalog, facts, 1_795_500_000.0)}
    assert "%" in rows["retired in 12 months"].value
    assert rows["retired in 24 months"].source.startswith("base rate, fitted 20")


def test_models_without_a_price_are_named_with_what_to_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "facts.yaml"
    path.write_text(
        "models:\n  v/old: {context_window: 8000, retires: 2026-12-24, prices: {input: 1.0, output: 2.0}}\n"
        "  v/dear: {context_window: 8000, prices: {input: 9.0, output: 9.0}}\n"
        "  v/free: {context_window: 8000, retires: 2027-01-01}\n"
    )
    catalog, calls = (
        load_catalog(path),
        [CallShape(NOW, Usage(prompt_tokens=9), frozenset({"text"}), frozenset(), 0, "", None)],
    )
    print_plan(make_plan(catalog, "v/old", calls, ["v/dear", "v/free"], now=NOW), 10)
    told = " ".join(capsys.readouterr().out.split())
    assert "no price is known of v/free: write `prices` or `hosting` into your overlay" in told

    bound = [Binding("a", target, "alias") for target in ("v/old", "v/free")]
    report = WatchReport(
        at=NOW,
        bound=2,
        unknown=(),
        exposures=tuple(watch(catalog, bound, {}, NOW)),
        events=(),
        outlook={},
        catalog_read="2026-11-25",
        catalog_stale_days=0,
    )
    print_watch(report)
    told = " ".join(capsys.readouterr().out.split())
    assert "no price is known of v/free: write `prices` into your overlay" in told
    assert "no price is known of v/old" not in told
