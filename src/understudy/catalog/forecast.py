"""How likely a model without an announced end is gone within 6, 12 or 24 months.

A Weibull accelerated-failure-time model was fitted when the catalog was refreshed (`forecast_fit`, where its
back-test is); here its few numbers are read from ``data/forecast.json`` and applied, so no statistics package
is needed. Where the back-test did not beat the base rate at a horizon, the base rate is what is told. It
ignores models whose release nobody dates.
"""

from __future__ import annotations

import datetime as dt
import math
import re
from collections.abc import Mapping
from functools import cache
from itertools import accumulate, islice
from operator import mul
from weakref import WeakKeyDictionary

import msgspec

from understudy.catalog.facts import DATA, RESELLERS, Catalog, ModelFacts

HORIZONS = (6, 12, 24)
"""Months."""
VENDORS = ("openai", "google", "mistral", "groq")
FEATURES = (
    "log_age", "small", "large", "preview", "succeeded", "log_years_succeeded", *VENDORS, "other",
)  # fmt: skip
"""What the model sees; vendors are told from Anthropic, the one left out."""
_SMALL = frozenset({"mini", "nano", "haiku", "flash", "lite", "small", "instant", "tiny", "ministral"})
_LARGE = frozenset({"opus", "pro", "large", "ultra", "max", "fable"})
"""Words by which vendors name the ends of their range: a model's tier among its siblings."""
_PREVIEW = frozenset({"preview", "exp", "experimental", "beta", "labs"})
YEAR_D = 365.25
MONTH_D = YEAR_D / 12


class Chance(msgspec.Struct, frozen=True):
    """Probability of being retired within some months."""

    months: int
    probability: float
    low: float
    """Lower end of a 90% interval."""
    high: float
    method: str
    """survival model, or base rate where the model did no better in the back-test."""


class Forecast(msgspec.Struct, frozen=True):
    """What is expected of a model that has no announced end."""

    model: str
    chances: tuple[Chance, ...]
    """One per horizon, in order."""
    fitted: str
    """Day (ISO 8601) up to which the history was known."""

    def within(self, months: int) -> Chance:
        return next(c for c in self.chances if c.months == months)


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """The back-test at one horizon, over all landmark days; Brier scores, lower is better."""

    months: int
    models: int
    """Model and landmark day, counted."""
    retired: int
    brier_model: float
    brier_kaplan_meier: float
    brier_base_rate: float

    @property
    def model_is_better(self) -> bool:
        return self.brier_model < min(self.brier_kaplan_meier, self.brier_base_rate)


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """The fitted model, as `forecast_fit` writes it."""

    fitted: str
    rows: int
    models: int
    events: int
    coefficients: tuple[float, ...]
    """Of log λ: the intercept, then `FEATURES`."""
    log_rho: float
    bootstrap: tuple[tuple[float, ...], ...]
    """Refits on resampled models: coefficients, then log ρ."""
    base_rates: dict[str, tuple[float, float, float]]
    """Months to share retired, with its 90% interval (Wilson)."""
    scores: tuple[Score, ...]


def forecast(catalog: Catalog, facts: ModelFacts, now: float) -> Forecast | None:
    """What is expected of ``facts`` from ``now`` (Unix seconds) on; None when an end is announced, when its
    release is not known, when its name moves from model to model, or when you host it."""
    day = dt.datetime.fromtimestamp(now, dt.UTC).date()
    if facts.ending or facts.hosting or facts.vendor in RESELLERS:
        return None
    if facts.model.endswith("-latest"):  # a name that moves on to the next model
        return None
    x = features(facts, releases_by_line(catalog), day)
    if x is None or (fit := _fit()) is None:
        return None
    return Forecast(facts.id, tuple(accumulate(_chances(fit, x), _no_less)), fit.fitted)


