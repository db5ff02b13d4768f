"""A judge in a trial: what another model thinks of finished tasks of which nobody else said how they went.

It is shown a task's last answer and the rubric, and not who gave it. Its calls are kept in the store under
``ALIAS#judge`` and scores are read back from there, so a process that starts again pays for none twice. The
incumbent's tasks are thinned to about `BESIDE` for each of the candidate's, by a hash that knows no answer. A
call that fails, or names no score, is no outcome: it is tried again later and decides nothing.

It ignores turns that called tools (graders tell of those) and what follows from a score (standing).
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

import msgspec

from understudy.config import Rollout
from understudy.endpoint import Endpoint
from understudy.errors import InputError
from understudy.evaluate.grade import reply_of
from understudy.evaluate.judge import refuse_kin
from understudy.evaluate.score import score_of, scoring
from understudy.evaluate.workers import side_by_side
from understudy.protocol import Json, answer_text
from understudy.rollout.evidence import Event, Judged, Settled
from understudy.rollout.own_call import Means, ask
from understudy.rollout.shadow import drawn
from understudy.traffic.record import Call, new_key, time_of
from understudy.traffic.routes import Route
from understudy.traffic.rows import StoredCall
from understudy.traffic.sample import exchange
from understudy.traffic.store import Store

OF, ARM, TRIAL = "judge_of", "arm", "trial"
"""Tags of a judge's call: the key of the call it is about, who that was dealt to, the version that began the
trial."""
BESIDE = 2.0
"""The incumbent's tasks judged for each of the candidate's."""
AT_ONCE = 8
MOST = 32
"""Calls in one pass."""
WAITING = 1_000
"""Tasks that wait to be judged; of more, the oldest are given up."""
TRIES = 3
FEW_UNSCORED, LOPSIDED = 3, 0.1
"""So many of the candidate's tasks without a score, and such a share more than of the incumbent's, are no
chance."""
AGAIN_S, AGAIN_MOST_S = 30.0, 900.0
"""Pause after a pass in which a call failed; it doubles."""


def judge_alias(alias: str) -> str:
    """The name under which a judge's calls on an alias are kept."""
    return f"{alias}#judge"


class _Due(NamedTuple):
    call: str
    """Key of the task's last answer."""
    candidate: bool
    tries: int = 0


