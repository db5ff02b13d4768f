"""Running a gateway: routes that move, keys, recording modes, a full disk, TLS, draining, `up`."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import re
import resource
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
from faulty_upstream import (
    SSE_HEAD,
    FaultyUpstream,
    RawClient,
    Served,
    answers,
    ask,
    calls,
    chat,
    chunk,
    completion,
    config_for,
    echo,
    feedback,
    http,
    post,
    raw_client,
    records,
    running,
    sends,
    until,
)

from understudy.child import pause_after
from understudy.config import Gateway
from understudy.errors import AddressError, InputError
from understudy.gateway import following, indexing, processes
from understudy.gateway.app import start
from understudy.traffic.indexer import Indexer
from understudy.traffic.record import Call
from understudy.traffic.segments import Fault, segment_files
from understudy.traffic.store import Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store("sqlite:///understudy.db", tmp_path) as store:
        yield store


# routes


async def test_a_changed_route_is_followed(
    tmp_path: Path, upstream: FaultyUpstream, second: FaultyUpstream, store: Store
) -> None:
    endpoints = {"one": upstream.url, "two": second.url}
    async with running(config_for(tmp_path, endpoints)) as gateway:
        assert (await ask(gateway.port)).headers["x-understudy-model"] == "one/m"
        assert store.set_route("assistant", "two/student", expected_version=0, by="test", reason="test")
        await until(lambda: gateway.plane.table.aliases["assistant"].version == 1)
        got = await ask(gateway.port)
        assert got.headers["x-understudy-model"] == "two/student"
        assert "x-understudy-fallback" not in got.headers
        assert store.set_route("assistant", "gone/m", expected_version=1, by="test", reason="test")
        await until(lambda: gateway.plane.metrics.route_faults == 1)
        # a route that leads nowhere is named and counted, and the config's route answers
        assert (await ask(gateway.port)).headers["x-understudy-model"] == "one/m"
    assert second.served[0].json["model"] == "student"
    async with running(config_for(tmp_path, {**endpoints, "gone": second.url})) as gateway:
        assert (await ask(gateway.port)).headers["x-understudy-model"] == "gone/m"


async def test_models_show_where_an_alias_points(tmp_path: Path, upstream: FaultyUpstream) -> None:
    config = config_for(tmp_path, {"one": upstream.url, "two": upstream.url})
    async with running(config) as gateway, raw_client(gateway.port) as client:
        got = await client.ask(b"GET /v1/models/assistant HTTP/1.1\r\nHost: a\r\n\r\n")
    assert got.json == {
        "id": "assistant",
        "object": "model",
        "created": 0,
        "owned_by": "one",
        "target": "one/m",
        "fallback": ["two/m"],
        "version": 0,
    }


# reload


async def test_another_config_is_taken_up_with_nothing_lost(
    tmp_path: Path, upstream: FaultyUpstream, second: FaultyUpstream
) -> None:
    go = asyncio.Event()

    async def slow(served: Served) -> None:
        await served.send(SSE_HEAD + chunk(b"data: 1\n\n"))
        await go.wait()
        await served.send(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    upstream.script = [slow, echo]
    before = config_for(tmp_path, {"one": upstream.url})
    async with running(before) as gateway, raw_client(gateway.port) as client:
        asking = asyncio.ensure_future(client.ask(post(chat(stream=True))))
        await until(lambda: upstream.served)
        moved = config_for(tmp_path, {"two": second.url}, 'record = "metadata"', "keep_days = 3")
        assert await gateway.reload(moved) == []
        got = await ask(gateway.port)
        assert got.headers["x-understudy-model"] == "two/m"
        go.set()
        got = await asking
        assert (got.body, got.complete) == (b"data: 1\n\ndata: [DONE]\n\n", True)
        got = await client.ask(post(chat()))  # over the same connection
        assert got.headers["x-understudy-model"] == "two/m"
        await upstream.gone.wait()  # nobody needs the old connection any more
        with pytest.raises(InputError, match="UNDERSTUDY_TEST_NO_SUCH"):
            await gateway.reload(config_for(tmp_path, {"one": upstream.url}, rest=NO_SECRET))
        assert (await ask(gateway.port)).headers["x-understudy-model"] == "two/m"
        elsewhere = config_for(tmp_path, {"two": second.url}, "require_key = true", 'segments = "other"')
        assert await gateway.reload(elsewhere) == ["store.segments"]
        assert (await ask(gateway.port)).status == 401
    assert [call.target for call in calls(tmp_path)] == ["two/m", "one/m", "two/m", "two/m"]
    assert [call.request for call in calls(tmp_path)] == [b""] * 4


async def test_what_has_not_changed_keeps_its_connections(tmp_path: Path, upstream: FaultyUpstream) -> None:
    config = config_for(tmp_path, {"local": upstream.url})
    async with running(config) as gateway:
        await ask(gateway.port)
        await gateway.reload(msgspec.structs.replace(config, gateway=Gateway(idle_timeout_s=5.0)))
        await ask(gateway.port)
        assert gateway.plane.settings.idle_timeout_s == 5.0
    assert upstream.connections == 1


# keys


async def test_a_key_is_required_and_revoked_at_once(
    tmp_path: Path, upstream: FaultyUpstream, store: Store
) -> None:
    made = store.create_key("team")
    async with running(config_for(tmp_path, {"local": upstream.url}, "require_key = true")) as gateway:
        for header in ((), ("Authorization: Bearer sk-1",), (f"Authorization: Bearer {made.secret}x",)):
            got = await ask(gateway.port, None, *header)
            assert (got.status, got.json["error"]["code"]) == (401, "invalid_api_key")
            assert made.secret not in got.body.decode()
        for header in (f"Authorization: Bearer {made.secret}", f"X-Api-Key: {made.secret}") * 2:
            assert (await ask(gateway.port, None, header)).status == 200
        assert store.revoke_key(made.key.id)
        await until(lambda: gateway.plane.keys and gateway.plane.keys.known(made.secret.encode()) is None)
        assert (await ask(gateway.port, None, f"Authorization: Bearer {made.secret}")).status == 401
        async with raw_client(gateway.port) as client:
            assert (await client.ask(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")).status == 200
            assert (await client.ask(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")).status == 401
    assert [call.caller for call in calls(tmp_path)] == [made.key.id] * 4
    assert made.secret.encode() not in log_bytes(tmp_path)


async def test_without_a_key_no_body_is_read(tmp_path: Path, upstream: FaultyUpstream) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 60000000\r\n\r\n"
    config = config_for(tmp_path, {"local": upstream.url}, "require_key = true")
    async with running(config) as gateway, raw_client(gateway.port) as client:
        got = await client.ask(head)
        assert (got.status, got.json["error"]["code"]) == (401, "invalid_api_key")
        assert got.headers["connection"] == "close"
        assert await client.closed()
    assert calls(tmp_path) == []


# recording


def log_bytes(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in (folder / "segments").iterdir())


async def test_metadata_mode_keeps_numbers_and_no_texts(tmp_path: Path, upstream: FaultyUpstream) -> None:
    async with running(config_for(tmp_path, {"local": upstream.url}, 'record = "metadata"')) as gateway:
        await ask(gateway.port, chat("a secret"))
        await ask(gateway.port, chat("a secret", stream=True))
    for call in calls(tmp_path):
        assert (call.request, call.response) == (b"", b"")
        assert call.usage is not None
        assert call.usage.prompt_tokens == 7
    assert b"secret" not in log_bytes(tmp_path)


async def test_one_alias_keeps_no_texts(tmp_path: Path, upstream: FaultyUpstream) -> None:
    rest = '[aliases.private]\nmodel = "local/m"\nrecord = "metadata"'
    async with running(config_for(tmp_path, {"local": upstream.url}, rest=rest)) as gateway:
        await ask(gateway.port, {**chat("a secret"), "model": "private"})
        await ask(gateway.port, chat("no harm"))
    private, plain = calls(tmp_path)
    assert (private.alias, private.request, private.response) == ("private", b"", b"")
    assert private.usage == plain.usage
    assert b"no harm" in plain.response
    assert b"secret" not in log_bytes(tmp_path)


FOUND = "jane@example.org"
CUT = (b"mail ja", b"ne@exam", b"ple.org")
END = b"0\r\n\r\n"


@pytest.mark.parametrize("record", ["buffered", "strict"])
async def test_findings_never_touch_the_disk(tmp_path: Path, upstream: FaultyUpstream, record: str) -> None:
    said = completion(f"mail {FOUND}")
    packed = {"content-encoding": "gzip"}, gzip.compress(json.dumps(said).encode())
    upstream.script = [
        echo,
        echo,
        sends(http(200, packed[1], headers=packed[0])),
        # announced as packed, and not so: who knows what is in it
        sends(http(200, json.dumps(said).encode(), headers={"content-encoding": "br"})),
        sends(
            SSE_HEAD, *(chunk(b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n' % p) for p in CUT), END
        ),
        answers(400, b"what is " + FOUND.encode() + b" \xff?"),
        sends(SSE_HEAD, chunk(b'data: {"choices":[3],"a":"%b"}\n\n' % FOUND.encode()), then="close"),
    ]
    rest = '[redact]\nrules = ["email"]\n[redact.patterns]\nword = "hidden"'
    config = config_for(tmp_path, {"local": upstream.url}, f'record = "{record}"', rest=rest)
    async with running(config) as gateway:
        for stream in (False, True, False, False, True, False, True):
            headers = (f"x-task-id: {FOUND}", f"x-tags: who={FOUND},hidden")
            got = await ask(gateway.port, chat(f"hidden: {FOUND}", stream=stream), *headers)
            assert b"[email]" not in got.body
        async with raw_client(gateway.port) as client:
            comment = {"call": "0" * 32, "expected": FOUND, "comment": "hidden"}
            assert (await client.ask(post(comment, path="/feedback"))).status == 202
    assert json.loads(calls(tmp_path)[0].request)["messages"][0]["content"] == "[word]: [email]"
    assert b"mail [email]" in calls(tmp_path)[2].response
    assert [call.status for call in calls(tmp_path)] == [200] * 5 + [400, 200]
    assert feedback(tmp_path)[0].expected == "[email]"
    for word in (FOUND.encode(), b"hidden", *CUT):
        assert word not in log_bytes(tmp_path)


async def test_a_salt_that_is_not_there_is_named_at_the_start(tmp_path: Path) -> None:
    rest = '[redact]\nrules = ["key"]\nmode = "hash"\nsalt = "env:UNDERSTUDY_TEST_NO_SALT"'
    with pytest.raises(InputError, match="UNDERSTUDY_TEST_NO_SALT"):
        await start(config_for(tmp_path, {"local": "http://127.0.0.1:1/v1"}, rest=rest))


async def test_strict_mode_answers_after_the_disk(tmp_path: Path, upstream: FaultyUpstream) -> None:
    async with running(config_for(tmp_path, {"local": upstream.url}, 'record = "strict"')) as gateway:
        counters = gateway.plane.recorder.writer.counters
        for body in (chat(), chat(stream=True), {**chat(), "model": "dead/m"}):
            syncs = counters.syncs
            got = await ask(gateway.port, body)
            assert counters.syncs > syncs or got.status == 404
        async with raw_client(gateway.port) as client:
            syncs = counters.syncs
            said = {"call": "0" * 32, "expected": "x"}
            assert (await client.ask(post(said, path="/feedback"))).status == 202
            assert counters.syncs > syncs
    assert len(calls(tmp_path)) == 2
    assert len(feedback(tmp_path)) == 1


async def test_usage_is_estimated_where_a_stream_does_not_say(
    tmp_path: Path, upstream: FaultyUpstream
) -> None:
    body = completion("eight more words than you would think, yes")
    del body["usage"]
    upstream.script = [sends(http(200, json.dumps(body).encode()))]
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
    asked = chat() | {"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 400}, image]}]}
    async with running(config_for(tmp_path, {"local": upstream.url})) as gateway:
        await ask(gateway.port, asked)
    (call,) = calls(tmp_path)
    assert call.usage_estimated
    assert call.usage is not None
    # 400 bytes of prompt text and 42 of answer, four to a token, rounded up; an image is not text
    assert (call.usage.prompt_tokens, call.usage.completion_tokens) == (100, 11)


@pytest.mark.parametrize("jump_s", [-3600.0, 3600.0])
async def test_a_clock_that_jumps_during_a_call_costs_nothing(
    tmp_path: Path, upstream: FaultyUpstream, store: Store, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    true = time.time

    async def jump(served: Served) -> None:
        monkeypatch.setattr(time, "time", lambda: true() + jump_s)
        await echo(served)

    upstream.script = [jump, echo]
    async with running(config_for(tmp_path, {"local": upstream.url})) as gateway:
        answers = [await ask(gateway.port) for _ in range(2)]
    monkeypatch.undo()
    assert [answer.status for answer in answers] == [200, 200]
    before, after = calls(tmp_path)
    for one in (before, after):
        assert 0 <= one.total_s < 5
        assert one.attempts[0].ended - one.attempts[0].started == pytest.approx(one.total_s, abs=0.1)
    assert after.at - before.at == pytest.approx(jump_s, abs=5)
    Indexer(tmp_path / "segments", store).run_once()
    assert stored(tmp_path) == {before.key, after.key}


@contextmanager
def disk_full_at(size: int) -> Generator[None]:
    """No file of this process can grow beyond ``size`` bytes; the kernel answers as for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("mode", ["buffered", "strict"])
