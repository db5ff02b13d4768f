"""A teacher that sees, from recorded pictures to a student proven on them: commands over real sockets."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import seeing
import torch
from click.testing import CliRunner
from openai import OpenAI

from understudy.child import running
from understudy.cli.compress import own as own_command
from understudy.cli.evaluate import evaluate, verify
from understudy.compress import checkpoint
from understudy.compress.corpus import Chat, collate, encode_chat, pack
from understudy.compress.decoder import outside_weights, states_of
from understudy.config import Serve
from understudy.serve.server import start

pytestmark = pytest.mark.e2e
COLORS = {"red": (200, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 200)}
OWN = "[own]\nparams = '0.8'\ncalibration_tokens = 1500\ndistil_tokens = 2000\nlearning_rate = 1e-3\n"
CONFIG = (
    "[store]\nurl = 'sqlite:///calls.db'\n[endpoints.vendor]\nbase_url = '{vendor}'\n"
    "[endpoints.local]\nbase_url = '{local}'\n[aliases.eyes]\nmodel = 'vendor/teacher'\n"
    "[evaluate]\nmargin = 0.3\nheld_out = 0.6\nconcurrency = 2\n" + OWN
)


def asked(number: int) -> tuple[Chat, str]:
    """A question about a picture that no other question has, and the right answer."""
    name = list(COLORS)[number % 3]
    shade = [max(part - number, 0) for part in COLORS[name]]
    url = seeing.picture((shade[0], shade[1], shade[2]), 12 + number % 9)
    shown = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [shown, {"type": "text", "text": "what is the color"}]}], name


def chat(number: int) -> Chat:
    question, answer = asked(number)
    return [*question, {"role": "assistant", "content": answer}]


def taught(folder: Path) -> Path:
    """An Idefics3 that has learnt three colours, and looks: its questions are all the same words."""
    eyes = seeing.processor_of("idefics3")
    model: Any = seeing.model_of("idefics3")
    batch = collate(pack([encode_chat(eyes, chat(n)) for n in range(100, 130)], 64))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with torch.enable_grad():
        for _ in range(40):
            logits = model.lm_head(states_of(model, batch)[batch.answers])
            loss = torch.nn.functional.cross_entropy(logits, batch.labels[batch.answers])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return checkpoint.save(model.eval(), eyes.tokenizer, folder, processor=eyes)


@contextmanager
def served(name: str, folder: Path) -> Iterator[str]:
    """Our serve with one model, in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    settings = Serve(listen="127.0.0.1:0", threads=1, context=128, models={name: str(folder)})
    server = asyncio.run_coroutine_threadsafe(start(settings, folder), loop).result(60)
    try:
        yield server.url
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def record(root: Path) -> None:
    """Send every question through a gateway, and say what would have been right."""
    with running(
        "up", ["up", "--listen", "127.0.0.1:0", "--config", str(root / "understudy.toml")], root / "up.log"
    ) as up:
        client = OpenAI(base_url=up["url"], api_key="none")
        for number in range(48):
            question, right = asked(number)
            sent: Any = {"model": "eyes", "messages": question, "temperature": 0, "max_tokens": 6}
            answer = client.chat.completions.with_raw_response.create(**sent)
            said = {"call": answer.headers["x-understudy-call"], "expected": right}
            urllib.request.urlopen(up["url"] + "/feedback", json.dumps(said).encode()).close()
        client.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, what it answered through a gateway, and a student made of both by `understudy own`."""
    folder = tmp_path_factory.mktemp("eyes")
    teacher = taught(folder / "teacher")
    with served("teacher", teacher) as url:
        (folder / "understudy.toml").write_text(CONFIG.format(vendor=url, local=url))
        record(folder)
    command = [
        sys.executable,
        "-m",
        "understudy",
        "own",
        "teacher",
        "--alias",
        "eyes",
        "--out",
        "own",
        "--json",
    ]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    (folder / "report.json").write_text(done.stdout)
    return folder


def test_own_learns_from_recorded_pictures(root: Path) -> None:
    report = json.loads((root / "report.json").read_text())
    assert report["parameters_after"] <= 0.81 * report["parameters_before"]
    assert report["after"]["answer_tokens"] > 30
    assert report["after"]["answer_agreement"] > 0.9
    teacher, student = (checkpoint.load(root / name).model for name in ("teacher", "own/checkpoint"))
    assert all(
        torch.equal(a, b) for a, b in zip(outside_weights(teacher), outside_weights(student), strict=True)
    )


def answers_of(proof: Path) -> str:
    """The candidate's evidence."""
    return next((proof / "evidence").glob("local-student-*.jsonl")).read_text()


def test_a_student_that_sees_is_proven_on_recorded_pictures(root: Path) -> None:
    """Every question has the same words: who does not get the picture is right in a third of them."""
    with served("student", root / "own" / "checkpoint") as url:
        (root / "understudy.toml").write_text(CONFIG.format(vendor=url, local=url))
        arguments = ["run", "--alias", "eyes", "--candidate", "local/student", "--out", str(root / "proof")]
        more = ["--config", str(root / "understudy.toml"), "--json"]
        done = CliRunner().invoke(evaluate, [*arguments, *more], catch_exceptions=False)
    told = json.loads(done.stdout)
    assert told["verdict"] == "PASS"
    assert told["candidates"][0]["proof"]["paid"] > 0
    calls = [json.loads(line) for line in answers_of(root / "proof").splitlines()[1:]]
    assert {call["reply"]["text"] for call in calls} == set(COLORS)
    assert {call["score"] for call in calls} == {1.0}
    assert CliRunner().invoke(verify, [str(root / "proof" / "certificate.json")]).exit_code == 0


def test_own_learns_from_a_file_of_chats_with_pictures(root: Path, tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat(n)}) for n in range(40)))
    (tmp_path / "understudy.toml").write_text(OWN)
    arguments = [str(root / "teacher"), "--data", "chats.jsonl", "--out", "own", "--tokens", "500", "--json"]
    done = CliRunner().invoke(own_command, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["after"]["answer_tokens"] > 20
    again = checkpoint.load(tmp_path / "own" / "checkpoint")
    assert (
        encode_chat(again.reader, chat(0)).tokens
        == encode_chat(seeing.processor_of("idefics3"), chat(0)).tokens
    )
