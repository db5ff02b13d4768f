"""An endpoint asked by a cluster's workers: as the plain client does, each answer once, nodes killed."""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import mortal
import pytest
from mortal import Server, needs_ray, serving

from understudy.cluster import Cluster, Crew, connect
from understudy.compress import answers
from understudy.config import Evaluate
from understudy.endpoint import Endpoint, HttpEndpoint
from understudy.errors import EndpointError
from understudy.evaluate.evidence import ProofHeader, file_name, read_lines
from understudy.evaluate.item import Call
from understudy.evaluate.replay import prove
from understudy.fleet import Fleet
from understudy.protocol import Usage
from understudy.traffic.sample import Exchange

NAME = "host/new"


class Here(Cluster):
    """Makes workers as a cluster would, of what survives being pickled, in this process."""

    def __init__(self) -> None:
        self.members: list[Any] = []

    def crew(self, kind: type[Any], item: Any) -> Crew:
        self.members = [_Member(kind(pickle.loads(pickle.dumps(item)))) for _ in range(2)]
        return Crew(self.members, lambda error: error, lambda member: None)


class _Member:
    def __init__(self, worker: Any) -> None:
        self.do, self.worker, self.count = self, worker, 0

    async def remote(self, item: Any) -> Any:
        self.count += 1
        return pickle.loads(pickle.dumps(await self.worker.do(pickle.loads(pickle.dumps(item)))))


def client(server: Server) -> HttpEndpoint:
    return HttpEndpoint(NAME, server.url, "new", api_key="secret")


def question(number: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"q{number}"}]}


async def test_it_says_what_the_plain_client_says_and_shares_the_questions():
    with serving() as server:
        there = Here()
        async with client(server) as plain, Fleet(client(server), cluster=there) as fleet:
            assert fleet.name == plain.name
            one, two = await asyncio.gather(*(fleet.chat(question(n)) for n in (1, 2)))
            assert (one.text, two.text) == ("odd", "even")
            assert (await plain.chat(question(1))).body == one.body
            with pytest.raises(EndpointError, match="answered 400") as refused:
                await fleet.chat({"messages": [{"role": "user", "content": "what"}]})
            assert refused.value.status == 400
        assert [member.count for member in there.members] == [2, 1]
        for member in there.members:
            await member.worker._client.__aexit__(None, None, None)


# on a cluster


def traffic(count: int) -> list[Exchange]:
    """Held-out questions that the incumbent got right two times out of three."""
    return [_exchange(n) for n in range(count)]


def _exchange(number: int) -> Exchange:
    right = "odd" if number % 2 else "even"
    said = right if number % 3 else "none"
    choice = {"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
    return Exchange(
        key=f"key{number:03}", at=float(number), alias="assistant", target="host/old",
        request=question(number), body={"choices": [choice]}, answer=said, expected=right, grades={},
        task_id="", tags={}, prompt_hash=f"h{number}", usage=Usage(prompt_tokens=5, completion_tokens=1),
        status=200, total_s=0.1, ttft_s=0.1,
    )  # fmt: skip


async def generate(endpoint: Endpoint, folder: Path) -> dict[str, str]:
    """Answers by key, each of which the file must have once."""
    wanted = answers.wanted(NAME, [question(n) for n in range(150)], 1)
    await answers.sample(endpoint, wanted, folder / "answers.jsonl", concurrency=16)
    lines = (folder / "answers.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert sorted(one["key"] for one in found) == sorted(one.key for one in wanted)
    return {one["key"]: one["message"]["content"] for one in found}


async def replay(endpoint: Endpoint, folder: Path) -> tuple[str, int, float | None, float]:
    """The verdict and what it rests on; the evidence must have every call once."""
    settings = Evaluate(margin=0.03, concurrency=16, seed=3)
    proof = await prove(endpoint, traffic(150), settings, evidence=folder)
    calls = read_lines(folder / file_name(NAME), ProofHeader, Call).records
    assert len({call.key for call in calls}) == len(calls)
    assert all(call.score == 1 and not call.error for call in calls)
    return proof.verdict, proof.calls, proof.e_pass, proof.difference


@needs_ray
@pytest.mark.e2e
async def test_nodes_die_and_every_answer_is_there_once(tmp_path: Path):
    """One of two nodes while answers are generated, its successor during a replay: the same as without a
    cluster, and only what was under way at that moment is asked again."""
    with serving() as server:
        async with client(server) as plain:
            wanted = [await task(plain, tmp_path / f"plain{n}") for n, task in enumerate((generate, replay))]
        with mortal.cluster() as nodes, connect(nodes.address) as cluster:
            for place, task in enumerate((generate, replay)):
                node = mortal.another(nodes)
                server.delay_s = 0.4
                server.at = {(44, 20)[place]: partial(mortal.die, nodes, node)}
                assert await on(cluster, server, task, tmp_path / f"ray{place}") == wanted[place]
                assert not server.at
                again = server.asked.total() - len(server.asked)
                assert 1 <= again <= 16, server.asked.most_common(3)


async def on(
    cluster: Cluster, server: Server, task: Callable[[Endpoint, Path], Awaitable[Any]], folder: Path
) -> Any:
    async with Fleet(client(server), cluster=cluster) as fleet:
        await asyncio.gather(*(fleet.chat(question(n)) for n in range(900, 904)))  # both workers are there
        server.asked.clear()
        return await task(fleet, folder)
