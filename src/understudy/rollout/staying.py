"""Which tasks stay with the incumbent when the candidate's share grows, so that no task mixes models.

Every gateway process remembers the tasks that it dealt itself (gateway.routing.Memory); what is found here in
the store speaks for the other processes, and for one that starts again. What is left to chance is a task
whose first call is not in the store yet (a second or so) and whose next one reaches another process. It
ignores calls without a task: those are dealt out by key, and a key moves when its share comes.
"""

from __future__ import annotations

from understudy.gateway.routing import digest_of
from understudy.traffic.routes import Route
from understudy.traffic.store import Store

MOST = 200_000
"""Tasks that are told to the gateways, the latest: 1.6 MB."""


def staying(store: Store, route: Route, share: float, since: float) -> list[bytes]:
    """Digests of the tasks heard of since then (Unix seconds) that the incumbent began and that lie within
    ``share``. Raises StoreError."""
    begun: dict[str, str] = {}
    for task, target in store.dealt(route.alias, since):
        begun.setdefault(task, target)
    digests = (digest_of(route.alias, t.encode()) for t, by in begun.items() if by != route.candidate)
    within = [digest for digest in digests if int.from_bytes(digest) / 2**64 < share]
    return within[-MOST:]
