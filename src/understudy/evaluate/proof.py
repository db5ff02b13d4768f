"""What a candidate's evidence proves: verdict, effect, strata, guards and where the two arms differ.

A pure function of two evidence files; `prove`, the certificate and `verify` all call it, so a number can only
come from the records. It ignores how the calls were made (replay) and what they cost (certificate).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from understudy.evaluate.evidence import Call, Item, ProofHeader
from understudy.evaluate.grade import grade, is_json, refuses
from understudy.evaluate.scores import Generalisation, finite, generalise
from understudy.evaluate.sequential import (
    Design,
    Interval,
    Outcome,
    Point,
    SequentialTest,
    Unit,
    Verdict,
    shuffled,
)

PATH_POINTS = 200
"""Points of the e-value path kept for the plot."""
EXAMPLES = 12
"""Answers shown side by side."""
SUCCESS = 0.5
"""Score from which on a task counts as completed."""
TOLERATED_RATE = 0.02
"""How much a guard's rate may rise over the incumbent's before it is called worse."""
TOLERATED_SLOWDOWN = 1.5
"""How many times the incumbent's p95 latency is tolerated."""


class PathPoint(msgspec.Struct, frozen=True):
    """E-values after some calls; null where the hypothesis has become impossible."""

    calls: int
    e_pass: float | None
    e_fail: float | None


class Stratum(msgspec.Struct, frozen=True, kw_only=True):
    """One task's items, with its own verdict at the same error rates (not corrected for their number)."""

    task: str
    asked: int
    items: int
    incumbent: float
    """Mean score over the asked items."""
    candidate: float
    difference: float
    interval: tuple[float, float]
    verdict: Verdict


class Guard(msgspec.Struct, frozen=True, kw_only=True):
    """Something that must not get worse, over the asked items."""

    name: str
    unit: str
    """share or seconds."""
    incumbent: float
    candidate: float
    worse: bool


class Example(msgspec.Struct, frozen=True, kw_only=True):
    """An item on which the two were graded differently."""

    key: str
    task: str
    prompt: str
    expected: str
    agreement: bool
    incumbent: str
    incumbent_score: float
    candidate: str
    candidate_score: float


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens and outcomes of one arm over the asked items; what cost per completed task is made of."""

    calls: int
    attempts: int
    prompt: int
    completion: int
    completed: int
    """Calls whose score is at least SUCCESS."""


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """Everything one candidate's evidence says."""

    candidate: str
    incumbent: str
    verdict: Verdict
    calls: int
    """Calls that decided."""
    paid: int
    """Calls made, those in flight at the verdict included and those answered by the cache not."""
    items: int
    seed: int
    margin: float
    alpha: float
    beta: float
    candidates: int
    good: float
    difference: float
    interval: tuple[float, float]
    level: float
    e_pass: float | None
    e_fail: float | None
    path: list[PathPoint]
    incumbent_mean: float
    """Over the asked items."""
    candidate_mean: float
    incumbent_mean_all: float
    """Over all held-out items: free, for the answers are recorded."""
    agreement: float
    """Share of items scored by agreement with the incumbent, for want of a known right answer."""
    clusters: int
    future: Generalisation | None
    strata: list[Stratum]
    guards: list[Guard]
    examples: list[Example]
    incumbent_tokens: Tokens
    candidate_tokens: Tokens


class _Pair(msgspec.Struct, frozen=True):
    item: Item
    call: Call
    incumbent: float
    candidate: float


def good_difference(items: Sequence[Item], margin: float) -> float:
    """From which difference on a candidate counts as good: -margin · share of items scored by agreement.

    On those the incumbent scores 1 by construction, so no candidate can reach 0.
    """
    return -margin * sum(item.agreement for item in items) / len(items)


