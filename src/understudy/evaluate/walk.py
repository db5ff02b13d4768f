"""A candidate's answers taken draw by draw in the committed order: the tests fed, both scores kept.

The run that pays for the calls and the proof that is read back from files take the same walk. It ignores how
calls are made (replay), which order was committed (sequential) and what the walk proves (proof).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from understudy.evaluate.item import Call, Drawn, Item
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

    ``order`` is the committed one. ``graded`` says that the scores within items and calls were computed by
    this very process; those read from a file are not trusted, and everything is graded anew.
    """

    def __init__(
        self, metrics: Sequence[Metric], order: Sequence[Drawn], rates: Rates, *, graded: bool = False
    ) -> None:
        self.order = order
        self.panel = Panel(metrics, order, rates, graded=graded)
        self.pairs: list[Pair] = []
        """In the order asked."""
        self._graded = graded

    def take(
        self, together: Drawn, calls: Mapping[str, Call], preferences: Mapping[str, float | None]
    ) -> None:
        """Take the answers to the next draw, all of them; ``preferences`` are the judge's, where it has
        spoken."""
        pairs = [self._pair(item, calls[item.key], preferences.get(item.key)) for item in together]
        self.pairs += pairs

        def score(metric: Metric, place: int) -> float:
            pair = pairs[place]
            if metric is pair.metric:
                return pair.candidate
            preference = preferences.get(pair.item.key)
            return metric.candidate(pair.item, pair.call, preference, graded=self._graded)

        self.panel.observe(together, score)

    def _pair(self, item: Item, call: Call, preference: float | None) -> Pair:
        metric = primary(self.panel.metrics, item)
        score = metric.candidate(item, call, preference, graded=self._graded)
        return Pair(item, call, metric, self.panel.own[metric.name][item.key], score)

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
