"""What a call costs: the user's own prices first, then genai-prices, then the catalog's snapshot.

A model's price at a day becomes `Rates`, a few numbers; everything that costs is computed from them, one call
or a hundred thousand. A model at an endpoint that is no known vendor's has no price unless the overlay gives
one: a guess would look like a fact. It ignores tools billed by use (web searches, code runs).
"""

from __future__ import annotations

import datetime as dt
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from functools import cache, lru_cache
from importlib.metadata import version
from operator import mul
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from understudy.catalog.facts import OVERLAY, Catalog, Details, Hosting, ListPrice, ModelFacts
from understudy.protocol import Cost, Usage

if TYPE_CHECKING:
    from genai_prices.types import ModelInfo, ModelPrice, Provider, TieredPrices

    from understudy.config import Endpoint


class Tier(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """USD per million tokens of a call whose prompt is longer than ``above`` tokens."""

    above: int = 0
    input: float
    output: float
    cached: float
    cached_audio: float
    cache_write: float
    cache_write_1h: float
    input_audio: float
    output_audio: float
    reasoning: float

    @property
    def row(self) -> tuple[float, ...]:
        """The prices in the order of `Sums`."""
        return (
            self.input,
            self.cached,
            self.cached_audio,
            self.cache_write,
            self.cache_write_1h,
            self.input_audio,
            self.output,
            self.reasoning,
            self.output_audio,
        )

    @property
    def uncached(self) -> Tier:
        """The same prices where nothing is read from or written to a cache."""
        return msgspec.structs.replace(
            self,
            cached=self.input,
            cached_audio=self.input_audio,
            cache_write=self.input,
            cache_write_1h=self.input,
        )

    @property
    def unasked(self) -> Tier:
        """The same prices where prompts cost nothing."""
        return msgspec.structs.replace(
            self,
            input=0.0,
            cached=0.0,
            cached_audio=0.0,
            cache_write=0.0,
            cache_write_1h=0.0,
            input_audio=0.0,
        )


class Rates(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A model's price at some day. The highest tier whose bound a prompt exceeds holds for the call."""

    tiers: tuple[Tier, ...]
    """By rising bound, the first with bound 0."""
    per_call: float = 0.0
    """USD for the call itself."""
    start: str = ""
    """Day (ISO 8601) from which the price holds; empty where the source names none."""
    source: str = ""


class Sums(NamedTuple):
    """Tokens by the price they have; each token is in exactly one."""

    plain: int
    cached: int
    cached_audio: int
    cache_write: int
    """Kept for minutes."""
    cache_write_1h: int
    heard: int
    said: int
    thought: int
    spoken: int


def is_detailed(usage: Usage) -> bool:
    """Whether a call has tokens of other prices than plain, cached and said."""
    return bool(usage.cache_write_tokens or usage.audio_tokens or usage.reasoning_tokens)


def sums_of(usage: Usage) -> Sums:
    """The tokens of one call by price: details are taken out of the count that includes them.

    Where a vendor does not say how many cached tokens are sound, as few are taken for it as fit into the
    prompt: sound costs more, and a cache makes it cheaper.
    """
    prompt, cached, written = usage.prompt_tokens, usage.cached_tokens, usage.cache_write_tokens
    if not is_detailed(usage):  # most calls
        return Sums(max(0, prompt - cached), cached, 0, 0, 0, 0, usage.completion_tokens, 0, 0)
    sound = usage.audio_tokens - usage.output_audio_tokens
    both = 0
    if sound and cached:
        both = min(max(usage.cached_audio_tokens, cached + written + sound - prompt, 0), cached, sound)
    hour = min(usage.cache_write_1h_tokens, written) if written else 0
    return Sums(
        max(0, prompt - cached - written - sound + both),
        cached - both,
        both,
        written - hour,
        hour,
        sound - both,
        max(0, usage.completion_tokens - usage.output_audio_tokens - usage.reasoning_tokens),
        usage.reasoning_tokens,
        usage.output_audio_tokens,
    )


def tier_usd(tokens: Sums, tier: Tier) -> float:
    """USD for tokens that are all charged in one tier."""
    return sum(map(mul, tokens, tier.row)) / 1e6


def charge(rates: Rates, usage: Usage) -> float:
    """USD for one call."""
    tier = rates.tiers[0]
    for higher in rates.tiers[1:]:
        if usage.prompt_tokens > higher.above:
            tier = higher
    return tier_usd(sums_of(usage), tier) + rates.per_call


def cost(
    catalog: Catalog,
    model: str,
    usage: Usage,
    at: float,
    *,
    context: Mapping[str, str] | None = None,
) -> Cost | None:
    """Cost of one call to ``model`` (VENDOR/MODEL or a target the overlay knows) at ``at`` (Unix seconds).

    ``context`` selects a price variant as genai-prices names it: {"processing": "batch"}, {"service_tier":
    "flex"}. None when nobody tells a price.
    """
    rates = rates_at(catalog, model, at, context=context)
    return None if rates is None else Cost(charge(rates, usage), rates.start, rates.source)


def rates_at(
    catalog: Catalog, model: str, at: float, *, context: Mapping[str, str] | None = None
) -> Rates | None:
    """The price of ``model`` at a moment, from the first of: overlay, genai-prices, snapshot."""
    facts = catalog.find(model)
    day = dt.datetime.fromtimestamp(at, dt.UTC)
    batch = (context or {}).get("processing") == "batch"
    own = facts and _overlay_rates(facts, day.date(), batch)
    if own:
        return own
    asked = (at - at % 3600, tuple(sorted((context or {}).items())))
    # the id as asked for first: a dated id may have a price of its own, and a reseller has its own
    vendor = _vendor_rates(model, *asked) or (_vendor_rates(facts.id, *asked) if facts else None)
    special = any(value != "default" for value in (context or {}).values())
    if vendor or facts is None or facts.prices is None or (special and not batch):
        return vendor
    return _listed(facts.prices.value, day.date(), f"{facts.prices.source}, read {facts.prices.read}", batch)


class Billable(Protocol):
    """What a price depends on; a `traffic.record.Call` is one."""

    @property
    def target(self) -> str: ...
    @property
    def usage(self) -> Usage | None: ...
    @property
    def at(self) -> float: ...
    @property
    def tags(self) -> Mapping[str, str]: ...
    @property
    def response(self) -> bytes: ...


def pricer(
    catalog: Catalog, endpoints: Mapping[str, Endpoint] | None = None
) -> Callable[[Billable], Cost | None]:
    """The price function for `traffic.indexer.Indexer`: takes a recorded call, gives its cost or None.

    ``endpoints`` (``config.endpoints``) tell which vendor is behind a target by its URL; without them an
    endpoint must be called as the vendor is. A call's tags ``processing`` and ``service_tier`` select the
    price variant (batch, flex); without a tag, the service tier that the answer names does.
    """
    vendors = {name: vendor_of_url(e.base_url) for name, e in (endpoints or {}).items()}

    def price(call: Billable) -> Cost | None:
        if call.usage is None:
            return None
        endpoint, _, model = call.target.partition("/")
        vendor = vendors[endpoint] if endpoint in vendors else _VENDORS.get(endpoint, "")
        if not vendor and not _priced_by_overlay(catalog, call.target):
            return None
        name = call.target if _priced_by_overlay(catalog, call.target) else f"{vendor}/{model}"
        context = {k: call.tags[k] for k in ("processing", "service_tier") if k in call.tags}
        if "service_tier" not in context and (told := _SERVICE_TIER.findall(call.response)):
            context["service_tier"] = told[-1].decode()
        return cost(catalog, name, call.usage, call.at, context=context)

    return price


_SERVICE_TIER = re.compile(rb'"service_tier"\s*:\s*"(\w+)"')
"""In the answer's own frame: inside a message's text the quotes would be escaped."""

# vendor as the catalog and configs call it -> id in genai-prices
_PROVIDERS = {
    "anthropic": "anthropic",
    "azure": "azure",
    "bedrock": "aws",
    "cohere": "cohere",
    "deepseek": "deepseek",
    "fireworks": "fireworks",
    "google": "google",
    "groq": "groq",
    "mistral": "mistral",
    "moonshot": "moonshotai",
    "openai": "openai",
    "openrouter": "openrouter",
    "perplexity": "perplexity",
    "together": "together",
    "xai": "x-ai",
    "zai": "zai",
}
_VENDORS = {**{v: v for v in _PROVIDERS}, "gemini": "google", "vertex": "google", "x-ai": "xai"}


def vendor_of_url(url: str) -> str:
    """The catalog's vendor behind a base URL; empty for one nobody sells."""
    found = next((p for p in _snapshot() if _reaches(p, url)), None)
    if found is None:
        return ""
    return next((v for v, provider in _PROVIDERS.items() if provider == found.id), found.id)


def _reaches(provider: Provider, url: str) -> bool:
    return bool(re.match(provider.api_pattern, url))


@lru_cache(maxsize=1)
def _snapshot() -> list[Provider]:
    from genai_prices.data_snapshot import get_snapshot

    return get_snapshot().providers


@lru_cache(maxsize=16_384)
def _vendor_rates(name: str, at: float, context: tuple[tuple[str, str], ...]) -> Rates | None:
    """genai-prices' price of VENDOR/MODEL; hours are fine enough for prices that differ by time of day."""
    info = priced_model(name)
    if info is None:
        return None
    moment = dt.datetime.fromtimestamp(at, dt.UTC)
    price = info.get_prices(moment, dict(context))
    if price.input_mtok is None or price.output_mtok is None:
        return None  # sold by the hour, the page or the character
    return Rates(
        tiers=_tiers(price),
        per_call=_base(price.requests_kcount) / 1000,
        start=_start(info, moment),
        source=_genai_prices(),
    )


@lru_cache(maxsize=16_384)
def priced_model(name: str) -> ModelInfo | None:
    """genai-prices' entry for VENDOR/MODEL: the one that its own ``find_model`` finds, sooner."""
    vendor, _, model = name.partition("/")
    provider_id = _PROVIDERS.get(vendor, vendor)
    provider = next((p for p in _snapshot() if p.id == provider_id), None)
    if provider is None or not model:
        return None
    asked = model.lower()
    for seller in (provider_id, *(provider.fallback_model_providers or ())):
        if found := _sold(seller, asked):
            return found
    # genai-prices also tries dates written otherwise
    return provider.find_model(asked, all_providers=_snapshot()) if _COMPACT_DAY.search(asked) else None


def _sold(provider_id: str, asked: str) -> ModelInfo | None:
    """The first of a provider's own models that ``asked`` matches."""
    shelf = _shelf_of(provider_id)
    place, found = shelf.named.get(asked, (sys.maxsize, None))
    for before, info in shelf.matched:
        if before > place:
            break
        if info.match.is_match(asked):
            return info
    return found


_COMPACT_DAY = re.compile(r"\d{8}")


class _Shelf(NamedTuple):
    """A provider's models with their places in its list: a look-up where genai-prices compares one by one."""

    named: dict[str, tuple[int, ModelInfo]]
    """By a name that is all the match asks for."""
    matched: list[tuple[int, ModelInfo]]
    """Whose match asks for more."""


@cache
def _shelf_of(provider_id: str) -> _Shelf:
    shelf = _Shelf({}, [])
    for place, info in enumerate(next(p.models for p in _snapshot() if p.id == provider_id)):
        names = _names(info.match)
        for name in names:
            shelf.named.setdefault(name, (place, info))
        if not names:
            shelf.matched.append((place, info))
    return shelf


def _names(match: object) -> frozenset[str]:
    from genai_prices.types import ClauseEquals, ClauseOr

    if isinstance(match, ClauseEquals):
        return frozenset({match.equals.lower()})
    if isinstance(match, ClauseOr) and all(isinstance(clause, ClauseEquals) for clause in match.or_):
        return frozenset(clause.equals.lower() for clause in match.or_ if isinstance(clause, ClauseEquals))
    return frozenset()


@cache
def _genai_prices() -> str:
    return f"genai-prices {version('genai-prices')}"


def _tiers(price: ModelPrice) -> tuple[Tier, ...]:
    named = (
        price.input_mtok,
        price.output_mtok,
        price.cache_read_mtok,
        price.cache_audio_read_mtok,
        price.cache_write_mtok,
        price.cache_write_1h_mtok,
        price.input_audio_mtok,
        price.output_audio_mtok,
        price.output_reasoning_mtok,
    )
    bounds = {0, *(tier.start for p in named for tier in getattr(p, "tiers", ()))}
    return tuple(_tier(price, bound) for bound in sorted(bounds))


def _tier(price: ModelPrice, above: int) -> Tier:
    def told(special: Decimal | TieredPrices | None) -> float | None:
        return None if special is None else _base(special, above)

    return _filled(
        above,
        _base(price.input_mtok, above),
        _base(price.output_mtok, above),
        Details(
            cached=told(price.cache_read_mtok),
            cached_audio=told(price.cache_audio_read_mtok),
            cache_write=told(price.cache_write_mtok),
            cache_write_1h=told(price.cache_write_1h_mtok),
            input_audio=told(price.input_audio_mtok),
            output_audio=told(price.output_audio_mtok),
            reasoning=told(price.output_reasoning_mtok),
        ),
    )


def _filled(above: int, entry: float, answer: float, told: Details) -> Tier:
    """A tier in which nothing is left open: what has no price of its own has that of its kind."""
    cached = _or(told.cached, entry)
    written = _or(told.cache_write, entry)
    sound = _or(told.input_audio, entry)
    return Tier(
        above=above,
        input=entry,
        output=answer,
        cached=cached,
        # sound of which no cached price is told: nobody says that a cache makes it cheaper
        cached_audio=_or(told.cached_audio, cached if told.input_audio is None else sound),
        cache_write=written,
        cache_write_1h=_or(told.cache_write_1h, written),
        input_audio=sound,
        output_audio=_or(told.output_audio, answer),
        reasoning=_or(told.reasoning, answer),
    )


def _or(special: float | None, usual: float) -> float:
    return usual if special is None else special


def _base(price: Decimal | TieredPrices | None, above: int = 0) -> float:
    if price is None:
        return 0.0
    if isinstance(price, Decimal):
        return float(price)
    value = price.base
    for tier in price.tiers:
        if tier.start <= above and above:
            value = tier.price
    return float(value)


def _start(info: ModelInfo, at: dt.datetime) -> str:
    """Day from which the price in force at ``at`` holds; empty where none is named."""
    if not isinstance(info.prices, list):
        return ""
    for conditional in reversed(info.prices):
        if conditional.constraint is None or conditional.constraint.active(at):
            start = getattr(conditional.constraint, "start_date", None)
            return start.isoformat() if start else ""
    return ""


def _priced_by_overlay(catalog: Catalog, target: str) -> bool:
    facts = catalog.find(target) if target in catalog else None
    return facts is not None and _overlay_rates(facts, dt.date.max) is not None


def _overlay_rates(facts: ModelFacts, day: dt.date, batch: bool = False) -> Rates | None:
    if facts.prices and facts.prices.source.startswith(OVERLAY):
        return _listed(facts.prices.value, day, facts.prices.source, batch) or (
            _listed(facts.prices.value, day, facts.prices.source) if batch else None
        )
    if facts.hosting:
        return hosting_rates(facts.hosting.value, facts.hosting.source)
    return None


def hosting_rates(hosting: Hosting, source: str) -> Rates:
    """The price of running a model oneself: the machine's hour shared among the tokens it generates in it.

    The time spent on prompts is inside the measured tokens per second, so prompt tokens cost nothing apart.
    """
    output = hosting.usd_per_hour / 3600 / hosting.tokens_per_s * 1e6
    return Rates(tiers=(_filled(0, 0.0, output, Details()),), source=source)


def _listed(prices: Iterable[ListPrice], day: dt.date, source: str, batch: bool = False) -> Rates | None:
    """The last price that has begun; before the first, none. ``batch``: its price by batch, if it has one."""
    begun = [p for p in prices if p.start is None or p.start <= day]
    if not begun:
        return None
    price = max(begun, key=lambda p: p.start or dt.date.min)
    if batch and not price.batch:
        return None
    start = price.start.isoformat() if price.start else ""
    if batch and price.batch:
        tiers = (_filled(0, price.batch.input, price.batch.output, price.batch),)
    else:
        first = _filled(0, price.input, price.output, price)
        longer = sorted(price.tiers, key=lambda t: t.above)
        tiers = (first, *(_filled(t.above, t.input, t.output, t) for t in longer))
    return Rates(tiers=tiers, start=start, source=source)
