"""What every page reads: the config, the store, a second connection for lists, the catalog and the clock.

It ignores HTTP (app) and what pages make of it. The catalog is read once, when first asked for; a store that
another process fills is seen as it is at each request.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from understudy.catalog.facts import Catalog, catalog_of
from understudy.catalog.prices import rates_at
from understudy.config import Config
from understudy.traffic.database import Database, open_database
from understudy.traffic.hours import HOUR_S, Hour
from understudy.traffic.store import Store, open_store

DAY_S = 86_400.0


class Desk:
    """One for the whole program; every method may be called from any thread."""

    def __init__(self, config: Config, clock: Callable[[], float] = time.time) -> None:
        root = Path(config.root)
        self.config = config
        self.store: Store = open_store(config.store.url, root)
        self.lists: Database = open_database(config.store.url, root)
        """A connection of its own: a long list never holds up the store's."""
        self.now = clock

    def close(self) -> None:
        self.lists.close()
        self.store.close()

    @cached_property
    def catalog(self) -> Catalog:
        return catalog_of(self.config)

    def warm(self) -> None:
        """Read beforehand what the first reader would wait for: the catalog and its prices."""
        for facts in self.catalog:
            rates_at(self.catalog, facts.id, self.now())

    def bindings(self) -> dict[str, Binding]:
        """Who answers each alias: by the store's route where there is one, else by the config."""
        bound = {
            name: Binding(name, alias.model, tuple(alias.fallback), "config", 0)
            for name, alias in self.config.aliases.items()
        }
        for name, route in self.store.routes().items():
            bound[name] = Binding(
                name, route.model, route.fallback, route.stage, route.version, route.candidate, route.share
            )
        return bound

    def hours(self, hours: int) -> list[Hour]:
        """Hourly sums of the last ``hours`` hours, the one under way included."""
        return self.store.hours(since=self.now() - (hours - 1) * HOUR_S)

    def days(self, days: int) -> list[Hour]:
        """Daily sums of the last ``days`` days (UTC), today included."""
        return self.store.days(since=self.now() - (days - 1) * DAY_S)


class Binding(NamedTuple):
    """Who answers an alias now."""

    alias: str
    model: str
    """ENDPOINT/MODEL."""
    fallback: tuple[str, ...]
    stage: str
    """The route's stage; ``config`` where nobody moved it yet."""
    version: int
    """Of the route; 0 where there is none."""
    candidate: str = ""
    """ENDPOINT/MODEL on trial; empty when none is."""
    share: float = 0.0
    """Of tasks that the candidate has in a canary."""


class Use(NamedTuple):
    """Sums over hours."""

    calls: int = 0
    failed: int = 0
    priced: int = 0
    prompt_tokens: float = 0.0
    completion_tokens: float = 0.0
    cached_tokens: float = 0.0
    cost_usd: float = 0.0
    total_s: float = 0.0

    @property
    def failure_rate(self) -> float:
        return self.failed / self.calls if self.calls else 0.0

    @property
    def mean_s(self) -> float:
        """Seconds that a caller waited on average."""
        return self.total_s / self.calls if self.calls else 0.0


def total(hours: Sequence[Hour]) -> Use:
    """Everything in these hours."""
    return Use._make(map(sum, zip(*(hour[3:] for hour in hours), strict=True))) if hours else Use()


def by(name: Literal["alias", "target"], hours: Iterable[Hour]) -> dict[str, Use]:
    """Sums for each value of ``alias`` or ``target``, the busiest first."""
    groups: dict[str, list[Hour]] = {}
    for hour in hours:
        groups.setdefault(hour.alias if name == "alias" else hour.target, []).append(hour)
    found = {key: total(group) for key, group in groups.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1].calls))
