"""Replay and shadow: recorded calls put to the candidate as well, where no client waits for the answer.

Replayed are calls from before the trial, the newest first; copied in the shadow are those since it began.

Copies are made of what is in the store, some time after the client was served, so they can neither delay nor
fail a client, and nobody carries out the tools they ask for. Answers are kept in the store under
``ALIAS#shadow`` and pairs are read back from there, so a process that starts again pays for no copy twice.
It ignores calls recorded without their texts, and what follows from a pair (standing).
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

from understudy.config import Rollout
from understudy.evaluate.asking import asked
from understudy.evaluate.evidence import finish_reason
from understudy.evaluate.workers import side_by_side
from understudy.forms.translation import ROUTES
from understudy.rollout.evidence import graded, useless
from understudy.rollout.own_call import Means, ask
from understudy.rollout.standing import Pair
from understudy.traffic.record import Call
from understudy.traffic.rows import StoredCall
from understudy.traffic.sample import Exchange, exchange
from understudy.traffic.store import Store

OF = "shadow_of"
"""Tag of a copy: the key of the call it was made of."""
REPLAYED = "replayed"
"""Tag of a copy made of a call from before the trial."""
AT_ONCE = 8
MOST = 32
"""Copies made in one pass."""


def shadow_alias(alias: str) -> str:
    """The name under which an alias's copies are kept."""
    return f"{alias}#shadow"


class Shadow:
    """The copies of one trial."""

    def __init__(self, store: Store, alias: str, candidate: str, since: float, settings: Rollout) -> None:
        self._store = store
        self._alias = alias
        self._candidate = candidate
        self._since = since
        self._settings = settings
        self._copied: set[str] = set()
        self._replayed: set[str] = set()
        self._seen = since
        self.spent_usd = 0.0
        """Of the copies that have a price."""
        self._dearest: float | None = None
        """US dollars of the dearest copy so far; None before the first."""

    def pairs(self) -> list[Pair]:
        """Copies answered since it was last asked, beside what they were made of. Raises StoreError."""
        found: list[Pair] = []
        for stored in self._store.calls(alias=shadow_alias(self._alias), since=self._seen):
            call, of = stored.call, stored.call.tags.get(OF, "")
            made = self._replayed if REPLAYED in call.tags else self._copied
            if call.target != self._candidate or of in made:
                continue
            made.add(of)
            usd = stored.cost.usd if stored.cost else 0.0
            self.spent_usd, self._dearest = self.spent_usd + usd, max(self._dearest or 0.0, usd)
            self._seen = max(self._seen, call.at)
            was = exchange(self._store, of)
            if was is not None:
                found.append(self._pair(was, call))
        return found

    async def copy(self, now: float, means: Means, *, replay: bool = False) -> int:
        """Put the next recorded calls to the candidate, those from before the trial under ``replay``; returns
        how many.

        Only calls old enough for their outcome to be known are copied. Raises StoreError.
        """
        waiting = list(self._next(now, replay))
        tags = {REPLAYED: ""} if replay else {}
        answers: list[Call] = []
        shadow = shadow_alias(self._alias)
        if waiting:
            async with means.connect() as client:

                async def work() -> None:
                    while waiting:
                        of = waiting.pop()
                        named = {OF: of.key, **tags}
                        copied = await ask(client, asked(of.request), shadow, self._candidate, named)
                        answers.append(means.redactor.call(copied) if means.redactor else copied)

                await side_by_side(work, min(AT_ONCE, len(waiting)))
            segment = f"shadow/{self._alias}"
            beyond = self._store.reached(segment) + 1
            self._store.insert(sorted(answers, key=lambda c: c.key), segment, beyond, price=means.price)
        return len(answers)

    @property
    def broke(self) -> bool:
        """Whether its money is spent: one more copy might cost more than is left."""
        return self.spent_usd + (self._dearest or 0.0) > self._settings.shadow_usd or not self._affordable

    @property
    def _affordable(self) -> int:
        """Copies that may be made in the next pass; one, before anybody knows what one costs."""
        left = self._settings.shadow_usd - self.spent_usd
        if self._dearest is None:
            return int(left > 0.0)
        return int(left / self._dearest) if self._dearest else MOST

    def _next(self, now: float, replay: bool) -> Iterator[Exchange]:
        made = self._replayed if replay else self._copied
        wanted = self._settings.replay_tasks if replay else self._settings.shadow_tasks
        most = 0 if self.broke else min(MOST, self._affordable, wanted - len(made))
        for stored in self._recorded(now, replay):
            if most <= 0:
                return
            call = stored.call
            wanted_too = replay or drawn(call.key, self._settings.shadow_sample)
            if call.route not in ROUTES or call.key in made or not wanted_too:
                continue
            if found := exchange(self._store, call.key):
                most -= 1
                yield found

    def _recorded(self, now: float, replay: bool) -> Iterator[StoredCall]:
        settled = now - self._settings.settle_s
        if not replay:
            return self._store.calls(alias=self._alias, since=self._since, until=settled, ok=True)
        before, limit = min(self._since, settled), 10 * self._settings.replay_tasks
        return self._store.calls(alias=self._alias, until=before, ok=True, newest_first=True, limit=limit)

    def _pair(self, was: Exchange, copy: Call) -> Pair:
        answer = exchange(self._store, copy.key) if copy.status < 400 else None
        replayed = REPLAYED in copy.tags
        if answer is None:
            return Pair(True, False, False, None, None, replayed)
        right = was.expected is not None
        judged = answer._replace(expected=was.expected, tags=was.tags, grades={})
        return Pair(
            failed=False,
            invalid=answer_cut(copy) or useless(answer.request, answer.body),
            was_invalid=finish_reason(was.body) == "length" or useless(was.request, was.body),
            outcome=graded(judged) if right else None,
            was_outcome=graded(was) if right else None,
            replayed=replayed,
        )


def drawn(key: str, share: float) -> bool:
    """Whether a call is among a share of all; the same call always is, or never."""
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest()) / 2**64 < share


def answer_cut(call: Call) -> bool:
    """Whether the token limit ended it."""
    return call.finish_reason == "length"
