"""Several metrics tested side by side on one order of items; all that are required must hold.

PASS needs every required metric to pass, each at the full alpha: an intersection-union test, so nothing is
lost to their number. FAIL needs one to fail, each at beta over the number that can. It ignores where scores
come from (metrics) and in which order items are asked (replay).

Source: Berger 1982, "Multiparameter hypothesis testing and acceptance sampling" (intersection-union).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from understudy.evaluate.item import Item
from understudy.evaluate.metrics import Metric
from understudy.evaluate.sequential import Design, SequentialTest, Unit, Verdict

LOOKED_AT = 50
"""Items asked although no open metric scores them: enough to see errors, refusals and broken tool calls."""

Score = Callable[[Metric], float]


class Rates(NamedTuple):
    """Error rates shared by all metrics."""

    alpha: float
    beta: float
    candidates: int


class Panel:
    """The tests of one candidate, fed item by item in the committed order."""

    def __init__(
        self, metrics: Sequence[Metric], items: Sequence[Item], rates: Rates, *, graded: bool = False
    ) -> None:
        self.metrics = [m for m in metrics if any(m.scores(item) for item in items)]
        self.required = [m for m in self.metrics if m.required]
        self.own = {
            m.name: {i.key: m.incumbent(i, graded=graded) for i in items if m.scores(i)} for m in self.metrics
        }
        """Metric to item to the incumbent's score."""
        beta = rates.beta / max(sum(m.can_fail for m in self.required), 1)
        self.tests = {
            m.name: SequentialTest(
                [Unit(score) for score in self.own[m.name].values()],
                Design(m.margin, rates.alpha, beta, rates.candidates, m.good),
            )
            for m in self.metrics
        }
        self._idle = 0
        self.settled = False
        """No further answer can change the verdict: it has come, or every required test has said its word."""

    def wants(self, item: Item) -> bool:
        """Whether the item's answer can still tell something; once no, always no."""
        return not self.settled and (self._idle < LOOKED_AT or self._open_on(item))

    def _open_on(self, item: Item) -> bool:
        return any(m.scores(item) and not self.tests[m.name].decided for m in self.required)

    def wants_judgement(self, item: Item) -> bool:
        """Whether a judge has still to compare the answers to this item."""
        return any(m.basis == "judge" and m.scores(item) and not self._decided(m) for m in self.metrics)

    def _decided(self, metric: Metric) -> bool:
        return self.tests[metric.name].decided

    def observe(self, item: Item, candidate: Score) -> None:
        """Take the answer to the next item; ``candidate`` gives its score by a metric."""
        self._idle += not self._open_on(item)
        for metric in self.metrics:
            # a judge is no longer asked once its test has decided
            own = self.own[metric.name].get(item.key)
            if own is not None and not (metric.basis == "judge" and self._decided(metric)):
                self.tests[metric.name].observe(Unit(own), candidate(metric))
        spoken = all(self._decided(m) for m in self.required)
        self.settled = spoken or self.verdict is not Verdict.UNDECIDED

    def verdict_of(self, metric: Metric) -> Verdict:
        """A metric's own verdict: unlike the incumbent is not yet worse than it."""
        verdict = self.tests[metric.name].verdict
        return verdict if verdict is Verdict.PASS or metric.can_fail else Verdict.UNDECIDED

    @property
    def verdict(self) -> Verdict:
        verdicts = [self.verdict_of(m) for m in self.required]
        if Verdict.FAIL in verdicts:
            return Verdict.FAIL
        passed = bool(verdicts) and all(v is Verdict.PASS for v in verdicts)
        return Verdict.PASS if passed else Verdict.UNDECIDED

    @property
    def leading(self) -> Metric:
        """The metric whose numbers stand for the verdict: one that failed, else the first still open, else
        the first."""
        failed = [m for m in self.required if self.verdict_of(m) is Verdict.FAIL]
        open_ = [m for m in self.required if self.verdict_of(m) is Verdict.UNDECIDED]
        return (failed or open_ or self.required or self.metrics)[0]
