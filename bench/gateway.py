"""What the gateway costs beside its peers: CPU per request, added latency, memory. Prints Markdown.

Three processes besides this one: a fake upstream and a load generator, both raw protocols so that they cost
little, and between them `understudy up` with keys, routing and durable recording on, or LiteLLM's proxy with
a key and no recording. TensorZero runs embedded in a process of its own (tensorzero_peer.py), not recording.
CPU is the gateway process's own (utime + stime of /proc, all its threads); the indexer, a process of its own,
is told apart. Latency is measured at a fixed rate from the moment a request was due, with and without us.

A bare relay on the same event loop shows which part is the kernel's. All are asked for the same three things:
a JSON answer, a stream whose 31 events come in one write, and one whose events come two milliseconds apart.

`--requests N` sets the length of the memory run. Peers come from an
environment of their own, `--peers FOLDER` (bench/gateway-peers.txt says which): they must not change what we
are installed with. One that is not there is named as missing. It ignores what recording costs afterwards
(recording.py).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, cast

import uvloop

from understudy.traffic.indexer import Indexer
from understudy.traffic.store import open_store

HERE = Path(__file__).parent
SPAWN = multiprocessing.get_context("spawn")
TICKS = os.sysconf("SC_CLK_TCK")
PATH = "/v1/chat/completions"
EVENTS = 31
PACE_S = 0.002

CONFIG = """
[gateway]
listen = "127.0.0.1:0"
record = "{record}"
require_key = true
[endpoints.local]
base_url = "http://127.0.0.1:{port}/v1"
api_key = "env:BENCH_KEY"
[aliases.assistant]
model = "local/a-model"
"""


LITELLM = """
model_list:
  - model_name: assistant
    litellm_params: {{model: openai/a-model, api_base: "http://127.0.0.1:{port}/v1", api_key: sk-bench}}
general_settings: {{master_key: sk-client}}
"""


def request(kind: str, secret: str) -> bytes:
    """A chat request of about 1.3 KB with the headers an SDK sends."""
    messages = [
        {"role": "system", "content": "You answer briefly. " * 20},
        {"role": "user", "content": "What is the capital of France, and why?\n" * 20},
    ]
    body: dict[str, Any] = {"model": "assistant", "messages": messages, "temperature": 0.2}
    if kind != "json":
        body |= {"stream": True, "stream_options": {"include_usage": True}, "user": kind}
    raw = json.dumps(body).encode()
    head = [
        f"POST {PATH} HTTP/1.1",
        "Host: 127.0.0.1",
        "Accept: application/json",
        "Accept-Encoding: gzip, deflate",
        "Content-Type: application/json",
        "User-Agent: OpenAI/Python 2.0.0",
        "X-Stainless-Lang: python",
        "X-Stainless-OS: Linux",
        f"Authorization: Bearer {secret}",
        f"Content-Length: {len(raw)}",
    ]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + raw


def json_answer() -> bytes:
    body = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "a-model-2026-01-01",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Paris, since 987. " * 20},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 300, "completion_tokens": 100, "total_tokens": 400},
    }
    raw = json.dumps(body).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
        len(raw),
        raw,
    )


def stream_answer() -> list[bytes]:
    """The head, 31 events (the last two end the answer and give usage), the end; each as it is sent."""
    base: dict[str, Any] = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1}
    base |= {"model": "a-model-2026-01-01", "system_fingerprint": "fp_1"}
    said = [{**base, "choices": [{"index": 0, "delta": {"content": " Paris"}}]} for _ in range(EVENTS - 2)]
    said.append({**base, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    usage = {"prompt_tokens": 300, "completion_tokens": EVENTS - 2, "total_tokens": 300 + EVENTS - 2}
    said.append({**base, "choices": [], "usage": usage})
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    events = [b"data: %b\n\n" % json.dumps(event).encode() for event in said]
    chunks = [b"%x\r\n%b\r\n" % (len(event), event) for event in events]
    done = b"data: [DONE]\n\n"
    chunks[-1] += b"%x\r\n%b\r\n0\r\n\r\n" % (len(done), done)
    return [head + chunks[0], *chunks[1:]]


class FakeUpstream(asyncio.Protocol):
    """Answers each request at once; streams either in one write or an event every two milliseconds."""

    def __init__(self) -> None:
        self.buffer = b""
        self.answer = json_answer()
        self.events = stream_answer()
        self.whole = b"".join(self.events)
        self.loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: *(\d+)", head)  # a peer's health check has none
        if not found or (length and len(rest) < int(length[1])):
            return
        self.buffer = b""
        if b'"paced"' in rest:
            self.send(0)
        else:
            streams = b'"stream":true' in rest.replace(b" ", b"")
            self.transport.write(self.whole if streams else self.answer)

    def send(self, place: int) -> None:
        if not self.transport.is_closing():
            self.transport.write(self.events[place])
            if place + 1 < len(self.events):
                self.loop.call_later(PACE_S, self.send, place + 1)


def serve_upstream(pipe: Connection) -> None:
    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(FakeUpstream, "127.0.0.1", 0, backlog=1024)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    uvloop.run(main())


class Running(NamedTuple):
    """A gateway under test."""

    port: int
    pid: int
    secret: str


class Relay(asyncio.Protocol):
    """Passes every byte on and reads none: what any gateway on this loop costs at least."""

    def __init__(self, other: asyncio.Transport | None, upstream_port: int) -> None:
        self.other = other
        self.upstream_port = upstream_port
        self.early = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        if self.other is None:
            self.connecting = asyncio.get_running_loop().create_task(self.connect())

    async def connect(self) -> None:
        def back() -> Relay:
            return Relay(self.transport, self.upstream_port)

        made = await asyncio.get_running_loop().create_connection(back, "127.0.0.1", self.upstream_port)
        self.other = made[0]
        self.other.write(self.early)

    def data_received(self, data: bytes) -> None:
        if self.other is None:
            self.early += data
        else:
            self.other.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other is not None:
            self.other.close()


def serve_relay(upstream_port: int, pipe: Connection) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Relay(None, upstream_port), "127.0.0.1", 0, backlog=1024)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    uvloop.run(main())


@contextmanager
def bare_relay(upstream_port: int) -> Generator[Running]:
    """The relay in a process of its own."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=serve_relay, args=(upstream_port, theirs), daemon=True)
    process.start()
    try:
        yield Running(ours.recv(), process.pid or 0, "sk-client")
    finally:
        process.terminate()
        process.join()


