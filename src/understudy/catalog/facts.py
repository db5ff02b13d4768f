"""What is known of models, each fact with its source and the day it was read.

Facts come from one YAML per vendor in ``data/`` and from the user's own overlay. Sources may disagree: all
claims are kept, and `choose` says by which rule one is believed. It ignores money (prices), the user's
bindings (watch) and the user's traffic (plan).
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast

import msgspec

from understudy.catalog.documents import document_of, shipped_documents
from understudy.config import Config
from understudy.errors import InputError
from understudy.protocol import Modality

T = TypeVar("T")
DATA = Path(__file__).parent / "data"
SNAPSHOT_STALE_DAYS = 30
ENDING = frozenset({"deprecating", "deprecated"})
"""Words of Azure's ``lifecycle_status`` for a model that will end."""
OVERLAY = "overlay"
"""Name of the source that beats all others: the user's own file."""

RULE = (
    "the overlay first; then the claim read last; then the more cautious one: the earlier date, the smaller "
    "limit, the higher price; features are what any source says a model has, and what one denies and none "
    "says it has is lacking"
)
"""How one claim is believed where sources disagree."""

Feature = Literal[
    "tools", "json_schema", "json_object", "logprobs", "caching", "batch", "reasoning", "stream",
    "fine_tuning",
]  # fmt: skip


class Claim(msgspec.Struct, Generic[T], frozen=True, gc=False):
    """What one source says."""

    value: T
    source: str
    read: str
    """Day (ISO 8601) on which the source said so."""


class Fact(msgspec.Struct, Generic[T], frozen=True, gc=False):
    """The claim believed, and all that were made."""

    value: T
    source: str
    read: str
    claims: tuple[Claim[T], ...]

    @property
    def disputed(self) -> bool:
        """Whether sources contradict each other."""
        return any(claim.value != self.value for claim in self.claims)

    @property
    def estimated(self) -> bool:
        """Whether it is an outsider's estimate: nobody who knows has published it."""
        return self.source.endswith("-estimate")


