"""The course of a trial: from the shadow through growing shares to the whole alias, or back.

`decide` is a pure function of where the route stands and what the evidence says; whoever calls it carries the
step out by compare-and-set (controller). It ignores where evidence comes from (evidence, shadow).
"""

from __future__ import annotations

from typing import NamedTuple

from understudy.config import Rollout
from understudy.rollout.standing import Standing
from understudy.traffic.store import Route, Stage

DAY_S = 86_400.0
DOUBT = 20.0
"""Evidence against the candidate above which no step is taken until it has gone again."""


class Step(NamedTuple):
    """What to do with the route."""

    stage: Stage
    share: float
    reason: str


class Decision(NamedTuple):
    """A step, or what is waited for."""

    step: Step | None
    missing: list[str]
    """In words; empty when there is a step."""


def decide(route: Route, standing: Standing, settings: Rollout, now: float) -> Decision:
    """The next step of a route that is in the shadow or a canary."""
    if broken := alarm(standing, settings):
        return Decision(Step("rolled_back", 0.0, broken), [])
    missing = waits_for(route, standing, settings)
    if missing:
        if route.stage == "canary" and now - route.changed_at > settings.hold_days * DAY_S:
            reason = f"undecided after {settings.hold_days:g} days: {'; '.join(missing)}"
            return Decision(Step("held", route.share, reason), [])
        return Decision(None, missing)
    return Decision(_onward(route, standing, settings), [])


def alarm(standing: Standing, settings: Rollout) -> str:
    """Why the candidate must go back at once; empty when nothing says so."""
    limit = 1.0 / settings.rollback_alpha
    if standing.difference.e_worse >= limit:
        return (
            f"outcomes {standing.difference.estimate:+.3f} against the incumbent's over "
            f"{standing.difference.rounds} comparisons (e-value {standing.difference.e_worse:.3g})"
        )
    for name, guard in standing.guards.items():
        if guard.excess.e_value >= limit:
            return (
                f"{name}: {guard.excess.rate:.0%} of {guard.excess.rounds} comparisons, "
                f"{guard.excess.tolerated:.0%} tolerated (e-value {guard.excess.e_value:.3g})"
            )
    return ""


def waits_for(route: Route, standing: Standing, settings: Rollout) -> list[str]:
    """What the next step still needs."""
    missing: list[str] = []
    if route.stage == "shadow":
        more = settings.shadow_tasks - standing.pairs
        if more > 0:
            missing.append(f"{more} more copies answered in the shadow")
    else:
        place = settings.shares.index(route.share) if route.share in settings.shares else 0
        more = settings.tasks[place] - standing.settled_since(route.changed_at)
        if more > 0:
            missing.append(f"{more} more tasks of the candidate at {route.share:.0%}")
        if place >= len(settings.shares) - 2:
            missing += _unproven(standing, settings)
    doubts = [name for name, guard in standing.guards.items() if guard.excess.e_value > DOUBT]
    if standing.difference.e_worse > DOUBT:
        doubts.append("outcomes")
    return missing + [f"evidence that clears {name} of the doubt there is" for name in doubts]


def _unproven(standing: Standing, settings: Rollout) -> list[str]:
    wanted = 1.0 / settings.alpha
    if standing.difference.e_fine >= wanted:
        return []
    if not standing.scored:
        return ["outcomes: report right answers or a number per task to POST /feedback"]
    return [
        f"outcomes that show it no worse by {settings.margin:g}: e-value {standing.difference.e_fine:.3g} "
        f"of {wanted:g} after {standing.scored} tasks of the candidate"
    ]


def _onward(route: Route, standing: Standing, settings: Rollout) -> Step:
    if route.stage == "shadow":
        return Step("canary", settings.shares[0], f"{standing.pairs} copies answered in the shadow")
    place = settings.shares.index(route.share) if route.share in settings.shares else 0
    done = f"{standing.answered} tasks, outcomes {standing.difference.estimate:+.3f}"
    if place + 1 < len(settings.shares):
        return Step("canary", settings.shares[place + 1], f"{done}; no guard spoke")
    proof = f"not worse by {settings.margin:g} (e-value {standing.difference.e_fine:.3g})"
    return Step("promoted", 0.0, f"{done}; {proof}; no guard spoke")
