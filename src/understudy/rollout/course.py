"""The course of a trial: replay, shadow, canaries of growing shares up to the whole alias; promoted, or back.

`decide` is a pure function of where the route stands and what the evidence says; whoever calls it carries the
step out by compare-and-set (controller). It ignores where evidence comes from (evidence, shadow).
"""

from __future__ import annotations

import datetime as dt
from typing import NamedTuple

from understudy.config import Rollout
from understudy.rollout.standing import Standing
from understudy.traffic.routes import Route, Stage

DAY_S = 86_400.0
DOUBT = 20.0
"""E-value of a guard above which no step is taken until it has gone again."""
HAND_OVER = 0.0125
"""Most that the square of the next share times the evidence against the candidate's outcomes may be: the more
of the traffic a step would hand over, the less doubt it takes to stop it, and a small share sees the truth
with the fewest of the candidate's tasks, for the incumbent's mean beside it is known best there. Within the
canary a share above 0.11 takes outcomes that speak for the candidate; into it, none that speak against it."""
NOTHING_KNOWN = 1.01
"""An e-value begins at 1."""
PROOF_SHARE = 0.5
"""So much of the traffic is never given to a candidate that has not been shown to be no worse."""


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
    """The next step of a route whose trial is under way."""
    if broken := alarm(standing, settings):
        return Decision(Step("rolled_back", 0.0, broken), [])
    missing = waits_for(route, standing, settings)
    if missing:
        if standing.judge_broke and _judge_alone(standing) and _unproven(standing, settings):
            reason = f"all that [rollout] judge_usd allows is spent; {'; '.join(missing)}"
            return Decision(Step("held", route.share, reason), [])
        if route.deadline and now >= route.deadline:
            day = dt.datetime.fromtimestamp(route.deadline, dt.UTC).date()
            reason = f"undecided on {day}, by which it was to be over: {'; '.join(missing)}"
            return Decision(Step("held", route.share, reason), [])
        if route.stage == "canary" and now - route.changed_at > settings.hold_days * DAY_S:
            reason = f"undecided after {settings.hold_days:g} days: {'; '.join(missing)}"
            return Decision(Step("held", route.share, reason), [])
        return Decision(None, missing)
    return Decision(_onward(route, standing, settings), [])


def alarm(standing: Standing, settings: Rollout) -> str:
    """Why the candidate must go back at once; empty when nothing says so."""
    limit = 1.0 / settings.rollback_alpha
    for what, difference in (("outcomes", standing.difference), ("replayed outcomes", standing.replayed)):
        if difference.e_worse >= limit:
            return (
                f"{what} {difference.estimate:+.3f} against the incumbent's over "
                f"{difference.rounds} comparisons (e-value {difference.e_worse:.3g})"
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
    onward = next_share(route, settings)
    compared = route.share < 1.0  # beside a candidate with every task nobody is left; its proof came before
    if route.stage == "replay":
        more = settings.replay_tasks - standing.replays
        if more > 0 and not standing.replay_over:
            missing.append(f"{more} more answers to recorded calls")
    elif route.stage == "shadow":
        more = settings.shadow_tasks - standing.pairs
        if more > 0:
            missing.append(f"{more} more copies answered in the shadow")
    else:
        more = settings.tasks[_place(route, settings)] - standing.settled_since(route.changed_at)
        if more > 0:
            missing.append(f"{more} more tasks of the candidate at {route.share:.0%}")
        if onward >= PROOF_SHARE and compared:
            missing += _unproven(standing, settings)
    doubts = [name for name, guard in standing.guards.items() if guard.excess.e_value > DOUBT]
    missing += [f"evidence that clears {name} of the doubt there is" for name in doubts]
    if compared and standing.difference.e_worse > _most_doubt(route, onward):
        missing += _doubtful(standing, settings, _most_doubt(route, onward), onward)
    return list(dict.fromkeys(missing))


def first_step(settings: Rollout, *, replay: bool) -> tuple[Stage, float]:
    """Where a trial begins; without ``replay`` the recorded calls are answered for by a certificate."""
    if replay and settings.replay_tasks > 0:
        return "replay", 0.0
    if settings.shadow_tasks > 0:
        return "shadow", 0.0
    return "canary", settings.shares[0]


def next_share(route: Route, settings: Rollout) -> float:
    """The candidate's share after the next step into or within the canary; 1 when promoted."""
    if route.stage != "canary":
        return settings.shares[0]
    onward = _place(route, settings) + 1
    return settings.shares[onward] if onward < len(settings.shares) else 1.0


def _place(route: Route, settings: Rollout) -> int:
    """The canary's step; the first one for a share that the config no longer has."""
    return settings.shares.index(route.share) if route.share in settings.shares else 0


def _unproven(standing: Standing, settings: Rollout) -> list[str]:
    wanted = 1.0 / settings.alpha
    if standing.difference.e_fine >= wanted:
        lopsided = standing.judge_lopsided if standing.judged else ""
        return [f"a judge that is fair: {settings.judge} {lopsided}"] if lopsided else []
    return _unsaid(standing, settings) or [
        f"outcomes that show it no worse by {settings.margin:g}: e-value {standing.difference.e_fine:.3g} "
        f"of {wanted:g} after {standing.scored} tasks of the candidate",
        *_judges_trouble(standing, settings),
    ]


def _most_doubt(route: Route, onward: float) -> float:
    """E-value against the candidate's outcomes with which it may still have the next share."""
    most = HAND_OVER / onward**2
    return most if route.stage == "canary" else max(most, NOTHING_KNOWN)


def _doubtful(standing: Standing, settings: Rollout, most: float, onward: float) -> list[str]:
    return _unsaid(standing, settings) or [
        f"outcomes that clear it of doubt before it has {onward:.0%}: e-value against it "
        f"{standing.difference.e_worse:.2g}, at most {most:.2g}",
        *_judges_trouble(standing, settings),
    ]


def _unsaid(standing: Standing, settings: Rollout) -> list[str]:
    """What to do where nobody has told of a task of the candidate; empty where somebody has."""
    if standing.scored:
        return []
    nobody = "outcomes: report right answers or a number per task to POST /feedback"
    if not settings.judge:
        return [f"{nobody}, or name a [rollout] judge"]
    return _judges_trouble(standing, settings) or [nobody]


def _judges_trouble(standing: Standing, settings: Rollout) -> list[str]:
    return [f"the judge {settings.judge}: {standing.judge_trouble}"] if standing.judge_trouble else []


def _judge_alone(standing: Standing) -> bool:
    """Nobody but the judge has told of an outcome."""
    return standing.scored == standing.judged


def _onward(route: Route, standing: Standing, settings: Rollout) -> Step:
    if route.stage == "replay":
        stage, share = first_step(settings, replay=False)
        return Step(stage, share, f"{standing.replays} recorded calls answered")
    if route.stage == "shadow":
        return Step("canary", settings.shares[0], f"{standing.pairs} copies answered in the shadow")
    done = f"{standing.answered} tasks, outcomes {standing.difference.estimate:+.3f}"
    if _place(route, settings) + 1 < len(settings.shares):
        return Step("canary", next_share(route, settings), f"{done}; no guard spoke")
    proof = f"not worse by {settings.margin:g} (e-value {standing.difference.e_fine:.3g})"
    return Step("promoted", 0.0, f"{done}; {proof}; no guard spoke")