class Details(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """USD per million tokens of particular kinds."""

    cached: float | None = None
    """Of prompt tokens read from a cache; None: as ``input``."""
    cached_audio: float | None = None
    """Of sound read from a cache; None: as ``input_audio`` where that is told, else as ``cached``."""
    cache_write: float | None = None
    """Of prompt tokens written to a cache for minutes; None: as ``input``."""
    cache_write_1h: float | None = None
    """Of prompt tokens written to a cache for an hour; None: as ``cache_write``."""
    input_audio: float | None = None
    output_audio: float | None = None
    reasoning: float | None = None
    """Of answer tokens that are thought, not said; None: as ``output``."""


class Batch(Details, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """What a vendor's batch API takes."""

    input: float
    output: float


class LongPrompts(Details, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """What all tokens of a call cost whose prompt is longer than ``above`` tokens."""

    above: int
    input: float
    output: float


class ListPrice(Details, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """A price in USD per million tokens, from a day on."""

    input: float
    output: float
    start: dt.date | None = None
    """Day from which it holds; None: since ever, as far as the source says."""
    tiers: tuple[LongPrompts, ...] = ()
    batch: Batch | None = None
    """None: there is none, or nobody tells its price."""


class Hosting(msgspec.Struct, frozen=True, kw_only=True):
    """What running a model oneself costs."""

    usd_per_hour: float
    tokens_per_s: float
    """Generated tokens per second, all slots together, measured under your load."""


class Energy(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a million answer tokens take, from the lower to the upper end of the estimate."""

    kwh: tuple[float, float]
    kg_co2e: tuple[float, float]
    """Use and the hardware's share, in kilograms of CO2 equivalent."""


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All that is known of one model; None where nobody says."""

    id: str
    """VENDOR/MODEL, or ENDPOINT/MODEL for one the overlay adds."""
    names: tuple[str, ...] = ()
    """Other ids by which the vendor's API knows it."""
    context_window: Fact[int] | None = None
    """Tokens of prompt and answer together, or of the prompt where the vendor counts so."""
    output_limit: Fact[int] | None = None
    """Most tokens of one answer."""
    inputs: Fact[frozenset[Modality]] | None = None
    outputs: Fact[frozenset[Modality]] | None = None
    features: Fact[frozenset[str]] | None = None
    """Of `Feature`. A list in the overlay is complete; a source's silence on a feature says nothing."""
    lacks: Fact[frozenset[str]] | None = None
    """Features that a source says it has not; ``temperature``: sampling cannot be tuned."""
    regions: Fact[frozenset[str]] | None = None
    """Where the vendor serves it, by the vendor's own names."""
    tokens_per_minute: Fact[int] | None = None
    """Most the vendor lets you use, by your contract: from the overlay."""
    purpose: Fact[str] | None = None
    """chat, or what else it is made for; from the overlay, where the words of its id mislead (purpose)."""
    tokenizer: Fact[str] | None = None
    """Your own copy of its tokenizer (tokenizer.json): with it, calls are counted instead of bounded."""
    prices: Fact[tuple[ListPrice, ...]] | None = None
    hosting: Fact[Hosting] | None = None
    energy: Fact[Energy] | None = None
    parameters: Fact[int] | None = None
    active_parameters: Fact[int] | None = None
    """Used for one token, where fewer than all."""
    architecture: Fact[str] | None = None
    """dense or moe."""
    licence: Fact[str] | None = None
    """SPDX id or the licence's name."""
    open_weights: Fact[bool] | None = None
    released: Fact[dt.date] | None = None
    deprecated: Fact[dt.date] | None = None
    """Day the vendor said that it will end."""
    retires: Fact[dt.date] | None = None
    """Day from which calls fail."""
    lifecycle: Fact[str] | None = None
    """Where it stands by its vendor's own word: preview, generally-available, deprecating, deprecated."""
    successor: Fact[str] | None = None
    """What the vendor names as replacement."""
    scores: dict[str, Fact[float]] = {}
    """Public benchmark to score in percent."""

    @property
    def ending(self) -> Fact[dt.date] | Fact[str] | None:
        """What says that it will end, the most telling first; None where nothing does."""
        said_so = self.lifecycle if self.lifecycle and self.lifecycle.value in ENDING else None
        return self.retires or self.deprecated or said_so

    @property
    def vendor(self) -> str:
        return self.id.partition("/")[0]

    @property
    def model(self) -> str:
        """The id without its vendor: what requests name."""
        return self.id.partition("/")[2]


class Catalog:
    """Every model known, found by the ids people and configs use."""

    def __init__(self, models: Iterable[ModelFacts], read: dt.date) -> None:
        self._models = {m.id: m for m in models}
        self.read = read
        """Day of the snapshot."""

    def __len__(self) -> int:
        return len(self._models)

    def __contains__(self, name: str) -> bool:
        """Whether exactly this id is known."""
        return name in self._models

    def __iter__(self) -> Iterator[ModelFacts]:
        return iter(self._models.values())

    def find(self, name: str) -> ModelFacts | None:
        """A model by VENDOR/MODEL, ENDPOINT/MODEL or MODEL; None for one nobody told us of.

        An endpoint's name need not be the vendor's: ``prod-eu/gpt-4.1`` is the one model called gpt-4.1. A
        dated id that is not known itself (gpt-4.1-2025-04-14) stands for its undated family; an undated one
        is never taken for a dated one. One of your own fine-tuned models (ft:gpt-4.1-2025-04-14:acme::id) is
        what is known of fine-tuned forms of its base, or of the base.
        """
        if name in self._models:
            return self._models[name]
        bare = name.partition("/")[2] if "/" in name else name
        tuned = bare.split(":")[:2] if bare.startswith("ft:") else []
        for candidate in dict.fromkeys(
            (name, bare, family_of(name), family_of(bare), ":".join(tuned), *tuned[1:])
        ):
            if candidate in self._by_name:
                return self._by_name[candidate]
        return None

    @cached_property
    def _by_name(self) -> dict[str, ModelFacts]:
        by_name: dict[str, ModelFacts] = {}
        for model in self:
            for name in (model.id, model.model, *model.names):
                by_name.setdefault(name, model)  # vendors come before those who resell them
        return by_name

    def stale_days(self, today: dt.date) -> int:
        """Age of the snapshot beyond what is healthy, in days; 0 while it is fresh."""
        age = (today - self.read).days
        return age if age > SNAPSHOT_STALE_DAYS else 0


_DATED = re.compile(r"-(20\d{2}-\d{2}-\d{2}|20\d{6}|\d{4})$")
"""The date at the end of an id: 2025-04-14, 20250414, or month and day (0613)."""


def family_of(name: str) -> str:
    """The id without the date at its end: gpt-4.1 for gpt-4.1-2025-04-14."""
    return _DATED.sub("", name)


def load_catalog(overlay: Path | None = None, live: Path | None = None) -> Catalog:
    """The snapshot shipped with Understudy, with what vendors' own lists said (``live``, if the file exists)
    and the user's overlay on top. Needs no network.

    Raises InputError naming a file's first fault: syntax, an unknown field, a value of the wrong type.
    """
    paths = sorted(DATA.glob("*.yaml"), key=lambda p: (p.stem in RESELLERS, p.stem))
    parsed, read = _snapshot(tuple((path, path.stat().st_mtime_ns) for path in paths))
    table = {name: {field: list(said) for field, said in claims.items()} for name, claims in parsed.items()}
    if live is not None and live.exists():
        _add_live(table, live)
    _inherit_ends(table)
    if overlay is not None:
        _add_overlay(table, overlay)
    return Catalog((_model(name, claims) for name, claims in table.items()), read)


@lru_cache(maxsize=2)
def _snapshot(files: tuple[tuple[Path, int], ...]) -> tuple[dict[str, dict[str, list[Claim[Any]]]], dt.date]:
    """Claims of the files, each with its time of change, and the day the last of them was read."""
    table: dict[str, dict[str, list[Claim[Any]]]] = {}
    read = dt.date.min
    for stem, document in shipped_documents([path for path, _ in files]):
        read = max(read, *(_date(s["read"]) for s in document["sources"].values()))
        _add_snapshot(table, document, stem)
    return table, read


MIXED = frozenset({"benchmarks", "finetuning", "releases", "live"})
"""Files with facts about models of many vendors."""
RESELLERS = frozenset({"azure", "bedrock", "vertex"})
"""Vendors who serve models of others: asked last when a bare model id is looked up."""


def choose(claims: Iterable[Claim[T]]) -> Fact[T]:
    """The claim to believe, by `RULE`."""
    ordered = tuple(sorted(claims, key=_trust, reverse=True))
    latest = [c for c in ordered if _trust(c) == _trust(ordered[0])]
    best = min(latest, key=_boldness)
    return Fact(best.value, best.source, best.read, ordered)


def _trust(claim: Claim[Any]) -> tuple[bool, str]:
    return (claim.source.startswith(OVERLAY), claim.read)


def _boldness(claim: Claim[Any]) -> Any:
    value = claim.value
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, dt.date):
        return value.toordinal()
    if isinstance(value, frozenset):
        return len(cast(frozenset[str], value))
    if isinstance(value, tuple):
        return -cast(tuple[ListPrice, ...], value)[-1].input
    return 0


_FIELDS: dict[str, Any] = {
    "names": list[str],
    "context_window": int,
    "output_limit": int,
    "inputs": frozenset[Modality],
    "outputs": frozenset[Modality],
    "features": frozenset[Feature],
    "lacks": frozenset[str],
    "regions": frozenset[str],
    "tokens_per_minute": int,
    "purpose": str,
    "tokenizer": str,
    "prices": tuple[ListPrice, ...],
    "hosting": Hosting,
    "energy": Energy,
    "parameters": int,
    "active_parameters": int,
    "architecture": Literal["dense", "moe"],
    "licence": str,
    "open_weights": bool,
    "released": dt.date,
    "deprecated": dt.date,
    "retires": dt.date,
    "lifecycle": str,
    "successor": str,
    "scores": dict[str, float],
}


def _add_snapshot(table: dict[str, Any], document: Mapping[str, Any], vendor: str) -> None:
    sources = document["sources"]
    for model, fields in document["models"].items():
        # a file that is no vendor's names models in full
        claims = table.setdefault(model if vendor in MIXED else f"{vendor}/{model}", {})
        for field, said in fields.items():
            # "read" beside a source's value is the day that very fact was checked, where the source tells
            for source, value in said.items():
                read = str(sources[source]["read"])
                claims.setdefault(field, []).append(_claim(field, value, source, read))


def _add_live(table: dict[str, Any], path: Path) -> None:
    try:
        _add_snapshot(table, document_of(path), "live")
    except (KeyError, TypeError, AttributeError, msgspec.ValidationError) as error:
        raise InputError(
            f"{path} is not what `understudy models --refresh` writes: {error}",
            expected="sources: and models:",
            next_step=f"rm {path}, then understudy models --refresh",
        ) from error


def catalog_of(config: Config) -> Catalog:
    """The catalog as a config asks for it: with its overlay and the vendors' lists it has read. Raises
    InputError as `load_catalog` does."""
    overlay = config.path(config.catalog.overlay) if config.catalog.overlay else None
    return load_catalog(overlay, config.path(config.catalog.live) if config.catalog.live else None)


def _claim(field: str, value: Any, source: str, read: str) -> Claim[Any]:
    if isinstance(value, dict) and "value" in value:
        told = cast(dict[str, Any], value)
        return Claim(_converted(field, told["value"]), source, str(told.get("read", read)))
    return Claim(_converted(field, value), source, read)


def _inherit_ends(table: dict[str, dict[str, list[Claim[Any]]]]) -> None:
    """An undated id stands for its newest dated form: where only that one has an end, it is the id's too.
    Fine-tuned forms end with their base."""
    newest: dict[str, str] = {}
    for name in sorted(table):
        if (family := family_of(name)) != name and "/ft:" not in name:
            newest[family] = name
    newest |= {name: name.replace("/ft:", "/") for name in table if "/ft:" in name}
    for heir, other in newest.items():
        if heir in table and other in table and not table[heir].keys() & {"deprecated", "retires"}:
            _inherit_end(table[heir], table[other], other)


def _inherit_end(heir: dict[str, list[Claim[Any]]], other: Mapping[str, list[Claim[Any]]], name: str) -> None:
    for field in ("deprecated", "retires", "successor"):
        if said := other.get(field):
            heir[field] = [msgspec.structs.replace(c, source=f"{c.source}, of {name}") for c in said]


def _add_overlay(table: dict[str, Any], path: Path) -> None:
    document = document_of(path)
    models = document.get("models")
    if not isinstance(models, dict):
        raise InputError(
            f"{path} has no models", expected="models: with an entry ENDPOINT/MODEL: for each", next_step=_HOW
        )
    read = str(document.get("read") or dt.date.fromtimestamp(path.stat().st_mtime))
    for model, fields in cast(dict[str, dict[str, Any]], models).items():
        claims = table.setdefault(str(model), {})
        for field, value in (fields or {}).items():
            claims.setdefault(field, []).append(_overlay_claim(path, str(model), field, value, read))


_HOW = "see `understudy models --help` for the fields an overlay may have"


def _overlay_claim(path: Path, model: str, field: str, value: Any, read: str) -> Claim[Any]:
    try:
        if field == "prices":
            listed = cast(list[Any], [value] if isinstance(value, dict) else value)
            value = [_in_usd(price, f"{path}: {model}") for price in listed]
        return Claim(_converted(field, value), f"{OVERLAY} {path.name}", read)
    except (KeyError, msgspec.ValidationError) as error:
        expected = f"one of {', '.join(_FIELDS)}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{path}: {model}: {field}: {value!r}", expected=expected, next_step=_HOW) from error


def _in_usd(price: Any, where: str) -> Any:
    """A price of the overlay in USD: one in another ``currency`` says what one unit is worth (``rate``)."""
    if not isinstance(price, dict):
        return price
    told = cast(dict[str, Any], price)
    currency, rate = (
        str(told.get("currency", "USD")),
        told.get("rate", 1.0 if "currency" not in told else None),
    )
    if currency == "USD":
        rate = 1.0
    if not isinstance(rate, (int, float)) or rate <= 0:
        raise InputError(
            f"{where}: prices: in {currency} without a rate",
            expected="rate: the USD that one unit is worth, on a day you choose",
            next_step=f"add rate: 1.08 (for example) beside currency: {currency}",
        )
    return _times({k: v for k, v in told.items() if k not in ("currency", "rate")}, rate)


def _times(price: Any, rate: float) -> Any:
    """Every amount of a price, its tiers and its batches included, times ``rate``."""
    if isinstance(price, list):
        return [_times(part, rate) for part in cast(list[Any], price)]
    if not isinstance(price, dict):
        return price
    amounts = {*Details.__struct_fields__, "input", "output"}
    return {
        k: v * rate if k in amounts and isinstance(v, (int, float)) else _times(v, rate)
        for k, v in cast(dict[str, Any], price).items()
    }


def _converted(field: str, value: Any) -> Any:
    return msgspec.convert(value, _FIELDS[field], strict=False)


def _model(name: str, claims: Mapping[str, list[Claim[Any]]]) -> ModelFacts:
    values: dict[str, Any] = {
        field: choose(said) for field, said in claims.items() if field not in ("names", "scores")
    }
    for field in ("features", "lacks"):
        if said := claims.get(field):
            values[field] = _together(said)
    if (lacks := values.get("lacks")) and (has := values.get("features")):
        values["lacks"] = msgspec.structs.replace(lacks, value=lacks.value - has.value)
    if "released" not in values and (day := _day_in(name)):
        values["released"] = choose([Claim(day, "the day in its id", str(day))])
    names = tuple(n for claim in claims.get("names", []) for n in claim.value)
    return ModelFacts(id=name, names=names, scores=_scores(claims.get("scores", [])), **values)


def _together(said: list[Claim[frozenset[str]]]) -> Fact[frozenset[str]]:
    """What any source says: silence on a feature is no claim. The overlay's list stands alone."""
    fact = choose(said)
    if fact.source.startswith(OVERLAY):
        return fact
    has = frozenset[str]().union(*(c.value for c in said))
    sources = ", ".join(dict.fromkeys(c.source for c in said))
    return Fact(has, sources, fact.read, fact.claims)


_WHOLE_DAY = re.compile(r"-(?P<year>20\d\d)-?(?P<month>\d\d)-?(?P<day>\d\d)$")
_MONTH = re.compile(r"-(?P<month>0[1-9]|1[0-2])-(?P<year>20\d\d)$")
_SHORT_MONTH = re.compile(r"^mistral/.*-(?P<year>2\d)(?P<month>0[1-9]|1[0-2])$")
"""Mistral's ids end in year and month."""


def _day_in(name: str) -> dt.date | None:
    """The day in an id (gpt-4.1-2025-04-14): vendors date a snapshot by its release. A month begins with its
    first day."""
    found = next((m for rule in (_WHOLE_DAY, _MONTH, _SHORT_MONTH) if (m := rule.search(name))), None)
    if found is None:
        return None
    told = found.groupdict("1")
    try:
        return dt.date(int(told["year"]) % 2000 + 2000, int(told["month"]), int(told.get("day", 1)))
    except ValueError:
        return None


def _scores(said: Iterable[Claim[dict[str, float]]]) -> dict[str, Fact[float]]:
    by_benchmark: dict[str, list[Claim[float]]] = {}
    for claim in said:
        for benchmark, score in claim.value.items():
            by_benchmark.setdefault(benchmark, []).append(Claim(score, claim.source, claim.read))
    return {benchmark: choose(claims) for benchmark, claims in by_benchmark.items()}


def _date(value: object) -> dt.date:
    return msgspec.convert(value, dt.date, strict=False)
