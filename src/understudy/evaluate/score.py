"""A judge that scores one answer, where no second one to the same question is there to compare it with.

It is shown the conversation, the answer and a rubric, and never who answered. It ignores who may be a judge
(judge.refuse_kin) and what its scores are good for (rollout).
"""

from __future__ import annotations

import re
from typing import Any

from understudy.evaluate.judge import put_to_judge
from understudy.protocol import Json

RUBRIC = "How well does the answer help the user? Judge correctness first, then completeness, then clarity."
TOP = 10
"""Best score."""


def scoring(request: Json, answer: str, rubric: str = "") -> dict[str, Any]:
    """The judge's request."""
    task = f"You score one answer to a conversation. {rubric or RUBRIC}"
    end = f"score: N, a whole number from 0 (of no use) to {TOP} (nothing to mend)"
    return put_to_judge(request, [("Answer", answer)], task, end)


_SCORE = re.compile(r"score[^\w-]{0,9}(\d{1,3}(?:\.\d{1,3})?)(?!\d)", re.IGNORECASE)
_BARE = re.compile(r"\W{0,9}(\d{1,3}(?:\.\d{1,3})?)(?: ?/ ?10)?\W{0,9}")


def score_of(text: str) -> float | None:
    """The last score a judge's text gives, in [0, 1]; a bare number is one too; None for none."""
    found = _SCORE.findall(text) or ([bare[1]] if (bare := _BARE.fullmatch(text.strip())) else [])
    score = float(found[-1]) / TOP if found else -1.0
    return score if 0.0 <= score <= 1.0 else None
