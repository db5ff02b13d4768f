"""The sequential test against exact fractions, its error rates by simulation, and its confidence sequence."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import pytest

from understudy.evaluate.sequential import (
    EFFECTS,
    LARGEST_LOSS,
    WEIGHTS,
    Design,
    SequentialTest,
    Unit,
    Verdict,
    shuffled,
)

Pairs = list[tuple[float, float]]
NEVER = 1e-300


def run(pairs: Pairs, design: Design) -> SequentialTest:
    test = SequentialTest([Unit(a) for a, _ in pairs], design)
    for a, b in pairs:
        if test.observe(Unit(a), b) is not Verdict.UNDECIDED:
            break
    return test


def population(n: int, lost: int, won: int, both: int) -> Pairs:
    """Right/wrong scores: items only the incumbent, only the candidate, and both get right."""
    neither = n - lost - won - both
    return [(1.0, 0.0)] * lost + [(0.0, 1.0)] * won + [(1.0, 1.0)] * both + [(0.0, 0.0)] * neither


def drawn(pairs: Pairs, rng: random.Random) -> Pairs:
    return rng.sample(pairs, len(pairs))


def exact_first_e_values(a: list[int], b0: int, margin: Fraction) -> tuple[Fraction, Fraction]:
    """Both e-values after one draw, from the formulas in exact arithmetic (items of one)."""
    n, mean = len(a), Fraction(sum(a), len(a))
    variance_a = sum((x - mean) ** 2 for x in a) / Fraction(n)
    theta = Fraction(1, 2)
    guess = max(Fraction(6, 10) * variance_a, Fraction(2, 100))
    level = (1 - theta) * mean
    z = b0 - theta * a[0] - level
    null = (sum(a) - (theta * sum(a) + level * n)) / Fraction(n)
    e_pass = e_fail = Fraction(0)
    for weight, effect in zip(WEIGHTS, EFFECTS, strict=True):
        e = margin * Fraction(effect)
        bet, mean_pass = e / (guess + e * e), null - margin
        cap_pass = Fraction(LARGEST_LOSS) / (mean_pass + theta + level)
        cap_fail = Fraction(LARGEST_LOSS) / (1 - level - null)
        e_pass += Fraction(weight) * (1 + min(bet, cap_pass) * (z - mean_pass))
        e_fail += Fraction(weight) * (1 - min(bet, cap_fail) * (z - null))
    return e_pass, e_fail


@pytest.mark.parametrize("b0", [0, 1])
@pytest.mark.parametrize("a", [[1, 0, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1]])
def test_the_first_e_values_are_those_of_the_formulas(a: list[int], b0: int) -> None:
    test = SequentialTest([Unit(float(x)) for x in a], Design(0.25))
    test.observe(Unit(float(a[0])), float(b0))
    e_pass, e_fail = exact_first_e_values(a, b0, Fraction(1, 4))
    now = test.path[-1]
    assert now.e_pass == pytest.approx(float(e_pass), rel=1e-12)
    if all(a) and not b0:
        assert now.e_fail == math.inf  # the incumbent is always right: equality is disproved
    else:
        assert now.e_fail == pytest.approx(float(e_fail), rel=1e-12)


@pytest.mark.parametrize("pairs", [population(5, 1, 0, 3), population(6, 2, 1, 2), population(5, 0, 0, 3)])
def test_over_all_orders_the_null_is_a_fair_bet(pairs: Pairs) -> None:
    """The mean e-value over every order is at most 1 at every time when the null is just true."""
    difference = sum(b - a for a, b in pairs) / len(pairs)
    orders = list(itertools.permutations(pairs))
    for t in range(1, len(pairs)):
        passing = failing = 0.0
        for order in orders:
            test = SequentialTest([Unit(a) for a, _ in order], Design(max(-difference, 1e-6), NEVER, NEVER))
            for a, b in order[:t]:
                test.observe(Unit(a), b)
            passing += min(test.path[-1].e_pass, 1e9)
            failing += min(test.path[-1].e_fail, 1e9)
        if difference < 0:
            assert passing / len(orders) <= 1 + 1e-9
        else:
            assert failing / len(orders) <= 1 + 1e-9


def wrong_rate(pairs: Pairs, design: Design, wrong: Verdict, runs: int, seed: int) -> float:
    rng = random.Random(seed)
    return sum(run(drawn(pairs, rng), design).verdict is wrong for _ in range(runs)) / runs


def upper(rate: float, runs: int) -> float:
    """Rate plus four binomial standard errors: a right test fails this once in 30,000."""
    return rate + 4 * math.sqrt(rate * (1 - rate) / runs)


@pytest.mark.parametrize(
    "pairs",
    [
        population(200, 20, 10, 120),  # ordinary
        population(200, 10, 0, 190),  # heavily tied: ten losses, all else equal and right
        population(100, 30, 25, 20),  # noisy
    ],
)
def test_false_passes_at_the_exact_margin_stay_below_alpha(pairs: Pairs) -> None:
    """The candidate is worse by exactly the margin; one looks after every call."""
    runs = 1500
    assert wrong_rate(pairs, Design(0.05), Verdict.PASS, runs, seed=11) <= upper(0.05, runs)


def test_false_fails_of_an_equal_candidate_stay_below_beta() -> None:
    runs = 1500
    rate = wrong_rate(population(200, 15, 15, 120), Design(0.05), Verdict.FAIL, runs, seed=5)
    assert rate <= upper(0.10, runs)


def test_false_passes_in_clustered_graded_scores_stay_below_alpha() -> None:
    """All the loss sits in one cluster of ten; items are drawn singly, and whole clusters are drawn."""
    rng = random.Random(2)
    clusters = [[(q := rng.betavariate(3, 2), q) for _ in range(12)] for _ in range(20)]
    loss = 0.05 * 240 / 24
    for cluster in clusters[:2]:
        cluster[:] = [(min(a + loss, 1.0), min(a + loss, 1.0) - loss) for a, _ in cluster]
    items = [pair for cluster in clusters for pair in cluster]
    runs = 600
    assert wrong_rate(items, Design(0.05), Verdict.PASS, runs, seed=3) <= upper(0.05, runs)
    wrong = 0
    for _ in range(runs):
        order = rng.sample(clusters, len(clusters))
        test = SequentialTest([Unit(sum(a for a, _ in c), len(c)) for c in order], Design(0.05))
        for c in order:
            if test.observe(Unit(sum(a for a, _ in c), len(c)), sum(b for _, b in c)) != "UNDECIDED":
                break
        wrong += test.verdict is Verdict.PASS
    assert wrong / runs <= upper(0.05, runs)


def test_the_confidence_sequence_covers_whenever_one_stops() -> None:
    """Adversarial stopping: after each call the interval is read, and one miss anywhere counts."""
    pairs, rng, runs, missed = population(60, 8, 5, 35), random.Random(4), 300, 0
    truth = -3 / 60
    for _ in range(runs):
        test = SequentialTest([Unit(a) for a, _ in pairs], Design(0.05, NEVER, NEVER))
        held = True
        for t, (a, b) in enumerate(drawn(pairs, rng)):
            test.observe(Unit(a), b)
            if t % 4 == 3:
                interval = test.interval(0.05)
                held &= interval.low - 1e-9 <= truth <= interval.high + 1e-9
        missed += not held
    assert missed / runs <= upper(0.10, runs)


def test_pass_and_interval_agree() -> None:
    rng, design, passed = random.Random(8), Design(0.05), 0
    for _ in range(60):
        test = run(drawn(population(300, 15, 20, 200), rng), design)
        low = test.interval().low
        passed += test.verdict is Verdict.PASS
        assert (test.verdict is Verdict.PASS) == (low >= -0.05)
    assert 0 < passed < 61


def test_when_every_item_is_seen_the_answer_is_the_truth() -> None:
    for lost, verdict in ((5, Verdict.FAIL), (2, Verdict.PASS), (6, Verdict.FAIL)):
        pairs = population(100, lost, 0, 90)
        test = run(drawn(pairs, random.Random(lost)), Design(0.05, NEVER, NEVER))
        assert test.verdict is verdict
        low, high = test.certain
        assert low - 1e-9 <= -lost / 100 <= high + 1e-9


def test_a_null_that_became_impossible_ends_the_test_early() -> None:
    """Ten items, margin 0.35: after seven equal scores at most three can be lost."""
    test = run([(1.0, 1.0)] * 10, Design(0.35, NEVER, NEVER))
    assert (test.verdict, test.calls, test.path[-1].e_pass) == (Verdict.PASS, 7, math.inf)


def test_one_lost_item_is_no_failure_when_the_incumbent_is_always_right() -> None:
    test = SequentialTest([Unit(1.0)] * 200, Design(0.05))
    for b in [1.0] * 60 + [0.0] + [1.0] * 139:
        if test.observe(Unit(1.0), b) is not Verdict.UNDECIDED:
            break
    assert test.verdict is Verdict.PASS


def test_agreement_within_the_margin_seldom_fails() -> None:
    """Scores of agreement with the incumbent: it has 1 everywhere, the candidate 0.97 on average."""
    rng, design, runs = random.Random(6), Design(0.05, good=-0.05), 400
    pairs = [(1.0, 1.0 - 0.06 * (i % 2)) for i in range(200)]
    verdicts = [run(drawn(pairs, rng), design).verdict for _ in range(runs)]
    assert verdicts.count(Verdict.FAIL) / runs <= upper(0.10, runs)
    assert verdicts.count(Verdict.PASS) / runs > 0.9


def test_the_verdict_of_the_first_threshold_passed_stays() -> None:
    pairs = population(100, 0, 60, 40) + population(100, 100, 0, 0)
    test = SequentialTest([Unit(a) for a, _ in pairs], Design(0.1))
    for a, b in pairs:
        test.observe(Unit(a), b)
    assert test.verdict is Verdict.PASS


def test_best_of_k_needs_k_times_the_evidence() -> None:
    assert Design(0.03, 0.05, candidates=4).pass_at == pytest.approx(80)
    pairs = drawn(population(400, 10, 20, 300), random.Random(1))
    assert run(pairs, Design(0.05, candidates=4)).calls > run(pairs, Design(0.05)).calls


def test_the_order_is_a_permutation_set_by_the_seed_alone() -> None:
    keys = [f"k{i}" for i in range(50)]
    order = shuffled(keys, 7)
    assert sorted(order) == sorted(keys)
    assert order == shuffled(reversed(keys), 7)
    assert order != shuffled(keys, 8)


def test_the_order_is_pinned_across_versions() -> None:
    """Sorted by SHA-256 of "seed:key", so that a certificate can be checked in years."""
    assert shuffled(["a", "b", "c", "d"], 1) == sorted(
        "abcd", key=lambda k: __import__("hashlib").sha256(f"1:{k}".encode()).hexdigest()
    )


def test_no_units_is_a_bug_of_the_caller() -> None:
    with pytest.raises(ValueError, match="at least one unit"):
        SequentialTest([], Design(0.03))
