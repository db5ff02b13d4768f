"""The record log: what was written is read back, damage is named, what was promised survives."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.errors import StoreError
from understudy.traffic import segments
from understudy.traffic.record import Attempt, Call, Feedback, Record, new_key
from understudy.traffic.segments import (
    MAGIC,
    Fault,
    SegmentWriter,
    compress_segment,
    is_open,
    read_segment,
    segment_files,
    segment_name,
    segment_size,
)


def a_call(response: bytes = b"{}", alias: str = "assistant") -> Call:
    attempt = Attempt(target="local/m", status=200, billed="yes", started=1.0, ended=2.0)
    return Call(
        key=new_key(),
        at=time.time(),
        route="chat.completions",
        alias=alias,
        target="local/m",
        status=200,
        request=b'{"model":"assistant"}',
        response=response,
        attempts=[attempt],
        tags={"a": "b"},
    )


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[SegmentWriter]:
    writer = SegmentWriter(tmp_path, strict=False, on_full="serve")
    yield writer
    writer.close()


def records_in(folder: Path) -> list[Record | Fault]:
    return [frame.record for path in segment_files(folder) for frame in read_segment(path)]


def test_records_come_back_in_order(writer: SegmentWriter, tmp_path: Path) -> None:
    written: list[Record] = [a_call(os.urandom(size)) for size in (0, 1, 4096, 300_000)]
    written.append(Feedback(key=new_key(), call=written[0].key, at=3.5, expected="yes"))
    assert all(writer.append(record) for record in written)
    assert records_in(tmp_path) == written
    assert writer.counters.records == 5
    assert writer.counters.bytes == writer.path.stat().st_size - 16


def test_reading_goes_on_from_an_earlier_end(writer: SegmentWriter) -> None:
    first, second = a_call(), a_call()
    writer.append(first)
    (frame,) = read_segment(writer.path)
    assert list(read_segment(writer.path, frame.end)) == []
    writer.append(second)
    (later,) = read_segment(writer.path, frame.end)
    assert (frame.record, later.record) == (first, second)
    assert later.end == writer.path.stat().st_size


@given(cut=st.integers(min_value=0, max_value=10_000))
@settings(max_examples=60, deadline=None)
def test_a_torn_tail_ends_the_segment_cleanly(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    folder = tmp_path_factory.mktemp("torn")
    writer = SegmentWriter(folder, strict=False, on_full="serve")
    calls = [a_call(bytes(size)) for size in (10, 200, 3000)]
    for call in calls:
        writer.append(call)
    writer.close()
    ends = [frame.end for frame in read_segment(writer.path)]
    size = min(cut, ends[-1])
    os.truncate(writer.path, size)
    whole = [call for call, end in zip(calls, ends, strict=True) if end <= size]
    assert records_in(folder) == whole


@given(place=st.integers(min_value=16, max_value=2000), flip=st.integers(min_value=1, max_value=255))
@settings(max_examples=100, deadline=None)
def test_a_flipped_byte_costs_one_record_and_is_named(
    tmp_path_factory: pytest.TempPathFactory, place: int, flip: int
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    writer = SegmentWriter(folder, strict=False, on_full="serve")
    calls = [a_call(bytes(600)) for _ in range(4)]
    for call in calls:
        writer.append(call)
    writer.close()
    ends = [frame.end for frame in read_segment(writer.path)]
    raw = bytearray(writer.path.read_bytes())
    place = min(place, ends[2] - 1)
    raw[place] ^= flip
    writer.path.write_bytes(raw)
    hit = next(index for index, end in enumerate(ends) if place < end)
    frames = list(read_segment(writer.path))
    fault = frames[hit].record
    assert isinstance(fault, Fault)
    assert (fault.offset, fault.offset + fault.length) == ([16, *ends][hit], ends[hit])
    assert [frame.record for frame in frames if frame.record != fault] == [
        call for index, call in enumerate(calls) if index != hit
    ]


def test_a_damaged_last_frame_is_named_once_the_writer_is_gone(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, strict=False, on_full="serve")
    writer.append(a_call())
    raw = bytearray(writer.path.read_bytes())
    raw[-1] ^= 1
    writer.path.write_bytes(raw)
    assert records_in(tmp_path) == []
    writer.close()
    (fault,) = records_in(tmp_path)
    assert isinstance(fault, Fault)
    assert fault.reason == "wrong checksum"


def test_frames_inside_a_request_are_not_mistaken_for_records(tmp_path: Path) -> None:
    """A caller may send the bytes of a segment; damage in front of them must not bring them to life."""
    inner = SegmentWriter(tmp_path / "inner", strict=False, on_full="serve")
    inner.append(a_call(alias="forged"))
    inner.close()
    outer = SegmentWriter(tmp_path / "outer", strict=False, on_full="serve")
    outer.append(a_call(inner.path.read_bytes()))
    outer.append(a_call())
    outer.close()
    raw = bytearray(outer.path.read_bytes())
    raw[20] ^= 1
    outer.path.write_bytes(raw)
    fault, call = records_in(tmp_path / "outer")
    assert isinstance(fault, Fault)
    assert isinstance(call, Call)
    assert call.alias == "assistant"


def test_segments_roll_and_keep_their_order(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, strict=False, on_full="serve", roll_bytes=4096)
    written = [a_call(bytes(1000)) for _ in range(20)]
    for call in written:
        writer.append(call)
    writer.sync()
    files = segment_files(tmp_path)
    assert len(files) == 5
    assert [is_open(path) for path in files] == [False] * 4 + [True]
    writer.close()
    assert records_in(tmp_path) == written


def test_compressed_segments_read_the_same_at_the_same_offsets(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, strict=False, on_full="serve")
    for _ in range(5):
        writer.append(a_call(bytes(5000)))
    with pytest.raises(StoreError, match="being written"):
        compress_segment(writer.path)
    writer.close()
    plain, size = list(read_segment(writer.path)), segment_size(writer.path)
    packed = compress_segment(writer.path)
    assert packed.stat().st_size < size / 5
    assert segment_files(tmp_path) == [packed]
    assert segment_name(packed) == segment_name(writer.path)
    assert segment_size(packed) == size
    assert packed.stat().st_mode & 0o777 == 0o600
    assert list(read_segment(packed)) == plain
    assert list(read_segment(packed, plain[2].end)) == plain[3:]
    assert list(read_segment(writer.path, plain[3].end)) == plain[4:]


def test_what_is_not_a_segment_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.seg").write_bytes(b"sqlite format 3, or anything else")
    with pytest.raises(StoreError, match="not a segment"):
        list(read_segment(tmp_path / "x.seg"))
    (tmp_path / "x.seg").write_bytes(MAGIC[:3])
    assert list(read_segment(tmp_path / "x.seg")) == []


def test_two_writers_never_share_a_file(tmp_path: Path) -> None:
    writers = [SegmentWriter(tmp_path, strict=False, on_full="serve") for _ in range(5)]
    assert len({writer.path for writer in writers}) == 5
    for writer in writers:
        writer.append(a_call())
        writer.close()
    assert len(records_in(tmp_path)) == 5


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot be written"):
        SegmentWriter(tmp_path / "file", strict=False, on_full="serve")


async def test_durable_resolves_after_a_sync_and_serves_all_who_wait(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, strict=True, on_full="serve", sync_interval_s=60)
    waiting: list[asyncio.Future[None]] = []
    for _ in range(50):
        writer.append(a_call())
        waiting.append(writer.durable())
    await asyncio.gather(*waiting)
    assert 1 <= writer.counters.syncs < 50
    writer.close()
    with pytest.raises(StoreError, match="closed"):
        writer.append(a_call())


def test_threads_may_share_a_writer(writer: SegmentWriter, tmp_path: Path) -> None:
    def write() -> None:
        for _ in range(200):
            writer.append(a_call())

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = records_in(tmp_path)
    assert len({record.key for record in found if isinstance(record, Call)}) == 800


# the child's disk is "full" at 20 KB: RLIMIT_FSIZE makes the same short write and the same failure
FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from understudy.traffic.segments import SegmentWriter
from understudy.traffic.record import Feedback
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
writer = SegmentWriter(Path(sys.argv[1]), strict=False, on_full=sys.argv[2])
big = [writer.append(Feedback(key=f"{n}", call="c", at=0.0, comment="x" * 3000)) for n in range(10)]
print(big.count(True), writer.counters.dropped, writer.refusing)
print(writer.append(Feedback(key="small", call="c", at=0.0)), writer.refusing)
writer.close()
"""


