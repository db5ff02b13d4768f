"""How a trial stands, as people are shown it: by `rollout status`, and by the dashboard from the store.

Whoever takes trials through their course keeps what it saw last in the store, so a page costs a row and says
how old its figures are. It ignores what follows from the figures (course).
"""

from __future__ import annotations

import msgspec

from understudy.config import Rollout
from understudy.rollout.course import waits_for
from understudy.rollout.standing import Standing
from understudy.traffic.routes import Route


class GuardLook(msgspec.Struct, frozen=True):
    """One thing that must not happen."""

    rate: float
    """Share of comparisons in which it did."""
    tolerated: float
    e_value: float


class Look(msgspec.Struct, frozen=True):
    """One trial."""

    candidate: str
    stage: str
    share: float
    replays: int
    copies: int
    tasks: int
    """Of the candidate."""
    tasks_with_outcome: int
    difference: float
    """Of outcomes, candidate less incumbent."""
    e_no_worse: float
    e_worse: float
    promote_at: float
    """`e_no_worse` that allows the larger shares."""
    roll_back_at: float
    """E-value of anything against it that ends the trial."""
    path: list[tuple[int, float, float]]
    """Comparisons, `e_no_worse` and `e_worse` as they went."""
    guards: dict[str, GuardLook]
    waits_for: list[str]
    judge: str = ""
    """ENDPOINT/MODEL; empty for none."""
    judged: int = 0
    """The candidate's tasks of which the judge alone has told."""
    judge_usd: float = 0.0
    """What it has cost."""
    judge_usd_most: float = 0.0
    """What it may cost."""
    judge_trouble: str = ""
    """Why it brings no score; empty when it does."""


def look_at(route: Route, standing: Standing, settings: Rollout) -> Look:
    """The evidence of a route's trial, and what it waits for."""
    waits = ["a person: resume or abort"] if route.stage == "held" else waits_for(route, standing, settings)
    return Look(
        candidate=route.candidate,
        stage=route.stage,
        share=route.share,
        replays=standing.replays,
        copies=standing.pairs,
        tasks=standing.answered,
        tasks_with_outcome=standing.scored,
        difference=standing.difference.estimate,
        e_no_worse=standing.difference.e_fine,
        e_worse=standing.difference.e_worse,
        promote_at=1.0 / settings.alpha,
        roll_back_at=1.0 / settings.rollback_alpha,
        path=[(at.rounds, at.fine, at.worse) for at in standing.difference.path],
        guards={
            name: GuardLook(g.excess.rate, g.excess.tolerated, g.excess.e_value)
            for name, g in standing.guards.items()
        },
        waits_for=waits,
        judge=settings.judge,
        judged=standing.judged,
        judge_usd=standing.judge_usd,
        judge_usd_most=settings.judge_usd,
        judge_trouble=standing.judge_trouble,
    )
