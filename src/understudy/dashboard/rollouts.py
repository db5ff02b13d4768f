"""Where each alias leads, how it came to that, and the two things an operator does: move it, or move it back.

What a move does is the rollout room's business: its functions are handed in, for that room stands beside this
one. It ignores who may press the buttons (guard).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from understudy.config import Alias
from understudy.dashboard.desk import Binding, Desk
from understudy.errors import InputError
from understudy.traffic.store import Route, Store

HISTORY = 100


class Order(NamedTuple):
    """What an operator asked for."""

    alias: str
    to: str
    """ENDPOINT/MODEL; empty: back to where the alias led before."""
    version: int
    """Of the route the operator saw; a route that has moved on since is not touched."""
    by: str
    reason: str


class Move(Protocol):
    """`rollout.move.move`."""

    def __call__(
        self, store: Store, alias: str, to: str, *, by: str, reason: str, initial: Alias | None
    ) -> object: ...


class RollBack(Protocol):
    """`rollout.move.roll_back`."""

    def __call__(self, store: Store, alias: str, *, by: str, reason: str) -> object: ...


class Moves(NamedTuple):
    """What the buttons do."""

    move: Move
    roll_back: RollBack


def carry_out(desk: Desk, order: Order, moves: Moves) -> None:
    """Do what an operator asked for.

    Raises InputError for an unknown alias or endpoint, and when somebody else moved it in the meantime.
    """
    bound = desk.bindings().get(order.alias)
    if bound is None:
        raise InputError(f"no alias {order.alias!r}", expected="one of: " + ", ".join(desk.bindings()))
    if bound.version != order.version:
        raise InputError(
            f"{order.alias} was moved by somebody else: it is at version {bound.version}",
            expected=f"version {order.version}, which the page was made from",
            next_step="open the page again, and look who moved it and why",
        )
    if not order.to:
        moves.roll_back(desk.store, order.alias, by=order.by, reason=order.reason)
        return
    desk.config.endpoint_of(order.to)
    initial = desk.config.aliases.get(order.alias)
    moves.move(desk.store, order.alias, order.to, by=order.by, reason=order.reason, initial=initial)


class AliasRoute(NamedTuple):
    """One alias and its history."""

    binding: Binding
    route: Route | None
    """None where nobody moved it yet: the config decides."""
    history: list[Route]
    """Newest first."""
    before: str
    """Where it would go back to; empty when there is nowhere."""


class Rollouts(NamedTuple):
    """The page."""

    now: float
    routes: list[AliasRoute]
    movable: bool
    """Whether there are buttons: not where the dashboard was started to read only."""
    targets: list[str]
    """Known targets to choose from; any other may be typed."""
    done: str
    """Alias just moved; empty otherwise."""


def page(desk: Desk, query: Mapping[str, str], movable: bool) -> Rollouts:
    """Read the page. Raises StoreError."""
    history: dict[str, list[Route]] = {}
    for route in reversed(desk.store.route_history()):
        history.setdefault(route.alias, []).append(route)
    current = desk.store.routes()
    routes: list[AliasRoute] = []
    for name, binding in desk.bindings().items():
        past = history.get(name, [])
        routes.append(AliasRoute(binding, current.get(name), past[:HISTORY], _before(past)))
    return Rollouts(desk.now(), routes, movable, _targets(desk, routes), query.get("moved", ""))


def order_of(form: Mapping[str, str], by: str) -> Order:
    """What a form asks for. Raises InputError for one that was filled in wrongly."""
    to, back = form.get("to", "").strip(), form.get("do") == "back"
    if not back and "/" not in to.strip("/"):
        raise InputError(f"cannot move to {to!r}", expected="ENDPOINT/MODEL", next_step="fill in where to")
    version = form.get("version", "")
    if not (version.isascii() and version.isdigit()):
        raise InputError(f"version {version!r}", expected="the version the page was made from")
    reason = form.get("reason", "").strip() or ("moved back by hand" if back else "moved by hand")
    return Order(form.get("alias", ""), "" if back else to, int(version), by, reason[:500])


def _before(history: list[Route]) -> str:
    """Where a roll-back leads, by the rule of `rollout.move.roll_back`."""
    return history[1].model if len(history) > 1 and history[0].stage != "rolled_back" else ""


def _targets(desk: Desk, routes: list[AliasRoute]) -> list[str]:
    seen = {target for route in routes for target in (route.binding.model, *route.binding.fallback)}
    seen |= {route.model for each in routes for route in each.history}
    return sorted(seen | set(desk.config.drill.candidates) - {""})
