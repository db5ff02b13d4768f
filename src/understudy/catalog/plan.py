"""What could take over from a model, ranked on the traffic it really has.

For each candidate: which share of the recorded calls it could answer at all (context, output length, rate,
modalities, features), what they would cost and take in energy, what requests must change in, and how long it
will live. It ignores whether the answers would
be any good: that is proven, not planned (evaluate).
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import msgspec

from understudy.catalog.capability import Asked, Fit, can_of, fit
from understudy.catalog.changes import Change, changes
from understudy.catalog.facts import RESELLERS, RULE, Catalog, ModelFacts, family_of
from understudy.catalog.forecast import Forecast, forecast
from understudy.catalog.prices import Rates, hosting_rates, rates_at
from understudy.catalog.purpose import CHAT, purpose_of
from understudy.catalog.tiers import Condition, tier_of
from understudy.catalog.watch import days_until
from understudy.catalog.workload import Workload
from understudy.errors import InputError
from understudy.protocol import CallShape

TOKENIZER_BOUND = 1.3
"""A text has at most this many times as many tokens with another vendor's tokenizer: taken for the fit, since
the candidate's own tokenizer is seldom at hand."""
SAFE_DAYS = 365
"""A candidate that retires sooner ranks behind all that do not."""
PEER_MMLU = 3.0
"""Points of MMLU below the incumbent's that still count as its equal: what prompts and runs differ by."""
PEER_SIZE = 0.5
"""Share of the incumbent's parameters that counts as its equal where no score is known of both."""
Key = Literal["fit", "life", "verified", "peer", "cost", "risk", "score", "latency", "energy"]
KEYS: dict[Key, str] = {
    "fit": "the larger share of calls that fit",
    "life": "no retirement announced within a year",
    "verified": "fewer needs that nobody speaks of",
    "peer": "as strong as the incumbent, as far as anybody tells (the vendor's named successor, or MMLU at "
    f"most {PEER_MMLU:g} points lower, or where no score tells at least {PEER_SIZE:.0%} of its parameters), "
    "then those nobody compares, then those known as weaker",
    "cost": "the lower cost of this traffic per month (unknown last)",
    "risk": "the lower forecast of retirement within a year (unknown last)",
    "score": "the higher MMLU (unknown last)",
    "latency": "the faster in your own traffic (unknown last)",
    "energy": "the less energy (unknown last)",
}
"""What candidates may be ranked by."""
RANK_BY: tuple[Key, ...] = ("fit", "life", "verified", "peer", "cost")


class Latency(msgspec.Struct, frozen=True):
    """How fast a model has been for you, in medians."""

    ttft_s: float
    total_s: float
    tokens_per_s: float
    """Of the answer, over the whole call."""
    calls: int


class Timed(Protocol):
    """How fast one target has been; a `traffic.store.Latency` is one."""

    @property
    def target(self) -> str: ...
    @property
    def ttft_s(self) -> float: ...
    @property
    def total_s(self) -> float: ...
    @property
    def tokens_per_s(self) -> float: ...
    @property
    def calls(self) -> int: ...


