"""Do two models fail on the same items? Chance-adjusted agreement (CAPA) and the overlap of their errors.

A fallback helps where the incumbent fails, so what counts is not how often it is right but where. Two models
that are often right agree often by that alone; CAPA takes this out. It ignores why an item is hard: two that
both fail on the hardest items agree beyond chance, and are less of a safety net for it.

Sources: Goel et al. 2025, "Great Models Think Alike and this Undermines AI Oversight", arXiv 2502.04313
(CAPA, κ_p); Geirhos et al. 2020, arXiv 2006.16736 (error consistency, which is CAPA with two outcomes);
Efron & Stein 1981 (jackknife).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from understudy.errors import InputError
from understudy.evaluate.benchmarks import BenchmarkHeader, Scored, right
from understudy.evaluate.evidence import Lines
from understudy.evaluate.grade import grade
from understudy.evaluate.item import Call, Item
from understudy.evaluate.proof import SUCCESS, score_of
from understudy.evaluate.questions import LETTERS, letter_of
from understudy.evaluate.scores import Table

TRAFFIC = "traffic"
"""Where a pair was compared on the held-out items; else a benchmark's name."""
SHARED_FROM = 0.4
"""CAPA whose lower bound is above this is called a shared blind spot (Landis & Koch 1977: moderate)."""
FEWEST_FAILURES = 5
"""Failures of the first arm below which nothing is called out."""
TINY = 1e-9
"""How near to always or never counts as such."""
NORMAL_95 = 1.959963984540054


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """Two arms on the items both have answered and for which a right answer is known."""

    first: str
    second: str
    on: str
    """`traffic`, or a benchmark."""
    items: int
    both_right: int
    only_first: int
    """Items that only the first got right."""
    only_second: int
    both_wrong: int
    error_overlap: float | None
    """Items both got wrong over items either did; None when neither failed."""
    second_fails: float
    """Share of all items the second gets wrong."""
    second_fails_too: float | None
    """Share of the first's failures that the second fails as well; None without failures."""
    capa: float | None
    """1: the same answers; 0: as alike as chance makes models of this accuracy; None: not defined."""
    low: float | None
    """95% interval by the jackknife."""
    high: float | None

    @property
    def failures(self) -> int:
        """Of the first."""
        return self.only_second + self.both_wrong

    @property
    def shares_blind_spots(self) -> bool:
        enough = self.failures >= FEWEST_FAILURES and self.low is not None
        return enough and self.low is not None and self.low > SHARED_FROM


class Judged(NamedTuple):
    """One item as two models answered it: probabilities over the same options."""

    first: Sequence[float]
    second: Sequence[float]
    gold: int


class Kappa(NamedTuple):
    """CAPA with its jackknife interval."""

    value: float
    low: float
    high: float


def capa(items: Sequence[Judged]) -> Kappa | None:
    """κ_p = (c_obs - c_exp) / (1 - c_exp), Goel et al. 2025, eq. 1-3.

    c_obs is the mean over items of Σ_options p₁·p₂. c_exp is p̄₁·p̄₂ + (1-p̄₁)(1-p̄₂)·mean(1/(options - 1)),
    p̄ the mean probability on the right option: what two models of these accuracies share by chance, their
    errors spread evenly. None below two items, and where either is always or never right: the formula then
    gives 0 or 0/0 whatever the other does.
    """
    terms = [_term(item) for item in items]
    total = _Sums(*(math.fsum(column) for column in zip(*terms, strict=True))) if terms else _Sums(0, 0, 0, 0)
    count = len(terms)
    value = _kappa(total, count)
    varied = all(TINY * count < right < (1.0 - TINY) * count for right in (total.first, total.second))
    if value is None or count < 2 or not varied:
        return None
    left_out = [_kappa(_minus(total, term), count - 1) for term in terms]
    known = [v for v in left_out if v is not None]
    mean = math.fsum(known) / max(len(known), 1)
    variance = (count - 1) / count * math.fsum((v - mean) ** 2 for v in known)
    half = NORMAL_95 * math.sqrt(variance)
    return Kappa(value, max(value - half, -1.0), min(value + half, 1.0))


class _Sums(NamedTuple):
    agreed: float
    first: float
    second: float
    chance: float


def _term(item: Judged) -> _Sums:
    agreed = math.fsum(a * b for a, b in zip(item.first, item.second, strict=True))
    return _Sums(agreed, item.first[item.gold], item.second[item.gold], 1.0 / (len(item.first) - 1))


def _minus(total: _Sums, term: _Sums) -> _Sums:
    return _Sums(*(t - x for t, x in zip(total, term, strict=True)))


def _kappa(sums: _Sums, count: int) -> float | None:
    if count < 1:
        return None
    observed, first, second, chance = (s / count for s in sums)
    expected = first * second + (1.0 - first) * (1.0 - second) * chance
    return (observed - expected) / (1.0 - expected) if expected < 1.0 - TINY else None