async def test_a_full_disk_under_serve_answers_and_counts(
    tmp_path: Path, upstream: FaultyUpstream, mode: str
) -> None:
    big = chat("x" * 4_000_000)
    async with running(config_for(tmp_path, {"local": upstream.url}, f'record = "{mode}"')) as gateway:
        with disk_full_at(3_000_000):
            assert (await ask(gateway.port, big)).status == 200
            assert gateway.plane.recorder.writer.counters.dropped == 1
            async with raw_client(gateway.port) as client:
                page = await client.ask(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await ask(gateway.port)).status == 200
    assert f'understudy_records_dropped_total{{pid="{os.getpid()}"}} 1' in page.body.decode()
    assert len(calls(tmp_path)) == 1
    assert not [record for record in records(tmp_path) if isinstance(record, Fault)]


async def test_a_full_disk_under_refuse_refuses_until_there_is_room(
    tmp_path: Path, upstream: FaultyUpstream
) -> None:
    big = chat("x" * 4_000_000)
    config = config_for(tmp_path, {"local": upstream.url}, 'record = "strict"', 'on_full = "refuse"')
    async with running(config) as gateway:
        with disk_full_at(3_000_000):
            async with raw_client(gateway.port) as client:
                got = await client.ask(post(big))
            # paid for but not recordable: strict mode must not acknowledge it
            assert not got.complete
            gateway.plane.recorder.writer.full = True
            asked = len(upstream.served)
            got = await ask(gateway.port)
            assert (got.status, got.json["error"]["code"]) == (503, "record_log_full")
            assert len(upstream.served) == asked
        await until(lambda: not gateway.plane.recorder.refusing)
        assert (await ask(gateway.port)).status == 200


