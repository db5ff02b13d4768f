"""Where each alias leads, the trial it is in with its evidence, how it came to that, and what operators do.

What a button does is the rollout room's business: its functions are handed in, for that room stands beside
this one. Evidence is what the controller left in the store at its last look; `LookShown` names what is shown
of it. It ignores who may press the buttons (guard).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec
from markupsafe import Markup

from understudy.config import Alias, Rollout
from understudy.dashboard import chart
from understudy.dashboard.chart import Line
from understudy.dashboard.desk import Binding, Desk
from understudy.errors import InputError
from understudy.traffic.store import Route, Store

HISTORY = 100
SILENT_S = 90.0
"""A look older than this says that nobody takes the trial through its course."""
STARTING = ("start", "move")
"""What needs a model to go to."""
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


Act = Callable[[Store, Order, Alias | None], object]
"""Carries an order out; the alias's entry in the config is its first route."""
Moves = Mapping[str, Act]
"""For each of `DEEDS` what it does."""


class GuardShown(msgspec.Struct, frozen=True):
    """One thing that must not happen to the candidate more often than beside it."""

    rate: float
    tolerated: float
    e_value: float


class LookShown(msgspec.Struct, frozen=True):
    """What `rollout.look` keeps, as far as it is shown."""

    candidate: str
    replays: int
    copies: int
    tasks: int
    tasks_with_outcome: int
    difference: float
    e_no_worse: float
    e_worse: float
    promote_at: float
    roll_back_at: float
    path: list[tuple[int, float, float]]
    guards: dict[str, GuardShown]
    waits_for: list[str]


class StageShown(NamedTuple):
    """One step of the course."""

    name: str
    now: bool


class TrialShown(NamedTuple):
    """A trial under way, or held."""

    candidate: str
    deadline: float
    """Unix seconds; 0: none."""
    course: list[StageShown]
    look: LookShown | None
    """None where nobody has looked at it yet."""
    looked_at: float
    silent: bool
    """Nobody takes it through its course."""
    path: Markup | None


class AliasRoute(NamedTuple):
    """One alias and its history."""

    binding: Binding
    route: Route | None
    """None where nobody moved it yet: the config decides."""
    history: list[Route]
    """Newest first."""
    before: str
    """Where it would go back to; empty when there is nowhere."""
    trial: TrialShown | None


class Rollouts(NamedTuple):
    """The page."""

    now: float
    routes: list[AliasRoute]
    """Those with a trial first."""
    movable: bool
    """Whether there are buttons: not where the dashboard was started to read only."""
    targets: list[str]
    """Known targets to choose from; any other may be typed."""
    done: str
    """Alias just changed; empty otherwise."""


def carry_out(desk: Desk, order: Order, moves: Moves) -> None:
    """Do what an operator asked for.

    Raises InputError for an unknown alias or endpoint, and when somebody else changed it in the meantime.
    """
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
    moves[order.do](desk.store, order, desk.config.aliases.get(order.alias))


def page(desk: Desk, query: Mapping[str, str], movable: bool) -> Rollouts:
    """Read the page. Raises StoreError."""
    history: dict[str, list[Route]] = {}
    for route in reversed(desk.store.route_history()):
        history.setdefault(route.alias, []).append(route)
    current, looks = desk.store.routes(), desk.store.looks()
    routes: list[AliasRoute] = []
    for name, binding in desk.bindings().items():
        past, route = history.get(name, []), current.get(name)
        trial = _trial(desk, route, looks.get(name)) if route and route.candidate else None
        routes.append(AliasRoute(binding, route, past[:HISTORY], _before(past), trial))
    routes.sort(key=lambda each: each.trial is None)
    return Rollouts(desk.now(), routes, movable, _targets(desk, routes), query.get("moved", ""))


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
    reason = form.get("reason", "").strip() or f"{do} by hand"
    target = to if do in STARTING else ""
    return Order(do, form.get("alias", ""), target, int(version), by, reason[:500])


def _trial(desk: Desk, route: Route, looked: tuple[float, str] | None) -> TrialShown:
    settings = desk.config.rollout or Rollout()
    at, look = _read(looked, route.candidate)
    silent = route.stage != "held" and desk.now() - max(at, route.changed_at) > SILENT_S
    path = _path_chart(look) if look and look.path else None
    return TrialShown(route.candidate, route.deadline, _course(route, settings), look, at, silent, path)


def _read(looked: tuple[float, str] | None, candidate: str) -> tuple[float, LookShown | None]:
    """The look at this trial; one at another, or of another version, is none."""
    if looked is None:
        return 0.0, None
    try:
        look = msgspec.json.decode(looked[1], type=LookShown)
    except msgspec.MsgspecError:
        return 0.0, None
    return (looked[0], look) if look.candidate == candidate else (0.0, None)


def _course(route: Route, settings: Rollout) -> list[StageShown]:
    """Every step of the course; where a trial is held, the step is the one it goes on with."""
    steps = ["replay"] if settings.replay_tasks else []
    steps += ["shadow"] if settings.shadow_tasks else []
    steps += [f"canary {share * 100:g} %" for share in settings.shares]
    here = f"canary {route.share * 100:g} %" if route.share else route.stage
    return [StageShown(name, name == here) for name in [*steps, "promoted"]]


def _path_chart(look: LookShown) -> Markup:
    lines = [
        Line("no worse", [(float(n), fine) for n, fine, _ in look.path]),
        Line("worse", [(float(n), worse) for n, _, worse in look.path]),
    ]
    marks = (("may be promoted", look.promote_at), ("is rolled back", look.roll_back_at))
    return chart.lines(
        "Evidence from outcomes", "e-value", lines, "comparisons", marks=marks, logarithmic=True
    )


def _before(history: Sequence[Route]) -> str:
    """Where a roll-back leads, by the rule of `rollout.move.roll_back`."""
    return history[1].model if len(history) > 1 and history[0].stage != "rolled_back" else ""


def _targets(desk: Desk, routes: Sequence[AliasRoute]) -> list[str]:
    seen = {target for route in routes for target in (route.binding.model, *route.binding.fallback)}
    seen |= {route.model for each in routes for route in each.history}
    return sorted(seen | set(desk.config.drill.candidates) - {""})
