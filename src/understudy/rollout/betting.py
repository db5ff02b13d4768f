"""Bets on live traffic: may this candidate go on, and is it as good as the model answering beside it?

Candidate and incumbent answer different tasks of the same hours, dealt out at random, so whatever drifts
drifts for both. Tasks are compared in rounds: a round closes when each side has answered at least one task
since the last, whatever the shares are. When it closes depends on the dealing alone, so the difference of its
two means has the difference of the models as its expectation, and products of bets on it are e-processes:
they may be looked at after every task (Ville's inequality), and 1/α of wealth is evidence at level α.

It ignores where tasks come from (units) and what follows from a verdict (controller).

Sources: Waudby-Smith & Ramdas, "Estimating means of bounded random variables by betting", JRSS-B 2024, §4;
Ramdas et al., "Game-theoretic statistics and safe anytime-valid inference", Statistical Science 2023.
"""

from __future__ import annotations

from typing import NamedTuple

LARGEST_LOSS = 0.75
"""Share of a bet's stake that the worst round may cost."""
EFFECTS = (1.0, 2.0, 4.0)
"""Differences bet on, in margins."""
WORSE_WEIGHTS = (0.2, 0.6, 0.2)
"""What is first staked on each against the candidate: two margins is what has to be seen soonest."""
FINE_WEIGHTS = (0.7, 0.2, 0.1)
"""The same for it: a candidate as good as the incumbent lies one margin above what is tested."""
VARIANCE_GUESS, VARIANCE_WEIGHT = 0.25, 20.0
"""Of a round's difference before data, and how many rounds the guess is worth."""
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
        self._seen: tuple[list[float], list[float]] = ([], [])

    def add(self, value: float, *, candidate: bool) -> Round | None:
        """One observation in [0, 1]; the round it closed, if it closed one."""
        self._seen[candidate].append(value)
        incumbent, own = self._seen
        if not (incumbent and own):
            return None
        self._seen = ([], [])
        return Round(sum(own) / len(own), sum(incumbent) / len(incumbent))


class Difference:
    """Two e-processes on candidate − incumbent: against "as good" and against "worse by the margin"."""

    def __init__(self, margin: float) -> None:
        self.margin = margin
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
        return sum(self._worse)

    @property
    def e_fine(self) -> float:
        """Evidence against "worse by the margin or more"."""
        return sum(self._fine)

    def add(self, closed: Round) -> None:
        """Settle the bets placed before this round; the next ones know its variance."""
        z = closed.candidate - closed.incumbent
        variance = self._squares / (self.rounds + VARIANCE_WEIGHT)
        for i, effect in enumerate(EFFECTS):
            wanted = effect * self.margin
            bet = wanted / (variance + wanted * wanted)
            self._worse[i] *= 1.0 - min(bet, LARGEST_LOSS) * z
            most = LARGEST_LOSS / (1.0 - self.margin)
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
