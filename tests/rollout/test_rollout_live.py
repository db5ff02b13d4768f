"""Trials through `understudy up`: a judge decides where nobody else says how tasks went; tools asked for in
the shadow are nobody's business."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from real_trial import counted, real_trial, says

from understudy.rollout.judging import judge_alias
from understudy.rollout.shadow import shadow_alias

JUDGED = """
replay_tasks = 0
shadow_tasks = 0
shares = [0.4, 0.49]
tasks = [5, 5]
margin = 0.4
settle_s = 0.5
judge = "court/judge"
rubric = "Is it helpful?"
"""


async def test_a_judge_alone_has_a_worse_candidate_rolled_back(tmp_path: Path) -> None:
    def court(request: dict[str, Any]) -> dict[str, Any]:
        shown = request["messages"][-1]["content"]
        return says("It helps.\nscore: 9" if "a helpful word" in shown else "It does not.\nscore: 1")

    scripts = {
        "vendor": lambda _: says("a helpful word"),
        "local": lambda _: says("as you like"),
        "court": court,
    }
    async with real_trial(tmp_path, JUDGED, scripts) as stage:
        dry = stage.run("rollout", "start", "chat", "--to", "local/new", "--dry-run")
        assert "judged by court/judge where nobody else says, for $5 at most" in dry
        stage.run("rollout", "start", "chat", "--to", "local/new")
        tasks, answered = 0, counted([])
        while answered["local/new"] < 20:
            answered += counted(await stage.send([f"task-{tasks + n}" for n in range(10)]))
            tasks += 10
            await asyncio.sleep(0.2)  # gateways follow within a second
        assert answered.keys() == {"vendor/old", "local/new"}
        await stage.until(lambda: stage.route().stage == "rolled_back")
        assert stage.route().reason.startswith("outcomes")
        with stage.store() as store:
            judged = [c.call for c in store.calls(alias=judge_alias("chat"), texts=True)]
        assert {c.tags["arm"] for c in judged} == {"candidate", "incumbent"}
        assert len({c.tags["judge_of"] for c in judged}) == len(judged) == len(stage.asked["court"])
        for request in stage.asked["court"]:  # nothing says whose answer it is
            assert request["messages"][0]["content"].startswith("You score one answer")
            assert "Is it helpful?" in request["messages"][0]["content"]
            assert not any(word in json.dumps(request) for word in ("vendor", "local", "old", "new", "arm"))


async def test_tools_asked_for_in_the_shadow_are_never_carried_out(tmp_path: Path) -> None:
    rollout = "replay_tasks = 0\nshadow_tasks = 6\nsettle_s = 0.2\nshares = [0.01]\ntasks = [1000]"
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "pay", "arguments": '{"to": "mallory", "url": "http://127.0.0.1:1/"}'},
    }
    scripts = {
        "vendor": lambda _: says("I would rather not pay."),
        "local": lambda _: {"role": "assistant", "content": None, "tool_calls": [call]},
        "court": lambda _: says(""),
    }
    parameters = {"type": "object", "properties": {"to": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "pay", "parameters": parameters}}]
    async with real_trial(tmp_path, rollout, scripts) as stage:
        stage.run("rollout", "start", "chat", "--to", "local/new")
        answers = await stage.send([f"pay {n}" for n in range(6)], tools=tools)
        await stage.until(lambda: stage.route().stage == "canary")
        with stage.store() as store:
            copies = [c.call for c in store.calls(alias=shadow_alias("chat"), texts=True)]
            calls = [c.call for c in store.calls(alias="chat")]
        # each copy was answered with a call of the tool, and that was the end of it
        assert len(copies) == len(stage.asked["local"]) == 6
        assert all(json.loads(c.response)["choices"][0]["message"]["tool_calls"] == [call] for c in copies)
        assert len(stage.asked["vendor"]) == len(calls) == 6
        assert not stage.asked["court"]
        asked = [*stage.asked["local"], *stage.asked["vendor"]]
        assert {m["role"] for request in asked for m in request["messages"]} == {"user"}
        assert all(request["tools"] == tools for request in stage.asked["local"])
        # and no client saw it
        assert counted(answers) == {"vendor/old": 6}
        assert all("tool_calls" not in each.message for each in answers)