class Judging:
    """The judge of one trial."""

    def __init__(
        self,
        store: Store,
        route: Route,
        since: float,
        settings: Rollout,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._route = route
        self._settings = settings
        self._clock = clock
        self._seen, self._last = since, ""
        """When the last judgement that was read was recorded, and its key."""
        self._ahead: list[Judged] = []
        """Scores nearer to the present than is told of."""
        self._due: deque[_Due] = deque(maxlen=WAITING)
        self._asked: set[str] = set()
        """Judged by this process and not read back yet."""
        self._known: set[str] = set()
        """Judged by another process, or an earlier one, and not offered yet."""
        self._scored: Counter[str] = Counter()
        """Tasks by the arm they were dealt to."""
        self._unscored: dict[str, str] = {}
        """The same for those that it was asked about in vain, by call."""
        self._again_at, self._pause = 0.0, AGAIN_S
        self.spent_usd = 0.0
        """Of the calls that have a price."""
        self._dearest: float | None = None
        """US dollars of the dearest call so far; None before the first."""
        self.exhausted = False
        """One more call might cost more than is left."""
        self.trouble = _unfit(settings.judge, route)
        """Why the last call brought no score; empty when it did."""
        self._unfit = bool(self.trouble)

    @property
    def broke(self) -> bool:
        """Whether its money is spent."""
        if not self._settings.judge:
            return False
        return self.exhausted or self.spent_usd >= self._settings.judge_usd

    def heard(self, upto: float) -> list[Judged]:
        """Scores given before ``upto`` (Unix seconds), since it was last asked. Raises StoreError."""
        if not self._settings.judge:
            return []
        alias = judge_alias(self._route.alias)
        keys = self._store.arrived([alias], self._seen).get(alias, [])
        for stored in self._store.some([key for key in keys if key > self._last], texts=True):
            call = stored.call
            self._seen, self._last = time_of(call.key), call.key
            if call.tags.get(TRIAL) == str(self._route.origin) and (one := self._read(stored)):
                self._ahead.append(one)
        here = [one for one in self._ahead if one.at < upto]
        self._ahead = [one for one in self._ahead if one.at >= upto]
        return here

    def offer(self, events: Iterable[Event], share_at: Callable[[float], float]) -> None:
        """Tasks that have settled; those nobody spoke of are drawn from. ``share_at`` tells the candidate's
        share at a time (Unix seconds)."""
        if not self._settings.judge:
            return
        for event in events:
            if not isinstance(event, Settled) or event.outcome is not None or not event.call:
                continue
            share = share_at(event.at - self._settings.settle_s)
            if event.call in self._known:
                self._known.discard(event.call)
            elif 0.0 < share < 1.0 and drawn(event.call, self._rate(share, candidate=event.candidate)):
                self._due.append(_Due(event.call, event.candidate))

    def _rate(self, share: float, *, candidate: bool) -> float:
        beside = 1.0 if candidate else min(1.0, BESIDE * share / (1.0 - share))
        return self._settings.judge_sample * beside

    @property
    def lopsided(self) -> str:
        """In words, where it fails on the candidate's answers more than on the incumbent's: what it does say
        is then no fair sample. Empty where it doesn't."""
        unscored = Counter(self._unscored.values())
        own, beside = (
            unscored[arm] / ((unscored[arm] + self._scored[arm]) or 1) for arm in ("candidate", "incumbent")
        )
        if unscored["candidate"] < FEW_UNSCORED or own <= beside + LOPSIDED:
            return ""
        return f"scores no {own:.0%} of the candidate's tasks, and no {beside:.0%} of the incumbent's"

    def _read(self, stored: StoredCall) -> Judged | None:
        call = stored.call
        usd = stored.cost.usd if stored.cost else 0.0
        self.spent_usd += usd
        self._dearest = max(self._dearest or 0.0, usd)
        self.exhausted = self.spent_usd + self._dearest > self._settings.judge_usd
        of, score = call.tags.get(OF, ""), _score(call)
        self.trouble = "" if score is not None else _trouble(call)
        arm = call.tags.get(ARM, "")
        if score is None:
            self._unscored[of] = arm
            if len(self._unscored) > WAITING:
                del self._unscored[next(iter(self._unscored))]
            return None
        self._unscored.pop(of, None)
        self._scored[arm] += 1
        if of in self._asked:
            self._asked.discard(of)
        else:
            self._known.add(of)
        return Judged(call.at, arm == "candidate", score)

    def wants(self, now: float) -> bool:
        """Whether there is something to ask, and it may be asked."""
        return bool(self._due) and not self.broke and not self._unfit and now >= self._again_at

    async def judge(self, now: float, means: Means) -> None:
        """Have the next tasks judged, as far as the money goes.

        A judge in trouble, or of which nobody knows yet what it costs, is asked for one alone. Raises
        StoreError.
        """
        careful = self.trouble or self._dearest is None
        due = [self._due.popleft() for _ in range(min(len(self._due), 1 if careful else MOST))]
        if self._dearest:
            due = due[: int((self._settings.judge_usd - self.spent_usd) / self._dearest)]
            self.exhausted = not due
        told: list[Call] = []
        failed: list[_Due] = []
        async with means.connect() as client:

            async def work() -> None:
                while due:
                    each = due.pop()
                    if each.call in self._known:  # by another process, meanwhile
                        self._known.discard(each.call)
                        continue
                    said = await self._ask(client, each)
                    if said is not None:
                        told.append(means.redactor.call(said) if means.redactor else said)
                        failed.extend([each] if _score(said) is None else [])

            await side_by_side(work, AT_ONCE)
        self._keep(told, {each.call for each in failed}, means)
        self._after(failed, now)

    async def _ask(self, client: Endpoint, each: _Due) -> Call | None:
        """The judge's call on a task; None where its answer is not one for a judge."""
        found = exchange(self._store, each.call)
        if found is None or (reply := reply_of(found.body)).tool_calls:
            return None
        arm = "candidate" if each.candidate else "incumbent"
        tags = {OF: each.call, ARM: arm, TRIAL: str(self._route.origin)}
        request = scoring(found.request, reply.text, self._settings.rubric)
        return await ask(client, request, judge_alias(self._route.alias), self._settings.judge, tags)

    def _keep(self, told: Iterable[Call], failed: set[str], means: Means) -> None:
        """Record what was said, by the time of recording: whoever reads in order of time misses none."""
        now = self._clock()
        kept = [msgspec.structs.replace(call, key=new_key(), at=now) for call in told]
        self._asked |= {call.tags[OF] for call in kept} - failed
        segment = f"judge/{self._route.alias}"
        beyond = self._store.reached(segment) + 1
        self._store.insert(kept, segment, beyond, price=means.price)

    def _after(self, failed: Iterable[_Due], now: float) -> None:
        """Put back what failed, and leave the judge alone for a while if anything did."""
        again = [each._replace(tries=each.tries + 1) for each in failed]
        self._due.extend(each for each in again if each.tries < TRIES)
        if again:
            self._again_at, self._pause = now + self._pause, min(2.0 * self._pause, AGAIN_MOST_S)
        else:
            self._pause = AGAIN_S


def _unfit(judge: str, route: Route) -> str:
    """Why a model may not judge this trial; empty when it may."""
    try:
        if judge:
            refuse_kin(judge, [route.model, route.candidate])
    except InputError as error:
        return error.value
    return ""


def _score(call: Call) -> float | None:
    return score_of(answer_text(_body(call))) if call.status < 400 and call.response else None


def _trouble(call: Call) -> str:
    if error := call.attempts[-1].error if call.attempts else "":
        return error
    return f"named no score: {answer_text(_body(call))[-80:]!r}"


def _body(call: Call) -> Json:
    return msgspec.json.decode(call.response) if call.response else {}
