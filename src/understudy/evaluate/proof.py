"""What a candidate's evidence proves: verdict, effect, strata, guards and where the two arms differ.

A pure function of the evidence files; `prove`, the certificate and `verify` all call it, so a number can only
come from the records. It ignores how the calls were made (replay) and what they cost (certificate).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import msgspec

from understudy.evaluate.doubt import Preference, doubts, is_blind
from understudy.evaluate.evidence import ProofHeader
from understudy.evaluate.grade import calls_exist, grade, is_json, refuses
from understudy.evaluate.item import Call, Item, cluster_of, drawn, unit_of
from understudy.evaluate.metrics import RESTS_ON, Basis, Metric, primary
from understudy.evaluate.panel import Panel
from understudy.evaluate.scores import Generalisation, finite, generalise
from understudy.evaluate.sequential import Design, Draws, Outcome, Point, SequentialTest, Unit, Verdict
from understudy.evaluate.walk import Pair, Walk

PATH_POINTS = 200
"""Points of the e-value path kept for the plot."""
EXAMPLES = 60
"""Answers shown side by side, those that differ most."""
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


class MetricResult(msgspec.Struct, frozen=True, kw_only=True):
    """One metric over the items it scores."""

    name: str
    basis: Basis
    required: bool
    """A PASS needs it."""
    verdict: Verdict
    asked: int
    """Items asked that it scores."""
    items: int
    """Items that it scores."""
    margin: float
    alpha: float
    beta: float
    """Shared out among the metrics that can fail."""
    good: float
    difference: float
    interval: tuple[float, float]
    e_pass: float | None
    e_fail: float | None
    incumbent: float
    """Mean score over the asked items."""
    candidate: float


class Stratum(msgspec.Struct, frozen=True, kw_only=True):
    """One task's items, with its own verdict at the same error rates (not corrected for their number).

    UNDECIDED too where empty answers would have passed: what the incumbent never gets right proves nothing.
    """

    task: str
    metric: str
    """By which its items are scored."""
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
    """share, seconds or usd."""
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
    """No right answer is known."""
    metric: str
    """What the scores are by."""
    incumbent: str
    incumbent_score: float
    candidate: str
    candidate_score: float


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens and outcomes of one arm over the asked items whose right answer is known (all where none is):
    what cost per completed task is made of."""

    calls: int
    attempts: int
    prompt: int
    completion: int
    completed: int
    """Calls whose score is at least SUCCESS; none where no right answer is known."""


