"""The HTTP client against raw sockets: framing, connections kept, limits, what a server may not do."""

from __future__ import annotations

import asyncio
import gzip
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from understudy.client import Client
from understudy.errors import InputError

Answering = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class Server:
    """Answers each connection with ``answering``, once per request until it closes."""

    def __init__(self, answering: Answering) -> None:
        self.connections = 0
        self.heads: list[bytes] = []
        self.port = 0
        self.tasks: set[asyncio.Task[None] | None] = set()
        self._answering = answering

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.tasks.add(asyncio.current_task())
        try:
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                self.heads.append(head)
                await reader.readexactly(int(head.partition(b"content-length: ")[2].split(b"\r")[0]))
                await self._answering(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            writer.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"


Start = Callable[[Answering | bytes], Awaitable[Server]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    servers: list[tuple[asyncio.Server, Server]] = []

    async def run(answering: Answering | bytes) -> Server:
        async def say(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert isinstance(answering, bytes)
            writer.write(answering)

        made = Server(say if isinstance(answering, bytes) else answering)
        server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
        made.port = server.sockets[0].getsockname()[1]
        servers.append((server, made))
        return made

    yield run
    for server, made in servers:
        server.close()
        tasks = [task for task in made.tasks if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def client(url: str, connections: int = 4, timeout_s: float = 5.0, **headers: str) -> Client:
    return Client(url, headers, connections=connections, timeout_s=timeout_s)


async def test_connections_are_kept_and_never_more_than_allowed(start: Start) -> None:
    server = await start(OK)
    calls = client(server.url, connections=3)
    answers = await asyncio.gather(*(calls.post("/x", b"{}") for _ in range(40)))
    assert {(a.status, a.body) for a in answers} == {(200, b"ok")}
    assert (server.connections, len(server.heads)) == (3, 40)
    await calls.close()


PACKED = gzip.compress(b"packed")
PACKED_HEAD = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n"
FRAMINGS = [
    (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", b"abcde"),
    (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, b"ok"),
    (PACKED_HEAD % len(PACKED) + PACKED, b"packed"),
    (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "body"), FRAMINGS, ids=["chunked", "interim", "gzip", "empty"])
async def test_framings(start: Start, raw: bytes, body: bytes) -> None:
    async def by_bytes(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for byte in raw:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)

    for answering in (raw, by_bytes):
        calls = client((await start(answering)).url)
        for _ in range(3):
            assert (await calls.post("/x", b"{}")).body == body
        await calls.close()


async def test_an_answer_may_end_with_its_connection(start: Start) -> None:
    async def whole(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nto the end")
        writer.close()

    server = await start(whole)
    calls = client(server.url)
    for _ in range(2):
        assert (await calls.post("/x", b"{}")).body == b"to the end"
    assert server.connections == 2


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nshort", "without an answer"),
        (b"SSH-2.0-OpenSSH\r\n", "not an HTTP answer"),
        (b"", "without an answer"),
        (b"HTTP/1.1 200 OK\r\ncontent-encoding: br\r\ncontent-length: 1\r\n\r\nx", "packed as br"),
        (PACKED_HEAD % 1 + b"x", "unpacked"),
        (PACKED_HEAD % 9 + PACKED[:9], "cut off"),
    ],
)  # fmt: skip
async def test_what_is_no_whole_answer_is_an_error(start: Start, raw: bytes, said: str) -> None:
    async def cut(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(raw)
        await writer.drain()
        writer.close()

    calls = client((await start(cut)).url)
    with pytest.raises(OSError, match=said):
        await calls.post("/x", b"{}")


async def test_a_second_answer_never_becomes_the_next_calls(start: Start) -> None:
    """The first answer is followed by one that nobody asked for, in the same packet and in a later one."""
    later = asyncio.Event()

    async def twice(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK + OK.replace(b"ok", b"NO") if not later.is_set() else OK)

    server = await start(twice)
    calls = client(server.url, connections=1)
    assert (await calls.post("/x", b"{}")).body == b"ok"
    later.set()
    assert [(await calls.post("/x", b"{}")).body for _ in range(3)] == [b"ok"] * 3
    assert server.connections == 2


async def test_silence_ends_at_the_limit_and_a_cancelled_call_frees_its_place(start: Start) -> None:
    silent = asyncio.Event()

    async def mute(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await silent.wait()
        writer.write(OK)

    calls = client((await start(mute)).url, connections=1, timeout_s=0.2)
    with pytest.raises(TimeoutError, match=r"no whole answer within 0\.2 s"):
        await calls.post("/x", b"{}")
    cut, waiting = (asyncio.ensure_future(calls.post("/x", b"{}")) for _ in range(2))
    await asyncio.sleep(0.05)
    cut.cancel()
    silent.set()
    assert (await waiting).body == b"ok"


async def test_an_endless_answer_is_cut(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("understudy.client.MOST_BYTES", 1 << 20)
    bomb = gzip.compress(bytes(4 << 20))

    async def endless(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(bytes(1 << 16))
            await writer.drain()

    head = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(bomb)
    for answering in (endless, head + bomb):
        with pytest.raises(OSError, match="longer than 1 MiB"):
            await client((await start(answering)).url).post("/x", b"{}")


async def test_a_redirect_is_not_followed(start: Start) -> None:
    other = await start(OK)
    moved = b"HTTP/1.1 307 Moved\r\nlocation: %b\r\ncontent-length: 0\r\n\r\n" % other.url.encode()
    calls = client((await start(moved)).url, authorization="Bearer secret")
    answer = await calls.post("/x", b"{}")
    assert (answer.status, answer.headers[b"location"], other.heads) == (307, other.url.encode(), [])


async def test_the_head_is_what_was_given(start: Start) -> None:
    server = await start(OK)
    with_user = server.url.replace("http://", "http://me:pass%20word@")
    await client(with_user, x="1").post("/x?a=b", b"{}")
    first, *lines = server.heads[0].decode().splitlines()
    assert first == "POST /v1/x?a=b HTTP/1.1"
    wanted = [f"host: 127.0.0.1:{server.port}", "x: 1", "authorization: Basic bWU6cGFzcyB3b3Jk"]
    assert lines[: len(wanted)] == wanted


@pytest.mark.parametrize("value", ["key\n", "key\r\nx-admin: 1", "“key”", "schlüssel\x00"])
def test_a_key_that_would_break_out_of_its_line_is_refused_unshown(value: str) -> None:
    with pytest.raises(InputError) as caught:
        client("http://127.0.0.1/v1", authorization=f"Bearer {value}")
    assert "authorization" in str(caught.value)
    assert "key" not in caught.value.value


def certified(folder: Path) -> tuple[Path, Path]:
    """A key and a certificate for localhost that nobody has signed."""
    key, certificate = folder / "key.pem", folder / "cert.pem"
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    made += ["-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*made, "-addext", "subjectAltName=DNS:localhost"], check=True, capture_output=True)
    return key, certificate


async def test_tls_needs_a_certificate_that_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = certified(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)

    async def say(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)

    made_server = Server(say)
    async with await asyncio.start_server(made_server.serve, "127.0.0.1", 0, ssl=context) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(OSError, match="certificate verify failed"):
            await client(f"https://localhost:{port}/v1").post("/x", b"{}")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with pytest.raises(OSError, match="certificate"):
            await client(f"https://127.0.0.1:{port}/v1").post("/x", b"{}")  # another name than it says
        trusted = client(f"https://localhost:{port}/v1")
        assert (await trusted.post("/x", b"{}")).body == b"ok"
        await trusted.close()
