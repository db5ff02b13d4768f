"""Takes trials through their course: reads the evidence, decides, and changes the route.

Whatever it knows it reads from the store, so any process may be it, and one that dies is replaced by the
next; of two at once, compare-and-set lets one win each step. It ignores how a step is decided (course) and
how gateways follow (gateway).
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from understudy.config import Config, Rollout
from understudy.errors import InputError, UserError
from understudy.rollout.course import Decision, Step, decide
from understudy.rollout.evidence import LAG_S, Event, Evidence, look
from understudy.rollout.judging import Judging
from understudy.rollout.look import Look, look_at
from understudy.rollout.own_call import Means
from understudy.rollout.shadow import Shadow
from understudy.rollout.standing import Standing
from understudy.rollout.trials import UNDER_WAY, set_stage
from understudy.traffic.routes import Route
from understudy.traffic.store import Store

BY = "understudy"
"""Who made a change that no person made."""
COPIED_AT_ONCE = 8
"""Trials for which copies are made at the same time."""
SHOWN_S = 30.0
"""How old a look in the store becomes, at most."""

_log = logging.getLogger("understudy.rollout")


class Report(NamedTuple):
    """A trial as it stands."""

    route: Route
    standing: Standing
    missing: list[str]
    """What the next step waits for; empty when it was just taken."""


class Trial:
    """What one process knows of a trial under way."""

    def __init__(
        self, store: Store, route: Route, settings: Rollout, clock: Callable[[], float] = time.time
    ) -> None:
        history = [r for r in store.route_history(route.alias) if r.origin == route.origin]
        self.standing = Standing(settings)
        began = history[0].changed_at if history else route.changed_at
        self._canary = next((r.changed_at for r in history if r.stage == "canary"), None)
        self._shares = [(r.changed_at, r.share if r.stage == "canary" else 0.0) for r in history]
        self._alone = next((r.changed_at for r in history if r.share >= 1.0), math.inf)
        self.shadow = Shadow(store, route.alias, route.candidate, began, settings)
        self.judging = Judging(store, route, began, settings, clock)
        self.asking: asyncio.Task[None] | None = None
        """Copies that are being made, or tasks that are being judged."""
        self._settings = settings
        self._evidence: Evidence | None = None
        self.shown: Look | None = None
        self.shown_at = 0.0

    def turn_to(self, route: Route) -> Evidence | None:
        """Know where the route stands now; returns what is told of its traffic, once there is a canary."""
        if not self._shares or route.changed_at > self._shares[-1][0]:
            self._shares.append((route.changed_at, route.share if route.stage == "canary" else 0.0))
        if route.share >= 1.0:
            self._alone = min(self._alone, route.changed_at)
        self.standing.alone_since = self._alone
        if self._evidence is None and route.stage == "canary":
            self._evidence = Evidence(
                route.alias,
                candidate=route.candidate,
                incumbent=route.model,
                since=self._canary or route.changed_at,
                settle_s=self._settings.settle_s,
                idle_s=self._settings.task_idle_s,
            )
        return self._evidence

    def _share_at(self, moment: float) -> float:
        """The candidate's share of the tasks that began then."""
        before = bisect_right(self._shares, (moment, math.inf))
        return self._shares[before - 1][1] if before else 0.0

    def add_events(self, events: Sequence[Event], upto: float) -> None:
        """Fold in what happened to tasks, with what the judge said until then (Unix seconds) of earlier
        ones. Raises StoreError."""
        judging, standing = self.judging, self.standing
        said = judging.heard(upto)
        judging.offer(events, self._share_at)
        standing.add(sorted([*events, *said], key=lambda event: event.at))
        standing.judge_trouble, standing.judge_broke = judging.trouble, judging.broke
        standing.judge_usd, standing.judge_lopsided = judging.spent_usd, judging.lopsided

    def add_pairs(self) -> None:
        """Fold in the copies answered since the last time. Raises StoreError."""
        self.standing.add_pairs(self.shadow.pairs())


def fold_in(store: Store, under_way: Sequence[tuple[Route, Trial]], now: float) -> None:
    """Give each trial what happened since it was last looked at, read for all of them together.

    Raises StoreError.
    """
    told: list[tuple[Trial, Evidence]] = []
    for route, trial in under_way:
        trial.add_pairs()
        if evidence := trial.turn_to(route):
            told.append((trial, evidence))
    events = look(store, [evidence for _, evidence in told], now)
    for (trial, _), of in zip(told, events, strict=True):
        trial.add_events(of, now - LAG_S)


