"""What a verdict rests on: metrics, each a way to score both arms on some of the items.

An item whose right answer is known is graded (`right`). One without can be given to a judge (`judge`): the
incumbent then stands at one half by definition and a candidate can gain or lose. Else all that can be
measured is likeness to the incumbent's own answer (`agreement`, and `structure` where it called tools).
Nobody can beat the incumbent at being itself, and unlike is not wrong: such a metric can support a PASS,
never a FAIL, and it stands apart from the others, in no common mean. It ignores how scores are tested
(panel).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, cast

import msgspec

from understudy.errors import InputError
from understudy.evaluate.grade import GRADERS, GraderName, grade, well_formed
from understudy.evaluate.item import Call, Item

if TYPE_CHECKING:
    from understudy import config

Basis = Literal["right", "judge", "agreement", "structure", "form"]
PRIMARY: tuple[Basis, ...] = ("right", "judge", "agreement", "structure")
"""Bases that say how good an answer is, the most telling first: an item's own score is by the first it
has."""
EVEN = 0.5
"""The incumbent's score before a judge: neither better nor worse than itself."""
MOSTLY = 0.5
"""Share of the items that required metrics must score; else likeness to the incumbent is required too."""
RESTS_ON: Mapping[Basis, str] = {
    "right": "known right answers",
    "judge": "the judge's preference",
    "agreement": "likeness to the incumbent's own answers",
    "structure": "the same tool calls as the incumbent's",
    "form": "well-formed answers",
}


class Metric(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One way to score both arms; written into the evidence before the first call."""

    name: str
    basis: Basis
    margin: float
    required: bool = True
    """A PASS needs it; else it is only reported."""
    grader: str = ""
    """Grades in place of each item's own (basis right)."""
    judge: str = ""
    """ENDPOINT/MODEL (basis judge)."""
    rubric: str = ""

    @property
    def can_fail(self) -> bool:
        """Whether a loss says that the candidate is worse, and not only that it is different."""
        return self.basis not in ("agreement", "structure")

    @property
    def good(self) -> float:
        """See `sequential.Design.good`."""
        return 0.0 if self.can_fail else -self.margin

    def scores(self, item: Item) -> bool:
        """Whether the metric says anything of an item."""
        if self.basis == "form":
            return True
        if self.basis == "right":
            return not item.agreement
        return item.agreement and (self.basis == "structure") == bool(item.reply.tool_calls)

    def incumbent(self, item: Item, *, graded: bool = False) -> float:
        """The recorded answer's score; ``graded``: the item's own score is known to be its grader's."""
        if self.basis == "judge":
            return EVEN
        if self.basis == "form":
            return float(well_formed(item.reply, item.finish_reason, item.wants_json, item.tools))
        if graded and not self.grader:
            return item.score
        return grade(cast(GraderName, self.grader or item.grader), item.reply, item.expected)

    def candidate(self, item: Item, call: Call, preference: float | None, *, graded: bool = False) -> float:
        """A candidate's score: 0 for an error; for a judge without a verdict it is even. ``graded`` as above,
        of the call."""
        if call.error:
            return 0.0
        if self.basis == "judge":
            return EVEN if preference is None else preference
        if self.basis == "form":
            return float(well_formed(call.reply, call.finish_reason, item.wants_json, item.tools))
        if graded and not self.grader:
            return call.score
        return grade(cast(GraderName, self.grader or item.grader), call.reply, item.expected)


def metrics_of(items: Sequence[Item], settings: config.Evaluate) -> list[Metric]:
    """The metrics of an evaluation: those its items allow, and those the config adds.

    Right answers and a judge are required where there are any. Likeness to the incumbent is reported, and
    required only where nothing else scores most items. Raises InputError for a grader that does not exist.
    """
    judge = Metric(
        name="preferred", basis="judge", margin=settings.margin, judge=settings.judge, rubric=settings.rubric
    )
    possible = [
        Metric(name="correct", basis="right", margin=settings.margin),
        *([judge] if settings.judge else []),
        Metric(name="agreement", basis="agreement", margin=settings.margin, required=False),
        Metric(name="tool calls", basis="structure", margin=settings.margin, required=False),
    ]
    usable = [m for m in possible if any(m.scores(item) for item in items)]
    covered = sum(any(m.required and m.scores(item) for m in usable) for item in items)
    if covered < MOSTLY * len(items):
        judged = any(m.basis == "judge" for m in usable)
        usable = [_required(m) if not (judged and m.basis == "agreement") else m for m in usable]
    return usable + [_added(name, more, settings.margin) for name, more in settings.metrics.items()]


def _required(metric: Metric) -> Metric:
    return msgspec.structs.replace(metric, required=True)


def _added(name: str, more: config.Metric, margin: float) -> Metric:
    known = ["form", *GRADERS]
    if more.grader not in known:
        raise InputError(
            f"evaluate.metrics.{name}: no grader {more.grader!r}", expected="one of: " + ", ".join(known)
        )
    basis: Basis = "form" if more.grader == "form" else "right"
    grader = "" if basis == "form" else more.grader
    return Metric(name=name, basis=basis, margin=more.margin or margin, grader=grader)


def primary(metrics: Iterable[Metric], item: Item) -> Metric:
    """The metric by which an item's answer is good or not: right answer, else judge, else likeness."""
    scoring = [m for m in metrics if m.basis in PRIMARY and not m.grader and m.scores(item)]
    return scoring[0] if len(scoring) == 1 else min(scoring, key=lambda m: PRIMARY.index(m.basis))
