"""Moves an alias from one model to another, and back, one compare-and-set at a time.

Every change is a new version in the route's history: who, why, and on what evidence. Gateways follow by
themselves. It ignores whether the move is wise (evaluate) and how the gateway routes (gateway).
"""

from __future__ import annotations

from typing import NamedTuple

from understudy.config import Alias
from understudy.errors import InputError
from understudy.traffic.routes import Route, Stage
from understudy.traffic.store import Store

CONFIG = "understudy.toml"
"""Who set the first version of a route."""


class Moved(NamedTuple):
    """A route before and after; the same when there was nothing to do."""

    was: Route
    now: Route

    @property
    def changed(self) -> bool:
        return self.was.version != self.now.version


def move(
    store: Store,
    alias: str,
    to: str,
    *,
    by: str,
    reason: str,
    evidence: str = "",
    initial: Alias | None = None,
    expected_version: int | None = None,
) -> Moved:
    """Point ``alias`` at ``to`` (ENDPOINT/MODEL), which leaves its own list of fallbacks, at once.

    ``initial`` is the alias's entry in the config, the route in force until a first change. Nothing changes
    when the alias is there already; a trial under way ends. Raises InputError for an alias without a route,
    and when somebody else changed it in between or since ``expected_version``.
    """
    was = current(store, alias, initial)
    if expected_version not in (None, was.version):
        raise changed_meanwhile(was._replace(version=expected_version or 0))
    if was.model == to and not was.candidate:
        return Moved(was, was)
    fallback = tuple(target for target in was.fallback if target != to)
    return _change(store, was, to, fallback, "promoted", by=by, reason=reason, evidence=evidence)


def roll_back(
    store: Store, alias: str, *, by: str, reason: str, expected_version: int | None = None
) -> Moved:
    """Put back the route that was in force before the last move.

    Raises InputError when there was no move, or it has been rolled back already, and when the route is not at
    ``expected_version`` (None: whatever it is at).
    """
    history = store.route_history(alias)
    if history and expected_version not in (None, history[-1].version):
        raise changed_meanwhile(history[-1]._replace(version=expected_version or 0))
    if len(history) < 2 or history[-1].stage == "rolled_back":
        raise InputError(
            f"there is no move of {alias!r} to roll back",
            expected="an alias that was moved and not rolled back since",
            next_step=f"understudy rollout history {alias}",
        )
    before, was = history[-2], history[-1]
    return _change(store, was, before.model, before.fallback, "rolled_back", by=by, reason=reason)


def current(store: Store, alias: str, initial: Alias | None) -> Route:
    """The route in force; the config's becomes version 1 of the history if there is none yet.

    Raises InputError for an alias that neither the store nor the config knows.
    """
    if found := store.route(alias):
        return found
    if initial is None:
        raise InputError(
            f"no route for the alias {alias!r}",
            expected="an alias of understudy.toml",
            next_step=f"add [aliases.{alias}] to understudy.toml",
        )
    # losing this race is as good as winning it: somebody wrote the first version
    store.set_route(
        alias,
        initial.model,
        expected_version=0,
        fallback=initial.fallback,
        by=CONFIG,
        reason="first route, from the config",
    )
    found = store.route(alias)
    assert found is not None, "a route is never deleted"
    return found


def _change(
    store: Store,
    was: Route,
    model: str,
    fallback: tuple[str, ...],
    stage: Stage,
    *,
    by: str,
    reason: str,
    evidence: str = "",
) -> Moved:
    changed = store.set_route(
        was.alias,
        model,
        expected_version=was.version,
        fallback=fallback,
        stage=stage,
        by=by,
        reason=reason,
        evidence=evidence,
    )
    if not changed:
        raise changed_meanwhile(was)
    now = store.route_history(was.alias)[was.version]
    return Moved(was, now)


def changed_meanwhile(was: Route) -> InputError:
    """The error of whoever looked at a version that is no longer in force."""
    return InputError(
        f"the route of {was.alias!r} changed while we looked; nothing was done",
        expected=f"version {was.version}",
        next_step=f"understudy rollout history {was.alias}",
    )