class Load(NamedTuple):
    """An order for the load generator."""

    port: int
    kind: str
    """json, stream (one write) or paced (an event every two milliseconds)."""
    calls: int
    connections: int
    rate: float
    """Requests per second; 0: as fast as they are answered."""
    secret: str = "sk-client"


class Client(asyncio.Protocol):
    """One connection; calls ``done`` with the seconds since the request was due."""

    def __init__(self, load: Load, done: Callable[[Client, float], None]) -> None:
        kind = load.kind
        self.wire = request(kind, load.secret)
        # a stream that came in one piece is given its length, so it may end without a last chunk
        self.ends = (b"\n0\r\n\r\n", b"[DONE]\n\n") if kind != "json" else (b"}",)
        self.done = done
        self.due = 0.0
        self.tail = b""
        self.total = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def send(self, due: float) -> None:
        self.due = due
        self.total = 0
        self.transport.write(self.wire)

    def data_received(self, data: bytes) -> None:
        self.total += len(data)
        self.tail = (self.tail + data)[-16:]
        if self.tail.endswith(self.ends):
            self.tail = b""
            self.done(self, time.perf_counter() - self.due)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.due:
            raise ConnectionError("the connection was lost in mid-run")


async def drive(load: Load) -> list[float]:
    """Latencies in seconds, in order of completion."""
    loop = asyncio.get_running_loop()
    finished = loop.create_future()
    latencies: list[float] = []
    idle: list[Client] = []
    due: list[float] = []
    sent = 0

    def done(client: Client, seconds: float) -> None:
        nonlocal sent
        latencies.append(seconds)
        client.due = 0.0
        if len(latencies) == load.calls:
            finished.set_result(None)
        elif load.rate == 0 and sent < load.calls:
            sent += 1
            client.send(time.perf_counter())
        elif due:
            client.send(due.pop(0))
        else:
            idle.append(client)

    for _ in range(load.connections):
        _, client = await loop.create_connection(lambda: Client(load, done), "127.0.0.1", load.port)
        idle.append(client)
    if load.rate == 0:
        sent = load.connections
        for client in [idle.pop() for _ in range(load.connections)]:
            client.send(time.perf_counter())
    else:
        begun = time.perf_counter()
        for number in range(load.calls):
            moment = begun + number / load.rate
            await asyncio.sleep(max(0.0, moment - time.perf_counter()))
            if idle:
                idle.pop().send(moment)
            else:
                due.append(moment)
    await finished
    return latencies


def generate(pipe: Connection) -> None:
    """The load generator's process: takes orders, gives latencies, until told None."""
    while (load := pipe.recv()) is not None:
        pipe.send(uvloop.run(drive(load)))


def cpu_s(pid: int) -> float:
    """CPU seconds of a process, its threads included, its children not."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def rss_mib(pid: int) -> float:
    line = next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def indexer_of(pid: int) -> int:
    """The gateway's child that indexes: the one that is not multiprocessing's resource tracker."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return next(int(c) for c in children if "resource_tracker" not in Path(f"/proc/{c}/cmdline").read_text())