@pytest.mark.parametrize("on_full", ["serve", "refuse"])
def test_a_full_disk_drops_whole_records_and_counts_them(tmp_path: Path, on_full: str) -> None:
    out = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), on_full], capture_output=True, text=True, check=True
    )
    assert out.stdout.splitlines() == [f"6 4 {on_full == 'refuse'}", "True False"]
    found = records_in(tmp_path)
    assert [record.key for record in found if isinstance(record, Feedback)] == [*"012345", "small"]
    assert not [record for record in found if isinstance(record, Fault)]


KILLED = """
import os, sys
from pathlib import Path
from understudy.traffic.segments import SegmentWriter
from understudy.traffic.record import Feedback
writer = SegmentWriter(Path(sys.argv[1]), strict=True, on_full="serve", roll_bytes=200_000)
for n in range(10**9):
    writer.append(Feedback(key=f"{os.getpid()}-{n}", call="c", at=0.0, comment="x" * (n * 7919 % 20_000)))
    writer.sync()
    os.write(1, b"%d-%d\\n" % (os.getpid(), n))
"""


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    rng = random.Random(7)
    acknowledged: list[str] = []
    for _ in range(4):
        child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        first = child.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.1))
        child.send_signal(signal.SIGKILL)
        acknowledged += (first + child.communicate()[0]).decode().split()
    found = records_in(tmp_path)
    assert not [record for record in found if isinstance(record, Fault)]
    keys = [record.key for record in found]
    assert len(keys) == len(set(keys))
    assert set(acknowledged) <= set(keys)
    assert len(keys) - len(acknowledged) <= 4
    assert not any(is_open(path) for path in segment_files(tmp_path))


def test_a_frame_completed_while_it_is_looked_at_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between finding a frame incomplete and searching for the next, its writer may write both."""
    writer = SegmentWriter(tmp_path, strict=False, on_full="refuse")
    wanted = [a_call(b"{}" * n) for n in range(3)]
    for record in wanted:
        writer.append(record)
    writer.close()
    path = writer.path
    whole = path.read_bytes()
    ends = [frame.end for frame in read_segment(path)]
    path.write_bytes(whole[: ends[0] + 20])
    look = segments._Reader._next

    def look_and_write(reader: segments._Reader, offset: int) -> segments.Frame | str:
        found = look(reader, offset)
        if isinstance(found, str):
            path.write_bytes(whole)
        return found

    monkeypatch.setattr(segments._Reader, "_next", look_and_write)
    assert [frame.record for frame in read_segment(path)] == wanted