async def test_the_indexer_takes_care_of_segments(
    tmp_path: Path, upstream: FaultyUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tmp_path, {"local": upstream.url}, store="keep_days = 1")
    for _ in range(2):
        async with running(config) as gateway:
            await ask(gateway.port)
    old, young = segment_files(tmp_path / "segments")
    for path, age_s in ((old, 2 * 86_400), (young, 60)):
        os.utime(path, (time.time() - age_s, time.time() - age_s))
    monkeypatch.setattr(indexing, "CARE_S", 0.05)
    stop = threading.Event()
    looping = asyncio.create_task(asyncio.to_thread(indexing.index, config, stop))
    await until(lambda: segment_files(tmp_path / "segments") == [young.with_suffix(".seg.gz")])
    stop.set()
    await looping
    # the records themselves are new: only what stands in an old segment is thought old
    assert len(stored(tmp_path)) == 2


async def test_how_far_the_indexer_is_behind_is_shown(
    tmp_path: Path, upstream: FaultyUpstream, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "LAG_S", 0.0)
    monkeypatch.setattr(following, "POLL_S", 0.01)
    async with running(config_for(tmp_path, {"local": upstream.url})) as gateway:
        await ask(gateway.port, chat("x" * 5000))
        await until(lambda: gateway.plane.metrics.index_lag_bytes > 5000)
        Indexer(tmp_path / "segments", store).run_once()
        await until(lambda: gateway.plane.metrics.index_lag_bytes == 0)