@contextmanager
def gateway(folder: Path, upstream_port: int, record: str) -> Generator[Running]:
    """`understudy up` in a folder of its own, with a key."""
    folder.mkdir()
    (folder / "understudy.toml").write_text(CONFIG.format(port=upstream_port, record=record))
    with open_store("sqlite:///understudy.db", folder) as store:
        secret = store.create_key("bench").secret
    process = subprocess.Popen(
        [sys.executable, "-m", "understudy", "up", "--json"],
        cwd=folder,
        stdout=subprocess.PIPE,
        env={**os.environ, "BENCH_KEY": "sk-bench"},
    )
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        yield Running(int(ready["url"].rpartition(":")[2].split("/")[0]), process.pid, secret)
    finally:
        process.terminate()
        process.communicate()


@contextmanager
def litellm(peers: Path, folder: Path, upstream_port: int) -> Generator[Running]:
    """LiteLLM's proxy, one worker. Raises OSError where it is missing or ends, TimeoutError for silence."""
    folder.mkdir()
    (folder / "config.yaml").write_text(LITELLM.format(port=upstream_port))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [peers / "bin" / "litellm", "--config", "config.yaml", "--host", "127.0.0.1"]
    # what it says goes to a file: a pipe nobody reads would stop it
    with (folder / "log").open("wb") as log:
        arguments = [*command, "--port", str(port)]
        process = subprocess.Popen(arguments, cwd=folder, stdout=log, stderr=log, env=_without_ours())
    try:
        _await_port(port, process)
        yield Running(port, process.pid, "sk-client")
    finally:
        process.terminate()
        process.wait()


def _without_ours() -> dict[str, str]:
    """The environment without what would show a peer our own packages, or have it phone home."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "BENCH_KEY": "sk-bench"}


def _await_port(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise OSError(f"it ended with code {process.returncode}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError("nothing listens after a minute")


class Bench:
    """The processes of one run."""

    def __init__(self) -> None:
        ours, theirs = SPAWN.Pipe()
        SPAWN.Process(target=serve_upstream, args=(theirs,), daemon=True).start()
        self.upstream_port: int = ours.recv()
        self.load, theirs = SPAWN.Pipe()
        SPAWN.Process(target=generate, args=(theirs,), daemon=True).start()

    def run(self, load: Load) -> list[float]:
        self.load.send(load)
        return self.load.recv()

    def cpu(self, running: Running, kind: str, count: int) -> float:
        """CPU-microseconds of the gateway per request, after a warm-up."""
        connections = 64 if kind == "paced" else 16
        load = Load(running.port, kind, count // 5, connections, 0, running.secret)
        self.run(load)
        before = cpu_s(running.pid)
        self.run(load._replace(calls=count))
        return (cpu_s(running.pid) - before) / count * 1e6

    def quantiles_ms(self, load: Load) -> tuple[float, float]:
        """Median and 99th percentile of the time from due to answered, in milliseconds."""
        cuts = statistics.quantiles(self.run(load), n=100)
        return cuts[49] * 1e3, cuts[98] * 1e3


KINDS = ("json", "stream", "paced")


def cpu_table(bench: Bench, folder: Path, count: int, peers: Path) -> list[str]:
    rows = [
        "| | JSON | 31 events in one write | 31 events, 2 ms apart |",
        "| --- | --- | --- | --- |",
    ]
    costs: dict[str, list[float]] = {}
    print("CPU, a bare relay …", file=sys.stderr, flush=True)
    with bare_relay(bench.upstream_port) as running:
        costs["bare"] = _costs(bench, running, count)
    rows.append(_row("a bare relay: every byte passed on, none read", costs["bare"]))
    for record in ("buffered", "metadata", "strict"):
        print(f"CPU, record = {record} …", file=sys.stderr, flush=True)
        with gateway(folder / record, bench.upstream_port, record) as running:
            costs[record] = _costs(bench, running, count)
        rows.append(_row(f"understudy, {record}", costs[record]))
    for name, measure in (
        ("TensorZero, embedded, not recording", lambda: _tensorzero(bench, peers, count)),
        ("LiteLLM's proxy, not recording", lambda: _litellm(bench, peers, folder / "litellm", count)),
    ):
        print(f"CPU, {name} …", file=sys.stderr, flush=True)
        try:
            figures = measure()
        except (OSError, TimeoutError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
            rows.append(f"| {name}: not measured ({type(error).__name__}: {error}) | | | |")
            continue
        rows.append(_row(name, figures))
        times = [f"{peer / ours:,.1f}x" for peer, ours in zip(figures, costs["buffered"], strict=True)]
        rows.append(f"| … as a multiple of understudy, buffered | {' | '.join(times)} |")
    return rows


def _costs(bench: Bench, running: Running, count: int) -> list[float]:
    counts = {"json": count, "stream": count, "paced": max(64, count // 4)}
    return [bench.cpu(running, kind, counts[kind]) for kind in KINDS]


def _row(name: str, figures: list[float]) -> str:
    return f"| {name} | " + " | ".join(f"{figure:,.0f}" for figure in figures) + " |"


def _tensorzero(bench: Bench, peers: Path, count: int) -> list[float]:
    figures: list[float] = []
    for kind in KINDS:
        script = [peers / "bin" / "python", HERE / "tensorzero_peer.py"]
        command = [*script, str(bench.upstream_port), kind, str(max(320, count // 4))]
        done = subprocess.run(command, capture_output=True, text=True, env=_without_ours(), timeout=300)
        figures.append(float(done.stdout.split()[-1]))
    return figures


def _litellm(bench: Bench, peers: Path, folder: Path, count: int) -> list[float]:
    with litellm(peers, folder, bench.upstream_port) as running:
        return _costs(bench, running, max(160, count // 20))


def load_line(bench: Bench, count: int) -> str:
    """What the load generator and the upstream can do without a gateway: the latencies' ceiling."""
    begun = time.perf_counter()
    bench.run(Load(bench.upstream_port, "json", count, 64, 0))
    rate = count / (time.perf_counter() - begun)
    busy = os.getloadavg()[0]
    return (
        f"The load generator reaches {rate:,.0f} requests/s straight from the fake upstream; both share "
        f"{os.cpu_count()} cores with the gateway. The machine's load was {busy:.1f} when this was measured."
    )


