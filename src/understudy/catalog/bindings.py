"""Where a model id is bound: every place that stops working, or changes, when the model does.

The config names models (aliases, weights, fallbacks, the judge, candidates, the teacher, what is served), so
do the routes of a rollout, applications that ask for a model's own id, and vendors that answer an undated id
with a dated one. It ignores when any of them ends (watch).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, Protocol
from urllib.parse import urlsplit

import msgspec

from understudy.catalog.facts import Catalog
from understudy.config import Config

Level = Literal[
    "alias",
    "weight",
    "fallback",
    "trial",
    "judge",
    "candidate",
    "teacher",
    "served",
    "requested",
    "answering",
]
"""trial: a rollout lets it answer beside the alias's model; candidate: of the drill; teacher: `[own]` distils
from it; served: `[serve]` runs it; requested: an application asks for the id itself; answering: the vendor
answers the target with it."""


class Binding(msgspec.Struct, frozen=True):
    """One place that names a model."""

    name: str
    """The alias, the section of the config, or the id that applications ask for."""
    target: str
    """ENDPOINT/MODEL; of a teacher its Hub id or file."""
    level: Level
    kept: bool = False
    """A file of your own: nobody can retire it."""


class Led(Protocol):
    """Where a rollout leads an alias; a `traffic.store.Route` is one."""

    @property
    def model(self) -> str: ...
    @property
    def fallback(self) -> Sequence[str]: ...
    @property
    def candidate(self) -> str: ...


class Answers(Protocol):
    """Who answered for one target; a `traffic.store.AnsweredBy` is one."""

    @property
    def target(self) -> str: ...
    @property
    def answered_by(self) -> str: ...
    @property
    def calls(self) -> int: ...
    @property
    def first_at(self) -> float: ...
    @property
    def last_at(self) -> float: ...


class Fingerprinted(Answers, Protocol):
    """With which fingerprint; a `traffic.fingerprints.Fingerprint` is one."""

    @property
    def fingerprint(self) -> str: ...


def bindings_of(
    config: Config, routes: Mapping[str, Led], requested: Iterable[tuple[str, str]]
) -> list[Binding]:
    """Where models are bound: by the config, by ``routes`` (alias to where a rollout leads it, which replaces
    what the config says of it), and by applications.

    ``requested`` are the pairs of name asked for and target seen in traffic; those that are no alias count.
    """
    known = {*config.aliases, *routes}
    asked = [Binding(name, target, "requested") for name, target in requested if name not in known]
    return list(dict.fromkeys([*_aliases(config, routes), *_sections(config), *asked]))


def answering(catalog: Catalog, bindings: Iterable[Binding], answers: Iterable[Answers]) -> list[Binding]:
    """The ids by which bound targets answer now, where the catalog knows them as models of their own: an
    undated id may go on while the dated one behind it ends."""
    latest: dict[str, Answers] = {}
    for told in answers:
        if told.target not in latest or told.last_at > latest[told.target].last_at:
            latest[told.target] = told
    found: list[Binding] = []
    for target in dict.fromkeys(b.target for b in bindings if b.target in latest):
        dated = f"{target.partition('/')[0]}/{latest[target].answered_by}"
        facts, behind = catalog.find(target), catalog.find(dated)
        if behind is not None and (facts is None or behind.id != facts.id):
            found.append(Binding(target, dated, "answering"))
    return found


def _aliases(config: Config, routes: Mapping[str, Led]) -> Iterator[Binding]:
    for name, alias in config.aliases.items():
        if name not in routes:
            yield Binding(name, alias.model, "alias")
            yield from (Binding(name, t, "weight") for t in alias.weights if t != alias.model)
            yield from (Binding(name, t, "fallback") for t in alias.fallback)
    for name, route in routes.items():
        yield Binding(name, route.model, "alias")
        yield from (Binding(name, t, "fallback") for t in route.fallback)
        if route.candidate:
            yield Binding(name, route.candidate, "trial")


def _sections(config: Config) -> Iterator[Binding]:
    yield from (Binding("drill", t, "candidate") for t in config.drill.candidates)
    if config.rollout and config.rollout.judge:
        yield Binding("rollout", config.rollout.judge, "judge")
    if config.evaluate.judge:
        yield Binding("evaluate", config.evaluate.judge, "judge")
    if teacher := config.own.teacher:
        kept = teacher.startswith("package:") or config.path(teacher).exists()
        yield Binding("own", teacher, "teacher", kept)
    server = _server(config)
    yield from (Binding("serve", f"{server}/{name}", "served", kept=True) for name in config.serve.models)


def _server(config: Config) -> str:
    """The endpoint that reaches `[serve]`, by its address; ``serve`` where none does."""
    places = {name: urlsplit(e.base_url).netloc for name, e in config.endpoints.items()}
    return next((name for name, place in places.items() if place == config.serve.listen), "serve")
