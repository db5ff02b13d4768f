"""Bundles: leaves come back as they were bound, whatever was taken out, and small texts share a row."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.traffic import texts
from understudy.traffic.bundles import BUNDLE_BYTES, Leaf, bind, bundled, unbind
from understudy.traffic.database import Database, SqliteDatabase, open_database
from understudy.traffic.migrations import HISTORY, migrate
from understudy.traffic.record import Call, new_key
from understudy.traffic.rows import CALLS
from understudy.traffic.store import Store, open_store


def tables(store: Store) -> Database:
    """The tables, which no caller may see."""
    return store._database  # pyright: ignore[reportPrivateUsage] - tests look at what is really kept


def stream(ident: str, created: str, pieces: list[bytes]) -> bytes:
    """A streamed answer as it is laid down; its id and second stand in every event."""
    told = b'{"id":"%b","created":%b,"choices":[{"delta":' % (ident.encode(), created.encode())
    said = [b'data: %b{"content":"%b"}}]}\n\n' % (told, piece) for piece in pieces]
    return texts.lay_answer(b"".join([b"data: %b{}}]}\n\n" % told, *said, b"data: [DONE]\n\n"]))


IDS = st.sampled_from(["chatcmpl-1", "chatcmpl-22", "17900000", "\0\0\0\0\0\0\0\0\0", "\1" * 9, "x"])
STREAMS = st.builds(
    stream,
    IDS,
    st.sampled_from(["1790000000", "17900000", "0"]),
    st.lists(
        st.binary(min_size=1, max_size=300).map(lambda b: b.replace(b'"', b"").replace(b"\n", b"")),
        max_size=9,
    ),
)
PLAIN = st.binary(max_size=30).map(lambda b: b"rs3"[len(b) % 3 :][:1] + b)
LEAVES = st.lists(
    st.tuples(st.integers(1, 40), st.booleans(), st.one_of(PLAIN, STREAMS)), min_size=1, max_size=20
)


@given(LEAVES, st.integers(1, 2**40))
@settings(max_examples=300, deadline=None)
def test_leaves_come_back_as_they_were_bound(made: list[tuple[int, bool, bytes]], start: int) -> None:
    leaves: list[Leaf] = []
    at = start
    for step, goes_on, laid in made:
        leaves.append(Leaf(at, max(0, at - 7) if goes_on else 0, laid))
        at += step
    bundle = bind(leaves)
    assert (bundle.first, bundle.last, bundle.leaves) == (leaves[0].id, leaves[-1].id, len(leaves))
    assert unbind(bundle.first, bundle.data) == leaves


def test_streams_that_are_alike_share_what_surrounds_their_text() -> None:
    leaves = [
        Leaf(
            n,
            0,
            stream(f"chatcmpl-{new_key()}", str(1_790_000_000 + n), [b"t%d" % (n * i) for i in range(9)]),
        )
        for n in range(1, 101)
    ]
    assert len(leaves[0].laid) > 350  # its id has 16 bytes that nobody can foretell; nine pieces follow
    assert len(bind(leaves).data) / 100 < 60


def test_a_bundle_of_an_older_version_is_read() -> None:
    """Its texts stood one behind the other, those of a codec together."""
    leaves = [Leaf(5, 0, b"rquestion"), Leaf(7, 5, b"fsaid"), Leaf(8, 0, b"rfurther")]
    index = ([0, 2, 1], [0, 2, 0], [9, 5, 8], [1, 0, 2])
    assert unbind(5, texts.pack(msgspec.msgpack.encode((index, b"fsaidrquestionrfurther")))) == leaves


def test_a_large_leaf_is_bound_alone() -> None:
    leaves = [Leaf(1, 0, b"ra"), Leaf(2, 0, b"r" + bytes(BUNDLE_BYTES)), Leaf(3, 0, b"rc")]
    bundles, loose = bundled(leaves)
    assert [(b.first, b.last) for b in bundles] == [(1, 1), (2, 2)]
    assert loose == [leaves[2]]


def many(make_call: Callable[..., Call], count: int) -> list[Call]:
    """Calls whose texts fill several bundles."""
    return [make_call(prompt=f"{n} " + new_key() * 40, answer=new_key() * 20) for n in range(count)]


def test_texts_fill_bundles_and_one_by_one_does_as_well_as_at_once(
    store: Store, make_call: Callable[..., Call]
) -> None:
    calls = many(make_call, 200)
    for n, call in enumerate(calls[:100]):
        store.insert([call], "s", n + 1)
    store.insert(calls[100:], "s", 1000)
    rows = tables(store).query("SELECT first, last, leaves FROM bundles ORDER BY first")
    assert len(rows) >= 2
    assert all(after[0] > before[1] for before, after in pairwise(rows))
    loose = [row[0] for row in tables(store).query("SELECT id FROM blobs ORDER BY id")]
    assert all(blob > rows[-1][1] for blob in loose)
    assert store.counts().blobs == 401  # a frame for all, and of each call its message and its answer
    found = {c.call.key: (c.call.request, c.call.response) for c in store.calls(texts=True)}
    assert found == {c.key: (c.request, c.response) for c in calls}


def test_what_is_forgotten_is_taken_out_of_its_bundle(store: Store, make_call: Callable[..., Call]) -> None:
    calls = many(make_call, 120)
    store.insert(calls, "s", 1)
    assert store.forget(calls[70].at) == 70
    store.sweep(limit=50)
    bound = tables(store).query("SELECT first, data FROM bundles ORDER BY first")
    left = b"".join(leaf.laid for first, data in bound for leaf in unbind(first, bytes(data)))
    assert not any(call.request[60:90] in left for call in calls[:70])
    assert {c.call.request for c in store.calls(texts=True)} == {c.request for c in calls[70:]}
    store.insert(more := many(make_call, 60), "s", 2)
    assert [c.call.request for c in store.calls(texts=True)][-60:] == [c.request for c in more]


def columns(database: Database, table: str) -> str:
    kind = "pragma_table_info(?)" if isinstance(database, SqliteDatabase) else "information_schema.columns"
    where = (
        ""
        if isinstance(database, SqliteDatabase)
        else "WHERE table_name = ? AND table_schema = current_schema()"
    )
    name = "name" if isinstance(database, SqliteDatabase) else "column_name"
    return ", ".join(row[0] for row in database.query(f"SELECT {name} FROM {kind} {where}", (table,)))


def copied_as_before(new: Database, old: Database) -> None:
    """What a store has, in one of the version before bundles: each text in a row of its own."""
    migrate(old, upto=next(n for n, step in enumerate(HISTORY) if step.name == "m020_create_bundles"))
    for table in ("calls", "digests", "lifts", "segments"):
        names = columns(old, table)
        rows = new.query(f"SELECT {names} FROM {CALLS if table == 'calls' else table}")
        old.many(f"INSERT INTO {table} ({names}) VALUES ({', '.join('?' * len(names.split(',')))})", rows)
    leaves = [Leaf(row[0], row[1], bytes(row[2])) for row in new.query("SELECT id, parent, data FROM blobs")]
    for first, data in new.query("SELECT first, data FROM bundles"):
        leaves += unbind(first, bytes(data))
    old.many("INSERT INTO blobs (id, parent, data) VALUES (?, ?, ?)", leaves)


def test_a_store_with_loose_texts_of_an_older_version_goes_on(
    store_url: str, tmp_path: Path, make_call: Callable[..., Call]
) -> None:
    """The texts it has stay where they are and are found there, whatever is bound beside them."""
    calls = many(make_call, 100)
    with open_store("sqlite:///new.db", tmp_path) as store:
        store.insert(calls[:40], "s", 1)
        old = open_database(store_url, tmp_path)
        copied_as_before(tables(store), old)
        old.close()
    with open_store(store_url, tmp_path) as store:
        loose = "SELECT COUNT(*) FROM blobs WHERE id <= ?"
        before = tables(store).query("SELECT COUNT(*) FROM blobs")[0][0]
        store.insert(calls[40:], "s", 2)
        assert tables(store).query(loose, (before,))[0][0] == before == 81
        assert [c.call.request for c in store.calls(texts=True)] == [c.request for c in calls]
        assert store.forget(calls[60].at) == 60
        store.sweep()
        assert [c.call.request for c in store.calls(texts=True)] == [c.request for c in calls[60:]]
        assert tables(store).query(loose, (before,))[0][0] == 1  # the frame, which all share
