"""Bets on live traffic: may this candidate go on, and is it as good as the model answering beside it?

Candidate and incumbent answer different tasks of the same hours, dealt out at random, so whatever drifts
drifts for both. Tasks are compared in rounds: a round closes when each side has answered at least one task
since the last, whatever the shares are. When it closes depends on the dealing alone, so the difference of its
two means has the difference of the models as its expectation, and products of bets on it are e-processes:
they may be looked at after every task (Ville's inequality), and 1/α of wealth is evidence at level α.

What is staked against a candidate is staked on blocks of tasks: the likelihood of what both sides got under
"worse by so much" over that under one mean for both, which needs fewer tasks than a bet on the difference.
More than half of it sprints (`Sprint`): two margins are to be seen by a deadline, not as cheaply as possible
on average.

It ignores where tasks come from (evidence) and what follows from a verdict (controller).

Sources: Turner, Ly & Grünwald, "Generic E-variables for exact sequential k-sample tests that allow for
optional stopping", JSPI 2024, §2 (blocks); Waudby-Smith & Ramdas, "Estimating means of bounded random
variables by betting", JRSS-B 2024, §4; Ramdas et al., "Game-theoretic statistics and safe anytime-valid
inference", Statistical Science 2023.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

LARGEST_LOSS = 0.75
"""Share of a bet's stake that the worst round may cost."""
EFFECTS = (1.0, 2.0, 4.0)
"""Differences bet on, in margins."""
WORSE_WEIGHTS = (0.05, 0.3, 0.05)
"""What is first staked on each against the candidate."""
SPRINT_WEIGHT = 0.6
"""What is staked on seeing `SPRINT_EFFECT` by the deadline."""
SPRINT_EFFECT = 2.0
"""Difference that has to be seen soonest, in margins."""
SPRINT_SLACK = 1.05
"""Tasks until the deadline, by those with which a test of the sprint's level has even chances."""
BOLDEST = 3.0
"""Times `SPRINT_EFFECT` that it bets on at most."""
FINE_WEIGHTS = (0.7, 0.2, 0.1)
"""The same for it: a candidate as good as the incumbent lies one margin above what is tested."""
VARIANCE_GUESS, VARIANCE_WEIGHT = 0.25, 20.0
"""Of a round's difference before data, and how many rounds the guess is worth."""
LARGE_BLOCK, SMALL_BLOCK = 40, 4
"""Tasks of the incumbent, or of the candidate, that are enough for a block: the more of the incumbent's stand
beside one of the candidate's the less is lost, and nothing is seen before a block closes."""
MEAN_GUESS, MEAN_WEIGHT = 0.5, 4.0
"""Of the incumbent's outcomes before data, and how many tasks the guess is worth."""
LEAST_SPREAD = 0.25
"""Part of the variance of right and wrong answers with the same mean that graded ones have at the least."""
STAKES = (0.05, 0.2, 0.6)
"""Shares of its wealth that a guard loses when nothing bad happens."""


PATH = 200
"""Points kept of how the evidence went."""


class Wealth(NamedTuple):
    """The evidence after some rounds."""

    rounds: int
    fine: float
    worse: float


class Round(NamedTuple):
    """Both sides since the last round: means of what was observed, each in [0, 1]."""

    candidate: float
    incumbent: float


class Rounds:
    """Closes a round as soon as both sides have been seen."""

    def __init__(self) -> None:
        self._sums, self._counts = [0.0, 0.0], [0, 0]

    def add(self, value: float, *, candidate: bool) -> Round | None:
        """One observation in [0, 1]; the round it closed, if it closed one."""
        sums, counts = self._sums, self._counts
        sums[candidate] += value
        counts[candidate] += 1
        if not (counts[0] and counts[1]):
            return None
        self._sums, self._counts = [0.0, 0.0], [0, 0]
        return Round(sums[1] / counts[1], sums[0] / counts[0])


class Block(NamedTuple):
    """Both sides since the last block, each value in [0, 1]."""

    candidate: list[float]
    incumbent: list[float]


class Blocks:
    """Closes a block when both sides have been seen and one of them often enough."""

    def __init__(self) -> None:
        self._open = Block([], [])

    def add(self, value: float, *, candidate: bool) -> Block | None:
        """One observation in [0, 1]; the block it closed, if it closed one."""
        (self._open.candidate if candidate else self._open.incumbent).append(value)
        own, beside = (len(side) for side in self._open)
        if not (own and beside) or (own < SMALL_BLOCK and beside < LARGE_BLOCK):
            return None
        closed, self._open = self._open, Block([], [])
        return closed


