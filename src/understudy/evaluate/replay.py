"""Ask a candidate the recorded questions until the evidence suffices.

The order is committed in the evidence file's header before the first call. Calls run side by side but count
in that order, so what answers fast gains no weight; calls still in flight at the verdict are finished,
recorded and counted as paid. An item already in the evidence is never called again. It ignores what the
answers prove (proof) and what the incumbent costs: its answers are recorded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from understudy import config
from understudy.endpoint import Endpoint
from understudy.errors import EndpointError, InputError
from understudy.evaluate.evidence import (
    EXCHANGES,
    Call,
    Item,
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
from understudy.evaluate.proof import Proof, good_difference, judge
from understudy.evaluate.sequential import Design, SequentialTest, Unit, Verdict, shuffled
from understudy.evaluate.thrift import CACHED, Price, Purse
from understudy.evaluate.workers import side_by_side
from understudy.protocol import Answer, Json, Usage
from understudy.traffic.sample import Exchange

MISCONFIGURED = frozenset({401, 403, 404})
"""Statuses that every further call would meet too: the run stops instead of scoring them 0."""
SILENCES = 3
"""Calls in a row without any answer after which the endpoint counts as gone."""
REPEATED_ITEMS = 20
"""Questions asked again where repeats are wanted: the first of the committed order."""
STRIPPED = ("stream", "stream_options", "store", "metadata", "user", "service_tier")
"""Fields of a recorded request that say how it was carried, not what was asked."""


class Progress(NamedTuple):
    """What a run can show after each counted call."""

    calls: int
    items: int
    e_pass: float
    e_fail: float
    verdict: Verdict


Report = Callable[[Progress], None]


async def prove(
    candidate: Endpoint,
    exchanges: Sequence[Exchange],
    settings: config.Evaluate,
    *,
    evidence: Path,
    candidates: int = 1,
    progress: Report | None = None,
    price: Price | None = None,
) -> Proof:
    """Replay ``exchanges`` to ``candidate`` until PASS, FAIL or the end of the budget.

    ``evidence`` is a folder; `exchanges.jsonl` is frozen there at the first run. ``candidates`` is how many
    are tried side by side. ``price`` is what a call costs, needed where ``settings.budget_usd`` is set: the
    money ends the run as a budget in calls does. Raises EndpointError when the endpoint is gone or
    misconfigured (what was paid is kept) and InputError when the evidence at hand belongs to another question
    or no price is known.
    """
    items = write_exchanges(evidence, exchanges)
    header = _header(candidate.name, exchanges, items, settings, candidates, evidence)
    path = evidence / file_name(candidate.name)
    known = _known(path, header)
    replay = _Replay(candidate, exchanges, items, header, known, progress)
    replay.purse = _purse(candidate.name, settings, price, known)
    with Journal(path, header) as journal:
        await replay.run(journal, settings.concurrency)
    return judge(header, items, replay.calls.values())


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
        good=good_difference(items, settings.margin),
        budget=settings.budget,
        exchanges_sha256=sha256_of(evidence / EXCHANGES),
    )


def _known(path: Path, header: ProofHeader) -> dict[str, Call]:
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
    return {call.key: call for call in calls}


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
    ) -> None:
        self.calls = known
        self._candidate = candidate
        self._items = {item.key: item for item in items}
        self._requests = {exchange.key: exchange.request for exchange in exchanges}
        self._order = shuffled(self._items, header.seed)[: header.budget or None]
        self._test = SequentialTest([Unit(item.score) for item in items], header.design)
        self._taken = 0
        self._counted = 0
        self._moved = asyncio.Event()
        self._silent: list[Call] = []
        self._progress = progress
        self.purse: Purse | None = None

    async def run(self, journal: Journal, concurrency: int) -> None:
        """Call until decided; calls in flight at that moment are finished and kept."""
        self._count()
        ahead = max(1, concurrency)
        await side_by_side(lambda: self._work(journal, ahead), ahead)
        self._flush(journal)
        self._count()

    @property
    def _over(self) -> bool:
        return self._test.decided or self._counted == len(self._order)

    async def _work(self, journal: Journal, ahead: int) -> None:
        while (key := await self._take(ahead)) is not None:
            await self._call(key, journal)
            self._count()

    async def _take(self, ahead: int) -> str | None:
        """The next key to call; waits while the count lags, so little is paid beyond the verdict."""
        while not self._over and self._taken < len(self._order):
            if self._taken >= self._counted + ahead + len(self._silent):
                self._moved.clear()
                await self._moved.wait()
                continue
            key = self._order[self._taken]
            if key not in self.calls and not self._affordable(key):
                return None
            self._taken += 1
            if key not in self.calls:
                return key
        return None

    def _affordable(self, key: str) -> bool:
        return self.purse is None or self.purse.reserve(key, self._items[key].usage)

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

    def _failed(self, key: str, error: EndpointError, journal: Journal) -> None:
        if error.status in MISCONFIGURED:
            raise error
        call = Call(key=key, score=0.0, error=error.value)
        if error.status is not None:
            self._flush(journal)
            self._keep(call, journal)
            return
        self._silent.append(call)
        self._moved.set()
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
        self._moved.set()
        while not self._over and (call := self.calls.get(self._order[self._counted])) is not None:
            item = self._items[call.key]
            self._test.observe(Unit(item.score), call.score)
            self._counted += 1
            if self._progress is not None:
                now = self._test.path[-1]
                self._progress(
                    Progress(now.calls, len(self._items), now.e_pass, now.e_fail, self._test.verdict)
                )


def asked(request: Json) -> dict[str, Any]:
    """The recorded request as it is put to a candidate: same parameters, not streamed."""
    return {name: value for name, value in request.items() if name not in STRIPPED}


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
    repeat_calls: int = 0
    """Calls that repeats would add at most, over candidates and incumbent."""
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
    """Calls and tokens a run would take, by playing the test on imagined candidates; nothing is called."""
    items = [item_of(exchange) for exchange in exchanges]
    most = min(settings.budget or len(items), len(items))
    design = Design(
        settings.margin, settings.alpha, settings.beta, candidates, good_difference(items, settings.margin)
    )
    good = _imagined(items, design, most, worse=-design.good, runs=runs)
    usages = [item.usage for item in items if item.usage is not None]
    prompt = sum(u.prompt_tokens for u in usages) / max(len(usages), 1)
    completion = sum(u.completion_tokens for u in usages) / max(len(usages), 1)
    return Forecast(
        items=len(items),
        most_calls=most,
        expected_if_as_good=good,
        expected_if_worse=_imagined(items, design, most, worse=3 * design.margin, runs=runs),
        prompt_tokens=prompt * good,
        completion_tokens=completion * good,
        prompt_tokens_most=round(prompt * most),
        completion_tokens_most=round(completion * most),
        usd=_dearest(prices, usages, good),
        usd_most=_dearest(prices, usages, most),
        repeat_calls=(repeats - 1) * min(REPEATED_ITEMS, len(items)) * (candidates + 1),
    )


def _dearest(prices: Sequence[Price], usages: Sequence[Usage], calls: float) -> float | None:
    """Money for ``calls`` of the recorded mean size at the dearest price."""
    totals = [[price(usage) for usage in usages] for price in prices]
    known = [sum(p for p in total if p is not None) for total in totals if None not in total]
    if not usages or not totals or len(known) < len(totals):
        return None
    return max(known) / len(usages) * calls


def _imagined(items: Sequence[Item], design: Design, most: int, *, worse: float, runs: int) -> float:
    import random

    total = 0
    for run in range(runs):
        rng = random.Random(run)  # noqa: S311  (a simulation)
        scores = [item.score for item in items]
        test = SequentialTest([Unit(score) for score in scores], design)
        for score in rng.sample(scores, most):
            other = rng.choice(scores) if rng.random() < 0.2 else score
            if test.observe(Unit(score), 0.0 if rng.random() < worse else other) is not Verdict.UNDECIDED:
                break
        total += test.calls
    return total / runs
