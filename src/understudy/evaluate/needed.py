"""What would be needed next, each line following from a number of the certificate.

It ignores what the reader has already done about it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from understudy.evaluate.certificate import Candidate, Model, Question
from understudy.evaluate.diversity import TRAFFIC, Pair, warning
from understudy.evaluate.proof import Proof
from understudy.evaluate.sequential import Verdict


def needed(candidates: Sequence[Candidate], winner: Candidate | None, incumbent: Model) -> list[str]:
    """The lines, the most pressing first; none when the evidence leaves nothing open."""
    lines: list[str] = []
    if winner is not None:
        lines.append(f"Move traffic to {winner.model.name} in stages, with the incumbent as fallback.")
        lines += [line for c in candidates if c is winner for line in _reservations(c)]
    for candidate in candidates:
        if candidate.proof.verdict is Verdict.UNDECIDED:
            lines += candidate.proof.doubts or [_undecided(candidate.proof)]
        elif candidate.proof.verdict is Verdict.FAIL:
            lines.append(_weakest(candidate))
    lines += _unknown(candidates) + _few_benchmark_items(incumbent)
    return lines


def shared_blind_spots(question: Question, pairs: Sequence[Pair]) -> list[str]:
    """Fallbacks that fail where the incumbent does, and fallbacks nobody has looked at.

    Where the alias names no fallback every candidate is looked at as one: the incumbent's likeliest.
    """
    fallbacks = question.fallbacks or question.candidates
    lines = [
        line
        for pair in pairs
        if pair.first == question.incumbent and pair.second in fallbacks and pair.on == TRAFFIC
        if (line := warning(pair))
    ]
    arms = {question.incumbent, *question.candidates}
    unknown = [name for name in question.fallbacks if name not in arms]
    lines += [
        f"Whether the fallback {name} fails where the incumbent does is not known: evaluate it too."
        for name in unknown
    ]
    return lines


def _reservations(candidate: Candidate) -> list[str]:
    proof = candidate.proof
    failing = [s.task or "untagged" for s in proof.strata if s.verdict is Verdict.FAIL]
    worse = [g.name for g in proof.guards if g.worse]
    below = [m.name for m in proof.metrics if not m.required and m.difference < -m.margin]
    lines: list[str] = []
    if below:
        lines.append(
            f"What is reported beside the verdict has fallen by more than the margin: {', '.join(below)}."
        )
    if failing:
        lines.append(f"The pass overall hides tasks that fail on their own: {', '.join(failing)}.")
    if worse:
        lines.append(f"Look at what got worse besides the score: {', '.join(worse)}.")
    if proof.future is not None and proof.future.low < -proof.margin:
        lines.append(
            "The verdict is about the recorded traffic. For calls that were not recorded, the seen answers"
            " alone do not rule out a loss beyond the margin: keep measuring during the move."
        )
    return lines


def _undecided(proof: Proof) -> str:
    """Width of the interval against the margin gives the items needed: error falls with 1/√n."""
    leading = next(m for m in proof.metrics if m.name == proof.leading)
    unlike = leading.basis in ("agreement", "structure") and leading.e_fail is not None
    if unlike and leading.difference < -leading.margin:
        return (
            f"{proof.candidate} does not answer as the incumbent does ({100 * leading.candidate:.0f} against"
            f" {100 * leading.incumbent:.0f} points of likeness). Whether it is worse nobody has said: send"
            " feedback, or set a judge ([evaluate] judge)."
        )
    half = (proof.interval[1] - proof.interval[0]) / 2.0
    more = math.ceil(leading.asked * (half / proof.margin) ** 2)
    return (
        f"{proof.candidate}: undecided by {leading.name} after {leading.asked:,} of {leading.items:,} items."
        f" About {max(more, leading.asked + 1):,} would narrow the interval to the margin."
    )


def _weakest(candidate: Candidate) -> str:
    proof = candidate.proof
    ranked = sorted((s for s in proof.strata if s.asked), key=lambda s: s.candidate - s.incumbent)
    where = f", most on {ranked[0].task or 'untagged calls'}" if ranked else ""
    return (
        f"{proof.candidate} loses {-100 * (proof.candidate_mean - proof.incumbent_mean):.1f} points on the"
        f" asked items{where}: heal it further on that traffic, keep more parameters,"
        " or try another candidate."
    )


def _unknown(candidates: Sequence[Candidate]) -> list[str]:
    if not candidates or not candidates[0].proof.agreement:
        return []
    proof = candidates[0].proof
    if any(m.basis == "judge" for m in proof.metrics):
        by = "were left to the judge: label some (understudy label) to see how far it can be believed"
    else:
        by = (
            "have only been held against the incumbent's own words: send feedback (POST /v1/feedback),"
            " or set a judge ([evaluate] judge), to have them decided by what is right"
        )
    return [f"{proof.agreement:.0%} of the items have no known right answer and {by}."]


def _few_benchmark_items(incumbent: Model) -> list[str]:
    wide = [s for s, r in incumbent.benchmarks.items() if r.accuracy.stderr > 0.02]
    if not wide:
        return []
    return [
        f"The benchmark figures ({', '.join(wide)}) come from small samples; raise evaluate.benchmark_items"
        " for standard errors below two points."
    ]
