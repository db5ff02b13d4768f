"""From the name an application asks for to the targets that may answer, in order.

The config gives the first version of every alias; a route in the store replaces it and is followed within a
second. A table is never changed, only replaced whole, so a request sees one version of it. It ignores how a
target is reached (upstream).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from itertools import accumulate
from types import MappingProxyType
from typing import NamedTuple, Protocol

import msgspec

from understudy.config import Alias, Config
from understudy.forms.rules import NONE, Rules, rules_of
from understudy.gateway.refusal import Refusal
from understudy.gateway.upstream import Upstream


class RouteRow(Protocol):
    """The part of a store's route that routing reads."""

    @property
    def model(self) -> str: ...
    @property
    def fallback(self) -> Sequence[str]: ...
    @property
    def version(self) -> int: ...
    @property
    def stage(self) -> str: ...
    @property
    def candidate(self) -> str: ...
    @property
    def share(self) -> float: ...
    @property
    def origin(self) -> int: ...


class Target(NamedTuple):
    """One model behind one upstream."""

    name: str
    """ENDPOINT/MODEL."""
    upstream: Upstream
    model: str
    model_json: bytes
    """The model's id as the JSON string that is spliced into requests."""
    as_is: frozenset[str]
    """Routes whose calls are passed on byte for byte but for the model's name."""
    rules: Rules = NONE
    on_trial: bool = False
    """A candidate that gets a share: where it cannot be asked a thing, the incumbent is."""


class Memory:
    """Tasks dealt to an alias's model while a candidate is on trial: the last so many of this process.

    With them a share may grow between two calls of a task, and the task stays where it is. Two halves, of
    which the older is dropped when the newer is full: neither a clock nor an order has to be kept.
    """

    def __init__(self, most: int = 20_000) -> None:
        self._most = most
        self._new: set[bytes] = set()
        self._old: set[bytes] = set()

    def __contains__(self, task: bytes) -> bool:
        return task in self._new or task in self._old

    def add(self, task: bytes) -> None:
        if len(self._new) >= self._most:
            self._old, self._new = self._new, set()
        self._new.add(task)


def digest_of(alias: str, task: bytes) -> bytes:
    """Eight bytes that stand for a task: the same in every process."""
    return blake2b(alias.encode("utf-8", "replace") + b"\0" + task, digest_size=8).digest()


class AliasRoute(NamedTuple):
    """Where an alias points now."""

    targets: tuple[Target, ...]
    version: int
    """0 while the config rules."""
    choices: tuple[Choice, ...] = ()
    """Where calls are shared out: whom they may go to instead."""
    by_key: bool = False
    """Calls without a task are dealt out by their key, so that no caller sees two models by turns."""
    memory: Memory | None = None
    """While a candidate is on trial."""
    staying: frozenset[bytes] = frozenset()
    """Digests of tasks that began before the candidate's share covered them."""

    def draw(self, alias: str, task: bytes, key: str = "") -> tuple[Target, ...]:
        """Who may answer a call; always the same for calls of one task, in every process."""
        if self.memory is not None and task:
            return self._sticky(digest_of(alias, task), self.memory)
        if not self.choices:
            return self.targets
        if self.by_key and not task:
            task = key.encode()
        # a share, not a secret
        place = _place(digest_of(alias, task)) if task else random.random()  # noqa: S311
        return self._chosen(place)

    def _sticky(self, task: bytes, memory: Memory) -> tuple[Target, ...]:
        """A task that the alias's own model has begun stays with it, whatever the share is now."""
        if task in memory or task in self.staying:
            return self.targets
        chosen = self._chosen(_place(task))
        if chosen is self.targets:
            memory.add(task)
        return chosen

    def _chosen(self, place: float) -> tuple[Target, ...]:
        return next((choice.targets for choice in self.choices if place < choice.upto), self.targets)


def _place(digest: bytes) -> float:
    """Where a task lies on the line from 0 to 1."""
    return int.from_bytes(digest) / 2**64


class Choice(NamedTuple):
    """One way calls may go."""

    upto: float
    """Its end on the line from 0 to 1; it begins where the one before ends."""
    targets: tuple[Target, ...]


