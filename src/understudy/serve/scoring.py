"""Scores asked for by many requests at once, computed together in one thread.

The scorer is opened at first use: a model that is only chatted with pays nothing for it. It ignores how
scores are computed (llama_scorer, checkpoint_engine).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

from understudy.serve.engine import BlockingScorer, Scored, ScoreJob

BATCH_TOKENS = 8192
"""Most tokens computed before newer requests get their turn."""

S = TypeVar("S", bound=BlockingScorer)


class _Waiting(NamedTuple):
    job: ScoreJob
    answer: asyncio.Future[Scored]


class ScoreQueue(Generic[S]):
    """First come, first served; all that wait are computed as one batch, so shared prefixes cost once."""

    def __init__(self, open_scorer: Callable[[], S]) -> None:
        self._open_scorer = open_scorer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="score")
        self._scorer: asyncio.Future[S] | None = None
        self._waiting: list[_Waiting] = []
        self._worker: asyncio.Task[None] | None = None

    async def opened(self) -> S:
        """The scorer, opened if need be. Raises what opening it raises, each time anew."""
        if self._scorer is None or (self._scorer.done() and self._scorer.exception()):
            loop = asyncio.get_running_loop()
            self._scorer = loop.run_in_executor(self._thread, self._open_scorer)
        return await asyncio.shield(self._scorer)

    async def score(self, tokens: Sequence[int], top: int) -> Scored:
        """Scores of one prompt. Raises what the scorer raises."""
        await self.opened()
        answer: asyncio.Future[Scored] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(ScoreJob(tuple(tokens), top), answer))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await answer

    async def _work(self) -> None:
        scorer = await self.opened()
        loop = asyncio.get_running_loop()
        # one turn of the loop lets requests that arrived together be computed together
        await asyncio.sleep(0)
        while batch := self._take():
            try:
                scores = await loop.run_in_executor(self._thread, scorer.score, [w.job for w in batch])
            except Exception as error:
                _answer(batch, [error] * len(batch))
            else:
                _answer(batch, scores)

    def _take(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        tokens = 0
        while self._waiting and (not batch or tokens < BATCH_TOKENS):
            waiting = self._waiting.pop(0)
            if not waiting.answer.done():  # done: the client has gone
                batch.append(waiting)
                tokens += len(waiting.job.tokens)
        return batch

    async def close(self) -> None:
        if self._worker is not None:
            self._worker.cancel()
        if self._scorer is not None and self._scorer.done() and not self._scorer.exception():
            await asyncio.get_running_loop().run_in_executor(self._thread, self._scorer.result().close)
        self._thread.shutdown(wait=False)


def _answer(batch: Sequence[_Waiting], outcomes: Sequence[Scored | Exception]) -> None:
    for waiting, outcome in zip(batch, outcomes, strict=True):
        if waiting.answer.done():
            continue
        if isinstance(outcome, Exception):
            waiting.answer.set_exception(outcome)
        else:
            waiting.answer.set_result(outcome)
