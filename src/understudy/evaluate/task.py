"""What a completed task costs, and how many get completed, each with its interval.

All attempts are paid for, the failed ones too; only successes count. The cost per completed task is therefore
a ratio of two means, and its error comes from both and from their dependence. It ignores what a failed task
costs whoever asked for it.

Sources: Cochran 1977, "Sampling Techniques", §6.4 (ratio estimator, delta method); residuals are summed in
conversations before they are squared (Liang & Zeger 1986); Wilson 1927 for the completion rate.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from understudy.evaluate.grade import grade
from understudy.evaluate.item import Call, Item
from understudy.evaluate.performance import ModelSheet, usd_of
from understudy.evaluate.proof import SUCCESS, Proof, score_of
from understudy.protocol import Usage

NORMAL_95 = 1.959963984540054


class TaskFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One arm on the answered items whose right answer is known; intervals are of 95%."""

    model: str
    calls: int
    """Items; 0 where no right answer is known."""
    completed: int
    """Calls whose score is at least proof.SUCCESS."""
    completion: float
    """Share completed."""
    completion_low: float
    completion_high: float
    usd: float | None
    """US dollars per completed task; None without a price or without a completed task."""
    usd_low: float | None
    """None below two conversations."""
    usd_high: float | None


class Attempted(NamedTuple):
    """One item as one arm did it."""

    cluster: str
    usd: float | None
    """All attempts together."""
    done: bool


class Ratio(NamedTuple):
    value: float
    low: float | None
    high: float | None


def figures(model: str, attempts: Sequence[Attempted]) -> TaskFigures:
    """An arm's figures."""
    done = sum(a.done for a in attempts)
    low, high = wilson(done, len(attempts))
    priced = [(a.cluster, a.usd, float(a.done)) for a in attempts if a.usd is not None]
    cost = ratio(priced) if len(priced) == len(attempts) else None
    return TaskFigures(
        model=model,
        calls=len(attempts),
        completed=done,
        completion=done / len(attempts) if attempts else 0.0,
        completion_low=low,
        completion_high=high,
        usd=cost.value if cost else None,
        usd_low=cost.low if cost else None,
        usd_high=cost.high if cost else None,
    )


def ratio(observed: Sequence[tuple[str, float, float]]) -> Ratio | None:
    """Σy / Σx over (cluster, y, x) with its 95% interval; None where Σx is 0.

    Var R = G/(G-1) · Σ_g (Σ_{i in g} y_i - R·x_i)² / (Σx)², the delta method over G clusters. The lower bound
    is not below 0: costs are not.
    """
    total_y, total_x = math.fsum(y for _, y, _ in observed), math.fsum(x for _, _, x in observed)
    if not total_x:
        return None
    value = total_y / total_x
    residuals: dict[str, float] = defaultdict(float)
    for cluster, y, x in observed:
        residuals[cluster] += y - value * x
    count = len(residuals)
    if count < 2:
        return Ratio(value, None, None)
    variance = math.fsum(r * r for r in residuals.values()) * count / (count - 1) / total_x**2
    half = NORMAL_95 * math.sqrt(variance)
    return Ratio(value, max(value - half, 0.0), value + half)


def wilson(done: int, of: int) -> tuple[float, float]:
    """95% score interval of a share; (0, 1) when nothing was tried."""
    if not of:
        return 0.0, 1.0
    z2, share = NORMAL_95**2, done / of
    middle = (share + z2 / (2 * of)) / (1 + z2 / of)
    half = NORMAL_95 / (1 + z2 / of) * math.sqrt(share * (1 - share) / of + z2 / (4 * of * of))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def of_incumbent(
    proof: Proof, items: Mapping[str, Item], calls: Mapping[str, Call], sheet: ModelSheet
) -> TaskFigures:
    """The incumbent on the items that a candidate answered."""
    return figures(
        proof.incumbent,
        [
            Attempted(item.cluster or item.key, _usd(sheet, item.usage, 1), _right(item))
            for item in _graded(items, calls)
        ],
    )


def of_candidate(
    proof: Proof, items: Mapping[str, Item], calls: Mapping[str, Call], sheet: ModelSheet
) -> TaskFigures:
    """A candidate on the items it answered; a call that brought no usage cost nothing that is known."""
    return figures(
        proof.candidate,
        [
            Attempted(
                item.cluster or item.key,
                _usd(sheet, calls[item.key].usage, calls[item.key].attempts),
                score_of(item, calls[item.key]) >= SUCCESS,
            )
            for item in _graded(items, calls)
        ],
    )


def _graded(items: Mapping[str, Item], calls: Mapping[str, Call]) -> list[Item]:
    """Answered items whose right answer is known: being like the incumbent completes no task."""
    return [item for key, item in items.items() if key in calls and not item.agreement]


def _right(item: Item) -> bool:
    return grade(item.grader, item.reply, item.expected) >= SUCCESS


def _usd(sheet: ModelSheet, usage: Usage | None, attempts: int) -> float | None:
    used = usage or Usage()
    once = usd_of(sheet, used.prompt_tokens, used.completion_tokens)
    return None if once is None else once * attempts
