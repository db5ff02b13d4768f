"""A candidate's answers taken one by one in the committed order: the tests fed, both scores kept.

The run that pays for the calls and the proof that is read back from files take the same walk. It ignores how
calls are made (replay), which order was committed (sequential) and what the walk proves (proof).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from understudy.evaluate.item import Call, Item
from understudy.evaluate.metrics import Metric, primary
from understudy.evaluate.panel import Panel, Rates


class Pair(NamedTuple):
    """One item asked, with both scores."""

    item: Item
    call: Call
    metric: Metric
    """The item's primary one."""
    incumbent: float
    candidate: float


class Walk:
    """The tests of one candidate and what they have been fed so far.

    ``graded`` says that the scores within items and calls were computed by this very process; those read from
    a file are not trusted, and everything is graded anew.
    """

    def __init__(
        self, metrics: Sequence[Metric], items: Sequence[Item], rates: Rates, *, graded: bool = False
    ) -> None:
        self.panel = Panel(metrics, items, rates, graded=graded)
        self.pairs: list[Pair] = []
        """In the order asked."""
        self._graded = graded

    def take(self, item: Item, call: Call, preference: float | None) -> None:
        """Take the answer to the next item; ``preference`` is the judge's, where it has spoken."""
        metric = primary(self.panel.metrics, item)
        score = metric.candidate(item, call, preference, graded=self._graded)
        self.pairs.append(Pair(item, call, metric, self.panel.own[metric.name][item.key], score))
        self.panel.observe(
            item, lambda m: score if m is metric else m.candidate(item, call, preference, graded=self._graded)
        )

    def awaits_judge(self, item: Item, call: Call, preferences: Mapping[str, float | None]) -> bool:
        """Whether an answered item has still to be compared by the judge before it counts."""
        return item.key not in preferences and not call.error and self.panel.wants_judgement(item)

    def scores(
        self, pair: Pair, metric: Metric, preferences: Mapping[str, float | None]
    ) -> tuple[float, float]:
        """The incumbent's and the candidate's score of a pair by any metric that scores its item."""
        own = self.panel.own[metric.name][pair.item.key]
        if metric is pair.metric:
            return own, pair.candidate
        preference = preferences.get(pair.item.key)
        return own, metric.candidate(pair.item, pair.call, preference, graded=self._graded)