async def test_answers_are_timed_in_histograms(tmp_path: Path, upstream: FaultyUpstream) -> None:
    upstream.script = [
        sends(SSE_HEAD, chunk(b"data: [DONE]\n\n"), b"0\r\n\r\n", pause_s=0.06),
        answers(400),
        echo,
    ]
    async with running(config_for(tmp_path, {"local": upstream.url})) as gateway:
        for stream in (True, False, False):
            await ask(gateway.port, chat(stream=stream))
        async with raw_client(gateway.port) as client:
            page = (await client.ask(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")).body.decode()
    ours = f'route="chat.completions",pid="{os.getpid()}"'
    for name in ("request_seconds", "first_byte_seconds"):
        assert f"# TYPE understudy_{name} histogram" in page
        assert f'understudy_{name}_bucket{{{ours},le="+Inf"}} 3' in page
        assert f"understudy_{name}_count{{{ours}}} 3" in page
    # the stream took a pause before each of its last two pieces
    quick = re.search(rf'understudy_request_seconds_bucket\{{{ours},le="0.1"\}} (\d)', page)
    assert quick is not None
    assert int(quick[1]) <= 2
    total = re.search(r"understudy_request_seconds_sum\{.*\} (.*)", page)
    assert total is not None
    assert float(total[1]) > 0.1


# TLS


async def test_an_upstream_over_tls(
    tmp_path: Path, upstream: FaultyUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    pem = Path(__file__).with_name("localhost.pem")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(pem)
    secure = FaultyUpstream()
    await secure.start(ssl=tls)
    url = f"https://localhost:{secure.port}/v1"
    async with running(config_for(tmp_path / "untrusted", {"tls": url})) as gateway:
        got = await ask(gateway.port)
    assert (got.status, got.json["error"]["code"]) == (502, "upstream_unreachable")
    assert "certificate" in got.json["error"]["message"]
    assert secure.served == []
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    async with running(config_for(tmp_path, {"tls": url})) as gateway:
        for stream in (False, True):
            got = await ask(gateway.port, chat(stream=stream))
            assert (got.status, got.complete) == (200, True)
    await secure.stop()
    assert [served.connection for served in secure.served] == [secure.connections] * 2
    assert [call.status for call in calls(tmp_path)] == [200, 200]


# start and stop


async def test_stop_lets_calls_end_and_loses_no_record(tmp_path: Path, upstream: FaultyUpstream) -> None:
    async def slow(served: Served) -> None:
        await asyncio.sleep(0.1)
        await echo(served)

    upstream.script = [slow]
    gateway = await start(config_for(tmp_path, {"local": upstream.url}))
    asking = [asyncio.ensure_future(ask(gateway.port, chat(f"n{n}", stream=n % 2 == 0))) for n in range(60)]
    await until(lambda: len(gateway.plane.exchanges) == 60)
    await gateway.stop()
    answers = await asyncio.gather(*asking)
    assert all(answer.status == 200 and answer.complete for answer in answers)
    assert {answer.headers["connection"] for answer in answers} == {"close"}
    kept = calls(tmp_path)
    assert {call.key for call in kept} == {answer.headers["x-understudy-call"] for answer in answers}
    assert len(kept) == 60


async def test_stop_gives_up_in_the_end_and_says_so_in_the_record(
    tmp_path: Path, upstream: FaultyUpstream
) -> None:
    upstream.script = [sends(then="stall")]
    gateway = await start(config_for(tmp_path, {"local": upstream.url}))
    asking = asyncio.ensure_future(ask(gateway.port))
    await until(lambda: upstream.served)
    await gateway.stop(grace_s=0.05)
    assert not (await asking).complete
    (call,) = calls(tmp_path)
    assert (call.status, call.attempts[0].error) == (503, "the gateway was stopped")
    with pytest.raises(ConnectionRefusedError):
        await ask(gateway.port)


async def test_a_port_in_use_is_named(tmp_path: Path, upstream: FaultyUpstream) -> None:
    config = config_for(tmp_path, {"local": upstream.url})
    taken = msgspec.structs.replace(
        config, gateway=msgspec.structs.replace(config.gateway, listen=f"127.0.0.1:{upstream.port}")
    )
    with pytest.raises(AddressError, match=str(upstream.port)):
        await start(taken)
    with pytest.raises(AddressError, match=str(upstream.port)):
        processes.up(lambda: taken)


NO_SECRET = '[endpoints.keyed]\nbase_url = "http://127.0.0.1:1/v1"\napi_key = "env:UNDERSTUDY_TEST_NO_SUCH"'


async def test_a_missing_secret_is_named_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="UNDERSTUDY_TEST_NO_SUCH"):
        await start(config_for(tmp_path, {"local": "http://127.0.0.1:1/v1"}, rest=NO_SECRET))


# the command


def write_config(folder: Path, upstream: FaultyUpstream, gateway: str) -> None:
    (folder / "understudy.toml").write_text(
        f'[gateway]\nlisten = "127.0.0.1:0"\n{gateway}\n[endpoints.local]\nbase_url = "{upstream.url}"\n'
        '[aliases.assistant]\nmodel = "local/m"\n'
    )


class Command:
    """`understudy up --json` in a folder."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "understudy", "up", "--json"],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    async def said(self) -> dict[str, Any]:
        """What it prints when it listens."""
        assert self.process.stdout is not None
        return json.loads(await asyncio.to_thread(self.process.stdout.readline))

    async def ready(self) -> int:
        """The port it listens on."""
        return urlsplit((await self.said())["url"]).port or 0

    async def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        await asyncio.to_thread(self.process.communicate)
        return self.process.returncode


def stored(folder: Path) -> set[str]:
    with open_store("sqlite:///understudy.db", folder) as store:
        return {kept.call.key for kept in store.calls()}


async def pids(port: int) -> set[int]:
    """Processes that answer on a port, as far as twenty connections are spread over them."""
    found: set[int] = set()
    for _ in range(20):
        with contextlib.suppress(ConnectionError):
            async with raw_client(port) as client:
                page = await client.ask(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
                found.update(int(pid) for pid in re.findall(rb'pid="(\d+)"', page.body))
    return found


async def test_up_records_and_indexes_until_it_is_told_to_stop(
    tmp_path: Path, upstream: FaultyUpstream
) -> None:
    write_config(tmp_path, upstream, "processes = 2")
    command = Command(tmp_path)
    port = await command.ready()
    answers = await asyncio.gather(*(ask(port, chat(f"n{n}")) for n in range(40)))
    workers = await pids(port)
    assert len(workers) == 2
    os.kill(workers.pop(), signal.SIGKILL)
    async with asyncio.timeout(20):
        while len(now := await pids(port)) < 2:
            pass
    assert workers < now
    assert await command.end(signal.SIGTERM) == 0
    keys = {answer.headers["x-understudy-call"] for answer in answers}
    assert len(keys) == 40
    assert {call.key for call in calls(tmp_path)} == keys
    assert stored(tmp_path) == keys


async def test_every_process_follows_a_route_within_a_second(
    tmp_path: Path, upstream: FaultyUpstream, store: Store
) -> None:
    write_config(tmp_path, upstream, "processes = 2")
    command = Command(tmp_path)
    port = await command.ready()

    async def answered_by() -> set[tuple[str, str]]:
        """Process and model of forty calls, each on a connection of its own."""
        got = await asyncio.gather(*(ask(port) for _ in range(40)))
        return {(g.headers["x-understudy-call"], g.headers["x-understudy-model"]) for g in got}

    assert len(await pids(port)) == 2
    assert {model for _, model in await answered_by()} == {"local/m"}
    for version in range(3):
        model = f"local/student-{version}"
        assert store.set_route("assistant", model, expected_version=version, by="test", reason="test")
        await asyncio.sleep(1.0)
        assert {model for _, model in await answered_by()} == {model}
    assert await command.end(signal.SIGTERM) == 0


def controllers(parent: int) -> set[int]:
    """Processes that `up` started to take trials through their course."""
    found: set[int] = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            above = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if above == parent and b"rollout\0run" in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="children are found in /proc")
async def test_a_dead_controller_is_started_again(tmp_path: Path, upstream: FaultyUpstream) -> None:
    write_config(tmp_path, upstream, "")
    with (tmp_path / "understudy.toml").open("a") as file:
        file.write("[rollout]\n")
    command = Command(tmp_path)
    port = await command.ready()
    [first] = controllers(command.process.pid)
    os.kill(first, signal.SIGKILL)
    async with asyncio.timeout(10):
        while not (now := controllers(command.process.pid) - {first}):
            assert (await ask(port)).status == 200
            await asyncio.sleep(0.05)
    assert await command.end(signal.SIGTERM) == 0
    assert not controllers(1) & now
    for pid in now:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_what_ends_at_once_is_started_ever_more_rarely() -> None:
    pauses = [pause := 0.0]
    for lived in (0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 3600.0):
        pauses.append(pause := pause_after(lived, pause))
    assert pauses[1:] == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 1.0]


@pytest.mark.parametrize("processes", [1, 2])
async def test_sighup_has_the_config_read_again(
    tmp_path: Path, upstream: FaultyUpstream, second: FaultyUpstream, processes: int
) -> None:
    write_config(tmp_path, upstream, f"processes = {processes}")
    command = Command(tmp_path)
    port = await command.ready()

    async def answers_from(served: list[Served], client: RawClient) -> None:
        count = len(served)
        async with asyncio.timeout(10):
            while len(served) == count:
                assert (await client.ask(post(chat()))).status == 200

    async with raw_client(port) as client:
        await answers_from(upstream.served, client)
        (tmp_path / "understudy.toml").write_text("[gateway]\nno_such = 1\n")
        command.process.send_signal(signal.SIGHUP)
        await asyncio.sleep(0.1)
        assert (await client.ask(post(chat()))).status == 200
        write_config(tmp_path, second, f"processes = {processes}")
        command.process.send_signal(signal.SIGHUP)
        await answers_from(second.served, client)
    assert await command.end(signal.SIGTERM) == 0
    assert stored(tmp_path) == {call.key for call in calls(tmp_path)}


async def test_up_starts_the_dashboard_and_takes_it_along(tmp_path: Path, upstream: FaultyUpstream) -> None:
    write_config(tmp_path, upstream, "")
    with (tmp_path / "understudy.toml").open("a") as file:
        file.write('[dashboard]\nlisten = "127.0.0.1:0"\n')
    command = Command(tmp_path)
    said = await command.said()
    address = urlsplit(said["dashboard"])
    assert address.port not in (None, urlsplit(said["url"]).port)
    async with raw_client(address.port or 0) as client:
        got = await client.ask(b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % address.netloc.encode())
    assert got.status in (200, 302, 303)
    assert await command.end(signal.SIGTERM) == 0
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", address.port)


async def test_a_killed_up_leaves_no_dashboard_behind(tmp_path: Path, upstream: FaultyUpstream) -> None:
    write_config(tmp_path, upstream, "")
    with (tmp_path / "understudy.toml").open("a") as file:
        file.write('[dashboard]\nlisten = "127.0.0.1:0"\n')
    command = Command(tmp_path)
    port = urlsplit((await command.said())["dashboard"]).port or 0
    await command.end(signal.SIGKILL)
    async with asyncio.timeout(10):
        while await listens(port):
            pass


async def listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        return False
    writer.close()
    return True


def test_a_dashboard_that_cannot_start_is_named(tmp_path: Path) -> None:
    (tmp_path / "understudy.toml").write_text('[dashboard]\nadmin_key = "env:UNDERSTUDY_TEST_NO_ADMIN"\n')
    command = [sys.executable, "-m", "understudy", "up", "--listen", "127.0.0.1:0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "UNDERSTUDY_TEST_NO_ADMIN" in done.stderr
    assert "Traceback" not in done.stderr


def test_up_says_what_is_wrong_and_exits_2(tmp_path: Path) -> None:
    (tmp_path / "understudy.toml").write_text(
        '[endpoints.a]\nbase_url = "http://127.0.0.1:1"\n[catalog]\noverlay = "none.yaml"\n'
    )
    command = [sys.executable, "-m", "understudy", "up", "--listen"]
    for listen, said in (("nowhere", "HOST:PORT"), ("127.0.0.1:0", "none.yaml")):
        done = subprocess.run([*command, listen], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("mode", ["strict", "buffered"])
async def test_kill_9_loses_nothing_acknowledged(tmp_path: Path, upstream: FaultyUpstream, mode: str) -> None:
    """What strict mode adds is the disk: a killed process leaves what it wrote in the page cache."""
    write_config(tmp_path, upstream, f'record = "{mode}"')
    acknowledged: set[str] = set()

    async def keep_asking(port: int) -> None:
        while True:
            got = await ask(port)
            if not got.complete:
                return
            acknowledged.add(got.headers["x-understudy-call"])

    for wanted in (20, 60):
        command = Command(tmp_path)
        port = await command.ready()
        asking = [asyncio.ensure_future(keep_asking(port)) for _ in range(4)]
        await until(lambda wanted=wanted: len(acknowledged) >= wanted)
        await command.end(signal.SIGKILL)
        await asyncio.gather(*asking, return_exceptions=True)
    command = Command(tmp_path)
    await command.ready()
    assert await command.end(signal.SIGINT) == 0
    found = [record.key for record in records(tmp_path) if isinstance(record, Call)]
    assert len(found) == len(set(found)) == len(records(tmp_path))
    assert acknowledged <= set(found)
    assert stored(tmp_path) == set(found)
