"""Every command with `--ray`, run as a user runs it, against a cluster of two nodes of which one dies.

What comes out is held against the same command without a cluster.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any

import mortal
import pytest
import stage
import torch
from aiohttp import web
from click.testing import CliRunner
from mortal import Server, needs_ray, serving
from prompt_logprobs import Vllm
from transformers import LlamaConfig, LlamaForCausalLM

from understudy.cli.main import main
from understudy.compress import checkpoint
from understudy.traffic.record import Call, Feedback, new_key
from understudy.traffic.store import open_store

pytestmark = [needs_ray, pytest.mark.e2e]
AT_ONCE = 16


@pytest.fixture(scope="module")
def nodes() -> Generator[Any]:
    with mortal.cluster() as found:
        yield found


class Both(Server):
    """Chats, and a tiny model's `prompt_logprobs`."""

    def __init__(self, vllm: Vllm) -> None:
        super().__init__()
        self.vllm = vllm

    async def complete(self, request: web.Request) -> web.Response:
        await self.noted(str((await request.json())["prompt"]))
        return await self.vllm.respond(request)


@pytest.fixture
def server(tmp_path: Path) -> Generator[Both]:
    """Beside it a teacher, a student, texts and a config, in the test's own folder."""
    words = stage.tokenizer()
    models = [model(len(words), seed) for seed in (0, 1)]
    for name, each in zip(("teacher", "student"), models, strict=True):
        checkpoint.save(each, words, tmp_path / name)
    chats = [
        [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "even"}] for n in range(90)
    ]
    lines = [json.dumps({"messages": chat}) for chat in chats]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    with serving(Both(Vllm(models[0], words))) as found:
        (tmp_path / "understudy.toml").write_text(
            f"[endpoints.old]\nbase_url = '{found.url}'\n[endpoints.new]\nbase_url = '{found.url}'\n"
            f"[aliases.assistant]\nmodel = 'old/m'\n"
            f"[evaluate]\nmargin = 0.03\nheld_out = 0.9\nconcurrency = {AT_ONCE}\n"
        )
        yield found  # pyright: ignore[reportReturnType]


