"""Several metrics tested side by side on one order of items; all that are required must hold.

PASS needs every required metric to pass, each at the full alpha: an intersection-union test, so nothing is
lost to their number. FAIL needs one to fail, each at beta over the number that can. It ignores where scores
come from (metrics) and in which order items are asked (replay).

Source: Berger 1982, "Multiparameter hypothesis testing and acceptance sampling" (intersection-union).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from understudy.evaluate.item import Drawn, Item
from understudy.evaluate.metrics import Metric
from understudy.evaluate.sequential import Design, SequentialTest, Unit, Verdict

LOOKED_AT = 50
"""Items asked although no open metric scores them: enough to see errors, refusals and broken tool calls."""

Score = Callable[[Metric, int], float]
"""A candidate's score by a metric of the item at a place of what was drawn."""


class Rates(NamedTuple):
    """Error rates shared by all metrics."""

    alpha: float
    beta: float
    candidates: int


class Panel:
    """The tests of one candidate, fed draw by draw in the committed order.

    ``order`` is all there is to draw. What is drawn at once is asked whole and counts at once: a metric tests
    the sum over those of its items that it scores.
    """

    def __init__(
        self, metrics: Sequence[Metric], order: Sequence[Drawn], rates: Rates, *, graded: bool = False
    ) -> None:
        items = [item for together in order for item in together]
        self.metrics = [m for m in metrics if any(m.scores(item) for item in items)]
        self.required = [m for m in self.metrics if m.required]
        self.own = {
            m.name: {i.key: m.incumbent(i, graded=graded) for i in items if m.scores(i)} for m in self.metrics
        }
        """Metric to item to the incumbent's score."""
        beta = rates.beta / max(sum(m.can_fail for m in self.required), 1)
        self.tests = {
            m.name: SequentialTest(
                [unit for together in order if (unit := _unit(self.own[m.name], together)).items],
                Design(m.margin, rates.alpha, beta, rates.candidates, m.good),
            )
            for m in self.metrics
        }
        self._open = [self.own[m.name] for m in self.required]
        """What the required metrics score whose tests have not decided."""
        self._idle = 0
        """Items asked although no open metric scores them."""
        self.settled = False
        """No further answer can change the verdict: it has come, or every required test has said its word."""

    def wants(self, together: Drawn) -> bool:
        """Whether the answers to a draw can still tell something; once no, always no."""
        return not self.settled and (self._idle < LOOKED_AT or self._open_on(together))

    def _open_on(self, together: Drawn) -> bool:
        for own in self._open:
            for item in together:
                if item.key in own:
                    return True
        return False

    def wants_judgement(self, item: Item) -> bool:
        """Whether a judge has still to compare the answers to this item."""
        return any(m.basis == "judge" and m.scores(item) and not self._decided(m) for m in self.metrics)

    def _decided(self, metric: Metric) -> bool:
        return self.tests[metric.name].decided

    def observe(self, together: Drawn, candidate: Score) -> None:
        """Take the answers to the next draw."""
        if not self._open_on(together):
            self._idle += len(together)
        turned = not self.required
        for metric in self.metrics:
            own, test = self.own[metric.name], self.tests[metric.name]
            places = [place for place, item in enumerate(together) if item.key in own]
            before = test.decided
            # a judge is no longer asked once its test has decided
            if places and not (before and metric.basis == "judge"):
                test.observe(_unit(own, together), math.fsum(candidate(metric, place) for place in places))
                turned = turned or test.decided != before
        if turned:
            self._open = [self.own[m.name] for m in self.required if not self._decided(m)]
            self.settled = not self._open or self.verdict is not Verdict.UNDECIDED

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


def _unit(own: Mapping[str, float], together: Drawn) -> Unit:
    """The part of a draw that a metric scores; of no items where it scores none."""
    if len(together) == 1:
        score = own.get(together[0].key)
        return Unit(0.0, 0) if score is None else Unit(score)
    scores = [own[item.key] for item in together if item.key in own]
    return Unit(math.fsum(scores), len(scores))