class TokenRatio(msgspec.Struct, frozen=True):
    """How many tokens a candidate's tokenizer makes of what was recorded, per token recorded."""

    mean: float
    most: float
    """Of one call."""
    calls: int
    """Counted."""
    said: float | None = None
    """The same of answers; None: as of prompts."""
    by: str = "its tokenizer"
    """What counted."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One model, weighed on the traffic."""

    model: str
    fitting: int
    """Calls it could answer."""
    share: float
    """The same as a share of all calls, in [0, 1]."""
    misfits: dict[str, int]
    """Reason to the calls that break for it; a call may break for several."""
    unverified: tuple[str, ...]
    """What the traffic needs and nobody says of the model."""
    usd_per_month: float | None
    """Cost of all recorded calls at this model's price today; None when no price is known."""
    usd_per_call: float | None
    usd_per_task: float | None
    """Per completed task, if it completes as many; None also when no task was reported as completed."""
    usd_per_million_tokens: float | None
    """Over this traffic's own mix of tokens."""
    usd_per_million_hosted: float | None = None
    """Of running it yourself, per million answer tokens: the machine's hour over what was measured in it."""
    price_source: str
    retires: dt.date | None
    days_left: int | None
    context_window: int | None
    output_limit: int | None
    modalities: tuple[str, ...]
    parameters: int | None
    licence: str
    open_weights: bool | None
    scores: dict[str, float]
    strength: str = ""
    """What tells whether it is as strong as the incumbent; empty when nobody tells."""
    peer: bool | None = None
    """Whether it is, by that."""
    tier: str = ""
    """Class by `[catalog] tiers`."""
    tokens: str = ""
    """How its tokens were reckoned: counted, taken as the same, or bounded."""
    usd_low: float | None = None
    """10th percentile of a month's cost, from the traffic's own variation; None for under five days."""
    usd_high: float | None = None
    """90th percentile."""
    usd_per_month_uncached: float | None = None
    """If nothing were cached."""
    usd_per_month_batch: float | None = None
    """If the calls that are not streamed went by batch; None where no batch price is known."""
    kwh_per_month: tuple[float, float] | None = None
    """Energy of the answers, lower and upper end of ecologits' estimate."""
    kg_co2e_per_month: tuple[float, float] | None = None
    latency: Latency | None = None
    forecast: Forecast | None = None
    """Where no end is announced."""
    changes: tuple[Change, ...] = ()
    """What requests must change in."""
    best_use: str = ""
    """What it is the best of the fitting candidates for; empty when it leads in nothing."""


class Reason(msgspec.Struct, frozen=True):
    """Why some candidates are excluded."""

    text: str
    models: int
    """That it excludes, alone or among other reasons."""
    calls: int
    """Most that break for it on one of them."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The answer: who could take over from ``incumbent``, ranked, and who could not."""

    made_at: float
    """Unix seconds."""
    incumbent: Candidate
    successor: str
    """What the vendor names as replacement; empty when it names nothing."""
    calls: int
    window_days: float
    """Time over which the calls were recorded, at least a day; monthly figures are scaled by it."""
    tokens: int
    completed_tasks: int
    candidates: tuple[Candidate, ...]
    """Best first, by `ranking`."""
    excluded: tuple[Candidate, ...]
    """Those that break more calls than tolerated, the nearest to fitting first, then those gone already."""
    tolerance: float
    """Share of calls that may break."""
    ranking: str
    assumptions: tuple[str, ...]
    catalog_read: dt.date
    """Day of the snapshot."""
    catalog_stale_days: int
    """0 while the snapshot is fresh."""
    reasons: tuple[Reason, ...] = ()
    """Why models are excluded, the reason that excludes most first."""
    passed_over: dict[str, int] = {}
    """Why models of the catalog were not weighed, and how many; empty when candidates were named."""
    lock_in: float = 0.0
    """Share of calls whose needs, as far as any vendor tells its features, only one vendor meets."""
    locked_by: tuple[str, ...] = ()
    """Those needs."""
    vendors: int = 0
    """Vendors among the candidates that fit."""
    peak_tokens_per_minute: int = 0
    """The busiest minute recorded."""
    batchable: float = 0.0
    """Share of calls that are not streamed."""


ASSUMPTIONS = (
    f"another vendor's tokenizer makes at most {TOKENIZER_BOUND} times as many tokens (for fit, not cost); "
    "where the overlay names a tokenizer, calls are counted with it, for both",
    "costs are those of the recorded tokens, at the list price of today unless the overlay says otherwise",
    "what came from a cache comes from the candidate's too; calls that do not stream could wait for a batch",
    "a month's p10–p90 takes days as independent",
    "a candidate writes as many answer tokens as the incumbent did: one that thinks writes more",
    "energy is that of the answers only, as ecologits estimates it: a range, not a measurement",
    "a candidate completes as many tasks as the incumbent did",
    f"where sources disagree: {RULE}",
)


