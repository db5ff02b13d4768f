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
PARAMETERS = ("temperature", "temperature>1", "no_temperature")
"""Features that a call tells only where its parameters were kept."""


class Rule(msgspec.Struct, frozen=True):
    """One difference of some models from the OpenAI protocol."""

    models: str
    """Regular expression for VENDOR/MODEL."""
    feature: str
    """Which calls it meets: of `CallShape.features` or `PARAMETERS`, ``max_tokens``, or ``no_max_tokens``."""
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
        met
        for models, rules in _rules().items()
        if models.fullmatch(facts.id) and not models.fullmatch(leaving.id)
        for rule in rules
        if (met := _met(rule, load)).calls
    ]
    lacks, lacked = (f.lacks.value if f.lacks else frozenset[str]() for f in (facts, leaving))
    if "temperature" in lacks - lacked and facts.lacks:
        refused = Change(
            "temperature and top_p are refused unless they are the default",
            load.sending("temperature", "top_p"),
            facts.lacks.source,
        )
        found += [told] if (told := _with_untold(refused, load)).calls else []
    thinks, thought = ("reasoning" in f.features.value if f.features else False for f in (facts, leaving))
    if thinks and not thought and facts.features:
        text = "it can think before it answers: then answers cost more tokens, and limits must leave room"
        found.append(Change(text, len(load), facts.features.source, "default"))
    return tuple(dict.fromkeys(found))


def _met(rule: Rule, load: Workload) -> Change:
    change = Change(rule.change, load.needing(rule.feature), rule.source, rule.kind)
    return _with_untold(change, load) if rule.feature in PARAMETERS else change


def _with_untold(change: Change, load: Workload) -> Change:
    """Calls of which nobody kept what they send may be met: they are counted, and the text says so."""
    if not load.untold:
        return change
    text = f"{change.text} ({load.untold:,} of these calls do not tell whether they send it)"
    return Change(text, change.calls + load.untold, change.source, change.kind)


@cache
def _rules() -> dict[re.Pattern[str], list[Rule]]:
    """The rules by whom they concern."""
    document = msgspec.json.decode((DATA / "parameters.json").read_bytes(), type=dict[str, object])
    rules: dict[re.Pattern[str], list[Rule]] = {}
    for rule in msgspec.convert(document["rules"], list[Rule]):
        rules.setdefault(re.compile(rule.models), []).append(rule)
    return rules
