"""Ask a candidate the recorded questions until the evidence suffices.

The order is committed in the evidence file's header before the first call: of single items, or of whole
conversations, each of which counts when its last answer is there. Calls run side by side but count
in that order, so what answers fast gains no weight; calls still in flight at the verdict are finished,
recorded and counted as paid. Where nobody knows what is right a judge, if there is one, compares both answers
before the item counts. An item already in the evidence is never called again, nor judged again. It ignores
what the answers prove (proof) and what the incumbent costs: its answers are recorded.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from understudy import config
from understudy.endpoint import Endpoint
from understudy.errors import EndpointError, InputError
from understudy.evaluate.asking import MISCONFIGURED, asked
from understudy.evaluate.evidence import (
    EXCHANGES,
    Journal,
    ProofHeader,
    file_name,
    finish_reason,
    incumbent_of,
    item_of,
    read_lines,
    sha256_of,
    write_exchanges,
)
from understudy.evaluate.grade import Reply, grade, reply_of
from understudy.evaluate.item import Call, Drawn, Item, drawn
from understudy.evaluate.judge import Judgement, Umpire, header_of
from understudy.evaluate.metrics import EVEN, Metric, metrics_of
from understudy.evaluate.panel import Panel, Rates, Score
from understudy.evaluate.proof import Proof, score_of, told
from understudy.evaluate.sequential import Draws, Verdict
from understudy.evaluate.thrift import CACHED, Price, Purse
from understudy.evaluate.walk import Walk
from understudy.evaluate.workers import side_by_side
from understudy.protocol import Answer, Usage
from understudy.traffic.sample import Exchange

DISAGREES = 0.2
"""Share of items on which an imagined candidate as good as the incumbent answers otherwise."""
SILENCES = 3
"""Calls in a row without any answer after which the endpoint counts as gone."""
FEELERS = 4
"""Calls side by side before a first answer has told what one costs."""
REPEATED_ITEMS = 20
"""Questions asked again where repeats are wanted: the first of the committed order."""


class Progress(NamedTuple):
    """What a run can show after each counted call."""

    calls: int
    items: int
    e_pass: float
    e_fail: float
    verdict: Verdict


Report = Callable[[Progress], None]


class Bench(NamedTuple):
    """The judge of a run."""

    endpoint: Endpoint
    retires: str = ""
    """ISO date on which the judge itself retires, where known."""
    price: Price | None = None


async def prove(
    candidate: Endpoint,
    exchanges: Sequence[Exchange],
    settings: config.Evaluate,
    *,
    evidence: Path,
    candidates: int = 1,
    progress: Report | None = None,
    price: Price | None = None,
    judge: Bench | None = None,
) -> Proof:
    """Replay ``exchanges`` to ``candidate`` until PASS, FAIL or the end of the budget.

    ``evidence`` is a folder; `exchanges.jsonl` is frozen there at the first run. ``candidates`` is how many
    are tried side by side. ``price`` is what a call costs, needed where ``settings.budget_usd`` is set: the
    money ends the run as a budget in calls does, the judge's included. Without ``judge`` the items whose
    right answer nobody knows are only held against the incumbent's own words. Raises EndpointError when an
    endpoint is gone or misconfigured (what was paid is kept) and InputError when the evidence at hand belongs
    to another question or no price is known.
    """
    items = write_exchanges(evidence, exchanges)
    if judge is None:
        settings = msgspec.structs.replace(settings, judge="")
    header = _header(candidate.name, exchanges, items, settings, candidates, evidence)
    path = evidence / file_name(candidate.name)
    known = _known(path, header, items)
    umpire = _umpire(judge, header, exchanges, evidence)
    replay = _Replay(candidate, exchanges, items, header, known, progress, umpire)
    replay.purse = _purse(candidate.name, settings, price, known)
    replay.judge_price = judge.price if judge else None
    replay.charge_for(umpire.known if umpire else [])
    try:
        with Journal(path, header) as journal:
            await replay.run(journal, settings.concurrency)
    finally:
        if umpire is not None:
            umpire.close()
    return told(header, items, replay.calls, replay.walk, replay.preferences)


def _umpire(
    judge: Bench | None, header: ProofHeader, exchanges: Sequence[Exchange], evidence: Path
) -> Umpire | None:
    """The judge at work; None where no item needs one."""
    metric = next((m for m in header.metrics if m.basis == "judge"), None)
    if judge is None or metric is None:
        return None
    judged = header_of(
        metric.judge,
        header.candidate,
        header.incumbent,
        rubric=metric.rubric,
        seed=header.seed,
        evidence=evidence,
        retires=judge.retires,
    )
    return Umpire(judge.endpoint, exchanges, judged, evidence)


def _purse(name: str, settings: config.Evaluate, price: Price | None, known: dict[str, Call]) -> Purse | None:
    """What is left of the money after the calls the evidence holds."""
    if not settings.budget_usd:
        return None
    if price is None or price(Usage(prompt_tokens=1)) is None:
        raise InputError(
            f"no price of {name} is known, so a budget in money cannot be kept",
            expected="a model in the catalog, or a price of your own",
            next_step="add its price to the catalog overlay, or set a budget in calls",
        )
    purse = Purse(settings.budget_usd, price)
    for call in known.values():
        if not call.cached:
            purse.settle(call.key, call.usage, call.attempts)
    return purse


def _header(
    name: str,
    exchanges: Sequence[Exchange],
    items: Sequence[Item],
    settings: config.Evaluate,
    candidates: int,
    evidence: Path,
) -> ProofHeader:
    return ProofHeader(
        candidate=name,
        incumbent=incumbent_of(exchanges),
        seed=settings.seed,
        margin=settings.margin,
        alpha=settings.alpha,
        beta=settings.beta,
        candidates=candidates,
        metrics=metrics_of(items, settings),
        budget=settings.budget,
        exchanges_sha256=sha256_of(evidence / EXCHANGES),
        unit=settings.unit,
    )


def _known(path: Path, header: ProofHeader, items: Sequence[Item]) -> dict[str, Call]:
    """Calls that the evidence holds, graded anew: a score in a file is not trusted."""
    if not path.exists() or b"\n" not in path.read_bytes():
        return {}
    found, calls = read_lines(path, ProofHeader, Call)
    if msgspec.structs.replace(found, budget=header.budget) != header:
        raise InputError(
            f"{path} was begun with other settings: {_differing(found, header)}",
            expected="the settings this evidence was begun with",
            next_step=f"put them back, or move {path} away to begin anew",
        )
    if found.budget != header.budget:
        _rewrite_header(path, header)
    by_key = {item.key: item for item in items}
    return {
        call.key: msgspec.structs.replace(call, score=score_of(by_key[call.key], call))
        for call in calls
        if call.key in by_key
    }


def _differing(found: ProofHeader, header: ProofHeader) -> str:
    names = [n for n in found.__struct_fields__ if getattr(found, n) != getattr(header, n)]
    return ", ".join(f"{n} {getattr(found, n)} there, {getattr(header, n)} here" for n in names)


def _rewrite_header(path: Path, header: ProofHeader) -> None:
    """A larger budget may be granted later: validity holds for any budget, at any time."""
    _, _, records = path.read_bytes().partition(b"\n")
    part = path.with_suffix(".part")
    part.write_bytes(msgspec.json.encode(header) + b"\n" + records)
    part.replace(path)


class _Replay:
    """One run: workers take items in the committed order, at most ``concurrency`` ahead of the count."""

    def __init__(
        self,
        candidate: Endpoint,
        exchanges: Sequence[Exchange],
        items: Sequence[Item],
        header: ProofHeader,
        known: dict[str, Call],
        progress: Report | None,
        umpire: Umpire | None,
    ) -> None:
        self.calls = known
        self.preferences: dict[str, float | None] = umpire.preferences if umpire else {}
        self.purse: Purse | None = None
        self.judge_price: Price | None = None
        self._candidate = candidate
        self._items = {item.key: item for item in items}
        self._requests = {exchange.key: exchange.request for exchange in exchanges}
        order = drawn(items, header.seed, header.unit)
        self._order = [(item.key, together) for together in order for item in together]
        """Every item with what it is drawn with."""
        self._budget = header.budget or len(items)
        self.walk = Walk(header.metrics, order, header.rates, graded=True)
        self._panel = self.walk.panel
        self._umpire = umpire
        self._next = 0
        """Place in the order of the next item to take."""
        self._asked = 0
        """Items taken."""
        self._place = 0
        """Place in the order of the next item to count: the first of its draw."""
        self._counted = 0
        self._full = False
        """The next draw does not fit into the budget."""
        self._pending: set[str] = set()
        """Taken and not yet counted."""
        self._working = 0
        """Items that a worker is at: only these can still bring money back or let the count go on."""
        self._ahead = 1
        """Most items taken and not yet counted."""
        self._waiting: deque[asyncio.Future[None]] = deque()
        """Workers with nothing to take; each is woken alone, for waking thousands at every call costs more
        than the calls."""
        self._broke = False
        """The money does not reach for another call."""
        self._spent = False
        """Nor do the calls for another draw."""
        self._silent: list[Call] = []
        self._progress = progress

    async def run(self, journal: Journal, concurrency: int) -> None:
        """Call until decided; calls in flight at that moment are finished and kept."""
        self._count()
        self._next, self._asked = self._place, self._counted
        # a draw counts when it is whole, so all of it must be allowed ahead of the count
        longest = max(len(together) for _, together in self._order)
        self._ahead = max(1, concurrency, longest)
        await side_by_side(lambda: self._work(journal), concurrency)
        self._flush(journal)
        self._count()

    @property
    def _over(self) -> bool:
        return self._panel.settled or self._full or self._place == len(self._order)

    async def _work(self, journal: Journal) -> None:
        while (key := await self._take()) is not None:
            if key not in self.calls:
                await self._call(key, journal)
            if key in self.calls:
                await self._compare(key)
            self._working -= 1
            self._count()

    async def _take(self) -> str | None:
        """The next key with something to ask; waits while the count lags, so little is paid beyond the
        verdict."""
        while not self._exhausted:
            key, together = self._order[self._next]
            if self._room <= 0:
                await self._woken()
            elif not self._panel.wants(together):
                self._next += 1
            elif key == together[0].key and self._asked + len(together) > self._budget:
                self._spent = True
                self._wake()
            elif self._ready(key):
                self._next, self._asked = self._next + 1, self._asked + 1
            elif not self._affordable(key):
                # what is in flight may cost less than is held for it
                if self._working:
                    await self._woken()
                else:
                    self._broke = True
                    self._wake()
            else:
                self._next, self._asked = self._next + 1, self._asked + 1
                self._pending.add(key)
                self._working += 1
                return key
        return None

    async def _woken(self) -> None:
        """Wait until there may be something to take."""
        self._waiting.append(asyncio.get_running_loop().create_future())
        await self._waiting[-1]

    @property
    def _exhausted(self) -> bool:
        """Nothing is left to take."""
        return self._over or self._broke or self._spent or self._next == len(self._order)

    @property
    def _room(self) -> int:
        """Items that may be taken now.

        Under a budget in money the calls in flight grow with the answers: what a call costs is known only
        then, and what is in flight at the end of the money is paid for too.
        """
        ahead = self._ahead if self.purse is None else min(self._ahead, FEELERS + len(self.calls))
        return ahead + len(self._silent) - len(self._pending)

    def _wake(self) -> None:
        """Let as many workers look again as there is something to take for; all when there is nothing."""
        many = len(self._waiting) if self._exhausted else min(self._room, len(self._waiting))
        for _ in range(many):
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)

    def _ready(self, key: str) -> bool:
        """Whether an item can be counted as it is."""
        call = self.calls.get(key)
        return call is not None and not self._awaits_judge(key, call)

    def _awaits_judge(self, key: str, call: Call) -> bool:
        return self._umpire is not None and self.walk.awaits_judge(self._items[key], call, self.preferences)

    def _affordable(self, key: str) -> bool:
        paid = key in self.calls  # it only waits for the judge
        return paid or self.purse is None or self.purse.reserve(key, self._items[key].usage)

    async def _call(self, key: str, journal: Journal) -> None:
        request = self._requests[key]
        ask = self._candidate.chat if "messages" in request else self._candidate.complete
        try:
            answer = await ask(asked(request))
        except EndpointError as error:
            self._failed(key, error, journal)
            return
        self._flush(journal)
        self._keep(call_of(self._items[key], answer), journal)

    async def _compare(self, key: str) -> None:
        """Have the judge compare both answers, where the item needs it."""
        call = self.calls[key]
        if self._umpire is None or not self._awaits_judge(key, call):
            return
        self.charge_for([await self._umpire.compare(self._items[key], call.reply)])

    def charge_for(self, judgements: Sequence[Judgement]) -> None:
        """Take what judgements cost out of the purse."""
        if self.purse is not None and self.judge_price is not None:
            for said in judgements:
                self.purse.charge(self.judge_price(said.usage or Usage()) or 0.0)

    def _failed(self, key: str, error: EndpointError, journal: Journal) -> None:
        if error.status in MISCONFIGURED:
            raise error
        call = Call(key=key, score=0.0, error=error.value)
        if error.status is not None:
            self._flush(journal)
            self._keep(call, journal)
            return
        self._silent.append(call)
        self._wake()
        if len(self._silent) >= SILENCES:
            raise error

    def _flush(self, journal: Journal) -> None:
        """Silences followed by an answer were the candidate's errors, not the network's end."""
        held, self._silent = self._silent, []
        for call in held:
            self._keep(call, journal)

    def _keep(self, call: Call, journal: Journal) -> None:
        journal.append(call)
        self.calls[call.key] = call
        if self.purse is not None:
            self.purse.settle(call.key, None if call.cached else call.usage, call.attempts)

    def _count(self) -> None:
        """Count what is there in the committed order, up to the first gap."""
        while not self._over:
            together = self._order[self._place][1]
            wanted = self._panel.wants(together)
            if wanted and self._counted + len(together) > self._budget:
                self._full = True
                break
            if wanted and not all(self._ready(item.key) for item in together):
                break
            self._place += len(together)
            self._pending.difference_update([item.key for item in together])
            if wanted:
                self._observe(together)
        self._wake()

    def _observe(self, together: Drawn) -> None:
        self.walk.take(together, self.calls, self.preferences)
        self._counted += len(together)
        if self._progress is not None:
            now = self._panel.tests[self._panel.leading.name].path[-1:]
            e_pass, e_fail = (now[0].e_pass, now[0].e_fail) if now else (1.0, 1.0)
            self._progress(Progress(self._counted, len(self._items), e_pass, e_fail, self._panel.verdict))


def call_of(item: Item, answer: Answer) -> Call:
    """The evidence line of an answer."""
    reply: Reply = reply_of(answer.body)
    return Call(
        key=item.key,
        reply=reply,
        score=grade(item.grader, reply, item.expected),
        usage=answer.usage,
        ttft_s=answer.ttft_s,
        total_s=answer.total_s,
        attempts=answer.attempts,
        finish_reason=finish_reason(answer.body),
        cached=bool(answer.body.get(CACHED)),
    )


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """What a run would take, before it is paid for."""

    items: int
    rests_on: list[str]
    """Names of the metrics that a PASS needs."""
    most_calls: int
    expected_if_as_good: float
    """Mean calls if the candidate is as good as the incumbent and disagrees on a fifth of the items."""
    expected_if_worse: float
    """Mean calls if it is worse by three margins."""
    prompt_tokens: float
    """Expected, at `expected_if_as_good` calls of the recorded mean size."""
    completion_tokens: float
    prompt_tokens_most: int
    completion_tokens_most: int
    unit: Draws = "item"
    """What is drawn at once."""
    draws: int = 0
    """Of these there are so many."""
    repeat_calls: int = 0
    """Calls that repeats would add at most, over candidates and incumbent."""
    judge_calls: float = 0.0
    """Comparisons expected of the judge, per candidate."""
    judge_calls_most: int = 0
    usd: float | None = None
    """Expected of the dearest candidate, at `expected_if_as_good` calls; None when a price is not known."""
    usd_most: float | None = None


def forecast(
    exchanges: Sequence[Exchange],
    settings: config.Evaluate,
    *,
    candidates: int = 1,
    repeats: int = 1,
    prices: Sequence[Price] = (),
    runs: int = 20,
) -> Forecast:
    """Calls and tokens a run would take, by playing the tests on imagined candidates; nothing is called."""
    items = [item_of(exchange) for exchange in exchanges]
    most = min(settings.budget or len(items), len(items))
    metrics = metrics_of(items, settings)
    rates = Rates(settings.alpha, settings.beta, candidates)
    order = drawn(items, settings.seed, settings.unit)
    good = _imagined(order, metrics, rates, most, worse=0.0, runs=runs)
    bad = _imagined(order, metrics, rates, most, worse=3 * settings.margin, runs=runs)
    usages = [item.usage for item in items if item.usage is not None]
    prompt = sum(u.prompt_tokens for u in usages) / max(len(usages), 1)
    completion = sum(u.completion_tokens for u in usages) / max(len(usages), 1)
    judged = sum(any(m.basis == "judge" and m.scores(item) for m in metrics) for item in items)
    return Forecast(
        items=len(items),
        rests_on=[m.name for m in metrics if m.required],
        most_calls=most,
        expected_if_as_good=good,
        expected_if_worse=bad,
        prompt_tokens=prompt * good,
        completion_tokens=completion * good,
        prompt_tokens_most=round(prompt * most),
        completion_tokens_most=round(completion * most),
        usd=_dearest(prices, usages, good),
        usd_most=_dearest(prices, usages, most),
        unit=settings.unit,
        draws=len(order),
        repeat_calls=(repeats - 1) * min(REPEATED_ITEMS, len(items)) * (candidates + 1),
        judge_calls=good * judged / len(items),
        judge_calls_most=min(judged, most),
    )


def _dearest(prices: Sequence[Price], usages: Sequence[Usage], calls: float) -> float | None:
    """Money for ``calls`` of the recorded mean size at the dearest price."""
    totals = [[price(usage) for usage in usages] for price in prices]
    known = [sum(p for p in total if p is not None) for total in totals if None not in total]
    if not usages or not totals or len(known) < len(totals):
        return None
    return max(known) / len(usages) * calls


class _Imagined(NamedTuple):
    """What becomes of one item with an imagined candidate."""

    item: Item
    answered: Item
    """Whose score it gets: the item's own, or another's."""
    lost: bool
    preferred: float
    """By a judge, where it answers otherwise."""

    def score(self, metric: Metric) -> float:
        if self.lost:
            return 0.0
        if metric.basis == "judge":
            return EVEN if self.answered is self.item else self.preferred
        if not metric.can_fail:
            return metric.incumbent(self.item) - metric.margin / 2.0
        return metric.incumbent(self.answered if metric.scores(self.answered) else self.item)


def _imagined(
    order: Sequence[Drawn], metrics: Sequence[Metric], rates: Rates, most: int, *, worse: float, runs: int
) -> float:
    """Mean calls to a candidate that loses what it had on a share ``worse`` of the items."""
    items = [item for together in order for item in together]
    total = 0
    for run in range(runs):
        rng = random.Random(run)  # noqa: S311  (a simulation)
        panel = Panel(metrics, order, rates)
        put = 0
        for together in rng.sample(order, len(order)):
            if panel.settled:
                break
            if not panel.wants(together):
                continue
            if put + len(together) > most:
                break
            put += len(together)
            panel.observe(together, _imagine(together, items, worse, rng))
        total += put
    return total / runs


def _imagine(together: Drawn, items: Sequence[Item], worse: float, rng: random.Random) -> Score:
    """An imagined candidate's scores of one draw."""
    imagined: list[_Imagined] = []
    for item in together:
        other = rng.choice(items) if rng.random() < DISAGREES else item
        imagined.append(_Imagined(item, other, rng.random() < worse, rng.choice((0.0, 1.0))))
    return lambda metric, place: imagined[place].score(metric)