def make_plan(
    catalog: Catalog,
    incumbent: str,
    shapes: Sequence[CallShape],
    candidates: Iterable[str] | None = None,
    *,
    now: float,
    tolerance: float = 0.0,
    rank: Sequence[Key] = RANK_BY,
    tiers: Mapping[str, Sequence[Condition]] | None = None,
    latencies: Mapping[str, Latency] | None = None,
    ratios: Mapping[str, TokenRatio] | None = None,
) -> Plan:
    """Weigh candidates for ``incumbent`` (VENDOR/MODEL or target) on its recorded calls.

    ``candidates`` None: every model of which `_passed_over` finds nothing; one that is retired, or made for
    other work, is weighed and excluded. An ENDPOINT/MODEL nobody knows is weighed all the same, with
    everything unverified. ``now`` is in Unix seconds. ``rank`` are keys of `KEYS`, the first deciding;
    ``latencies`` and ``ratios`` are by model id of the catalog. Raises InputError for a bare model id that no
    source knows.
    """
    leaving = catalog.find(incumbent) or ModelFacts(id=incumbent)
    load = Workload(shapes, now)
    scale = _Scale(catalog, leaving, load, now, tiers or {}, latencies or {}, ratios or {}, {})
    passed: dict[str, int] = {}
    if candidates is not None:
        named = [_known(catalog, c) for c in candidates]
    else:
        named = [facts for facts in catalog if not _passed_over(catalog, facts, leaving, passed)]
    weighed = [scale.weigh(facts) for facts in named if facts.id != leaving.id]
    weighed.sort(key=lambda c: (*(_RANK[key](c) for key in rank), c.model))
    kept = [c for c in weighed if c.share >= 1 - tolerance and not _gone(c)]
    fits = {c.model for c in kept}
    excluded = sorted((c for c in weighed if c.model not in fits), key=_gone)
    lock_in, locked_by = _lock_in(catalog, load)
    return Plan(
        made_at=now,
        incumbent=scale.weigh(leaving),
        successor=leaving.successor.value if leaving.successor else "",
        calls=len(load),
        window_days=load.window_s / 86_400,
        tokens=load.tokens,
        completed_tasks=load.completed_tasks,
        candidates=_with_best_uses(kept),
        excluded=tuple(excluded),
        reasons=_reasons(excluded),
        tolerance=tolerance,
        passed_over=dict(sorted(passed.items(), key=lambda item: -item[1])),
        ranking="; ".join(f"{n}. {text}" for n, text in enumerate([*(KEYS[k] for k in rank), "the name"], 1)),
        assumptions=ASSUMPTIONS,
        catalog_read=catalog.read,
        catalog_stale_days=catalog.stale_days(dt.datetime.fromtimestamp(now, dt.UTC).date()),
        lock_in=lock_in,
        locked_by=locked_by,
        vendors=len({c.model.partition("/")[0] for c in kept}),
        peak_tokens_per_minute=load.peak_tokens_per_minute,
        batchable=load.batchable,
    )


def latencies_by_model(catalog: Catalog, timed: Iterable[Timed]) -> dict[str, Latency]:
    """How fast each model behind a target has been."""
    return {
        facts.id if (facts := catalog.find(t.target)) else t.target: Latency(
            t.ttft_s, t.total_s, t.tokens_per_s, t.calls
        )
        for t in timed
    }


def _known(catalog: Catalog, name: str) -> ModelFacts:
    facts = catalog.find(name)
    if facts is None and "/" in name:
        return ModelFacts(id=name)
    if facts is None:
        raise InputError(
            f"nothing is known of the candidate {name!r}",
            expected="a model of the catalog (understudy models) or of your overlay",
            next_step=f"add {name} to the YAML named by [catalog] overlay",
        )
    return facts


