"""A held-out exchange, and what a candidate answered to it: the two records every proof is made of.

It ignores the files they are kept in (evidence) and what they prove (proof).
"""

from __future__ import annotations

import msgspec

from understudy.evaluate.grade import GraderName, Reply
from understudy.protocol import Usage


class Item(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One held-out exchange: the question, the standard and the incumbent's answer with its score."""

    key: str
    prompt_hash: str
    at: float = 0.0
    task: str = ""
    """The tag task=…; strata of the report."""
    cluster: str = ""
    """Task id: calls that belong together."""
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


class Call(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
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
