"""What recording costs after the answer: indexing speed, bytes stored for each byte of new text, kill -9.

Texts are drawn from a vocabulary whose words fall off as in any language (Zipf), so that they compress about
as prose does; how far is printed, because a store of well compressible texts is easily small. New text is
what nobody had said before: the user's new message and the answer, without JSON, headers or ids.

`--kills N` sets how often the gateway is killed with SIGKILL at a random moment under load in strict mode
(the default fits an ordinary run; 1,000 take about ten minutes), a quarter as often in buffered mode.
In strict mode the bench fails when an acknowledged call is missing, doubled or damaged; in buffered mode it
counts what was lost. It ignores what the gateway costs before the answer (gateway.py).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from itertools import accumulate
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, cast

import httptools
import uvloop

from gateway import Bench, request, rss_mib
from understudy.config import Config, parse
from understudy.gateway.app import start
from understudy.protocol import Usage
from understudy.traffic.indexer import Indexer
from understudy.traffic.record import Attempt, Call, new_key
from understudy.traffic.segments import Fault, SegmentWriter, read_segment, segment_files
from understudy.traffic.store import open_store

HERE = Path(__file__).parent
SYSTEM = "You are a careful assistant of a shop for garden tools. Answer in one paragraph. " * 8
TURNS = 10
ASKED, ANSWERED = 80, 120
"""Words of a message and of an answer."""
STREAMED = 29


class Words:
    """Prose-like text from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        letters, weights = (
            "etaoinshrdlucmfwypvbgk",
            [12, 9, 8, 8, 7, 7, 6, 6, 6, 4, 4, 3, 3, 2, 2, 2, 2, 2, 1, 1, 1, 1],
        )
        lengths = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
        self.vocabulary = [
            "".join(self.random.choices(letters, weights, k=self.random.choice(lengths)))
            for _ in range(20_000)
        ]
        self.cumulative = list(accumulate(1 / (rank + 3) for rank in range(len(self.vocabulary))))

    def text(self, words: int) -> str:
        chosen = self.random.choices(self.vocabulary, cum_weights=self.cumulative, k=words)
        return " ".join(chosen).capitalize() + "."


class Made(NamedTuple):
    """A recorded call and the text in it that is new."""

    call: Call
    new_text: str


def completion(words: Words, text: str) -> bytes:
    """An answer as OpenAI writes it, with an id that nobody can compress."""
    message = {"role": "assistant", "content": text, "refusal": None, "annotations": []}
    body = {
        "id": f"chatcmpl-{_noise(words)}",
        "object": "chat.completion",
        "created": 1_790_000_000 + words.random.randrange(10**6),
        "model": "gpt-4.1-2025-04-14",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 300, "completion_tokens": 160, "total_tokens": 460},
        "service_tier": "default",
        "system_fingerprint": "fp_799e4ca3f1",
    }
    return json.dumps(body, indent=2).encode()