def _passed_over(catalog: Catalog, facts: ModelFacts, leaving: ModelFacts, counts: dict[str, int]) -> bool:
    """Whether a model is not worth weighing by itself; the reason is counted."""
    family = family_of(facts.id)
    if facts.vendor in RESELLERS:
        reason = "sold by a reseller of another vendor's models"
    elif purpose_of(facts) != CHAT and not (facts.context_window and (facts.prices or facts.hosting)):
        reason = f"made for {purpose_of(facts)}"
    elif facts.model.endswith("-latest"):
        reason = "a name that moves on to other models by itself"
    elif facts.model.startswith("ft:"):
        reason = "a fine-tuned form that is yours to train first"
    elif family != facts.id and family in catalog:
        reason = "a dated twin of another"
    elif _shown_as(catalog, facts) not in (facts.id, leaving.id):
        reason = "another name of one that is weighed"
    elif facts.id != leaving.id and facts.id == _shown_as(catalog, leaving):
        reason = "the incumbent under another name"
    elif not facts.context_window or not (facts.prices or facts.hosting):
        reason = "no context window or no price known"
    else:
        return False
    counts[reason] = counts.get(reason, 0) + 1
    return True


def _shown_as(catalog: Catalog, facts: ModelFacts) -> str:
    """The shorter of two ids of one model: mistral-large-4 for mistral-large-4-0.

    Rule: the longer id only adds a minor version of zero, and price, context and output limit are told alike.
    """
    shorter = _ZERO_VERSION.sub("", facts.id)
    twin = next((m for m in (catalog.find(shorter),) if m and m.id == shorter), None)
    return facts.id if twin is None or _terms(twin) != _terms(facts) else shorter


_ZERO_VERSION = re.compile(r"(?<=\d)[-.]0$")


def _terms(facts: ModelFacts) -> tuple[object, ...]:
    told = (facts.prices, facts.context_window, facts.output_limit)
    return tuple(fact.value if fact else None for fact in told)


def _reasons(excluded: Iterable[Candidate]) -> tuple[Reason, ...]:
    found: dict[str, Reason] = {}
    for c in excluded:
        for text, calls in (*c.misfits.items(), *([("retired", 0)] if _gone(c) else [])):
            so_far = found.get(text, Reason(text, 0, 0))
            found[text] = Reason(text, so_far.models + 1, max(so_far.calls, calls))
    return tuple(sorted(found.values(), key=lambda r: (-r.models, r.text)))


def _strength(facts: ModelFacts, leaving: ModelFacts) -> tuple[str, bool | None]:
    """What tells whether a model is as strong as the one that leaves, and whether it is by that."""
    if leaving.successor and leaving.successor.value in (facts.id, facts.model):
        return f"named as successor by {leaving.vendor}", True
    mine, theirs = (_mmlu(m) for m in (facts, leaving))
    if mine is not None and theirs is not None:
        return f"MMLU {mine:g} against {theirs:g}", mine >= theirs - PEER_MMLU
    size, old = facts.parameters, leaving.parameters
    if size is None or old is None:
        return "", None
    estimated = ", estimated" if size.estimated or old.estimated else ""
    told = f"{_billions(size.value)} parameters against {_billions(old.value)}{estimated}"
    return told, size.value >= old.value * PEER_SIZE


def _billions(count: int) -> str:
    return f"{count / 1e9:.3g}B" if count < 1e12 else f"{count / 1e12:.3g}T"


def _mmlu(facts: ModelFacts) -> float | None:
    return max((s.value for name, s in facts.scores.items() if name.startswith("MMLU")), default=None)


