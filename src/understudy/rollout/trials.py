"""A candidate's trial on an alias as rows of the route: begun, held, gone on with, ended.

Every change is a compare-and-set on the version that was looked at, so of two operators, or an operator and
the controller, one is refused and nothing is half done. It ignores evidence (standing) and the order of
stages (course).
"""

from __future__ import annotations

import time
from typing import NamedTuple

from understudy.config import Alias, Rollout
from understudy.errors import InputError
from understudy.evaluate.judge import refuse_kin
from understudy.rollout.course import Step, first_step
from understudy.rollout.move import Moved, changed_meanwhile, current, roll_back
from understudy.rollout.staying import staying
from understudy.traffic.routes import Route, Stage
from understudy.traffic.store import Store

UNDER_WAY = frozenset({"replay", "shadow", "canary"})


class Order(NamedTuple):
    """Who changes a trial, and why."""

    by: str
    reason: str
    version: int | None = None
    """Of the route they looked at; None: whatever it is now."""


def begin(
    store: Store,
    alias: str,
    candidate: str,
    order: Order,
    settings: Rollout,
    *,
    evidence: str = "",
    deadline: float = 0.0,
    initial: Alias | None = None,
) -> Moved:
    """Put ``candidate`` on trial; the alias keeps its model until the trial promotes the other.

    With ``evidence``, a certificate, nothing is replayed first: that is what it was made from. ``deadline``
    is in Unix seconds, 0 for none.

    Raises InputError when one is on trial already, when it is the alias's model, when the judge of
    ``settings`` is one of both or of a family with one, and when somebody else changed the route.
    """
    was = _looked_at(store, alias, order, initial)
    if was.candidate:
        raise InputError(
            f"{was.candidate} is on trial for {alias!r} already",
            expected="an alias without a trial",
            next_step=f"understudy rollout status {alias}, or understudy rollout abort {alias}",
        )
    if candidate == was.model:
        raise InputError(f"{candidate} answers {alias!r} already", expected="another model to move to")
    if settings.judge:
        refuse_kin(settings.judge, [was.model, candidate])
    begun = was._replace(candidate=candidate, origin=was.version + 1, evidence=evidence, deadline=deadline)
    stage, share = first_step(settings, replay=not evidence)
    return set_stage(store, begun, Step(stage, share, order.reason), order.by, settings)


def pause(store: Store, alias: str, order: Order, initial: Alias | None = None) -> Moved:
    """Send every task to the incumbent; what the trial has learnt stays."""
    was = _on_trial(store, alias, order, initial)
    if was.stage == "held":
        return Moved(was, was)
    return set_stage(store, was, Step("held", was.share, order.reason), order.by)


def resume(
    store: Store,
    alias: str,
    order: Order,
    initial: Alias | None = None,
    settings: Rollout = Rollout(),  # noqa: B008 immutable
) -> Moved:
    """Go on where the trial was held; a deadline that has passed is none any more."""
    was = _on_trial(store, alias, order, initial)
    if was.stage != "held":
        return Moved(was, was)
    if was.deadline <= time.time():
        was = was._replace(deadline=0.0)
    before = [r for r in store.route_history(alias) if r.origin == was.origin and r.stage in UNDER_WAY]
    stage: Stage = before[-1].stage if before else "shadow"
    return set_stage(store, was, Step(stage, was.share, order.reason), order.by, settings)


def abort(store: Store, alias: str, order: Order, initial: Alias | None = None) -> Moved:
    """End the trial, or with none under way put back the route before the last move."""
    was = _looked_at(store, alias, order, initial)
    if not was.candidate:
        return roll_back(store, alias, by=order.by, reason=order.reason, expected_version=order.version)
    return set_stage(store, was, Step("rolled_back", 0.0, order.reason), order.by)


def set_stage(
    store: Store,
    was: Route,
    step: Step,
    by: str,
    settings: Rollout = Rollout(),  # noqa: B008 immutable
    at: float | None = None,
) -> Moved:
    """Carry out a step of a trial, at ``at`` (Unix seconds; None: now).

    Raises InputError when the route is not at ``was.version`` any more.
    """
    promoted, over = step.stage == "promoted", step.stage in ("promoted", "rolled_back")
    model = was.candidate if promoted else was.model
    idle = (time.time() if at is None else at) - settings.task_idle_s
    stay = staying(store, was, step.share, idle) if step.stage == "canary" else []
    changed = store.set_route(
        was.alias,
        model,
        expected_version=was.version,
        fallback=tuple(target for target in was.fallback if target != model),
        stage=step.stage,
        by=by,
        reason=step.reason,
        evidence=was.evidence,
        candidate="" if over else was.candidate,
        share=step.share,
        origin=was.origin,
        deadline=0.0 if over else was.deadline,
        staying=stay,
        at=at,
    )
    if not changed:
        raise changed_meanwhile(was)
    return Moved(was, store.route_history(was.alias)[was.version])


def _looked_at(store: Store, alias: str, order: Order, initial: Alias | None) -> Route:
    was = current(store, alias, initial)
    if order.version not in (None, was.version):
        raise changed_meanwhile(was._replace(version=order.version or 0))
    return was


def _on_trial(store: Store, alias: str, order: Order, initial: Alias | None) -> Route:
    was = _looked_at(store, alias, order, initial)
    if not was.candidate:
        raise InputError(
            f"nothing is on trial for {alias!r}",
            expected="an alias with a candidate",
            next_step=f"understudy rollout start {alias} --to ENDPOINT/MODEL",
        )
    return was