def latency_table(bench: Bench, folder: Path, seconds: int) -> list[str]:
    rows = [
        "| requests/s | p50 and p99 without, ms | with the gateway | added p50 | added p99 |",
        "| --- | --- | --- | --- | --- |",
    ]
    with gateway(folder / "latency", bench.upstream_port, "buffered") as running:
        for rate in (1000, 5000):
            print(f"latency at {rate}/s …", file=sys.stderr, flush=True)
            load = Load(bench.upstream_port, "json", rate * seconds, 64, rate, running.secret)
            direct, through = bench.quantiles_ms(load), bench.quantiles_ms(load._replace(port=running.port))
            added = [b - a for a, b in zip(direct, through, strict=True)]
            shown = [f"{a:.2f} / {b:.2f}" for a, b in (direct, through)]
            rows.append(f"| {rate:,} | {shown[0]} | {shown[1]} | {added[0]:.2f} | {added[1]:.2f} |")
    return rows


def memory_lines(bench: Bench, folder: Path, count: int) -> list[str]:
    print(f"memory over {count:,} requests …", file=sys.stderr, flush=True)
    with gateway(folder / "memory", bench.upstream_port, "buffered") as running:
        load = Load(running.port, "json", 5000, 16, 0, running.secret)
        bench.run(load)
        before = rss_mib(running.pid)
        begun = time.perf_counter()
        bench.run(load._replace(calls=count))
        rate = count / (time.perf_counter() - begun)
        after, indexer = rss_mib(running.pid), indexer_of(running.pid)
        spent, size = cpu_s(indexer), rss_mib(indexer)
        with open_store("sqlite:///understudy.db", folder / "memory") as store:
            behind = Indexer(folder / "memory" / "segments", store).lag_bytes / 2**20
    return [
        f"RSS {before:.1f} MiB after 5,000 requests, {after:.1f} MiB after {count:,} more (budget: 10 MiB) "
        f"({rate:,.0f} requests/s on this machine). The indexer beside it has {size:.1f} MiB, spent "
        f"{spent:.1f} CPU-s and is {behind:,.0f} MiB of segments behind at the end.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=1_000_000, help="length of the memory run")
    parser.add_argument("--count", type=int, default=8000, help="requests per CPU figure")
    parser.add_argument("--seconds", type=int, default=5, help="length of each latency run")
    parser.add_argument("--peers", type=Path, default=Path(sys.prefix) / "peers", help="their environment")
    options = parser.parse_args()
    bench = Bench()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = [
            [
                "CPU-µs of the gateway process per request, a key checked (budget of buffered recording: 100 "
                "for JSON, 200 a stream; LiteLLM at least 100 times that, TensorZero more):"
            ],
            cpu_table(bench, folder, options.count, options.peers),
            [load_line(bench, 20_000)],
            ["Latency the gateway adds (JSON, buffered recording), open loop, from when a call was due:"],
            latency_table(bench, folder, options.seconds),
            memory_lines(bench, folder, options.requests),
        ]
    print("\n\n".join("\n".join(part) for part in parts))


if __name__ == "__main__":
    main()