def compare(
    first: str, second: str, rights: Sequence[tuple[bool, bool]], *, on: str, options: Sequence[Judged] = ()
) -> Pair:
    """A pair from who was right where. ``options`` gives CAPA the answers themselves; without them an answer
    is right or wrong, two outcomes."""
    cells = [sum(1 for pair in rights if pair == cell) for cell in itertools.product((True, False), repeat=2)]
    both, only_first, only_second, neither = cells
    failed, count = only_second + neither, len(rights)
    kappa = capa(options or [_two_outcomes(a, b) for a, b in rights])
    return Pair(
        first=first,
        second=second,
        on=on,
        items=count,
        both_right=both,
        only_first=only_first,
        only_second=only_second,
        both_wrong=neither,
        error_overlap=neither / (count - both) if count > both else None,
        second_fails=(only_first + neither) / count if count else 0.0,
        second_fails_too=neither / failed if failed else None,
        capa=kappa.value if kappa else None,
        low=kappa.low if kappa else None,
        high=kappa.high if kappa else None,
    )


def _two_outcomes(first: bool, second: bool) -> Judged:
    return Judged((float(first), float(not first)), (float(second), float(not second)), 0)


def of_table(table: Table, *, incumbent: str = "") -> list[Pair]:
    """Every pair of models in a score file; only those with ``incumbent``, standing first, where it is given.

    A score from SUCCESS on counts as right. Raises InputError for an incumbent the file does not know.
    """
    if incumbent and incumbent not in table.scores:
        raise InputError(f"no scores of {incumbent!r}", expected="one of: " + ", ".join(table.models))
    models = sorted(table.models, key=lambda model: model != incumbent)
    pairs: list[Pair] = []
    for first, second in itertools.combinations(models, 2):
        if incumbent and first != incumbent:
            continue
        a, b = table.scores[first], table.scores[second]
        rights = [(a[item] >= SUCCESS, b[item] >= SUCCESS) for item in a if item in b]
        pairs.append(compare(first, second, rights, on="scores"))
    return pairs


def of_traffic(incumbent: str, items: Sequence[Item], proofs: Mapping[str, Sequence[Call]]) -> list[Pair]:
    """All arms on the held-out items; those graded by agreement with the incumbent are left out, for on them
    it cannot fail."""
    known = {item.key: item for item in items if not item.agreement}
    arms = {incumbent: {k: grade(i.grader, i.reply, i.expected) >= SUCCESS for k, i in known.items()}}
    for name, calls in proofs.items():
        arms[name] = {c.key: score_of(known[c.key], c) >= SUCCESS for c in calls if c.key in known}
    return [
        compare(first, second, [(a[key], b[key]) for key in a if key in b], on=TRAFFIC)
        for (first, a), (second, b) in itertools.combinations(arms.items(), 2)
        if any(key in b for key in a)
    ]


def of_benchmarks(benches: Iterable[Lines[BenchmarkHeader, Scored]], arms: Sequence[str]) -> list[Pair]:
    """All arms on each benchmark both were run on, with the probabilities they gave to every choice."""
    by_arm = {(b.header.suite, b.header.model): b for b in benches}
    suites = sorted({suite for suite, _ in by_arm})
    return [
        _on_benchmark(by_arm[suite, first], by_arm[suite, second])
        for suite in suites
        for first, second in itertools.combinations(arms, 2)
        if (suite, first) in by_arm and (suite, second) in by_arm
    ]


def _on_benchmark(one: Lines[BenchmarkHeader, Scored], other: Lines[BenchmarkHeader, Scored]) -> Pair:
    answers = {line.key: line for line in other.records}
    shared = [(line, answers[line.key]) for line in one.records if line.key in answers]
    rights = [(right(one.header, a) == 1.0, right(other.header, b) == 1.0) for a, b in shared]
    options = [Judged(_chances(one.header, a), _chances(other.header, b), a.gold) for a, b in shared]
    return compare(one.header.model, other.header.model, rights, on=one.header.suite, options=options)


def _chances(header: BenchmarkHeader, line: Scored) -> list[float]:
    """Softmax over the choices' log-probabilities; all of it on the choice that was answered, where it was
    asked, and even where none was.

    All on the likeliest choice too where the suite's figure is per character: a softmax of nats per character
    is nearly even whatever a model knows, and two copies of one model would look unlike each other.
    """
    if header.generative:
        return _picked(header, line)
    if header.normalised:
        values = [value / length for value, length in zip(line.logprobs, line.lengths, strict=True)]
        likeliest = values.index(max(values))
        return [float(choice == likeliest) for choice in range(len(values))]
    highest = max(line.logprobs)
    weights = [math.exp(value - highest) for value in line.logprobs]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def _picked(header: BenchmarkHeader, line: Scored) -> list[float]:
    options = len(line.lengths)
    if not options:  # an answer in free text is right or wrong
        value = right(header, line)
        return [value, 1.0 - value]
    letter = letter_of(line.text, options)
    if not letter:
        return [1.0 / options] * options
    return [float(letter == LETTERS[choice]) for choice in range(options)]


def warning(pair: Pair) -> str:
    """What a shared blind spot means, with the numbers; empty where there is none."""
    if not pair.shares_blind_spots or pair.second_fails_too is None or pair.capa is None:
        return ""
    alike = f"CAPA {pair.capa:.2f}, {pair.low:.2f} to {pair.high:.2f}"
    return (
        f"{pair.second} shares the blind spots of {pair.first}: on {pair.on} it fails on"
        f" {pair.second_fails_too:.0%} of what {pair.first} fails on, against {pair.second_fails:.0%} of all"
        f" items ({alike}). As its fallback it would help little."
    )
