"""Running a gateway: routes that move, a config read again, keys, numbers, TLS, draining."""

from __future__ import annotations

import asyncio
import os
import re
import ssl
from pathlib import Path

import msgspec
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
    config_for,
    echo,
    log_bytes,
    post,
    raw_client,
    running,
    sends,
    until,
)

from understudy.config import Gateway
from understudy.errors import AddressError, InputError
from understudy.gateway import processes
from understudy.gateway.app import start
from understudy.traffic.store import Store

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


# numbers


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