def chat(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": "even"}]


def model(vocabulary: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)  # two that say different things
    return made


def plainly(*arguments: str) -> Any:
    ran = CliRunner().invoke(main, [*arguments, "--json"], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    return json.loads(ran.stdout)


def on(nodes: Any, *arguments: str) -> Any:
    """As a process of its own, from the same folder."""
    told = [*arguments, "--ray", nodes.address, "--json"]
    # a default filter: pytest turns warnings into errors, Ray's own workers would inherit it
    environment = os.environ | {"PYTHONWARNINGS": "default"}
    ran = subprocess.run(
        [sys.executable, "-m", "understudy", *told],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    return json.loads(ran.stdout)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def weights(name: str) -> bytes:
    return (Path(name) / "model.safetensors").read_bytes()


def asked_again(server: Server) -> int:
    return server.asked.total() - len(server.asked)


def test_distil_from_answers_that_a_cluster_asks_for(nodes: Any, server: Both):
    """`distil recorded --generate`: every answer once, the same healed weights, half of the calls twice."""
    command = ("distil", "recorded", "student", "--data", "chats.jsonl", "--generate", "new/m", "--yes",
               "--tokens", "1000", "--learning-rate", "1e-3")  # fmt: skip
    plain = plainly(*command, "--out", "plain")
    node = mortal.another(nodes)
    with server.held(AT_ONCE, partial(mortal.die, nodes, node)):
        spread = on(nodes, *command, "--out", "spread")
    assert 1 <= asked_again(server) <= AT_ONCE
    assert answers("spread") == answers("plain")
    assert weights("spread") == weights("plain") != weights("student")
    assert [check["kl"] for check in spread["checks"]] == [check["kl"] for check in plain["checks"]]


def answers(name: str) -> dict[str, str]:
    """Of a run's file by key; every key is there once."""
    found = [json.loads(line) for line in Path(f"{name}.answers.jsonl").read_text().splitlines()]
    by_key = {one["key"]: one["message"]["content"] for one in found}
    assert len(by_key) == len(found) == 90
    return by_key


def test_distil_from_a_vllm_teacher_that_a_cluster_asks(nodes: Any, server: Both):
    """`distil ENDPOINT/MODEL`: the same targets, byte by byte, and the same healed weights."""
    command = ("distil", "new/large", "student", "--data", "chats.jsonl", "--yes", "--tokens", "1000",
               "--learning-rate", "1e-3")  # fmt: skip
    plainly(*command, "--out", "plain")
    node = mortal.another(nodes)
    with server.held(AT_ONCE, partial(mortal.die, nodes, node)):
        on(nodes, *command, "--out", "spread")
    assert 1 <= asked_again(server) <= AT_ONCE
    assert files(Path("spread.targets")) == files(Path("plain.targets"))
    assert weights("spread") == weights("plain") != weights("student")


def test_capture_and_distil_on_a_cluster(nodes: Any, server: Both):
    """`capture --ray` while a node dies, `distil --ray` while a worker does: the plain commands' bytes."""
    capture = ("capture", "teacher", "--data", "chats.jsonl", "--shard-tokens", "60", "--out")
    plain = plainly(*capture, "plain.targets")
    node = mortal.another(nodes)
    with on_errand(node, partial(mortal.die, nodes, node)):
        spread = on(nodes, *capture, "spread.targets")
    assert plain["made"] == spread["made"] > 10
    assert files(Path("spread.targets")) == files(Path("plain.targets"))
    distil = ("distil", "teacher", "student", "--data", "chats.jsonl", "--tokens", "4000",
              "--learning-rate", "5e-3", "--out")  # fmt: skip
    plainly(*capture[:4], "--out", "whole.targets")
    plainly(*distil, "plain", "--targets", "whole.targets")
    with on_errand(nodes.head_node, lambda: [os.kill(pid, 9) for pid in busy(nodes.head_node)]):
        on(nodes, *distil, "healed")
    assert weights("healed") == weights("plain") != weights("student")


def busy(node: Any) -> list[int]:
    """A node's workers that make a shard."""
    titles = {pid: Path(f"/proc/{pid}/cmdline") for pid in mortal.workers(node)}
    return [pid for pid, path in titles.items() if path.exists() and b"ray::make_there" in path.read_bytes()]


class on_errand:
    """Does something once as soon as one of a node's workers makes a shard; fails if none ever did."""

    def __init__(self, node: Any, act: Any) -> None:
        self._node, self._act, self._done = node, act, False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._over.is_set():
            if busy(self._node):
                self._act()
                self._done = True
                return
            time.sleep(0.02)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(60)
        assert self._done, "no worker of the node made a shard"


def test_evaluate_run_on_a_cluster(nodes: Any, server: Both):
    """The same verdict from the same calls, each once in the evidence, and a certificate that verifies."""
    record(Path.cwd(), 160)
    command = ("evaluate", "run", "--alias", "assistant", "--candidate", "new/m")
    plain = plainly(*command, "--out", "plain")["candidates"][0]["proof"]
    node = mortal.another(nodes)
    with server.held(AT_ONCE, partial(mortal.die, nodes, node)):
        spread = on(nodes, *command, "--out", "spread")["candidates"][0]["proof"]
    assert 1 <= asked_again(server) <= AT_ONCE
    for found in ("verdict", "calls", "e_pass", "e_fail", "difference", "interval"):
        assert spread[found] == plain[found], found
    assert plain["verdict"] == "PASS"
    assert CliRunner().invoke(main, ["verify", "spread/certificate.json"]).exit_code == 0


def record(folder: Path, count: int) -> None:
    """Calls of which the incumbent got two of three right."""
    with open_store("sqlite:///understudy.db", folder) as store:
        store.insert([record for n in range(count) for record in recorded(n)], "segment", 1)


def recorded(n: int) -> list[Call | Feedback]:
    right = "odd" if n % 2 else "even"
    request = {"model": "assistant", "messages": [{"role": "user", "content": f"q{n}"}]}
    message = {"role": "assistant", "content": right if n % 3 else "none"}
    body = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}}  # fmt: skip
    key = new_key()
    call = Call(
        key=key, at=1.79e9 + n, route="chat.completions", alias="assistant", target="old/m", status=200,
        request=json.dumps(request).encode(), response=json.dumps(body).encode(),
    )  # fmt: skip
    return [call, Feedback(key=new_key(), call=key, at=1.79e9 + n, expected=right)]
