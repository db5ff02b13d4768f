"""The indexer: exactly once over restarts, torn tails and two indexers at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from understudy.errors import StoreError
from understudy.protocol import Cost
from understudy.traffic import indexer as indexing
from understudy.traffic.indexer import Indexer
from understudy.traffic.record import Call, Record
from understudy.traffic.segments import SegmentWriter, compress_segment
from understudy.traffic.store import Store, open_store

MakeCall = Callable[..., Call]


def write(folder: Path, records: list[Record]) -> Path:
    writer = SegmentWriter(folder, strict=False, on_full="serve")
    for record in records:
        writer.append(record)
    writer.sync()
    path = writer.path
    writer.close()
    return path


def test_records_are_indexed_once(store: Store, tmp_path: Path, make_call: MakeCall) -> None:
    calls = [make_call(prompt=f"q{n}") for n in range(1200)]
    path = write(tmp_path / "segments", list(calls))
    indexer = Indexer(tmp_path / "segments", store, lambda _: Cost(0.5, "", "test"))
    assert indexer.lag_bytes > 100_000
    assert (indexer.run_once(), indexer.run_once(), indexer.lag_bytes) == (1200, 0, 0)
    assert [c.call.key for c in store.calls()] == [c.key for c in calls]
    compress_segment(path)
    assert (Indexer(tmp_path / "segments", store).run_once(), indexer.lag_bytes) == (0, 0)


def test_a_crash_between_batches_costs_nothing(
    store_url: str, tmp_path: Path, make_call: MakeCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "BATCH_RECORDS", 7)
    calls = [make_call() for _ in range(50)]
    write(tmp_path / "segments", list(calls))
    survived = 0
    for deadline in (3, 20, 30):  # the price function dies at these calls, in the middle of a transaction
        left = list(range(deadline))

        def price(_: Call, left: list[int] = left) -> Cost | None:
            left.pop()
            return None

        with open_store(store_url, tmp_path) as store:
            with pytest.raises(IndexError):
                Indexer(tmp_path / "segments", store, price).run_once()
            assert store.counts().calls % 7 == 0
            assert store.counts().calls >= survived
            survived = store.counts().calls
    with open_store(store_url, tmp_path) as store:
        Indexer(tmp_path / "segments", store).run_once()
        assert [c.call.key for c in store.calls()] == [c.key for c in calls]


def test_two_indexers_at_once_keep_each_record_once(
    store_url: str, tmp_path: Path, make_call: MakeCall
) -> None:
    calls = [make_call(prompt=f"q{n}") for n in range(1500)]
    write(tmp_path / "segments", list(calls))
    failures: list[BaseException] = []

    def run() -> None:
        try:
            with open_store(store_url, tmp_path) as own:
                Indexer(tmp_path / "segments", own).run_once()
        except StoreError as error:
            failures.append(error)

    with open_store(store_url, tmp_path) as store:
        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert store.counts().calls == 1500
        assert store.counts().attempts == 1500


def test_damage_is_counted_and_the_rest_is_kept(store: Store, tmp_path: Path, make_call: MakeCall) -> None:
    path = write(tmp_path / "segments", [make_call(prompt=f"q{n}") for n in range(20)])
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    assert Indexer(tmp_path / "segments", store).run_once() == 19
    assert sum(s.faults for s in store.segments()) == 1


def test_a_record_being_written_is_taken_when_whole(
    store: Store, tmp_path: Path, make_call: MakeCall
) -> None:
    path = write(tmp_path / "segments", [make_call(), make_call()])
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    indexer = Indexer(tmp_path / "segments", store)
    assert indexer.run_once() == 1
    path.write_bytes(whole)
    assert indexer.run_once() == 1


def test_the_loop_takes_what_came_before_it_was_stopped(
    store: Store, tmp_path: Path, make_call: MakeCall
) -> None:
    stop = threading.Event()
    loop = threading.Thread(target=Indexer(tmp_path / "segments", store).run, args=(stop, 0.01))
    loop.start()
    write(tmp_path / "segments", [make_call()])
    stop.set()
    loop.join()
    assert store.counts().calls == 1