def judge(header: ProofHeader, items: Sequence[Item], calls: Iterable[Call]) -> Proof:
    """The proof. Scores are graded anew from the recorded answers; scores in the files are not trusted."""
    by_key = {item.key: item for item in items}
    answered = {call.key: call for call in calls if call.key in by_key}
    scores = {item.key: grade(item.grader, item.reply, item.expected) for item in items}
    outcome, pairs = _decide(header, by_key, answered, scores)
    differences = [(p.item.cluster or p.item.key, p.candidate - p.incumbent) for p in pairs]
    return Proof(
        candidate=header.candidate,
        incumbent=header.incumbent,
        verdict=outcome.verdict,
        calls=outcome.calls,
        paid=sum(not call.cached for call in answered.values()),
        items=len(items),
        seed=header.seed,
        margin=header.margin,
        alpha=header.alpha,
        beta=header.beta,
        candidates=header.candidates,
        good=header.good,
        difference=outcome.difference,
        interval=(outcome.interval.low, outcome.interval.high),
        level=outcome.interval.level,
        e_pass=finite(outcome.e_pass),
        e_fail=finite(outcome.e_fail),
        path=_thinned(outcome.path),
        incumbent_mean=_mean(p.incumbent for p in pairs),
        candidate_mean=_mean(p.candidate for p in pairs),
        incumbent_mean_all=_mean(scores.values()),
        agreement=sum(item.agreement for item in items) / len(items),
        clusters=len({item.cluster or item.key for item in items}),
        future=generalise(differences, outcome.interval),
        strata=_strata(header.design, items, scores, pairs),
        guards=_guards(pairs),
        examples=_examples(pairs),
        incumbent_tokens=_incumbent_tokens(pairs),
        candidate_tokens=_candidate_tokens(pairs),
    )


def score_of(item: Item, call: Call) -> float:
    """A candidate's score: 0 for an error, else what the item's grader says."""
    return 0.0 if call.error else grade(item.grader, call.reply, item.expected)


def _decide(
    header: ProofHeader,
    items: Mapping[str, Item],
    answered: Mapping[str, Call],
    scores: Mapping[str, float],
) -> tuple[Outcome, list[_Pair]]:
    """Feed the test in the committed order until it is decided, the budget ends or an answer is missing."""
    test = SequentialTest([Unit(scores[key]) for key in items], header.design)
    pairs: list[_Pair] = []
    for key in shuffled(items, header.seed)[: header.budget or None]:
        if key not in answered or test.decided:
            break
        pair = _Pair(items[key], answered[key], scores[key], score_of(items[key], answered[key]))
        pairs.append(pair)
        test.observe(Unit(pair.incumbent), pair.candidate)
    return test.outcome(), pairs


def _thinned(path: Sequence[Point]) -> list[PathPoint]:
    """At most PATH_POINTS points, the last one always among them."""
    step = max(1, math.ceil(len(path) / PATH_POINTS))
    kept = list(range(0, len(path), step))
    if path and kept[-1] != len(path) - 1:
        kept.append(len(path) - 1)
    return [PathPoint(path[i].calls, finite(path[i].e_pass), finite(path[i].e_fail)) for i in kept]


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed) if listed else 0.0


def _strata(
    design: Design, items: Sequence[Item], scores: Mapping[str, float], pairs: Sequence[_Pair]
) -> list[Stratum]:
    """Asked items of a task come in the committed order too, so each stratum has a valid test of its own."""
    whole: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        whole[item.task].append(item)
    if len(whole) < 2:
        return []
    return [
        _stratum(task, design, whole[task], scores, [p for p in pairs if p.item.task == task])
        for task in sorted(whole)
    ]


def _stratum(
    task: str, design: Design, items: Sequence[Item], scores: Mapping[str, float], pairs: Sequence[_Pair]
) -> Stratum:
    own = design._replace(good=good_difference(items, design.margin))
    test = SequentialTest([Unit(scores[item.key]) for item in items], own)
    for pair in pairs:
        test.observe(Unit(pair.incumbent), pair.candidate)
    interval: Interval = test.interval()
    return Stratum(
        task=task,
        asked=len(pairs),
        items=len(items),
        incumbent=_mean(p.incumbent for p in pairs),
        candidate=_mean(p.candidate for p in pairs),
        difference=min(max(test.difference, interval.low), interval.high),
        interval=(interval.low, interval.high),
        verdict=test.verdict,
    )


