"""A recorded request as it is put to another model, and which refusals end a run.

It ignores who asks (replay, flicker, judge) and what comes back.
"""

from __future__ import annotations

from typing import Any

from understudy.protocol import Json

MISCONFIGURED = frozenset({401, 402, 403, 404, 429})
"""Statuses that every further call would meet too: the run stops instead of scoring them 0. A 429 is one
after the client's patience: our pace or our money is wrong, not the candidate."""
STRIPPED = ("stream", "stream_options", "store", "metadata", "user", "service_tier")
"""Fields of a recorded request that say how it was carried, not what was asked."""


def asked(request: Json) -> dict[str, Any]:
    """The recorded request as it is put to a candidate: same parameters, not streamed."""
    return {name: value for name, value in request.items() if name not in STRIPPED}