def _no_less(sooner: Chance, later: Chance) -> Chance:
    """Two methods need not agree on the order of two horizons; time does."""
    if later.probability >= sooner.probability:
        return later
    return msgspec.structs.replace(sooner, months=later.months)


def features(facts: ModelFacts, lines: Mapping[str, list[dt.date]], day: dt.date) -> list[float] | None:
    """`FEATURES` of a model on a day; None before its release or when that is not known."""
    if facts.released is None or facts.released.value > day:
        return None
    born = facts.released.value
    words = set(re.split(r"[-./_ ]", facts.model.lower()))
    newer = [d for d in lines.get(line_of(facts), ()) if born < d <= day]
    since = (day - newer[0]).days / YEAR_D if newer else 0.0
    vendors = [float(facts.vendor == v) for v in VENDORS]
    other = float(facts.vendor not in ("anthropic", *VENDORS))
    return [
        math.log((day - born).days / YEAR_D + 0.25),
        float(bool(words & _SMALL)),
        float(bool(words & _LARGE)),
        float(bool(words & _PREVIEW)),
        float(bool(newer)),
        math.log1p(since),
        *vendors,
        other,
    ]


def line_of(facts: ModelFacts) -> str:
    """The line a model belongs to: its vendor and words without numbers, so that claude-3-5-haiku and
    claude-haiku-4-5 are one."""
    words = re.split(r"[-./_ ]", facts.model.lower())
    return (
        facts.vendor
        + " "
        + " ".join(sorted({w for w in words if w.isalpha() and w not in _PREVIEW | {"latest"}}))
    )


_LINES: WeakKeyDictionary[Catalog, dict[str, list[dt.date]]] = WeakKeyDictionary()


def releases_by_line(catalog: Catalog) -> dict[str, list[dt.date]]:
    """Days on which models of each line came out, in order."""
    if catalog not in _LINES:
        lines: dict[str, list[dt.date]] = {}
        for facts in catalog:
            if facts.released:
                lines.setdefault(line_of(facts), []).append(facts.released.value)
        _LINES[catalog] = {line: sorted(days) for line, days in lines.items()}
    return _LINES[catalog]


def probability(coefficients: tuple[float, ...], log_rho: float, x: list[float], months: float) -> float:
    """P(T ≤ h) = 1 − exp(−(h/λ)^ρ), log λ linear in x (Weibull AFT, Kalbfleisch and Prentice 2002, §2.3)."""
    return _weibull(_log_scale(coefficients, x), math.exp(log_rho), math.log(months / 12))


def _log_scale(coefficients: tuple[float, ...], x: list[float]) -> float:
    return coefficients[0] + sum(map(mul, islice(coefficients, 1, None), x))


def _weibull(log_scale: float, rho: float, log_years: float) -> float:
    return -math.expm1(-math.exp(rho * (log_years - log_scale)))


def _chances(fit: Fit, x: list[float]) -> list[Chance]:
    """One for each of `HORIZONS`; the refits are applied to x once for all of them."""
    better = {s.months for s in fit.scores if s.model_is_better}
    drawn = [(_log_scale(b, x), math.exp(b[-1])) for b in fit.bootstrap] if better else []
    return [
        _modelled(fit, x, drawn, months)
        if months in better
        else Chance(months, *fit.base_rates[str(months)], "base rate")
        for months in HORIZONS
    ]


def _modelled(fit: Fit, x: list[float], drawn: list[tuple[float, float]], months: int) -> Chance:
    log_years = math.log(months / 12)
    spread = sorted(_weibull(scale, rho, log_years) for scale, rho in drawn)
    low, high = spread[int(0.05 * len(spread))], spread[int(0.95 * len(spread))]
    told = probability(fit.coefficients, fit.log_rho, x, months)
    return Chance(months, told, low, high, "survival model")


@cache
def _fit() -> Fit | None:
    path = DATA / "forecast.json"
    return msgspec.json.decode(path.read_bytes(), type=Fit) if path.exists() else None
