"""The append-only record log: what a gateway process writes of each call, and how it is read back.

A segment is one file of one process. It opens with 8 bytes of magic and 8 of salt; then come frames::

    mark (the salt's first 4 bytes) | payload length, u32 LE | crc32(salt, length, payload), u32 LE | payload

The payload is a `Record` in MessagePack. The salt keeps bytes that a caller put into a request from being
taken for a frame when a damaged segment is searched. A frame is written with one ``writev``; a background
thread calls ``fdatasync``, every 100 ms, or at once when somebody waits for it (strict mode; one sync serves
all who wait). A process that died leaves at most one torn frame at the end of its last segment.

It ignores tables and what the records mean (store, indexer), and it never deletes: retention does.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gzip
import os
import shutil
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, cast

import msgspec

from understudy.errors import StoreError
from understudy.traffic.record import Record

MAGIC = b"USTSEG1\n"
ROLL_BYTES = 64 << 20
"""Size at which a segment is closed and the next one opened."""
SYNC_INTERVAL_S = 0.1
"""Longest time a record is only in the page cache in buffered mode."""

_FILE_HEAD = len(MAGIC) + 8
_FRAME = struct.Struct("<4sII")
_LENGTH = struct.Struct("<I")
_PROBE_INTERVAL_S = 1.0
_PROBE_BYTES = 64 << 10
_SUFFIX, _COMPRESSED = ".seg", ".seg.gz"


class Counters(msgspec.Struct):
    """What one writer did since it was opened."""

    records: int = 0
    bytes: int = 0
    dropped: int = 0
    """Records that could not be written (disk full) and are lost."""
    syncs: int = 0
    sync_failures: int = 0


class Fault(NamedTuple):
    """A stretch of a segment that is not a record."""

    path: Path
    offset: int
    length: int
    reason: str


class Frame(NamedTuple):
    """What stands at one place of a segment; ``end`` is where to go on reading."""

    record: Record | Fault
    end: int


class SegmentWriter:
    """Writes records to segments in ``folder``, one file at a time; safe to share between threads.

    ``strict`` tells whoever appends to wait for `durable` (or `sync`) before acknowledging; all who share the
    writer read it here. Under ``on_full="refuse"`` the property `refusing` is true while the disk is full;
    under ``"serve"`` records are dropped and counted. Raises StoreError when the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        strict: bool,
        on_full: Literal["serve", "refuse"],
        roll_bytes: int = ROLL_BYTES,
        sync_interval_s: float = SYNC_INTERVAL_S,
    ) -> None:
        self.folder = folder
        self.strict = strict
        self.on_full = on_full
        self.counters = Counters()
        self.full = False
        """The last record could not be written."""
        self._roll_bytes = roll_bytes
        self._interval_s = sync_interval_s
        self._encode = msgspec.msgpack.Encoder().encode
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self._closed = False
        self._synced = 0
        self._waiters: list[_Waiter] = []
        self._retired: list[_Segment] = []
        self._next_probe = 0.0
        self._segment = _create(folder)
        self._thread = threading.Thread(target=self._run, name="segment-sync", daemon=True)
        self._thread.start()

    @property
    def refusing(self) -> bool:
        """Whether calls must be refused because they could not be recorded."""
        return self.full and self.on_full == "refuse"

    @property
    def path(self) -> Path:
        """The segment being written."""
        return self._segment.path

    def append(self, record: Record) -> bool:
        """Write one record to the page cache; False when it was dropped because the disk is full.

        Not yet durable: await `durable`, call `sync`, or rely on the next tick.
        """
        payload = self._encode(record)
        with self._lock:
            if self._closed:
                raise StoreError("the record log is closed")
            return self._write(payload)

    def durable(self) -> asyncio.Future[None]:
        """Resolves in the running loop once all that was appended so far is on disk.

        The future carries StoreError when the disk said otherwise.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ask(future)
        return future

    def sync(self) -> None:
        """Block until all that was appended so far is on disk. Raises StoreError."""
        ended = threading.Event()
        errors: list[StoreError] = []

        def done(error: StoreError | None) -> None:
            errors.extend([error] if error else [])
            ended.set()

        self._ask(done)
        ended.wait()
        if errors:
            raise errors[0]

    def close(self) -> None:
        """Sync and close; a second call does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._closing = True
        self._wake.set()
        self._thread.join()
        self._segment.close()

    def _write(self, payload: bytes) -> bool:
        segment = self._segment
        if segment.size >= self._roll_bytes and not self._roll():
            return self._drop()
        segment = self._segment
        if not segment.write(payload):
            return self._drop()
        self.full = False
        self.counters.records += 1
        self.counters.bytes += _FRAME.size + len(payload)
        return True

    def _drop(self) -> bool:
        self.counters.dropped += 1
        self.full = True
        return False

    def _roll(self) -> bool:
        try:
            following = _create(self.folder)
        except StoreError:
            return False
        self._retired.append(self._segment)
        self._segment = following
        return True

    def _ask(self, waiter: _Waiter) -> None:
        with self._lock:
            if self._closed:
                raise StoreError("the record log is closed")
            self._waiters.append(waiter)
        if not self._wake.is_set():  # who waits already wakes the thread for all
            self._wake.set()

    def _run(self) -> None:
        while not self._closing:
            self._wake.wait(self._interval_s)
            self._wake.clear()
            self._sync_once()
            self._probe()
        self._sync_once()

    def _sync_once(self) -> None:
        with self._lock:
            waiters, self._waiters = self._waiters, []
            retired, self._retired = self._retired, []
            segment, appended = self._segment, self.counters.records
        error = None
        try:
            if appended != self._synced:
                for old in retired:
                    old.sync()
                segment.sync()
                self.counters.syncs += 1
                self._synced = appended
        except OSError as failure:
            # the kernel may have thrown the dirty pages away: what was appended so far is not to be promised
            self.counters.sync_failures += 1
            self._synced = appended
            error = StoreError(f"the record log cannot be synced: {failure.strerror}: {segment.path}")
        for old in retired:
            old.close()
        _tell(waiters, error)

    def _probe(self) -> None:
        """Under "refuse" nothing is appended while the disk is full: find out here when it no longer is."""
        if not self.refusing or time.monotonic() < self._next_probe:
            return
        self._next_probe = time.monotonic() + _PROBE_INTERVAL_S
        probe = self.folder / f".probe-{os.getpid()}"
        with contextlib.suppress(OSError):
            try:
                probe.write_bytes(bytes(_PROBE_BYTES))
                self.full = False
            finally:
                probe.unlink(missing_ok=True)