class _Scale(NamedTuple):
    """What candidates are weighed with."""

    catalog: Catalog
    leaving: ModelFacts
    load: Workload
    now: float
    tiers: Mapping[str, Sequence[Condition]]
    latencies: Mapping[str, Latency]
    ratios: Mapping[str, TokenRatio]
    fits: dict[Asked, Fit]
    """Kept while a plan is made."""

    def weigh(self, facts: ModelFacts) -> Candidate:
        load, ratio = self.load, self._ratio(facts)
        fit = self._fit(facts, ratio.most)
        rates = rates_at(self.catalog, facts.id, self.now)
        scale = 1.0 if rates is None else self._scale(rates, ratio)
        usd = None if rates is None else load.usd(rates) * scale
        band = None if rates is None else load.usd_band(rates)
        retires = facts.retires.value if facts.retires else None
        energy = facts.energy.value if facts.energy else None
        strength, peer = _strength(facts, self.leaving)
        return Candidate(
            model=facts.id,
            fitting=fit.fitting,
            share=fit.fitting / len(load) if len(load) else 1.0,
            misfits=fit.misfits,
            unverified=fit.unverified,
            usd_per_month=_per(usd, load.months),
            usd_per_call=_per(usd, len(load)),
            usd_per_task=_per(usd, load.completed_tasks),
            usd_per_million_tokens=_per(usd, load.tokens / 1e6),
            usd_per_million_hosted=_hosted(facts),
            price_source=_source(rates),
            retires=retires,
            days_left=days_until(retires, self.now) if retires else None,
            context_window=facts.context_window.value if facts.context_window else None,
            output_limit=facts.output_limit.value if facts.output_limit else None,
            modalities=tuple(sorted(facts.inputs.value)) if facts.inputs else (),
            parameters=facts.parameters.value if facts.parameters else None,
            licence=facts.licence.value if facts.licence else "",
            open_weights=facts.open_weights.value if facts.open_weights else None,
            scores={benchmark: score.value for benchmark, score in facts.scores.items()},
            strength=strength,
            peer=peer,
            tier=tier_of(facts, rates, self.tiers).tier if self.tiers else "",
            tokens=self._tokens(facts),
            usd_low=band[0] * scale if band else None,
            usd_high=band[1] * scale if band else None,
            usd_per_month_uncached=_per(None if rates is None else load.usd_uncached(rates), load.months),
            usd_per_month_batch=_per(self._batch(facts, rates), load.months),
            kwh_per_month=self._per_month(energy.kwh) if energy else None,
            kg_co2e_per_month=self._per_month(energy.kg_co2e) if energy else None,
            latency=self.latencies.get(facts.id),
            forecast=forecast(self.catalog, facts, self.now),
            changes=changes(facts, self.leaving, load) if facts.id != self.leaving.id else (),
        )

    def _fit(self, facts: ModelFacts, bound: float) -> Fit:
        context, limit, rate = (
            known.value if known else 0
            for known in (facts.context_window, facts.output_limit, facts.tokens_per_minute)
        )
        asked = Asked(can_of(facts), (context, limit, bound), rate)
        if asked not in self.fits:
            self.fits[asked] = fit(self.load, asked)
        return self.fits[asked]

    def _ratio(self, facts: ModelFacts) -> TokenRatio:
        if facts.id in self.ratios:
            return self.ratios[facts.id]
        return TokenRatio(1.0, 1.0 if facts.vendor == self.leaving.vendor else TOKENIZER_BOUND, 0)

    def _scale(self, rates: Rates, ratio: TokenRatio) -> float:
        """Cost per USD of the recorded tokens: prompts and answers change by ratios of their own."""
        whole = self.load.usd(rates)
        if ratio.said is None or not whole:
            return ratio.mean
        said = self.load.usd_said(rates)
        return ((whole - said) * ratio.mean + said * ratio.said) / whole

    def _tokens(self, facts: ModelFacts) -> str:
        if ratio := self.ratios.get(facts.id):
            return f"counted with {ratio.by} on {ratio.calls} calls: {ratio.mean:.2f} per recorded token"
        if facts.vendor == self.leaving.vendor:
            return "as recorded: the same vendor"
        return f"at most {TOKENIZER_BOUND} per recorded token"

    def _batch(self, facts: ModelFacts, rates: Rates | None) -> float | None:
        """Cost with what can wait sent by batch; None where the vendor has no batch price."""
        cheaper = rates_at(self.catalog, facts.id, self.now, context={"processing": "batch"})
        if rates is None or cheaper is None or cheaper.tiers == rates.tiers:
            return None
        return self.load.usd_batched(rates, cheaper)

    def _per_month(self, per_million: tuple[float, float]) -> tuple[float, float]:
        millions = self.load.answer_tokens / 1e6 / self.load.months
        return per_million[0] * millions, per_million[1] * millions


def _per(usd: float | None, count: float) -> float | None:
    return None if usd is None or not count else usd / count


def _hosted(facts: ModelFacts) -> float | None:
    if facts.hosting is None:
        return None
    return hosting_rates(facts.hosting.value, facts.hosting.source).tiers[0].output