def stream(words: Words, text: str) -> bytes:
    """The same answer as server-sent events, a word in each."""
    base: dict[str, Any] = {"id": f"chatcmpl-{_noise(words)}", "object": "chat.completion.chunk"}
    base |= {"created": 1_790_000_000 + words.random.randrange(10**6), "model": "gpt-4.1-2025-04-14"}
    pieces = [word if place == 0 else f" {word}" for place, word in enumerate(text.split(" "))]
    deltas: list[dict[str, Any]] = [
        {"role": "assistant", "content": ""},
        *({"content": p} for p in pieces),
        {},
    ]
    chunks = [
        {
            **base,
            "choices": [{"index": 0, "delta": d, "logprobs": None, "finish_reason": None if d else "stop"}],
        }
        for d in deltas
    ]
    chunks.append({**base, "choices": [], "usage": {"prompt_tokens": 99, "completion_tokens": len(pieces)}})
    events = [f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n" for chunk in chunks]
    return "".join([*events, "data: [DONE]\n\n"]).encode()


def _noise(words: Words) -> str:
    return "".join(
        words.random.choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", k=29)
    )


def call_of(at: float, messages: list[dict[str, str]], answer: bytes, *, streamed: bool = False) -> Call:
    request: dict[str, Any] = {"model": "assistant", "messages": messages, "temperature": 0.2}
    if streamed:
        request |= {"stream": True, "stream_options": {"include_usage": True}}
    target = "openai/gpt-4.1"
    return Call(
        key=new_key(),
        at=at,
        route="chat.completions",
        alias="assistant",
        target=target,
        status=200,
        stream=streamed,
        request=json.dumps(request, ensure_ascii=False, separators=(",", ":")).encode(),
        response=answer,
        attempts=[Attempt(target=target, status=200, billed="yes", started=at + 1e-4, ended=at + 1.3)],
        answered_by="gpt-4.1-2025-04-14",
        usage=Usage(prompt_tokens=300, completion_tokens=160),
        ttft_s=0.4123 if streamed else 1.2999,
        total_s=1.3001,
        finish_reason="stop",
    )


def singles(words: Words, count: int) -> Iterator[Made]:
    for number in range(count):
        asked, said = words.text(ASKED), words.text(ANSWERED)
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": asked}]
        yield Made(call_of(1.79e9 + number, messages, completion(words, said)), asked + said)


def chats(words: Words, count: int) -> Iterator[Made]:
    """Conversations of ten turns; each answer comes back as the next turn's message."""
    for number in range(count // TURNS):
        messages = [{"role": "system", "content": SYSTEM}]
        for turn in range(TURNS):
            asked, said = words.text(ASKED), words.text(ANSWERED)
            messages = [*messages, {"role": "user", "content": asked}]
            yield Made(call_of(1.79e9 + number * 99 + turn, messages, completion(words, said)), asked + said)
            messages = [*messages, {"role": "assistant", "content": said}]


def streams(words: Words, count: int) -> Iterator[Made]:
    for number in range(count):
        asked, said = words.text(ASKED // 2), words.text(STREAMED)
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": asked}]
        yield Made(call_of(1.79e9 + number, messages, stream(words, said), streamed=True), asked + said)


def streamed_chats(words: Words, count: int) -> Iterator[Made]:
    for made in chats(words, count):
        text = json.loads(made.call.response)["choices"][0]["message"]["content"]
        at, messages = made.call.at, json.loads(made.call.request)["messages"]
        yield Made(call_of(at, messages, stream(words, text), streamed=True), made.new_text)


KINDS: dict[str, Callable[[Words, int], Iterator[Made]]] = {
    "single turns": singles,
    "chats of ten turns": chats,
    "short streams (31 events)": streams,
    "chats of ten turns, streamed": streamed_chats,
}


def stored(folder: Path, make: Callable[[Words, int], Iterator[Made]], count: int) -> str:
    """One row: calls indexed in a second of CPU, bytes stored per byte of new text."""
    folder.mkdir()
    made = list(make(Words(7), count))
    writer = SegmentWriter(folder / "segments", strict=False, on_full="refuse")
    for one in made:
        writer.append(one.call)
    writer.close()
    begun = time.process_time()
    with open_store("sqlite:///understudy.db", folder) as store:
        Indexer(folder / "segments", store).run_once()
        spent = time.process_time() - begun
        for sample in random.Random(1).sample(made, min(200, len(made))):
            kept = store.call(sample.call.key)
            assert kept is not None
            assert (kept.call.request, kept.call.response) == (sample.call.request, sample.call.response)
    size = (folder / "understudy.db").stat().st_size
    text = sum(len(one.new_text.encode()) for one in made)
    alone = sum(len(zlib.compress(one.new_text.encode(), 6)) for one in made)
    return f"{len(made) / spent:,.0f} | {text / len(made):,.0f} | {size / text:.2f} | {alone / text:.2f}"


def storage_table(folder: Path, count: int) -> list[str]:
    rows = [
        "| calls | indexed per CPU-second (wanted: 5,000 single turns) | bytes of new text | "
        "stored per byte of it (at most 1.2) | deflated alone |",
        "| --- | --- | --- | --- | --- |",
    ]
    for number, (name, make) in enumerate(KINDS.items()):
        print(f"storage: {name} …", file=sys.stderr, flush=True)
        rows.append(f"| {count:,} {name} | {stored(folder / f'storage{number}', make, count)} |")
    return rows


FORK = multiprocessing.get_context("fork")
"""A gateway to kill costs a fork, not a second of imports."""


def index_and_tell(folder: Path, pipe: Connection) -> None:
    """Index a folder; tell the seconds it took (CPU, wall) and how much memory it had on the way, in MiB."""
    sizes: list[float] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            sizes.append(rss_mib(os.getpid()))

    threading.Thread(target=watch).start()
    with open_store("sqlite:///understudy.db", folder) as store:
        cpu, wall = time.process_time(), time.perf_counter()
        Indexer(folder / "segments", store).run_once()
        pipe.send((time.process_time() - cpu, time.perf_counter() - wall, sizes))
    over.set()


def backlog_line(folder: Path, count: int) -> str:
    """An indexer that starts with a backlog: how fast it catches up, and whether its memory grows."""
    print(f"backlog of {count:,} …", file=sys.stderr, flush=True)
    folder.mkdir()
    writer = SegmentWriter(folder / "segments", strict=False, on_full="refuse")
    for made in singles(Words(7), count):
        writer.append(made.call)
    writer.close()
    ours, theirs = FORK.Pipe()
    child = FORK.Process(target=index_and_tell, args=(folder, theirs))
    child.start()
    cpu, wall, sizes = ours.recv()
    child.join()
    tenth = sizes[len(sizes) // 10]
    return (
        f"A backlog of {count:,} single turns ({writer.counters.bytes / 2**20:,.0f} MiB) is indexed at "
        f"{count / cpu:,.0f} calls per CPU-second ({count / wall:,.0f}/s on this machine; wanted: 5,000). "
        f"The indexer has {tenth:.1f} MiB after a tenth of the time and {max(sizes):.1f} MiB at most; "
        "how far it is behind is the gateway's gauge `understudy_index_lag_bytes`."
    )


CLIENTS = 8
KILL_CONFIG = """
[gateway]
listen = "127.0.0.1:0"
record = "{record}"
[endpoints.local]
base_url = "http://127.0.0.1:{port}/v1"
[aliases.assistant]
model = "local/a-model"
"""


def serve_gateway(config: Config, pipe: Connection) -> None:
    async def main() -> None:
        pipe.send((await start(config)).port)
        await asyncio.Event().wait()

    uvloop.run(main())


class Asker(asyncio.Protocol):
    """Asks again and again over one connection; notes the call of each answer that came whole."""

    def __init__(self, acknowledged: int, number: int) -> None:
        self.acknowledged = acknowledged
        self.wire = request("stream" if number % 2 else "json", "unused")
        self.gone = asyncio.get_running_loop().create_future()
        self.parser = httptools.HttpResponseParser(self)
        self.key = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self.wire)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"x-understudy-call":
            self.key = value

    def on_message_complete(self) -> None:
        os.write(self.acknowledged, self.key + b"\n")
        self.transport.write(self.wire)

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone.set_result(None)


def ask(port: int, acknowledged: Path) -> None:
    """Load until the gateway is gone."""

    async def main() -> None:
        file = os.open(acknowledged, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            pairs = [
                await loop.create_connection(lambda n=n: Asker(file, n), "127.0.0.1", port)
                for n in range(CLIENTS)
            ]
            await asyncio.gather(*(asker.gone for _, asker in pairs))

    uvloop.run(main())


def index_for_ever(config: Config) -> None:
    with open_store(config.store.url, config.path(".")) as store:
        indexer = Indexer(config.path(config.store.segments), store)
        while True:
            indexer.run_once()


def kill_once(config: Config, acknowledged: Path, chance: random.Random) -> None:
    """A gateway, an indexer and clients; at a random moment the first two are killed."""
    ours, theirs = FORK.Pipe()
    gateway = FORK.Process(target=serve_gateway, args=(config, theirs))
    indexer = FORK.Process(target=index_for_ever, args=(config,))
    gateway.start()
    clients = FORK.Process(target=ask, args=(ours.recv(), acknowledged))
    clients.start()
    indexer.start()
    time.sleep(chance.uniform(0.02, 0.25))
    for process in chance.sample([gateway, indexer], 2):
        os.kill(process.pid or 0, signal.SIGKILL)
    for process in (gateway, indexer, clients):
        process.join()


class Aftermath(NamedTuple):
    """What became of the calls of a series of kills."""

    acknowledged: int
    stored: int
    missing: int
    """Acknowledged, and not in the store."""
    doubled: int
    """In the log more than once."""
    damaged: int
    """Stretches of the log that are no record."""


def aftermath(config: Config, acknowledged: Path) -> Aftermath:
    segments = config.path(config.store.segments)
    records = [frame.record for path in segment_files(segments) for frame in read_segment(path)]
    logged = [record.key for record in records if isinstance(record, Call)]
    with open_store(config.store.url, config.path(".")) as store:
        Indexer(segments, store).run_once()
        kept = [stored.call.key for stored in store.calls()]
    told = set(acknowledged.read_text().split())
    doubled = len(logged) - len(set(logged)) + len(kept) - len(set(kept))
    damaged = sum(isinstance(record, Fault) for record in records)
    return Aftermath(len(told), len(kept), len(told - set(kept)), doubled, damaged)


def kill_table(folder: Path, kills: int, seed: int) -> list[str]:
    rows = [
        "| record | kills | calls acknowledged | in the store | missing | doubled | damaged |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    upstream = Bench()
    for record in ("strict", "buffered"):
        print(f"kill -9 up to {kills} times, record = {record} …", file=sys.stderr, flush=True)
        place, chance = folder / record, random.Random(seed)
        place.mkdir()
        config = parse(KILL_CONFIG.format(record=record, port=upstream.upstream_port), "bench", place)
        times = kills if record == "strict" else max(1, kills // 4)
        for _ in range(times):
            kill_once(config, place / "acknowledged", chance)
        found = aftermath(config, place / "acknowledged")
        if record == "strict" and (found.missing or found.doubled or found.damaged):
            raise SystemExit(f"strict mode lost or damaged records: {found}")
        rows.append(f"| {record} | {times:,} | " + " | ".join(f"{count:,}" for count in found) + " |")
    return rows


def fuzz_line(streams: int) -> str:
    """The test of the relay at full length: the same code, more streams."""
    print(f"{streams:,} fuzzed streams …", file=sys.stderr, flush=True)
    test = HERE.parent / "tests" / "gateway" / "test_gateway_streams.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)],
        env={**os.environ, "UNDERSTUDY_FUZZED_STREAMS": str(streams)},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stdout)
    return (
        f"{streams:,} fuzzed streams came through the gateway byte for byte and are recorded byte for byte."
    )


def loss_window(folder: Path, seconds: float = 5.0) -> str:
    """How old a record not yet on disk gets in buffered mode: what a machine that stops would lose."""
    writer = SegmentWriter(folder / "window", strict=False, on_full="refuse")
    call, ages = next(singles(Words(1), 1)).call, list[float]()
    end, oldest, syncs = time.monotonic() + seconds, time.monotonic(), 0
    while (now := time.monotonic()) < end:
        writer.append(call)
        if writer.counters.syncs != syncs:
            ages.append(now - oldest)
            syncs, oldest = writer.counters.syncs, now
        time.sleep(0.0005)
    writer.close()
    ages.sort()
    return (
        f"Buffered mode under steady load, {len(ages)} syncs: the oldest record that was not on disk yet was "
        f"{ages[len(ages) // 2] * 1e3:.0f} ms old in the median and {ages[-1] * 1e3:.0f} ms at most."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=10_000, help="calls of each kind")
    parser.add_argument("--streams", type=int, default=10_000, help="fuzzed streams through the gateway")
    parser.add_argument("--kills", type=int, default=200, help="kills in strict mode")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = [
            storage_table(folder, options.calls),
            [backlog_line(folder / "backlog", options.calls * 5)],
            [fuzz_line(options.streams)],
            [f"`kill -9` at a random moment under load, gateway and indexer, seed {seed}:"],
            kill_table(folder, options.kills, seed),
            [loss_window(folder)],
        ]
    print("\n\n".join("\n".join(part) for part in parts))


if __name__ == "__main__":
    main()