def _guards(pairs: Sequence[_Pair]) -> list[Guard]:
    if not pairs:
        return []
    json_pairs = [p for p in pairs if p.item.grader == "json"]
    texts = [(p.item.reply.text, p.call.reply.text) for p in pairs if not p.item.reply.tool_calls]
    guards = [
        _rate("errors", [(False, bool(p.call.error)) for p in pairs]),
        _rate("empty answers", [(not a.strip(), not b.strip()) for a, b in texts]),
        _rate("refusals", [(refuses(a), refuses(b)) for a, b in texts]),
        _rate("cut off by the token limit", [(_cut(p.item), _cut(p.call)) for p in pairs]),
        _rate(
            "invalid JSON",
            [(not is_json(p.item.reply.text), not is_json(p.call.reply.text)) for p in json_pairs],
        ),
        _latency(pairs),
    ]
    return [guard for guard in guards if guard is not None]


def _cut(answer: Item | Call) -> bool:
    return answer.finish_reason == "length"


def _rate(name: str, marks: Sequence[tuple[bool, bool]]) -> Guard | None:
    if not marks:
        return None
    incumbent, candidate = (_mean(float(m[arm]) for m in marks) for arm in (0, 1))
    worse = candidate > incumbent + TOLERATED_RATE
    return Guard(name=name, unit="share", incumbent=incumbent, candidate=candidate, worse=worse)


def _latency(pairs: Sequence[_Pair]) -> Guard:
    incumbent = quantile([p.item.total_s for p in pairs], 0.95)
    candidate = quantile([p.call.total_s for p in pairs], 0.95)
    worse = candidate > TOLERATED_SLOWDOWN * incumbent
    return Guard(name="p95 latency", unit="seconds", incumbent=incumbent, candidate=candidate, worse=worse)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value at or above ``share`` of all (nearest rank); 0 for none."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)] if ranked else 0.0


def _examples(pairs: Sequence[_Pair]) -> list[Example]:
    """Where the arms differ most, in the order asked among equals; losses and wins as they come."""
    differing = [p for p in pairs if p.incumbent != p.candidate]
    ranked = sorted(differing, key=lambda p: -abs(p.incumbent - p.candidate))[:EXAMPLES]
    return [
        Example(
            key=p.item.key,
            task=p.item.task,
            prompt=p.item.prompt,
            expected=p.item.expected,
            agreement=p.item.agreement,
            incumbent=_shown(p.item),
            incumbent_score=p.incumbent,
            candidate=p.call.error or _shown(p.call),
            candidate_score=p.candidate,
        )
        for p in ranked
    ]


def _shown(answer: Item | Call) -> str:
    calls = "\n".join(f"{call.name}({call.arguments})" for call in answer.reply.tool_calls)
    return "\n".join(part for part in (answer.reply.text, calls) if part)


def _incumbent_tokens(pairs: Sequence[_Pair]) -> Tokens:
    used = [p.item.usage for p in pairs if p.item.usage is not None]
    return Tokens(
        calls=len(pairs),
        attempts=len(pairs),
        prompt=sum(u.prompt_tokens for u in used),
        completion=sum(u.completion_tokens for u in used),
        completed=sum(p.incumbent >= SUCCESS for p in pairs),
    )


def _candidate_tokens(pairs: Sequence[_Pair]) -> Tokens:
    used = [p.call.usage for p in pairs if p.call.usage is not None]
    return Tokens(
        calls=len(pairs),
        attempts=sum(p.call.attempts for p in pairs),
        prompt=sum(u.prompt_tokens for u in used),
        completion=sum(u.completion_tokens for u in used),
        completed=sum(p.candidate >= SUCCESS for p in pairs),
    )