def _source(rates: Rates | None) -> str:
    if rates is None:
        return ""
    return f"{rates.source}, from {rates.start}" if rates.start else rates.source


def _gone(candidate: Candidate) -> bool:
    return candidate.days_left is not None and candidate.days_left <= 0


def _known_first(value: float | None) -> float:
    return float("inf") if value is None else value


_RANK: dict[Key, Callable[[Candidate], float]] = {
    "fit": lambda c: -c.share,
    "life": lambda c: float(c.days_left is not None and c.days_left < SAFE_DAYS),
    "verified": lambda c: len(c.unverified),
    "peer": lambda c: 1.0 if c.peer is None else 2.0 * (not c.peer),
    "cost": lambda c: _known_first(c.usd_per_month),
    "risk": lambda c: _known_first(c.forecast.within(12).probability if c.forecast else None),
    "score": lambda c: -max((s for name, s in c.scores.items() if name.startswith("MMLU")), default=-1.0),
    "latency": lambda c: _known_first(c.latency.total_s if c.latency else None),
    "energy": lambda c: _known_first(c.kwh_per_month[1] if c.kwh_per_month else None),
}


def _lock_in(catalog: Catalog, load: Workload) -> tuple[float, tuple[str, ...]]:
    """Share of calls that only one vendor's living models can take, and their needs.

    Only features that some source speaks of are looked at: one that nobody lists locks nobody in.
    """
    offers = [
        (m.vendor, m.features.value, m.inputs.value if m.inputs else frozenset({"text"}))
        for m in catalog
        if m.features and m.vendor not in RESELLERS and not m.retires
    ]
    spoken = frozenset[str]().union(*(features for _, features, _ in offers))
    locked = 0
    needs: dict[str, None] = {}
    for group in load.groups:
        wanted = group.features & spoken
        able = {v for v, features, inputs in offers if wanted <= features and group.modalities <= inputs}
        if len(able) == 1:
            locked += len(group)
            needs |= dict.fromkeys(sorted(wanted | (group.modalities - {"text"})))
    return (locked / len(load) if len(load) else 0.0), tuple(needs)


def _with_best_uses(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Candidates with the one thing each leads all others in, in the order a team would ask."""
    leads: dict[str, str] = {}
    for text, key in _LEADS:
        ranked = [(value, c) for c in candidates if (value := key(c)) is not None]
        if ranked:
            value, best = min(ranked, key=lambda pair: (pair[0], pair[1].model))
            leads.setdefault(best.model, text.format(abs(value)))
    return tuple(msgspec.structs.replace(c, best_use=leads.get(c.model, "")) for c in candidates)


_LEADS: tuple[tuple[str, Callable[[Candidate], float | None]], ...] = (
    ("bulk work: the cheapest for this traffic, ${:,.2f} a month", lambda c: c.usd_per_month),
    (
        "hard questions: the highest MMLU, {:.1f}",
        lambda c: -max((s for n, s in c.scores.items() if n.startswith("MMLU")), default=0.0) or None,
    ),
    (
        "long documents: the largest context, {:,.0f} tokens",
        lambda c: -c.context_window if c.context_window else None,
    ),
    (
        "long answers: the largest output, {:,.0f} tokens",
        lambda c: -c.output_limit if c.output_limit else None,
    ),
    (
        "people waiting: the fastest in your own traffic, {:.2f} s",
        lambda c: c.latency.total_s if c.latency else None,
    ),
    (
        "nightly jobs: the cheapest with batches, ${:,.2f} a month",
        lambda c: c.usd_per_month_batch,
    ),
    (
        "staying put: the least likely to retire within a year, {:.0%}",
        lambda c: c.forecast.within(12).probability if c.forecast else None,
    ),
    (
        "a small footprint: the least energy, up to {:.3g} kWh a month",
        lambda c: c.kwh_per_month[1] if c.kwh_per_month else None,
    ),
    (
        "owning it: open weights, the cheapest of them, ${:,.2f} a month",
        lambda c: c.usd_per_month if c.open_weights else None,
    ),
)
