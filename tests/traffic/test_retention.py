"""Retention: what is compressed, what is deleted, and that nothing in use ever is."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from understudy.config import Store as Settings
from understudy.traffic import segments as log
from understudy.traffic.allowances import KINDS
from understudy.traffic.database import SqliteDatabase
from understudy.traffic.indexer import Indexer
from understudy.traffic.migrations import HISTORY, migrate
from understudy.traffic.record import Call, Feedback, new_key
from understudy.traffic.retention import DAY_S, Retention
from understudy.traffic.rows import KIND_COLUMNS
from understudy.traffic.segments import SegmentWriter, is_open, segment_files
from understudy.traffic.store import Counts, Store, open_store

MakeCall = Callable[..., Call]
EMPTY = Counts(0, 0, 0, 0)


def write(folder: Path, calls: list[Call], at: float) -> Path:
    """A segment whose last record was written at ``at``."""
    writer = SegmentWriter(folder, strict=False, on_full="serve")
    for call in calls:
        writer.append(call)
    writer.close()
    os.utime(writer.path, (at, at))
    return writer.path


def body(*contents: str, **fields: object) -> bytes:
    messages = [{"role": "user", "content": content} for content in contents]
    return msgspec.json.encode({"model": "assistant", "messages": messages, **fields})


def texts(store: Store) -> dict[str, tuple[bytes, bytes]]:
    return {c.call.key: (c.call.request, c.call.response) for c in store.calls(texts=True)}


# segments


def test_indexed_segments_are_compressed_and_others_left_alone(
    store: Store, tmp_path: Path, make_call: MakeCall
) -> None:
    folder = tmp_path / "segments"
    done, torn, fresh = (write(folder, [make_call()], at) for at in (100.0, 200.0, 1000.0))
    torn.write_bytes(torn.read_bytes() + b"half a frame"[:3])
    os.utime(torn, (200.0, 200.0))
    indexer = Indexer(folder, store)
    indexer.run_once()
    later = write(folder, [make_call()], 300.0)
    writing = SegmentWriter(folder, strict=False, on_full="serve")
    os.utime(writing.path, (400.0, 400.0))
    retention = Retention(folder, store, Settings())
    assert retention.run_once(1001.0).compressed == 2
    assert retention.run_once(1001.0).compressed == 0
    packed = [path.with_suffix(".seg.gz") for path in (done, torn)]
    assert segment_files(folder) == [*packed, fresh, later, writing.path]
    assert [path.stat().st_mtime for path in packed] == [100.0, 200.0]
    assert is_open(writing.path)
    writing.close()
    assert indexer.run_once() == 1
    assert store.counts().calls == 4


def test_old_segments_go_whole_with_their_calls(store: Store, tmp_path: Path, make_call: MakeCall) -> None:
    folder, now = tmp_path / "segments", 1_790_000_000.0 + 10 * DAY_S
    old = [
        make_call(at=now - 9 * DAY_S, key=f"{int((now - 9 * DAY_S) * 1000):012x}{n:020x}") for n in range(3)
    ]
    new = [make_call(at=now - DAY_S, key=f"{int((now - DAY_S) * 1000):012x}{n:020x}") for n in range(2)]
    write(folder, old, now - 9 * DAY_S)
    kept = write(folder, new, now - DAY_S)
    unindexed = write(folder, [make_call(key=new_key())], now - 9 * DAY_S)
    unindexed.rename(tmp_path / "aside")
    Indexer(folder, store).run_once()
    (tmp_path / "aside").rename(unindexed)
    hours = store.hours()
    did = Retention(folder, store, Settings(keep_days=7)).run_once(now)
    assert (did.deleted, did.calls) == (1, 3)
    assert segment_files(folder) == [kept.with_suffix(".seg.gz"), unindexed]
    assert set(texts(store)) == {call.key for call in new}
    assert store.hours() == hours
    assert store.counts().attempts == 2
    # what was deleted is not indexed again
    assert Indexer(folder, store).run_once() == 1


def test_a_full_folder_loses_its_oldest(store: Store, tmp_path: Path, make_call: MakeCall) -> None:
    folder = tmp_path / "segments"
    for day in (3, 1, 2):
        noise = random.Random(day).randbytes(200_000).hex()
        at = day * DAY_S
        write(folder, [make_call(noise, at=at, key=f"{int(at * 1000):012x}{day:020x}")], at)
    Indexer(folder, store).run_once()
    retention = Retention(folder, store, Settings(keep_gb=0.0006))
    assert retention.run_once(9 * DAY_S)[:3] == (3, 1, 1)
    assert [path.stat().st_mtime / DAY_S for path in sorted(segment_files(folder))] == [3, 2]
    assert retention.run_once(9 * DAY_S).deleted == 0
    assert sorted(c.call.at for c in store.calls()) == [2 * DAY_S, 3 * DAY_S]


def test_a_disk_without_room_for_the_copy_keeps_the_segment(
    store: Store, tmp_path: Path, make_call: MakeCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "segments", [make_call()], 100.0)
    Indexer(tmp_path / "segments", store).run_once()

    def full(source: object, sink: object, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log.shutil, "copyfileobj", full)
    assert Retention(tmp_path / "segments", store, Settings()).run_once(1000.0).compressed == 0
    assert list((tmp_path / "segments").iterdir()) == [path]


def test_a_stop_is_heard(store: Store, tmp_path: Path, make_call: MakeCall) -> None:
    write(tmp_path / "segments", [make_call()], 100.0)
    Indexer(tmp_path / "segments", store).run_once()
    stop = threading.Event()
    stop.set()
    assert Retention(tmp_path / "segments", store, Settings(keep_days=1)).run_once(150.0, stop) == (
        0,
        0,
        0,
        0,
    )


# the store


def test_everything_forgotten_leaves_nothing(store: Store, make_call: MakeCall) -> None:
    image = {"url": "data:image/png;base64," + "QUJD" * 600}
    calls = [
        make_call(request=body("a" * 200, "b" * 200, "c", tools=["t" * 600])),
        make_call(request=body("a" * 200, "b" * 200, "d" * 300, tools=["t" * 600])),
        make_call(request=body(msgspec.json.encode(image).decode()), response=b""),
        make_call(request=b"not json"),
    ]
    said = [
        Feedback(key=new_key(), call=calls[0].key, at=1.0),
        Feedback(key=new_key(), call="0" * 32, at=1.0),
    ]
    store.insert([*calls, *said], "s", 1)
    assert store.forget(calls[-1].at + 1) == 4
    assert store.sweep(limit=3) > 5
    assert store.counts() == EMPTY
    for table in ("digests", "lifts", "links", "released", "bundles", "kinds"):
        rows = store._database.query(f"SELECT COUNT(*) FROM {table}")  # pyright: ignore[reportPrivateUsage] - what no caller may see
        assert rows[0][0] == 0
    # and the store is as good as new
    store.insert(calls, "t", 1)
    assert texts(store) == {c.key: (c.request, c.response) for c in calls}


def test_what_calls_share_stays_until_the_last_of_them(store: Store, make_call: MakeCall) -> None:
    """Conversations, tools and images in every mixture, forgotten bit by bit: the rest stays readable."""
    some = random.Random(7)
    words = [word * 150 for word in "abcdefg"]
    images = [f"data:image/png;base64,{letter * 1400}" for letter in "QRS"]
    calls: list[Call] = []
    for _ in range(120):
        length = some.randrange(1, 6)
        contents = [some.choice(words[: 1 + n * 2] + images) for n in range(length)]
        tools = {"tools": [some.choice("xyz") * 600]} if some.random() < 0.5 else {}
        calls.append(make_call(request=body(*contents, **tools)))
    for start in range(0, 120, 10):
        store.insert(calls[start : start + 10], "s", start + 1)
    for left in range(110, -1, -10):
        bound = calls[120 - left].at if left else calls[-1].at + 1
        while store.forget(bound, limit=7):
            pass
        store.sweep(limit=5)
        assert texts(store) == {c.key: (c.request, c.response) for c in calls[120 - left :]}
    assert store.counts() == EMPTY


KIND = {
    name: "INTEGER" if name in ("stream", "usage_estimated", "plain") else "TEXT"
    for name in KIND_COLUMNS.split(", ")
}
UNDONE = (
    *(f"ALTER TABLE calls ADD COLUMN {name} {kind}" for name, kind in KIND.items()),
    *(f"UPDATE calls SET {name} = (SELECT {name} FROM kinds WHERE id = kind)" for name in KIND),
    "ALTER TABLE calls DROP COLUMN kind",
    "DROP TABLE kinds",
    "DROP TABLE allowances",
    *(f"ALTER TABLE keys DROP COLUMN {kind}" for kind in KINDS),
    "ALTER TABLE calls DROP COLUMN plain",
    "DROP TABLE staying",
    "ALTER TABLE attempts DROP COLUMN form",
    "DROP TABLE looks",
    *(
        f"ALTER TABLE {table} DROP COLUMN {column}"
        for table in ("routes", "route_history")
        for column in ("candidate", "share", "origin", "deadline")
    ),
    *(
        f"ALTER TABLE calls DROP COLUMN {column}"
        for column in ("cached_audio_tokens", "cache_write_1h_tokens")
    ),
    "DROP TABLE bundles",
    "DROP TABLE links",
    "ALTER TABLE digests DROP COLUMN answer",
    "DROP TABLE fingerprints",
    "ALTER TABLE calls DROP COLUMN parameters",
    "DROP TABLE days",
)
"""The steps that came after retention, taken back."""


def test_a_text_named_by_calls_of_an_older_store_is_never_deleted(
    tmp_path: Path, make_call: MakeCall
) -> None:
    tools = {"tools": ["t" * 600]}
    path = tmp_path / "old.db"
    before = next(n for n, step in enumerate(HISTORY) if step.name == "m014_add_retention")
    with open_store(f"sqlite:///{path}", tmp_path) as store:
        first = make_call(request=body("one", **tools))
        store.insert([first], "s", 1)
        # as the version before left it: nobody noted who names whom
        database = store._database  # pyright: ignore[reportPrivateUsage] - what no caller may see
        for sql in (*UNDONE, "DROP TABLE lifts", "DROP TABLE released"):
            database.execute(sql)
        database.execute("DELETE FROM schema_history WHERE version > ?", (before,))
    old = SqliteDatabase(path)
    migrate(old)
    with Store(old) as store:
        second = make_call(request=body("two", **tools), at=1.0, key="0" * 32)
        store.insert([second], "s", 2)
        assert store.forget(2.0) == 1
        store.sweep()
        assert texts(store) == {first.key: (first.request, first.response)}


def test_a_reader_meets_no_half_deleted_call(store: Store, make_call: MakeCall) -> None:
    calls = [make_call(request=body(f"{n}" * 200)) for n in range(600)]
    store.insert(calls, "s", 1)
    reading = store.calls(texts=True)
    assert next(reading).call.request == calls[0].request
    store.forget(calls[-1].at, limit=599)
    store.sweep()
    rest = [stored.call for stored in reading]
    assert all(call.request for call in rest)
    assert rest[-1].key == calls[-1].key
