"""Every fact of one model as rows of text: what, its value, who says so, and who says otherwise.

It ignores how rows are laid out (cli, dashboard), and facts nobody states.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

from understudy.catalog.facts import Catalog, Details, Energy, Fact, Hosting, ListPrice, ModelFacts
from understudy.catalog.forecast import forecast
from understudy.catalog.prices import rates_at

_NO_FACTS = frozenset({"id", "names", "scores"})


class Row(NamedTuple):
    """One fact."""

    fact: str
    value: str
    source: str
    """And the day it was read; an outsider's estimate says so."""
    otherwise: str
    """What other sources say, each with its name and day; empty where none contradicts."""


def sheet(catalog: Catalog, model: ModelFacts, now: float) -> list[Row]:
    """What is told of a model, then what is reckoned: its price and chances at ``now`` (Unix seconds)."""
    names = [name for name in model.__struct_fields__ if name not in _NO_FACTS]
    told = [(name.replace("_", " "), getattr(model, name)) for name in names] + list(model.scores.items())
    return [*(_row(name, fact) for name, fact in told if fact is not None), *_reckoned(catalog, model, now)]


def _row(name: str, fact: Fact[Any]) -> Row:
    return Row(name, value_text(fact.value), f"{fact.source}, {fact.read}", _otherwise(fact))


def value_text(value: Any) -> str:
    """A fact's value for a person."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, frozenset):
        return ", ".join(sorted(cast("frozenset[str]", value))) or "none"
    if isinstance(value, tuple):
        return "; ".join(map(_price, cast("tuple[ListPrice, ...]", value)))
    if isinstance(value, Hosting):
        return f"${value.usd_per_hour:g} an hour, {value.tokens_per_s:g} tokens a second"
    if isinstance(value, Energy):
        ends = (*value.kwh, *value.kg_co2e)
        return "{:g}–{:g} kWh, {:g}–{:g} kg CO2e per million answer tokens".format(*ends)
    return str(value)


def _otherwise(fact: Fact[Any]) -> str:
    others = [c for c in fact.claims if c.value != fact.value and not _part(c.value, fact.value)]
    return "; ".join(f"{value_text(c.value)} ({c.source}, {c.read})" for c in others)


def _part(said: Any, believed: Any) -> bool:
    """Whether a source only says less: it doesn't contradict."""
    return isinstance(said, frozenset) and cast("frozenset[str]", said) < cast("frozenset[str]", believed)


def _price(price: ListPrice) -> str:
    since = f"from {price.start}: " if price.start else ""
    kinds = [name for name in Details.__struct_fields__ if getattr(price, name) is not None]
    told = [f"{n.replace('_', ' ')} ${getattr(price, n):g}" for n in kinds]
    told += [f"above {t.above:,} tokens ${t.input:g} in, ${t.output:g} out" for t in price.tiers]
    told += [f"batch ${price.batch.input:g} in, ${price.batch.output:g} out"] if price.batch else []
    return ", ".join([f"{since}${price.input:g} in", f"${price.output:g} out", *told])


def _reckoned(catalog: Catalog, model: ModelFacts, now: float) -> Iterator[Row]:
    if rates := rates_at(catalog, model.id, now):
        tiers = "; ".join(
            (f"above {t.above:,} tokens " if t.above else "") + f"${t.input:g} in, ${t.output:g} out"
            for t in rates.tiers
        )
        yield Row("price today", tiers, f"{rates.source}{f', from {rates.start}' if rates.start else ''}", "")
    if told := forecast(catalog, model, now):
        for chance in told.chances:
            text = f"{chance.probability:.0%} ({chance.low:.0%}–{chance.high:.0%})"
            source = f"{chance.method}, fitted {told.fitted}"
            yield Row(f"retired in {chance.months} months", text, source, "")
