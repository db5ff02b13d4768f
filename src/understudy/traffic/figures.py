"""What recorded calls add up to by model: use, ids that answered, speed.

It ignores sums per hour, which are kept as calls come (hours).
"""

from __future__ import annotations

from statistics import median
from typing import NamedTuple

from understudy.traffic.database import Database, Row
from understudy.traffic.rows import CALLS


class ModelUse(NamedTuple):
    """What one alias had from one target."""

    alias: str
    target: str
    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float
    """Of the calls that have a price."""
    first_at: float
    """Unix seconds."""
    last_at: float


class AnsweredBy(NamedTuple):
    """What one model id answered for one target."""

    target: str
    answered_by: str
    """The id named in the answers."""
    calls: int
    first_at: float
    """Unix seconds."""
    last_at: float


class Latency(NamedTuple):
    """How fast one target has been."""

    target: str
    calls: int
    ttft_s: float
    """Seconds to the first byte, median."""
    total_s: float
    """Seconds to the last, median."""
    tokens_per_s: float
    """Answer tokens per second of the whole call, median."""


def models(database: Database) -> list[ModelUse]:
    """Each alias and target seen in answered traffic, with its calls, tokens and cost."""
    sql = (
        "SELECT alias, target, COUNT(*), COALESCE(SUM(prompt_tokens), 0), "  # noqa: S608 literals
        "COALESCE(SUM(completion_tokens), 0), COALESCE(SUM(cost_usd), 0.0), MIN(at), MAX(at) "
        f"FROM {CALLS} WHERE status < 400 GROUP BY alias, target ORDER BY alias, target"
    )
    return [ModelUse(r[0], r[1], *(int(n) for n in r[2:5]), *r[5:]) for r in database.query(sql)]


def answered_by(database: Database, since: float | None) -> list[AnsweredBy]:
    """Each model id that answered for a target, by target and first sight."""
    sql = (
        f"SELECT target, answered_by, COUNT(*), MIN(at), MAX(at) FROM {CALLS} WHERE status < 400 "  # noqa: S608
        "AND answered_by <> '' AND at >= ? GROUP BY target, answered_by ORDER BY target, MIN(at)"
    )
    return [AnsweredBy(r[0], r[1], int(r[2]), *r[3:]) for r in database.query(sql, (since or 0.0,))]


def latencies(database: Database, latest: int) -> list[Latency]:
    """Medians over the ``latest`` answered calls, by target; a target with none of them is left out."""
    sql = (
        f"SELECT target, ttft_s, total_s, completion_tokens FROM {CALLS} "  # noqa: S608 literals
        "WHERE status < 400 AND total_s > 0 ORDER BY key DESC LIMIT ?"
    )
    timed: dict[str, list[Row]] = {}
    for row in database.query(sql, (latest,)):
        timed.setdefault(row[0], []).append(row)
    return [
        Latency(
            target,
            len(calls),
            median(row[1] for row in calls),
            median(row[2] for row in calls),
            median((row[3] or 0) / row[2] for row in calls),
        )
        for target, calls in sorted(timed.items())
    ]
