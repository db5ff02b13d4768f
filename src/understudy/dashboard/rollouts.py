"""Where each alias leads, the trial it is in with its evidence, how it came to that, and when one must begin.

Evidence is what the controller left in the store at its last look; `LookShown` names what is shown of it. It
ignores what operators ask for (orders) and who may press the buttons (guard).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec
from markupsafe import Markup

from understudy.config import Rollout
from understudy.dashboard import chart, evaluations
from understudy.dashboard.calendar import Calendar, Row
from understudy.dashboard.chart import Line, Mark
from understudy.dashboard.desk import Binding, Desk
from understudy.traffic.routes import Route

HISTORY = 100
LONGEST_DAYS = 365.0
"""A trial that would take longer is none: the traffic is too little."""
SILENT_S = 90.0
"""A look older than this says that nobody takes the trial through its course."""


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
    judge: str = ""
    judged: int = 0
    judge_usd: float = 0.0
    judge_usd_most: float = 0.0
    judge_trouble: str = ""


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


class Proof(NamedTuple):
    """A certificate a trial may rest on."""

    name: str
    """In addresses."""
    shown: str
    """Its folder and whom it passed."""


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
    due: Row | None
    """By when a trial must begin; None where nobody tells."""
    late: bool
    """That day is over, and no trial has begun."""
    proofs: list[Proof]
    """Certificates that passed somebody for this alias."""


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
    longest: float = LONGEST_DAYS


def page(desk: Desk, query: Mapping[str, str], calendar: Calendar | None) -> Rollouts:
    """Read the page; without a calendar nothing is movable. Raises StoreError."""
    history: dict[str, list[Route]] = {}
    for route in reversed(desk.store.route_history()):
        history.setdefault(route.alias, []).append(route)
    current, looks = desk.store.routes(), desk.store.looks()
    due = calendar.rows(desk) if calendar else {}
    today = dt.datetime.fromtimestamp(desk.now(), dt.UTC).date()
    proofs = _proofs(desk) if calendar else {}
    routes: list[AliasRoute] = []
    for name, binding in desk.bindings().items():
        past, route = history.get(name, []), current.get(name)
        trial = _trial(desk, route, looks.get(name)) if route and route.candidate else None
        row = due.get(name)
        late = trial is None and _late(row, today)
        routes.append(
            AliasRoute(binding, route, past[:HISTORY], _before(past), trial, row, late, proofs.get(name, []))
        )
    routes.sort(key=lambda each: each.trial is None)
    done = query.get("moved", "")
    return Rollouts(desk.now(), routes, calendar is not None, _targets(desk, routes), done)


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
    marks = (
        Mark(f"“no worse” at {look.promote_at:,.0f} may be promoted", look.promote_at),
        Mark(f"“worse” at {look.roll_back_at:,.0f} is rolled back", look.roll_back_at),
    )
    return chart.lines(
        "Evidence from outcomes", "e-value", lines, "comparisons", marks=marks, logarithmic=True
    )


def _before(history: Sequence[Route]) -> str:
    """Where a roll-back leads, by the rule of `rollout.move.roll_back`."""
    return history[1].model if len(history) > 1 and history[0].stage != "rolled_back" else ""


def _late(due: Row | None, today: dt.date) -> bool:
    if due is None or due.latest_start is None or due.days_needed is None:
        return False
    return due.latest_start < today and due.days_needed < LONGEST_DAYS


def _proofs(desk: Desk) -> dict[str, list[Proof]]:
    found: dict[str, list[Proof]] = {}
    for entry in evaluations.page(desk, {}).entries:
        made = entry.certificate
        passed = [c.model.name for c in made.candidates if c.proof.verdict == "PASS"] if made else []
        if made and passed:
            shown = f"{entry.folder}: {', '.join(passed)} passed"
            found.setdefault(made.question.alias, []).append(Proof(entry.name, shown))
    return found


def _targets(desk: Desk, routes: Sequence[AliasRoute]) -> list[str]:
    seen = {target for route in routes for target in (route.binding.model, *route.binding.fallback)}
    seen |= {route.model for each in routes for route in each.history}
    return sorted(seen | set(desk.config.drill.candidates) - {""})
