"""By when a trial must begin to be over before its alias's model retires.

How long a trial takes follows from the course (so many of the candidate's tasks at each share) and from the
proof: how many tasks beside the incumbent's it takes until the bet on "no worse" pays, with a given
probability, for a candidate that is as good. It ignores candidates that are better or worse: those are
decided sooner, or not promoted.

Method: per task the logarithm of the bet grows by g = d²/(2·(v + v/k)) with a variance of 2g (d the margin, v
the outcomes' variance, k the incumbent's tasks for each of the candidate's), the Gaussian approximation of
Wald's "Sequential Analysis", 1947, §3.
"""

from __future__ import annotations

import datetime as dt
import math
from statistics import NormalDist, fmean
from typing import NamedTuple

from understudy.config import Rollout
from understudy.rollout.betting import FINE_WEIGHTS
from understudy.rollout.course import PROOF_SHARE
from understudy.rollout.judging import BESIDE
from understudy.traffic.store import Store

POWER = 0.9
"""Probability with which an equal candidate is through in the time that is told."""
RESERVE_DAYS = 7
"""For whoever has to look when a trial is held."""
LOOK_BACK_DAYS = 14
SAMPLE = 2_000
"""Latest calls from which calls per task and outcomes are read."""
WIDEST = 0.25
"""Variance of an outcome in [0, 1] of which nothing is known."""
DAY_S = 86_400.0


class Traffic(NamedTuple):
    """What an alias gets to do."""

    tasks_per_day: float
    told: float
    """Share of tasks of which somebody said how they went."""
    variance: float
    """Of an outcome."""


class Entry(NamedTuple):
    """One alias in the calendar."""

    alias: str
    model: str
    retires: dt.date | None
    """By the catalog; None where no end is announced."""
    tasks_per_day: float
    tasks_needed: float | None
    """Of the whole alias; None where nothing can be decided."""
    days_needed: float | None
    latest_start: dt.date | None
    missing: str
    """Why there is no date; empty when there is one."""


def entry(alias: str, model: str, retires: dt.date | None, traffic: Traffic, settings: Rollout) -> Entry:
    """The latest safe start of a trial on one alias."""
    if not traffic.tasks_per_day:
        return Entry(alias, model, retires, 0.0, None, None, None, "no traffic in the last two weeks")
    if not traffic.told and not (settings.judge and settings.judge_sample):
        missing = "nobody says how tasks went: POST /feedback, or name a [rollout] judge"
        return Entry(alias, model, retires, traffic.tasks_per_day, None, None, None, missing)
    tasks = tasks_needed(settings, traffic)
    days = tasks / traffic.tasks_per_day + settings.settle_s / DAY_S
    latest = retires - dt.timedelta(days=math.ceil(days) + RESERVE_DAYS) if retires else None
    missing = "" if retires else "no end is announced"
    return Entry(alias, model, retires, traffic.tasks_per_day, tasks, days, latest, missing)


def tasks_needed(settings: Rollout, traffic: Traffic, power: float = POWER) -> float:
    """Tasks of the whole alias until an equal candidate is promoted, with probability ``power``.

    A judge tells of its sample of the candidate's tasks, and of few of the incumbent's; its money is not
    counted.
    """
    told = max(traffic.told, settings.judge_sample if settings.judge else 0.0)
    most_beside = math.inf if traffic.told else BESIDE
    before = [s for s in settings.shares if s < PROOF_SHARE]
    total = float(settings.replay_tasks > 0) + settings.shadow_tasks / (settings.shadow_sample or 1.0)
    evidence, wanted = 0.0, _evidence_needed(settings.alpha, power)
    for share, tasks in zip(settings.shares, settings.tasks, strict=True):
        beside = min((1.0 - share) / share, most_beside)
        rate = _growth(settings.margin, traffic.variance, beside)
        of_candidate = float(tasks)
        if before and share == before[-1] and rate:
            of_candidate = max(of_candidate, (wanted - evidence) / rate / told)
        evidence += of_candidate * rate * told
        total += of_candidate / share
    return total


def traffic_of(store: Store, alias: str, now: float) -> Traffic:
    """What the last two weeks and the latest calls say. Raises StoreError."""
    since = now - LOOK_BACK_DAYS * DAY_S
    hours = [hour for hour in store.hours(since=since) if hour.alias == alias]
    calls = sum(hour.calls for hour in hours)
    found = list(store.calls(alias=alias, newest_first=True, limit=SAMPLE)) if calls else []
    if not found:
        return Traffic(0.0, 0.0, WIDEST)
    tasks = {stored.call.task_id or stored.call.key for stored in found}
    days = min(LOOK_BACK_DAYS, max(1.0, (now - min(hour.hour for hour in hours) * 3600.0) / DAY_S))
    per_task = len(found) / len(tasks)
    named = {stored.call.key: stored.call.task_id or stored.call.key for stored in found}
    said = store.feedback(list(named))
    numbers = [f.value for f in said if f.value is not None and 0.0 <= f.value <= 1.0]
    mean = fmean(numbers) if numbers else 0.5
    told = len({named[f.call] for f in said}) / len(tasks)
    return Traffic(calls / days / per_task, told, max(mean * (1.0 - mean), 0.01))


def _evidence_needed(alpha: float, power: float) -> float:
    """Mean log-evidence at which it has passed ln(1/α) with probability ``power``: x − z·√(2x) = a."""
    a = math.log(1.0 / alpha) - math.log(FINE_WEIGHTS[0])
    z = NormalDist().inv_cdf(power)
    return ((z * math.sqrt(2.0) + math.sqrt(2.0 * z * z + 4.0 * a)) / 2.0) ** 2


def _growth(margin: float, variance: float, beside: float) -> float:
    """Per task of the candidate, with ``beside`` of the incumbent's for each."""
    return margin**2 / (2.0 * variance * (1.0 + 1.0 / beside)) if beside else 0.0