class Controller:
    """All trials of a store."""

    def __init__(
        self,
        store: Store,
        config: Config,
        means: Callable[[str], Means],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``means`` gives what copying to a candidate (ENDPOINT/MODEL) needs."""
        self._store = store
        self._settings = config.rollout or Rollout()
        self._means = means
        self._clock = clock
        self._copiers = asyncio.Semaphore(COPIED_AT_ONCE)
        self._trials: dict[tuple[str, int], Trial] = {}

    async def step(self, patience_s: float | None = None) -> list[Report]:
        """Look at every trial under way once, and take the steps that are due.

        A slow candidate must not keep the others from being rolled back: copies that take longer than
        ``patience_s`` are left to a later step (None: waited for). A trial for which nothing can be copied is
        logged and left as it is. Raises StoreError.
        """
        routes = [r for r in self._store.routes().values() if r.candidate and r.stage in UNDER_WAY]
        self._trials = {
            (r.alias, r.origin): self._trials.get((r.alias, r.origin))
            or Trial(self._store, r, self._settings, self._clock)
            for r in routes
        }
        now = self._clock()
        under_way = [(route, self._trials[route.alias, route.origin]) for route in routes]
        fold_in(self._store, under_way, now)
        decisions = [decide(route, trial.standing, self._settings, now) for route, trial in under_way]
        self._keep_looks(under_way, now)
        copied = await self._copies(under_way, decisions, now, patience_s)
        return [
            self._one(route, trial, self._after_copies(route, trial, now) if trial in copied else decision)
            for (route, trial), decision in zip(under_way, decisions, strict=True)
        ]

    async def _copies(
        self,
        under_way: Sequence[tuple[Route, Trial]],
        decisions: Sequence[Decision],
        now: float,
        patience_s: float | None,
    ) -> list[Trial]:
        """Make copies for the trials that wait for some, and have tasks judged, all side by side; returns the
        trials whose copies are made."""
        for (route, trial), decision in zip(under_way, decisions, strict=True):
            if trial.asking is not None or decision.step is not None:
                continue
            if route.stage in ("replay", "shadow"):
                trial.asking = asyncio.create_task(self._copy(route, trial, now))
            elif trial.judging.wants(now):
                trial.asking = asyncio.create_task(self._judge(route, trial, now))
        if running := [trial.asking for _, trial in under_way if trial.asking]:
            await asyncio.wait(running, timeout=patience_s)
        done: list[Trial] = []
        for route, trial in under_way:
            if trial.asking is not None and trial.asking.done():
                task, trial.asking = trial.asking, None
                task.result()  # raises what it raised
                done += [trial] if route.stage in ("replay", "shadow") else []
        return done

    def _one(self, route: Route, trial: Trial, decision: Decision) -> Report:
        if decision.step is None:
            return Report(route, trial.standing, decision.missing)
        return Report(self._take(route, decision.step), trial.standing, [])

    def _keep_looks(self, under_way: Sequence[tuple[Route, Trial]], now: float) -> None:
        """For the dashboard: where something has happened, and else every half minute."""
        new: list[tuple[str, float, str]] = []
        for route, trial in under_way:
            seen = look_at(route, trial.standing, self._settings)
            if seen != trial.shown or now - trial.shown_at > SHOWN_S:
                trial.shown, trial.shown_at = seen, now
                new.append((route.alias, now, msgspec.json.encode(seen).decode()))
        if new:
            self._store.set_looks(new)

    async def _copy(self, route: Route, trial: Trial, now: float) -> None:
        replay = route.stage == "replay"
        try:
            async with self._copiers:
                made = await trial.shadow.copy(now, self._means(route.candidate), replay=replay)
            trial.standing.replay_over = replay and made == 0
        except InputError as error:  # an endpoint that left the config, say
            _log.warning("%s: no copies for %s: %s", route.alias, route.candidate, error)

    async def _judge(self, route: Route, trial: Trial, now: float) -> None:
        try:
            async with self._copiers:
                await trial.judging.judge(now, self._means(self._settings.judge))
        except InputError as error:  # an endpoint whose key is gone, say
            _log.warning("%s: nothing is judged: %s", route.alias, error)

    def _after_copies(self, route: Route, trial: Trial, now: float) -> Decision:
        """What the copies just made, or that there were none to make, lead to."""
        trial.add_pairs()
        standing, shadow = trial.standing, trial.shadow
        decision = decide(route, standing, self._settings, now)
        if decision.step is None and shadow.broke:
            spent = f"${shadow.spent_usd:.2f} were spent on {standing.replays + standing.pairs} copies"
            return Decision(Step("held", 0.0, f"{spent}, all that [rollout] shadow_usd allows"), [])
        return decision

    def _take(self, route: Route, step: Step) -> Route:
        try:
            moved = set_stage(self._store, route, step, BY, self._settings, self._clock())
        except InputError:
            return route  # somebody was faster; the next pass sees what they did
        share = f" {step.share:.0%}" if step.stage == "canary" else ""
        _log.info("%s: %s %s%s: %s", route.alias, route.candidate, step.stage, share, step.reason)
        return moved.now


async def watch_over(
    controller: Controller, told: Callable[[Report], None], *, every_s: float, once: bool = False
) -> None:
    """Run until cancelled; ``told`` hears of every step taken and, under ``once``, of every trial.

    It is called in a thread, for it may speak to a webhook. A store that cannot be reached is tried again.
    """
    while True:
        try:
            for report in await controller.step(None if once else every_s):
                if once or not report.missing:
                    await asyncio.to_thread(told, report)  # a webhook may take its time
        except UserError as error:
            if once:
                raise
            _log.warning("trials cannot be looked at: %s", error)
        if once:
            return
        await asyncio.sleep(every_s)