_Waiter = Callable[[StoreError | None], None] | asyncio.Future[None]
"""A function that is told, or a future of some loop."""


def _tell(waiters: Sequence[_Waiter], error: StoreError | None) -> None:
    """Tell all who wait; a loop is woken once for all its futures, as its waking costs more than they do."""
    futures: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for waiter in waiters:
        if isinstance(waiter, asyncio.Future):
            futures.setdefault(waiter.get_loop(), []).append(waiter)
        else:
            waiter(error)
    for loop, waiting in futures.items():
        loop.call_soon_threadsafe(_settle, waiting, error)


def _settle(futures: Sequence[asyncio.Future[None]], error: StoreError | None) -> None:
    for future in futures:
        if future.done():
            continue
        if error:
            future.set_exception(error)
        else:
            future.set_result(None)


class _Segment:
    """An open segment. The lock on its file says that a living process writes it."""

    def __init__(self, path: Path, fd: int, salt: bytes) -> None:
        self.path = path
        self.size = _FILE_HEAD
        self._fd = fd
        self._mark = salt[:4]
        self._seed = zlib.crc32(salt)
        self._folder_synced = False

    def write(self, payload: bytes) -> bool:
        """Append one frame whole or not at all."""
        length = len(payload)
        crc = zlib.crc32(payload, zlib.crc32(_LENGTH.pack(length), self._seed))
        head = _FRAME.pack(self._mark, length, crc)
        whole = _FRAME.size + length
        try:
            written = os.writev(self._fd, (head, payload))
            if written != whole:
                _write_all(self._fd, (head + payload)[written:])
        except OSError:
            os.ftruncate(self._fd, self.size)
            return False
        self.size += whole
        return True

    def sync(self) -> None:
        os.fdatasync(self._fd)
        if not self._folder_synced:
            sync_folder(self.path.parent)
            self._folder_synced = True

    def close(self) -> None:
        os.close(self._fd)


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _create(folder: Path) -> _Segment:
    salt = os.urandom(8)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path, fd = _open_new(folder)
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _write_all(fd, MAGIC + salt)
    except OSError as error:
        os.close(fd)
        raise _unwritable(folder, error) from error
    return _Segment(path, fd, salt)


