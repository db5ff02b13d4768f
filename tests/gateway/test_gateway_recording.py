"""What a gateway writes down, in every mode, and what a full disk or a clock that jumps does to it."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import resource
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from faulty_upstream import (
    SSE_HEAD,
    FaultyUpstream,
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
    log_bytes,
    post,
    raw_client,
    records,
    running,
    sends,
    stored,
    until,
)

from understudy.errors import InputError
from understudy.gateway import following, indexing
from understudy.gateway.app import start
from understudy.traffic.indexer import Indexer
from understudy.traffic.segments import Fault, segment_files
from understudy.traffic.store import Store


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
