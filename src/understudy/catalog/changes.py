"""What requests must change in for another model: parameters renamed, refused, ignored or read otherwise.

The rules are facts with a source (``data/parameters.json``), counted on your own calls. It ignores what the
gateway does about them (gateway.request).
"""

from __future__ import annotations

import re
from functools import cache
from typing import Literal

import msgspec

from understudy.catalog.facts import DATA, ModelFacts
from understudy.catalog.workload import Workload

Kind = Literal["renamed", "unsupported", "default"]
"""default: the request may stay as it is, and means something else."""
ANY = "any"
"""A rule for every call."""


class Rule(msgspec.Struct, frozen=True):
    """One difference of some models from the OpenAI protocol."""

    models: str
    """Regular expression for VENDOR/MODEL."""
    feature: str
    """Which calls it meets: of `CallShape.features`, ``max_tokens``, ``no_max_tokens``, or `ANY`."""
    kind: Kind
    change: str
    source: str


class Change(msgspec.Struct, frozen=True):
    """One thing to change, and how many recorded calls it meets."""

    text: str
    calls: int
    source: str
    kind: Kind = "unsupported"


def changes(facts: ModelFacts, leaving: ModelFacts, load: Workload) -> tuple[Change, ...]:
    """What must change between two models; what the old one already demanded is not told again."""
    found = [
        Change(rule.change, calls, rule.source, rule.kind)
        for models, rules in _rules().items()
        if models.fullmatch(facts.id) and not models.fullmatch(leaving.id)
        for rule in rules
        if (calls := load.needing(rule.feature))
    ]
    lacks, lacked = (f.lacks.value if f.lacks else frozenset[str]() for f in (facts, leaving))
    if "temperature" in lacks - lacked and facts.lacks:
        text = "temperature and top_p, if you send them, are refused"
        found.append(Change(text, len(load), facts.lacks.source, "unsupported"))
    thinks, thought = ("reasoning" in f.features.value if f.features else False for f in (facts, leaving))
    if thinks and not thought and facts.features:
        text = "it can think before it answers: then answers cost more tokens, and limits must leave room"
        found.append(Change(text, len(load), facts.features.source, "default"))
    return tuple(dict.fromkeys(found))


@cache
def _rules() -> dict[re.Pattern[str], list[Rule]]:
    """The rules by whom they concern."""
    document = msgspec.json.decode((DATA / "parameters.json").read_bytes(), type=dict[str, object])
    rules: dict[re.Pattern[str], list[Rule]] = {}
    for rule in msgspec.convert(document["rules"], list[Rule]):
        rules.setdefault(re.compile(rule.models), []).append(rule)
    return rules
