"""What a trial may start on: the alias's route, proof of the candidate, and a last day that can be kept.

The command line and the dashboard ask here, so that both refuse the same with the same words. It ignores how
a trial goes (trials, course).
"""

from __future__ import annotations

import datetime as dt
import time
from pathlib import Path

import msgspec

from understudy.catalog.facts import Catalog
from understudy.config import Config, Rollout
from understudy.errors import InputError
from understudy.evaluate.judge import refuse_kin
from understudy.evaluate.verify import verify
from understudy.rollout.calendar import DAY_S, Entry, entry, traffic_of
from understudy.rollout.move import CONFIG
from understudy.traffic.routes import Route
from understudy.traffic.store import Store

RETIREMENT = "retirement"
"""In place of a day: the announced end of the alias's model."""


def in_force(config: Config, store: Store) -> list[Route]:
    """Routes of the store, and for aliases never changed what the config says, as version 0."""
    stored = store.routes()
    return [
        stored.get(name)
        or Route(name, 0, a.model, tuple(a.fallback), "promoted", 0.0, CONFIG, "never changed", "")
        for name, a in config.aliases.items()
    ]


def calendar_entry(config: Config, store: Store, catalog: Catalog, route: Route) -> Entry:
    """By when a trial must begin on a route's alias. Raises StoreError."""
    facts = catalog.find(route.model)
    retires = facts.retires.value if facts and facts.retires else None
    traffic = traffic_of(store, route.alias, time.time())
    return entry(route.alias, route.model, retires, traffic, config.rollout or Rollout())


def fit_to_judge(config: Config, store: Store, alias: str, candidate: str) -> None:
    """Raises InputError where the judge of `[rollout]` is a model on trial or of a family with one."""
    if config.rollout and config.rollout.judge:
        route = next(r for r in in_force(config, store) if r.alias == alias)
        refuse_kin(config.rollout.judge, [route.model, candidate])


def deadline(config: Config, store: Store, catalog: Catalog, alias: str, until: str) -> float:
    """The end of the day, in Unix seconds. Raises InputError for one too near for the alias's traffic."""
    route = next(r for r in in_force(config, store) if r.alias == alias)
    each = calendar_entry(config, store, catalog, route)
    day = _day(each, until)
    end = dt.datetime.combine(day, dt.time.max, dt.UTC)
    left = (end.timestamp() - time.time()) / DAY_S
    if each.days_needed is None or left < each.days_needed:
        needs = f"{each.days_needed:,.1f} days" if each.days_needed is not None else each.missing
        raise InputError(
            f"a trial of {alias!r} may not be over by {day}: {max(left, 0.0):,.1f} days left, needs {needs}",
            expected="a day by which an equal candidate is promoted with a probability of 90%",
            next_step="name a later day, give [rollout] larger shares, or leave out --until-date",
        )
    return end.timestamp()


def proven(certificate: Path, target: str, told: str = "") -> str:
    """The certificate, as ``told`` (by default its path), with its hash.

    Raises EvidenceError, or InputError where it does not pass the model.
    """
    digest, told = verify(certificate), told or str(certificate)
    said = msgspec.json.decode(certificate.read_bytes())
    verdicts = {c["model"]["name"]: c["proof"]["verdict"] for c in said["candidates"]}
    if verdicts.get(target) != "PASS":
        raise InputError(
            f"{told} does not pass {target}: {verdicts.get(target, 'not a candidate there')}",
            expected="a certificate with the verdict PASS for it",
            next_step="understudy evaluate, or leave out --evidence to start without proof",
        )
    return f"{told} sha256:{digest}"


def _day(each: Entry, until: str) -> dt.date:
    if until == RETIREMENT:
        if each.retires is None:
            raise InputError(
                f"no end of {each.model} is announced", expected="a model with a retirement date",
                next_step="--until-date YYYY-MM-DD",
            )  # fmt: skip
        return each.retires
    try:
        return dt.date.fromisoformat(until)
    except ValueError as error:
        raise InputError(f"no day: {until!r}", expected="YYYY-MM-DD or `retirement`") from error
