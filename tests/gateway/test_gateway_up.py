"""`understudy up`: its processes, signals, dashboard and what a kill leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from faulty_upstream import (
    FaultyUpstream,
    RawClient,
    Served,
    ask,
    calls,
    chat,
    post,
    raw_client,
    records,
    stored,
    until,
)

from understudy.child import pause_after
from understudy.traffic.record import Call
from understudy.traffic.store import Store

DASHBOARD = '[dashboard]\nlisten = "127.0.0.1:0"\n'


def write_config(folder: Path, upstream: FaultyUpstream, gateway: str, rest: str = "") -> None:
    (folder / "understudy.toml").write_text(
        f'[gateway]\nlisten = "127.0.0.1:0"\n{gateway}\n[endpoints.local]\nbase_url = "{upstream.url}"\n'
        f'[aliases.assistant]\nmodel = "local/m"\n{rest}'
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
    write_config(tmp_path, upstream, "", "[rollout]\n")
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
    write_config(tmp_path, upstream, "", DASHBOARD)
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
    write_config(tmp_path, upstream, "", DASHBOARD)
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
