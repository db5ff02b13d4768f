"""What operators ask for on the page of rollouts: read from a form, told before it is done, then done.

What a button does is the rollout room's business: its functions are handed in (`Moves`), for that room stands
beside this one; they refuse what `understudy rollout` refuses, in the same words. It ignores who may press
the buttons (guard) and what the page shows (rollouts).
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from understudy.catalog.facts import Catalog
from understudy.config import Alias, Rollout
from understudy.dashboard import evaluations
from understudy.dashboard.calendar import Row
from understudy.dashboard.desk import Binding, Desk, Use, total
from understudy.errors import InputError
from understudy.traffic.store import Store

STARTING = ("start", "move")
"""What needs a model to go to, and may rest on evidence."""
DEEDS = ("start", "pause", "resume", "abort", "move", "back")
"""What the buttons do."""


class Order(NamedTuple):
    """What an operator asked for."""

    do: str
    """One of `DEEDS`."""
    alias: str
    to: str
    """ENDPOINT/MODEL; empty where `do` needs none."""
    version: int
    """Of the route the operator saw; a route that has moved on since is not touched."""
    by: str
    reason: str
    certificate: str = ""
    """Name of the evaluation it rests on, as the addresses have it; empty for none."""
    until: str = ""
    """Last day of a trial, YYYY-MM-DD or `retirement`; empty for none."""


class Terms(NamedTuple):
    """What an order rests on, checked."""

    evidence: str = ""
    """The certificate and its hash; empty for none."""
    deadline: float = 0.0
    """Unix seconds; 0 for none."""


class Proof(NamedTuple):
    """A certificate that an operator chose."""

    path: Path
    shown: str
    """Relative to the config's folder."""


Act = Callable[[Store, Order, Terms, Alias | None], object]
"""Carries an order out; the alias's entry in the config is its first route."""


class Moves(NamedTuple):
    """What the rollout room does for the page."""

    acts: Mapping[str, Act]
    """For each of `DEEDS` what it does."""
    terms: Callable[[Store, Catalog, Order, Proof | None], Terms]
    """Raises InputError or EvidenceError for a certificate or a day that will not do."""
    calendar: Callable[[Store, Catalog], list[Row]]


class Asked(NamedTuple):
    """An order that nobody has carried out yet."""

    now: float
    order: Order
    binding: Binding
    terms: Terms
    course: list[str]
    """What a trial goes through, step by step; empty for other orders."""
    back_to: str
    """Where `back` leads; empty where it does not."""
    day: Use
    """What the alias answered in the last 24 hours."""
    command: str
    """What does the same on the command line."""


def order_of(form: Mapping[str, str], by: str) -> Order:
    """What a form asks for. Raises InputError for one that was filled in wrongly."""
    do, to = form.get("do", ""), form.get("to", "").strip()
    if do not in DEEDS:
        raise InputError(f"cannot do {do[:40]!r}", expected=f"one of: {', '.join(DEEDS)}")
    if do in STARTING and "/" not in to.strip("/"):
        raise InputError(f"cannot move to {to!r}", expected="ENDPOINT/MODEL", next_step="fill in where to")
    version = form.get("version", "")
    if not (version.isascii() and version.isdigit() and len(version) < 10):
        raise InputError(f"version {version[:40]!r}", expected="the version the page was made from")
    order = Order(do, form.get("alias", ""), "", int(version), by, _reason(form, do))
    if do not in STARTING:
        return order
    until = form.get("until", "").strip() if do == "start" else ""
    return order._replace(to=to, certificate=form.get("evidence", ""), until=until)


def ask(desk: Desk, order: Order, moves: Moves) -> Asked:
    """Everything an operator has to know before it is done. Raises as `carry_out` does, and does nothing."""
    bound = _bound(desk, order)
    terms = moves.terms(desk.store, desk.catalog, order, _proof(desk, order))
    history = desk.store.route_history(order.alias)
    back_to = history[-2].model if order.do == "back" and len(history) > 1 else ""
    settings = desk.config.rollout or Rollout()
    course = _course(settings, replay=not terms.evidence) if order.do == "start" else []
    hours = [hour for hour in desk.hours(24) if hour.alias == order.alias]
    return Asked(desk.now(), order, bound, terms, course, back_to, total(hours), _command(desk, order))


def carry_out(desk: Desk, order: Order, moves: Moves) -> None:
    """Do what an operator asked for.

    Raises InputError for an unknown alias or endpoint, for a day that cannot be kept, and when somebody else
    changed the route in the meantime; EvidenceError for a certificate that does not verify.
    """
    _bound(desk, order)
    terms = moves.terms(desk.store, desk.catalog, order, _proof(desk, order))
    moves.acts[order.do](desk.store, order, terms, desk.config.aliases.get(order.alias))


def _bound(desk: Desk, order: Order) -> Binding:
    """The alias's binding, if it is the one the operator saw."""
    bound = desk.bindings().get(order.alias)
    if bound is None:
        raise InputError(f"no alias {order.alias!r}", expected="one of: " + ", ".join(desk.bindings()))
    if bound.version != order.version:
        raise InputError(
            f"{order.alias} was changed by somebody else: it is at version {bound.version}",
            expected=f"version {order.version}, which the page was made from",
            next_step="open the page again, and look who changed it and why",
        )
    if order.do in STARTING:
        desk.config.endpoint_of(order.to)
    return bound


def _proof(desk: Desk, order: Order) -> Proof | None:
    """The certificate an order names; only such as were found beside the config are ever opened."""
    if not order.certificate:
        return None
    entry = evaluations.named(desk, order.certificate)
    if entry is None:
        raise InputError(
            f"no evaluation {order.certificate[:40]!r}",
            expected="a certificate of the page of evaluations",
            next_step="open the page of rollouts again, and choose from its list",
        )
    return Proof(entry.path, f"{entry.folder}/{entry.path.name}" if entry.folder != "." else entry.path.name)


def _reason(form: Mapping[str, str], do: str) -> str:
    return form.get("reason", "").strip()[:500] or f"{do} by hand"


def _course(settings: Rollout, *, replay: bool) -> list[str]:
    calls = [f"replay: {settings.replay_tasks} recorded calls"] if replay and settings.replay_tasks else []
    copies = [f"shadow: {settings.shadow_tasks} copies"] if settings.shadow_tasks else []
    steps = zip(settings.shares, settings.tasks, strict=True)
    canary = [f"canary {share * 100:g} %: {tasks} tasks" for share, tasks in steps]
    judged = f"judged by {settings.judge} where nobody else says, for ${settings.judge_usd:g} at most"
    return [*calls, *copies, *canary, *([judged] if settings.judge else []), "promoted"]


def _command(desk: Desk, order: Order) -> str:
    """The same on the command line; `back` is `abort` there."""
    proof = _proof(desk, order)
    words = {"move": "start", "back": "abort"}
    parts = ["understudy", "rollout", words.get(order.do, order.do), order.alias]
    parts += ["--to", order.to] if order.to else []
    parts += ["--now"] if order.do == "move" else []
    parts += ["--evidence", proof.shown] if proof else []
    parts += ["--until-date", order.until] if order.until else []
    return shlex.join([*parts, "--reason", order.reason])
