"""What a model is known to take, and which recorded calls that covers.

Modalities, features, context, output length and rate. It ignores what calls would cost and how good the
answers would be.
"""

from __future__ import annotations

from typing import NamedTuple

from understudy.catalog.facts import OVERLAY, ModelFacts
from understudy.catalog.purpose import purpose_of, unsuited
from understudy.catalog.workload import Group, Workload
from understudy.protocol import Modality

CERTAIN = frozenset({"tools", "json_schema"})
"""Features that a list in the overlay denies by leaving them out."""
TAKEN_FOR_GRANTED = frozenset({"stream", "system", "stop"})
"""Features every chat endpoint has."""


class Asked(NamedTuple):
    """All that the fit of a model depends on: models of which it is the same are looked at once."""

    can: Can
    limits: tuple[int, int, float]
    """Context, output limit (0: not known), and the tokens its tokenizer makes of one recorded."""
    tokens_per_minute: int


class Can(NamedTuple):
    """What a model is known to take, known not to, and not known to."""

    purpose: str
    inputs: frozenset[Modality] | None
    has: frozenset[str]
    lacks: frozenset[str]
    context_known: bool


def can_of(facts: ModelFacts) -> Can:
    """Lacking: a source says so, or the overlay's whole list omits it."""
    has = facts.features.value if facts.features else frozenset[str]()
    lacks = facts.lacks.value if facts.lacks else frozenset[str]()
    if facts.features and facts.features.source.startswith(OVERLAY):
        lacks |= CERTAIN - has
    inputs = facts.inputs.value if facts.inputs else None
    return Can(purpose_of(facts), inputs, has, lacks, facts.context_window is not None)


def _lacking(can: Can, group: Group) -> list[str]:
    """Modalities and features that calls need and the model is known not to have."""
    lacking = list(unsuited(can.purpose, group))
    if can.inputs is not None:
        lacking += sorted(group.modalities - can.inputs)
    return lacking + sorted(group.features & can.lacks)


def _unknown(can: Can, group: Group) -> list[str]:
    unknown = sorted(group.modalities - {"text"}) if can.inputs is None else []
    unknown += sorted(group.features - TAKEN_FOR_GRANTED - can.lacks - can.has)
    return unknown if can.context_known else [*unknown, "context"]


class Fit(NamedTuple):
    """Which calls a model could answer at all."""

    fitting: int
    """Calls."""
    misfits: dict[str, int]
    """Why calls do not fit, and how many for each reason."""
    unverified: tuple[str, ...]
    """Needs that no source speaks of."""


def fit(load: Workload, asked: Asked) -> Fit:
    """Group by group: a group that lacks something fits with none of its calls."""
    misfits: dict[str, int] = {}
    unverified: dict[str, None] = {}
    fitting = 0
    for group, (broken, reasons) in zip(load.groups, load.lengths(*asked.limits), strict=True):
        lacking = _lacking(asked.can, group)
        fitting += 0 if lacking else len(group) - broken
        unverified |= dict.fromkeys(_unknown(asked.can, group))
        for word, count in (*dict.fromkeys(lacking, len(group)).items(), *reasons.items()):
            misfits[word] = misfits.get(word, 0) + count
    if asked.tokens_per_minute:
        misfits["rate"] = load.too_fast(asked.tokens_per_minute)
        fitting = min(fitting, len(load) - misfits["rate"])
    return Fit(fitting, {w: n for w, n in misfits.items() if n}, tuple(unverified))