class Outcomes:
    """What the incumbent's outcomes have been like: where a bet on the next block is best placed."""

    def __init__(self) -> None:
        self._tasks = MEAN_WEIGHT
        self._sum = self._squares = MEAN_WEIGHT * MEAN_GUESS

    def add(self, values: list[float]) -> None:
        self._tasks += len(values)
        self._sum += sum(values)
        self._squares += sum(value * value for value in values)

    @property
    def mean(self) -> float:
        return min(max(self._sum / self._tasks, 0.02), 0.98)

    @property
    def spread(self) -> float:
        """Their variance over that of right and wrong answers with the same mean: 1 for these."""
        mean = self._sum / self._tasks
        return max((self._squares / self._tasks - mean * mean) / (mean * (1.0 - mean)), LEAST_SPREAD)


def likelihood_ratio(block: Block, candidate: float, incumbent: float) -> float:
    """How much likelier a block is under two means than under one for both, their mean over its tasks.

    Its expectation is at most 1 where the candidate's true mean is not below the incumbent's, whatever they
    are, if ``candidate`` ≤ ``incumbent``: the logarithm of the expectation is concave in one common mean, is
    largest at the mean of the two, and is 0 there; a better candidate only lowers it. Each factor is linear
    in its value, so this holds for any values in [0, 1], not for 0 and 1 alone.
    """
    own, beside = (len(side) for side in block)
    common = (own * candidate + beside * incumbent) / (own + beside)
    ratio = 1.0
    for values, mean in ((block.candidate, candidate), (block.incumbent, incumbent)):
        right, wrong = mean / common, (1.0 - mean) / (1.0 - common)
        for value in values:
            ratio *= wrong + value * (right - wrong)
    return ratio


_NORMAL = NormalDist()


class Sprint:
    """Wealth that is to reach a goal by a deadline, and is staked as boldly as that takes.

    Bets of one size for ever win soonest on average; the median is sooner for one who risks all on it. With
    τ of the deadline's information left and a share w of the goal in hand, the chance of a fair game to make
    it is w, so the sum of what was seen lacks d = Φ⁻¹(1 − w) of √τ, and the effect to bet on is h(d)/√τ, with
    h = φ/(1 − Φ) (Browne's formula). Every bet is placed before its block, so wealth stays an e-process.
    """

    def __init__(self, effect: float, goal: float) -> None:
        """``goal`` is what its first 1 has to become."""
        self.wealth = 1.0
        self._effect = effect
        self._left = SPRINT_SLACK * _NORMAL.inv_cdf(1.0 - 1.0 / goal) ** 2

    def bet(self, goal: float) -> float:
        """The difference to bet on next, with what is lacking to the goal now."""
        share = min(self.wealth / goal, 0.9999)
        if self._left < 0.05 or share < 1e-9:
            return self._effect
        lack = _NORMAL.inv_cdf(1.0 - share)
        hazard = _NORMAL.pdf(lack) / (1.0 - _NORMAL.cdf(lack))
        return self._effect * min(hazard / math.sqrt(self._left), BOLDEST)

    def settle(self, ratio: float, information: float) -> None:
        """``information`` is what was seen: the inverse of the difference's variance."""
        self.wealth *= ratio
        self._left -= self._effect**2 * information