def _open_new(folder: Path) -> tuple[Path, int]:
    """A file of its own, named by time and process so that no two writers ever share one."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    while True:
        path = folder / f"{time.time_ns() // 1000:017d}-{os.getpid()}{_SUFFIX}"
        with contextlib.suppress(FileExistsError):
            return path, os.open(path, flags, 0o600)


def _unwritable(folder: Path, error: OSError) -> StoreError:
    return StoreError(
        f"the record log cannot be written in {folder}: {error.strerror}",
        expected="a folder on a disk with free space",
        next_step="free some space, or set [store] segments to another folder",
    )


def segment_files(folder: Path) -> list[Path]:
    """Every segment of a folder in the order they were opened, each once; empty when there is no folder."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob(f"*{_SUFFIX}*")):
        if path.name.endswith((_SUFFIX, _COMPRESSED)):
            # a crash between compressing and deleting leaves both; the compressed one was renamed when whole
            found[segment_name(path)] = path
    return [found[name] for name in sorted(found)]


def segment_name(path: Path) -> str:
    """The segment's name, the same before and after compression: what an indexer keeps its offset under."""
    return path.name.removesuffix(".gz").removesuffix(_SUFFIX)


def is_open(path: Path) -> bool:
    """Whether a living process writes this segment. Advisory locks need a local disk."""
    if path.name.endswith(_COMPRESSED):
        return False
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def segment_size(path: Path) -> int:
    """Bytes of the segment, uncompressed (RFC 1952 §2.3.1: ISIZE, the last four bytes of a gzip file)."""
    if not path.name.endswith(_COMPRESSED):
        return path.stat().st_size
    with path.open("rb") as file:
        file.seek(-4, os.SEEK_END)
        return int(_LENGTH.unpack(file.read(4))[0])


def compress_segment(path: Path) -> Path:
    """Compress a segment that nobody writes any more and return its new path.

    Offsets stay what they were: they count uncompressed bytes. Raises StoreError for a segment in use, and
    OSError when there is no room for the copy.
    """
    if path.name.endswith(_COMPRESSED):
        return path
    if is_open(path):
        raise StoreError(f"{path} is being written", expected="a segment that was rotated")
    target = path.with_name(segment_name(path) + _COMPRESSED)
    part = target.with_suffix(".part")
    try:
        _pack(path, part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)  # a full disk must not be left with half a copy
    sync_folder(path.parent)
    path.unlink()
    return target


def _pack(path: Path, part: Path) -> None:
    # as private as the segment itself: it holds what callers said
    made = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with path.open("rb") as source, os.fdopen(made, "wb") as sink:
        with gzip.GzipFile(fileobj=sink, mode="wb", filename="", mtime=0, compresslevel=6) as packed:
            shutil.copyfileobj(source, packed, 1 << 20)
        sink.flush()
        os.fsync(sink.fileno())
    written = path.stat()
    os.utime(part, ns=(written.st_atime_ns, written.st_mtime_ns))  # a segment's age is its last record's


