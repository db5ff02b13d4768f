"""What speaks against a verdict that the tests have reached: a judge that is silent, a metric that is blind.

Not being worse means something only where being worse would have shown. If an empty answer to every question
would have been "not worse by the margin" too, a PASS says nothing about the candidate; trials call this assay
sensitivity. It ignores doubts about the traffic itself (strata, guards): those are shown beside a verdict.

Source: ICH E10, "Choice of control group and related issues in clinical trials", 2000, §1.5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

from understudy.evaluate.grade import Reply
from understudy.evaluate.item import Call, Item
from understudy.evaluate.metrics import EVEN, Metric
from understudy.evaluate.sequential import Verdict
from understudy.evaluate.walk import Pair, Walk

SILENT_JUDGE = 0.10
"""Share of pairs without a judge's verdict from which its word carries no PASS and no FAIL."""
ALWAYS_EVEN = 20
"""Pairs of unlike answers, all called even, from which a judge counts as one that tells nothing apart."""
CERTAIN = 1e-6
"""Slack for sums of floats where something is called known before all is added up."""
EMPTY = Call(key="", reply=Reply(), score=0.0)


class Preference(msgspec.Struct, frozen=True):
    """What people would say, if the judge's word is calibrated on theirs (see judge.Judged)."""

    value: float
    low: float
    high: float


def doubts(
    walk: Walk, preferences: Mapping[str, float | None], people: Preference | None = None
) -> list[str]:
    """Why the verdict of a walk must be withheld; none where it stands."""
    panel = walk.panel
    if panel.verdict is Verdict.UNDECIDED:
        return []
    judged = [p for p in walk.pairs if p.metric.basis == "judge" and p.item.key in preferences]
    found = _silent(judged, preferences)
    if panel.verdict is Verdict.PASS:
        found += _against_people(judged, people)
        found += [line for metric in panel.required if (line := _blind(walk, metric, judged, preferences))]
    return found


def _silent(judged: Sequence[Pair], preferences: Mapping[str, float | None]) -> list[str]:
    silent = _mean([float(preferences[p.item.key] is None) for p in judged])
    if silent <= SILENT_JUDGE:
        return []
    return [f"The judge gave no verdict on {silent:.0%} of the pairs: its word decides nothing."]


def _against_people(judged: Sequence[Pair], people: Preference | None) -> list[str]:
    if not judged or people is None or people.high >= EVEN - judged[0].metric.margin:
        return []
    return [
        f"People prefer the incumbent (the candidate in {people.value:.0%}, at most {people.high:.0%}):"
        " the judge's PASS does not stand."
    ]


def _blind(
    walk: Walk, metric: Metric, judged: Sequence[Pair], preferences: Mapping[str, float | None]
) -> str:
    """That a metric tells nothing apart; empty where it does."""
    if metric.basis == "judge":
        unlike = [p for p in judged if p.item.reply != p.call.reply]
        said = [one for p in unlike if (one := preferences[p.item.key]) is not None]
        if len(said) < ALWAYS_EVEN or any(one != EVEN for one in said):
            return ""
        return f"The judge called all {len(said)} pairs of unlike answers even: it tells nothing apart."
    own, asked = walk.panel.own[metric.name], [p.item for p in walk.pairs if metric.scores(p.item)]
    whole = [item for drawn in walk.order for item in drawn if item.key in own]
    if not _blind_everywhere(metric, asked, whole, own):
        return ""
    empty, incumbent = _mean([_empty(metric, item) for item in whole]), _mean(list(own.values()))
    return (
        f"“{metric.name}” tells nothing apart here: the incumbent scores {incumbent:.1%} on it and an"
        f" empty answer to every question {empty:.1%}, within the margin of {100 * metric.margin:g} points."
        " Any answers would have passed; look at the expected answers and the grader."
    )


def is_blind(metric: Metric, pairs: Sequence[Pair], items: Sequence[Item], own: Mapping[str, float]) -> bool:
    """Whether empty answers to all of these items would not be worse by the margin.

    ``pairs`` are those of them that were asked, ``own`` the incumbent's scores.
    """
    asked = [pair.item for pair in pairs]
    return metric.basis != "judge" and _blind_everywhere(metric, asked, items, own)


def _blind_everywhere(
    metric: Metric, asked: Sequence[Item], whole: Sequence[Item], own: Mapping[str, float]
) -> bool:
    """Whether neither the items asked nor all of them tell an empty answer from the incumbent's.

    The few that were asked may by chance be those the incumbent fails at; what it scores on the others is
    known too. They come first because they are few, and nearly always enough.
    """
    return not _tells(metric, asked, own) and not _tells(metric, whole, own)


def _tells(metric: Metric, items: Sequence[Item], own: Mapping[str, float]) -> bool:
    """Whether empty answers to all of these would be worse than the incumbent's by more than the margin.

    Grades no more of them than it must: once full marks for all that are left would not save them, it
    is known.
    """
    scores, empty = [own[item.key] for item in items], [0.0]
    room = math.fsum(scores) - metric.margin * len(items)
    for left, item in zip(range(len(items), 0, -1), items, strict=True):
        if left < room - CERTAIN:
            return True
        empty.append(_empty(metric, item))
        room -= empty[-1]
    return _mean(scores) - math.fsum(empty) / max(len(items), 1) > metric.margin


def _empty(metric: Metric, item: Item) -> float:
    """Score of an empty answer."""
    return metric.candidate(item, EMPTY, None)


def blind_scores(incumbent: Sequence[float], margin: float) -> str:
    """The same of a file of scores, where nothing is known but that 0 is the lowest; empty where it tells."""
    own = _mean(incumbent)
    if own > margin:
        return ""
    return (
        f"The incumbent scores {own:.1%}, within the margin of {100 * margin:g} points of nothing:"
        " scores of 0 on every item would have passed."
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