class Difference:
    """Two e-processes on candidate − incumbent: against "as good" and against "worse by the margin"."""

    def __init__(self, margin: float, goal: float = 1000.0) -> None:
        """``goal``: the evidence against the candidate that ends its trial."""
        self.margin = margin
        self._goal = goal
        self._sprint = Sprint(SPRINT_EFFECT * margin, goal / SPRINT_WEIGHT)
        self._outcomes = Outcomes()
        self._blocks, self._closing = Blocks(), Rounds()
        self.rounds = 0
        self.path: list[Wealth] = []
        """How the evidence went, thinned to at most `PATH` points."""
        self._stride = 1
        self._sum = 0.0
        self._squares = VARIANCE_WEIGHT * VARIANCE_GUESS
        self._worse, self._fine = list(WORSE_WEIGHTS), list(FINE_WEIGHTS)

    @property
    def estimate(self) -> float:
        """Mean difference of the rounds."""
        return self._sum / self.rounds if self.rounds else 0.0

    @property
    def e_worse(self) -> float:
        """Evidence against "at least as good as the incumbent"."""
        return sum(self._worse) + SPRINT_WEIGHT * self._sprint.wealth

    @property
    def e_fine(self) -> float:
        """Evidence against "worse by the margin or more"."""
        return sum(self._fine)

    def add(self, value: float, *, candidate: bool) -> None:
        """The outcome of one task, in [0, 1]."""
        if block := self._blocks.add(value, candidate=candidate):
            self._stake_on(block)
        if closed := self._closing.add(value, candidate=candidate):
            self._settle(closed)

    def add_pair(self, pair: Round) -> None:
        """Both models on the same request. Their outcomes depend on each other, so no likelihood is taken."""
        variance, z = self._variance, pair.candidate - pair.incumbent

        def ratio(effect: float) -> float:
            return 1.0 - min(effect / (variance + effect * effect), LARGEST_LOSS) * z

        sprint = ratio(self._sprint.bet(self._lacking))
        self._worse = [w * ratio(e * self.margin) for w, e in zip(self._worse, EFFECTS, strict=True)]
        self._sprint.settle(sprint, 1.0 / variance)
        self._settle(pair)

    @property
    def _variance(self) -> float:
        """Of a round's difference, as far as it is known."""
        return self._squares / (self.rounds + VARIANCE_WEIGHT)

    @property
    def _lacking(self) -> float:
        """What the sprint's wealth has to become, with what the other bets have won."""
        return max((self._goal - sum(self._worse)) / SPRINT_WEIGHT, 1.01)

    def _stake_on(self, block: Block) -> None:
        """Settle the bets placed before this block; the next ones know how the incumbent did in it."""
        mean, spread = self._outcomes.mean, self._outcomes.spread

        def ratio(effect: float) -> float:
            # graded answers vary less than right and wrong ones, so more can be staked on them
            return likelihood_ratio(block, max(mean - effect / spread, 0.01), mean)

        sprint = ratio(self._sprint.bet(self._lacking))
        self._worse = [w * ratio(e * self.margin) for w, e in zip(self._worse, EFFECTS, strict=True)]
        between = min(max(mean - SPRINT_EFFECT * self.margin / 2.0, 0.05), 0.95)
        own, beside = (len(side) for side in block)
        self._sprint.settle(sprint, own * beside / (own + beside) / (between * (1.0 - between) * spread))
        self._outcomes.add(block.incumbent)

    def _settle(self, closed: Round) -> None:
        """Settle the bets for the candidate placed before this round; the next ones know its variance."""
        z = closed.candidate - closed.incumbent
        most = LARGEST_LOSS / (1.0 - self.margin)
        for i, effect in enumerate(EFFECTS):
            wanted = effect * self.margin
            bet = wanted / (self._variance + wanted * wanted)
            self._fine[i] *= 1.0 + min(bet, most) * (z + self.margin)
        self.rounds += 1
        self._sum += z
        self._squares += (z - self.estimate) ** 2
        self._remember()

    def _remember(self) -> None:
        if self.rounds % self._stride:
            return
        self.path.append(Wealth(self.rounds, self.e_fine, self.e_worse))
        if len(self.path) >= PATH:
            self.path, self._stride = self.path[1::2], self._stride * 2


class Excess:
    """E-process against "something bad happens to the candidate, and not beside it, at most this often"."""

    def __init__(self, tolerated: float) -> None:
        self.tolerated = tolerated
        self.rounds = 0
        self._bad = 0.0
        self._wealth = [1.0 / len(STAKES)] * len(STAKES)

    @property
    def rate(self) -> float:
        """Share of rounds in which it happened."""
        return self._bad / self.rounds if self.rounds else 0.0

    @property
    def e_value(self) -> float:
        return sum(self._wealth)

    def add(self, closed: Round, usual: float = 0.0) -> None:
        """``closed`` holds shares of tasks it happened to; what happens to both is nobody's fault here.

        ``usual`` is tolerated on top: for a candidate that nobody stands beside, how often it happened to
        the incumbent before.
        """
        bad = closed.candidate * (1.0 - closed.incumbent)
        tolerated = min(self.tolerated + usual, 0.99)
        self._wealth = [
            w * (1.0 + stake / tolerated * (bad - tolerated))
            for w, stake in zip(self._wealth, STAKES, strict=True)
        ]
        self.rounds += 1
        self._bad += bad