def read_segment(path: Path, offset: int = 0) -> Iterator[Frame]:
    """Each frame from ``offset`` on (0, or the ``end`` of an earlier frame), with where it ends.

    Stops before a frame that is not complete yet, so a segment in use can be read again from the last
    ``end``. What is damaged comes as a `Fault` in its place and reading goes on behind it. Raises StoreError
    for a file that is not a segment.
    """
    with _open(path) as file:
        head = file.read(_FILE_HEAD)
        if not MAGIC.startswith(head[: len(MAGIC)]):
            raise StoreError(f"{path} is not a segment", expected=f"a file that starts with {MAGIC!r}")
        if len(head) < _FILE_HEAD:
            return
        yield from _Reader(path, file, head[len(MAGIC) :]).frames(max(offset, _FILE_HEAD))


def _open(path: Path) -> BinaryIO:
    if not path.exists() and path.name.endswith(_SUFFIX):
        path = path.with_name(path.name + ".gz")
    try:
        return cast(BinaryIO, gzip.open(path) if path.name.endswith(_COMPRESSED) else path.open("rb"))
    except OSError as error:
        raise StoreError(f"cannot read the segment {path}: {error.strerror}") from error


_TORN = "incomplete"


class _Reader:
    """Frames of one open file."""

    def __init__(self, path: Path, file: BinaryIO, salt: bytes) -> None:
        self.path = path
        self._file = file
        self._mark = salt[:4]
        self._seed = zlib.crc32(salt)
        self._decode = msgspec.msgpack.Decoder(Record).decode

    def frames(self, offset: int) -> Iterator[Frame]:
        self._file.seek(offset)
        while True:
            found = self._next(offset)
            if isinstance(found, str):
                self._file.seek(offset)
                rest = self._file.read()
                if self._sound(rest, 0):  # it was being written when it was first looked at
                    self._file.seek(offset)
                    continue
                fault = self._recover(rest, offset, found)
                if fault is None:
                    return
                found = Frame(fault, offset + fault.length)
                self._file.seek(found.end)
            offset = found.end
            yield found

    def _next(self, offset: int) -> Frame | str:
        """The frame at the file's position, or why there is none."""
        head = self._file.read(_FRAME.size)
        if len(head) < _FRAME.size:
            return _TORN
        mark, length, crc = _FRAME.unpack(head)
        if mark != self._mark:
            return "no frame here"
        payload = self._file.read(length)
        if len(payload) < length:
            return _TORN
        if crc != self._checksum(payload):
            return "wrong checksum"
        end = offset + _FRAME.size + length
        try:
            return Frame(self._decode(payload), end)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            return Frame(Fault(self.path, offset, end - offset, f"not a record: {error}"), end)

    def _recover(self, rest: bytes, offset: int, reason: str) -> Fault | None:
        """The fault at ``offset`` up to the next sound frame; None for the torn end of a segment."""
        place = rest.find(self._mark, 1)
        while place >= 0 and not self._sound(rest, place):
            place = rest.find(self._mark, place + 1)
        if place > 0:
            return Fault(self.path, offset, place, reason)
        if reason == _TORN or is_open(self.path):
            return None
        return Fault(self.path, offset, len(rest), reason)

    def _sound(self, rest: bytes, place: int) -> bool:
        if len(rest) - place < _FRAME.size:
            return False
        mark, length, crc = _FRAME.unpack_from(rest, place)
        if mark != self._mark:
            return False
        payload = rest[place + _FRAME.size : place + _FRAME.size + length]
        return len(payload) == length and crc == self._checksum(payload)

    def _checksum(self, payload: bytes) -> int:
        return zlib.crc32(payload, zlib.crc32(_LENGTH.pack(len(payload)), self._seed))