class Proof(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Everything one candidate's evidence says. Effect, interval, e-values and path are those of the metric
    that stands for the verdict."""

    candidate: str
    incumbent: str
    verdict: Verdict
    rests_on: str
    """What the verdict rests on and what not, in words."""
    doubts: list[str]
    """Why a verdict by the tests was withheld; none where it was not."""
    leading: str
    """Name of the metric that stands for the verdict."""
    metrics: list[MetricResult]
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
    difference: float
    interval: tuple[float, float]
    level: float
    e_pass: float | None
    e_fail: float | None
    path: list[PathPoint]
    """Of the leading metric; `calls` counts the items it scores."""
    incumbent_mean: float
    """Over the asked items of the leading metric."""
    candidate_mean: float
    incumbent_mean_all: float
    """Over all held-out items of the leading metric: free, for the answers are recorded."""
    agreement: float
    """Share of items without a known right answer."""
    clusters: int
    future: Generalisation | None
    strata: list[Stratum]
    guards: list[Guard]
    examples: list[Example]
    differing: int
    """Items on which the scores differ, those not shown included."""
    incumbent_tokens: Tokens
    candidate_tokens: Tokens
    unit: Draws = "item"
    """What was drawn at once; a cluster counts when the last of its answers is there."""


def weigh(
    header: ProofHeader,
    items: Sequence[Item],
    calls: Iterable[Call],
    preferences: Mapping[str, float | None] = MappingProxyType({}),
    people: Preference | None = None,
) -> Proof:
    """The proof. Scores are graded anew from the recorded answers; scores in the files are not trusted.

    ``preferences`` are the judge's by item: 1 for the candidate, 0 for the incumbent, ½ for neither, None
    where it gave no verdict. ``people`` are its preferences calibrated on labels.
    """
    by_key = {item.key: item for item in items}
    answered = {call.key: call for call in calls if call.key in by_key}
    return told(header, items, answered, _walked(header, by_key, answered, preferences), preferences, people)


def told(
    header: ProofHeader,
    items: Sequence[Item],
    answered: Mapping[str, Call],
    walk: Walk,
    preferences: Mapping[str, float | None],
    people: Preference | None = None,
) -> Proof:
    """What a walk to its end has proven; `weigh` walks itself."""
    panel, pairs = walk.panel, walk.pairs
    leading = panel.leading
    outcomes = {name: test.outcome() for name, test in panel.tests.items()}
    outcome = outcomes[leading.name]
    own = [p for p in pairs if leading.scores(p.item)]
    scores = [walk.scores(p, leading, preferences) for p in own]
    against = doubts(walk, preferences, people)
    return Proof(
        candidate=header.candidate,
        incumbent=header.incumbent,
        verdict=Verdict.UNDECIDED if against else panel.verdict,
        rests_on=_rests_on(panel, items),
        doubts=against,
        leading=leading.name,
        metrics=[_result(walk, m, outcomes[m.name], preferences) for m in panel.metrics],
        calls=len(pairs),
        paid=sum(not call.cached for call in answered.values()),
        items=len(items),
        seed=header.seed,
        margin=leading.margin,
        alpha=header.alpha,
        beta=panel.tests[leading.name].design.beta,
        candidates=header.candidates,
        difference=outcome.difference,
        interval=(outcome.interval.low, outcome.interval.high),
        level=outcome.interval.level,
        e_pass=finite(outcome.e_pass),
        e_fail=finite(outcome.e_fail),
        path=_thinned(outcome.path),
        incumbent_mean=_mean(a for a, _ in scores),
        candidate_mean=_mean(b for _, b in scores),
        incumbent_mean_all=_mean(panel.own[leading.name].values()),
        agreement=sum(item.agreement for item in items) / len(items),
        clusters=len({cluster_of(item) for item in items}),
        future=generalise(
            [(cluster_of(p.item), b - a) for p, (a, b) in zip(own, scores, strict=True)],
            outcome.interval,
        ),
        strata=_strata(header, panel, items, pairs),
        guards=_guards(pairs),
        examples=_examples(pairs),
        differing=sum(p.incumbent != p.candidate for p in pairs),
        incumbent_tokens=_incumbent_tokens(pairs),
        candidate_tokens=_candidate_tokens(pairs),
        unit=header.unit,
    )


def score_of(item: Item, call: Call) -> float:
    """A candidate's score by the item's grader: 0 for an error."""
    return 0.0 if call.error else grade(item.grader, call.reply, item.expected)


def _walked(
    header: ProofHeader,
    items: Mapping[str, Item],
    answered: Mapping[str, Call],
    preferences: Mapping[str, float | None],
) -> Walk:
    """Feed the tests in the committed order until they are settled, the budget ends or an answer is
    missing."""
    order = drawn(items.values(), header.seed, header.unit)
    walk = Walk(header.metrics, order, header.rates)
    for together in order:
        if walk.panel.settled:
            break
        if not walk.panel.wants(together):
            continue
        if header.budget and len(walk.pairs) + len(together) > header.budget:
            break
        if not all(_counts(walk, item, answered, preferences) for item in together):
            break
        walk.take(together, answered, preferences)
    return walk


def _counts(
    walk: Walk, item: Item, answered: Mapping[str, Call], preferences: Mapping[str, float | None]
) -> bool:
    """Whether all is there that an item needs to be counted."""
    call = answered.get(item.key)
    return call is not None and not walk.awaits_judge(item, call, preferences)


def _rests_on(panel: Panel, items: Sequence[Item]) -> str:
    """The bases of the required metrics, each with the share of the items it scores."""
    parts = [
        f"{RESTS_ON[m.basis]}{f' by {m.grader}' if m.grader else ''}"
        f" ({sum(m.scores(i) for i in items):,} of {len(items):,} items)"
        for m in panel.required
    ]
    rest = sum(not any(m.scores(i) for m in panel.required) for i in items)
    told = "Rests on " + " and ".join(parts)
    if rest:
        told += f"; says nothing of {rest:,} items without a known right answer"
    return told + "."


def _result(
    walk: Walk, metric: Metric, outcome: Outcome, preferences: Mapping[str, float | None]
) -> MetricResult:
    panel = walk.panel
    test = panel.tests[metric.name]
    scored = [p for p in walk.pairs if metric.scores(p.item)][: outcome.calls]
    scores = [walk.scores(p, metric, preferences) for p in scored]
    return MetricResult(
        name=metric.name,
        basis=metric.basis,
        required=metric.required,
        verdict=panel.verdict_of(metric),
        asked=outcome.calls,
        items=outcome.items,
        margin=metric.margin,
        alpha=test.design.alpha,
        beta=test.design.beta,
        good=metric.good,
        difference=outcome.difference,
        interval=(outcome.interval.low, outcome.interval.high),
        e_pass=finite(outcome.e_pass),
        e_fail=finite(outcome.e_fail),
        incumbent=_mean(a for a, _ in scores),
        candidate=_mean(b for _, b in scores),
    )


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


def _strata(header: ProofHeader, panel: Panel, items: Sequence[Item], pairs: Sequence[Pair]) -> list[Stratum]:
    """Asked items of a task come in the committed order too, so each stratum has a valid test of its own."""
    whole: dict[tuple[str, str], list[Item]] = defaultdict(list)
    for item in items:
        whole[item.task, primary(panel.metrics, item).name].append(item)
    if len(whole) < 2:
        return []
    own: dict[tuple[str, str], list[Pair]] = defaultdict(list)
    for pair in pairs:
        own[pair.item.task, pair.metric.name].append(pair)
    return [_stratum(header, panel, task, whole[task], own[task]) for task in sorted(whole)]


def _stratum(
    header: ProofHeader, panel: Panel, task: tuple[str, str], items: Sequence[Item], pairs: Sequence[Pair]
) -> Stratum:
    metric = next(m for m in panel.metrics if m.name == task[1])
    units: dict[str, list[float]] = defaultdict(list)
    for item in items:
        units[unit_of(item, header.unit)].append(panel.own[metric.name][item.key])
    test = SequentialTest(
        [_unit(scores) for scores in units.values()],
        Design(metric.margin, header.alpha, header.beta, header.candidates, metric.good),
    )
    answers: dict[str, list[float]] = defaultdict(list)
    for pair in pairs:
        answers[unit_of(pair.item, header.unit)].append(pair.candidate)
    for name, scores in answers.items():
        test.observe(_unit(units[name]), math.fsum(scores))
    outcome = test.outcome()
    passes = outcome.verdict is Verdict.PASS
    stands = not is_blind(metric, pairs, items, panel.own[metric.name]) if passes else metric.can_fail
    return Stratum(
        task=task[0],
        metric=metric.name,
        asked=len(pairs),
        items=len(items),
        incumbent=_mean(p.incumbent for p in pairs),
        candidate=_mean(p.candidate for p in pairs),
        difference=outcome.difference,
        interval=(outcome.interval.low, outcome.interval.high),
        verdict=outcome.verdict if stands else Verdict.UNDECIDED,
    )


def _unit(scores: Sequence[float]) -> Unit:
    return Unit(math.fsum(scores), len(scores))


def _guards(pairs: Sequence[Pair]) -> list[Guard]:
    if not pairs:
        return []
    json_pairs = [p for p in pairs if p.item.wants_json and not p.call.error]
    tool_pairs = [p for p in pairs if p.item.tools]
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
        _rate(
            "invalid tool calls",
            [(_broken_calls(p.item, p.item), _broken_calls(p.item, p.call)) for p in tool_pairs],
        ),
        _latency(pairs),
    ]
    return [guard for guard in guards if guard is not None]


def _broken_calls(item: Item, answer: Item | Call) -> bool:
    return not calls_exist(answer.reply.tool_calls, item.tools)


def _cut(answer: Item | Call) -> bool:
    return answer.finish_reason == "length"


def _rate(name: str, marks: Sequence[tuple[bool, bool]]) -> Guard | None:
    if not marks:
        return None
    incumbent, candidate = (_mean(float(m[arm]) for m in marks) for arm in (0, 1))
    worse = candidate > incumbent + TOLERATED_RATE
    return Guard(name=name, unit="share", incumbent=incumbent, candidate=candidate, worse=worse)


def _latency(pairs: Sequence[Pair]) -> Guard:
    incumbent = quantile([p.item.total_s for p in pairs], 0.95)
    candidate = quantile([p.call.total_s for p in pairs], 0.95)
    worse = candidate > TOLERATED_SLOWDOWN * incumbent
    return Guard(name="p95 latency", unit="seconds", incumbent=incumbent, candidate=candidate, worse=worse)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value at or above ``share`` of all (nearest rank); 0 for none."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)] if ranked else 0.0


def _examples(pairs: Sequence[Pair]) -> list[Example]:
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
            metric=p.metric.name,
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


def _graded(pairs: Sequence[Pair]) -> Sequence[Pair]:
    """Those whose right answer is known; all where none is: likeness completes no task."""
    return [p for p in pairs if not p.item.agreement] or pairs


def _incumbent_tokens(pairs: Sequence[Pair]) -> Tokens:
    known = _graded(pairs)
    used = [p.item.usage for p in known if p.item.usage is not None]
    return Tokens(
        calls=len(known),
        attempts=len(known),
        prompt=sum(u.prompt_tokens for u in used),
        completion=sum(u.completion_tokens for u in used),
        completed=sum(p.incumbent >= SUCCESS for p in known if not p.item.agreement),
    )


def _candidate_tokens(pairs: Sequence[Pair]) -> Tokens:
    known = _graded(pairs)
    used = [p.call.usage for p in known if p.call.usage is not None]
    return Tokens(
        calls=len(known),
        attempts=sum(p.call.attempts for p in known),
        prompt=sum(u.prompt_tokens for u in used),
        completion=sum(u.completion_tokens for u in used),
        completed=sum(p.candidate >= SUCCESS for p in known if not p.item.agreement),
    )