class Table(NamedTuple):
    """Every alias with its targets, and the endpoints that may be asked for directly."""

    aliases: Mapping[str, AliasRoute]
    upstreams: Mapping[str, Upstream]
    faults: tuple[str, ...] = ()
    """Routes of the store that cannot be used, one line each; the config's route stays in force."""
    memories: Mapping[tuple[str, int], Memory] = MappingProxyType({})
    """Of the trials under way, by alias and the version with which each began."""

    def targets(self, model: str, task: bytes = b"", key: str = "") -> tuple[Target, ...]:
        """Who may answer for a model's name, asked for a task and under a key; either may be empty.

        Raises Refusal (404) naming what is known.
        """
        route = self.aliases.get(model)
        if route is not None:
            return route.draw(model, task, key)
        endpoint, slash, inner = model.partition("/")
        if slash and inner and endpoint in self.upstreams:
            return (target_of(self.upstreams, model),)
        raise _unknown(model, self)


def target_of(upstreams: Mapping[str, Upstream], name: str, rules: Rules = NONE) -> Target:
    """The target ``ENDPOINT/MODEL`` under an alias's rules. Raises KeyError for an unknown endpoint."""
    endpoint, _, model = name.partition("/")
    upstream = upstreams[endpoint]
    rules = upstream.rules.and_then(rules)
    as_is = upstream.routes if rules == NONE else upstream.routes - {"chat.completions"}
    return Target(name, upstream, model, msgspec.json.encode(model), as_is, rules)


def build_table(
    config: Config,
    upstreams: Mapping[str, Upstream],
    rows: Mapping[str, RouteRow],
    staying: Mapping[str, frozenset[bytes]] = MappingProxyType({}),
    before: Table | None = None,
) -> Table:
    """The table of a config and the store's routes; it keeps the memory of the one ``before``."""
    aliases: dict[str, AliasRoute] = {}
    known = before.memories if before else {}
    trials = {n: (n, row.origin) for n, row in rows.items() if row.candidate}
    memories = {trial: known.get(trial) or Memory() for trial in trials.values()}
    faults: list[str] = []
    for name, alias in config.aliases.items():
        rules = _rules(alias)
        route = _route(upstreams, [alias.model, *alias.fallback], 0, rules)
        aliases[name] = route._replace(choices=_choices(upstreams, alias, rules))
    for name, row in rows.items():
        rules = _rules(config.aliases.get(name))
        try:
            route = _route(upstreams, [row.model, *row.fallback], row.version, rules)
            aliases[name] = route._replace(
                choices=_canary(upstreams, row, rules),
                by_key=True,
                memory=memories[trials[name]] if name in trials else None,
                staying=staying.get(name, frozenset()),
            )
        except KeyError as error:
            faults.append(
                f"route {name!r} version {row.version}: no [endpoints.{error.args[0]}] in the config"
            )
    return Table(aliases, upstreams, tuple(faults), memories)


def _rules(alias: Alias | None) -> Rules:
    return NONE if alias is None else rules_of(alias.drop, alias.rename, alias.default)


def _route(upstreams: Mapping[str, Upstream], names: Sequence[str], version: int, rules: Rules) -> AliasRoute:
    return AliasRoute(tuple(target_of(upstreams, name, rules) for name in names), version)


def _canary(upstreams: Mapping[str, Upstream], row: RouteRow, rules: Rules) -> tuple[Choice, ...]:
    """A share for the candidate, behind which the incumbent stands. Raises KeyError."""
    if row.stage != "canary":
        return ()
    names = dict.fromkeys([row.candidate, row.model, *row.fallback])
    candidate, *others = (target_of(upstreams, name, rules) for name in names)
    return (Choice(row.share, (candidate._replace(on_trial=True), *others)),)


def _choices(upstreams: Mapping[str, Upstream], alias: Alias, rules: Rules) -> tuple[Choice, ...]:
    shares = {name: weight for name, weight in alias.weights.items() if weight > 0}
    total = sum(shares.values())
    choices: list[Choice] = []
    for name, upto in zip(shares, accumulate(shares.values()), strict=True):
        names = dict.fromkeys([name, alias.model, *alias.fallback])
        choices.append(Choice(upto / total, tuple(target_of(upstreams, n, rules) for n in names)))
    return tuple(choices)


def _unknown(model: str, table: Table) -> Refusal:
    known = ", ".join(sorted(table.aliases)) or "none"
    endpoints = ", ".join(f"{name}/…" for name in sorted(table.upstreams)) or "none"
    return Refusal(
        404,
        "model_not_found",
        f"unknown model {model[:200]!r}; aliases: {known}; endpoints that may be asked directly: {endpoints}",
        param="model",
    )
