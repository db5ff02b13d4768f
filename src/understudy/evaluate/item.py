"""A held-out exchange, and what a candidate answered to it: the two records every proof is made of; and the
order in which exchanges are drawn, one by one or a conversation at a time.

It ignores the files they are kept in (evidence) and what they prove (proof).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import msgspec

from understudy.evaluate.grade import GraderName, Reply
from understudy.evaluate.sequential import Draws, shuffled
from understudy.protocol import Usage


class Item(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One held-out exchange: the question, the standard and the incumbent's answer with its score."""

    key: str
    prompt_hash: str
    at: float = 0.0
    task: str = ""
    """The tag task=…; strata of the report."""
    cluster: str = ""
    """Task id: calls that belong together; empty for a call on its own."""
    prompt: str = ""
    """The last user message, clipped."""
    grader: GraderName
    expected: str
    agreement: bool = False
    """Expected is the incumbent's own answer."""
    reply: Reply
    """The incumbent's."""
    score: float
    usage: Usage | None = None
    total_s: float = 0.0
    finish_reason: str = ""
    wants_json: bool = False
    """The request asked for JSON."""
    tools: tuple[str, ...] = ()
    """Names of the functions the request offered."""


class Call(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One paid call of a candidate."""

    key: str
    """The item's."""
    reply: Reply = Reply()
    score: float
    error: str = ""
    """What went wrong; the score is then 0."""
    usage: Usage | None = None
    ttft_s: float = 0.0
    total_s: float = 0.0
    attempts: int = 1
    finish_reason: str = ""
    cached: bool = False
    """An earlier evaluation had paid for this very request."""


Drawn = tuple[Item, ...]
"""What is drawn at once: one item, or every item of a cluster."""


def cluster_of(item: Item) -> str:
    """The conversation or task that an item belongs to; a call on its own is one."""
    return item.cluster or item.key


def unit_of(item: Item, unit: Draws) -> str:
    """Name of what an item is drawn with."""
    return cluster_of(item) if unit == "cluster" else item.key


def drawn(items: Iterable[Item], seed: int, unit: Draws) -> list[Drawn]:
    """The committed order. Units come as `shuffled` says, the items of a cluster as they were recorded."""
    members: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        members[unit_of(item, unit)].append(item)
    return [tuple(sorted(members[name], key=lambda i: (i.at, i.key))) for name in shuffled(members, seed)]
