"""A world for trials under a clock of our own: tasks are dealt by the gateway's own table, answered by
scripted models and indexed into a real store."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from understudy.config import Config, Endpoint, Rollout
from understudy.endpoint import ScriptedModel
from understudy.gateway.routing import Table, build_table
from understudy.gateway.upstream import Upstream
from understudy.protocol import Cost, Usage
from understudy.rollout.controller import Controller, Report
from understudy.rollout.own_call import Means
from understudy.rollout.trials import Order, begin
from understudy.traffic.record import Attempt, Call, Feedback, new_key
from understudy.traffic.store import Store

OLD, NEW, JUDGE = "vendor/old", "local/new", "court/judge"
ME = Order("me", "because")
TEXT = """
[endpoints.vendor]
base_url = "http://127.0.0.1:1/v1"
[endpoints.local]
base_url = "http://127.0.0.1:2/v1"
[endpoints.court]
base_url = "http://127.0.0.1:3/v1"
[aliases.chat]
model = "vendor/old"
[rollout]
replay_tasks = 0
shadow_tasks = 0
shares = [0.1, 0.3, 0.5]
tasks = [5, 10, 10]
margin = 0.2
settle_s = 4
"""


class World:
    """An application, two models and a clock; a task a second."""

    def __init__(self, store: Store, config: Config, *, old: float = 0.9, new: float = 0.9) -> None:
        self.store, self.config = store, config
        self.right = {OLD: old, NEW: new}
        self.fails: set[str] = set()
        self.seconds = {OLD: 0.5, NEW: 0.5}
        self.speaks = True
        self.text = "yes"
        self.answers: dict[str, str] = {}
        """What a model always says in place of `text`."""
        self.now = time.time()
        self.rng = random.Random(7)
        self.dealt: dict[str, int] = {OLD: 0, NEW: 0}
        self.copies = ScriptedModel("new", lambda request: "yes")
        self.judge = ScriptedModel(JUDGE, lambda request: "score: 5")
        self.judge_usd: float | None = None
        self.controller = self.anew()
        upstream = Upstream("either", Endpoint(base_url="http://127.0.0.1:9/v1"), "")  # asked for nothing
        self.upstreams: Mapping[str, Upstream] = {"vendor": upstream, "local": upstream}
        self.table: Table | None = None

    def anew(self) -> Controller:
        """A controller that knows nothing yet, as after a crash."""
        return Controller(self.store, self.config, self.means, clock=lambda: self.now)

    def means(self, candidate: str) -> Means:
        @asynccontextmanager
        async def connect() -> AsyncGenerator[ScriptedModel]:
            yield self.judge if candidate == JUDGE else self.copies

        def price(call: Call) -> Cost | None:
            return None if self.judge_usd is None else Cost(self.judge_usd, "2026-01-01", "test")

        return Means(connect, price, None)

    async def pass_on(self, tasks: int, *, until: str = "") -> list[Report]:
        """So many tasks, looked at every ten; ends early when the route reaches the stage ``until``."""
        reports: list[Report] = []
        for number in range(tasks):
            self.add_task(f"t{self.now:.0f}-{number}")
            self.now += 1.0
            if number % 10 == 9:
                reports = await self.controller.step() or reports
                route = self.store.route("chat")
                if route and route.stage == until:
                    break
        return reports

    def deal(self, task: str) -> str:
        """One more call of a task; returns whom it was dealt to."""
        self.add_task(task)
        return [c.call.attempts[0].target for c in self.store.calls(alias="chat", task_id=task)][-1]

    def first_of(self, task: str) -> str:
        return next(c.call.attempts[0].target for c in self.store.calls(alias="chat", task_id=task))

    def add_task(self, task: str) -> None:
        self.table = build_table(
            self.config, self.upstreams, self.store.routes(), self.store.staying(), self.table
        )
        targets = [t.name for t in self.table.targets("chat", task.encode())]
        self.dealt[targets[0]] += 1
        attempts: list[Attempt] = []
        for target in targets:
            status = 503 if target in self.fails else 200
            attempts.append(
                Attempt(target=target, status=status, billed="yes", started=self.now, ended=self.now)
            )
            if status == 200:
                break
        answered = attempts[-1].target
        call = self.as_call(task, answered, attempts)
        right = self.rng.random() < self.right[answered]
        records: list[Call | Feedback] = [call]
        if self.speaks:
            score = Feedback(key=new_key(), call=call.key, at=self.now + 1, metric="ok", value=float(right))
            records.append(score)
        offset = self.store.reached("world") + 1
        self.store.insert(records, "world", offset, price=lambda c: Cost(0.001, "2026-01-01", "test"))

    def as_call(self, task: str, answered: str, attempts: list[Attempt]) -> Call:
        content = self.answers.get(answered, self.text)
        body = {"choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}]}
        return Call(
            key=f"{int(self.now * 1000):012x}{new_key()[12:]}",
            at=self.now,
            route="chat.completions",
            alias="chat",
            target=answered,
            status=attempts[-1].status,
            request=msgspec.json.encode({"model": "chat", "messages": [{"role": "user", "content": task}]}),
            response=msgspec.json.encode(body),
            attempts=attempts,
            usage=Usage(prompt_tokens=5, completion_tokens=1),
            ttft_s=self.seconds[answered] / 2,
            total_s=self.seconds[answered],
            finish_reason="stop",
            task_id=task,
        )


def settings(config: Config, **changes: Any) -> Config:
    rollout = msgspec.structs.replace(config.rollout or Rollout(), **changes)
    return msgspec.structs.replace(config, rollout=rollout)


def started(store: Store, config: Config, **world: Any) -> World:
    begin(store, "chat", NEW, ME, config.rollout or Rollout(), initial=config.aliases["chat"])
    return World(store, config, **world)
