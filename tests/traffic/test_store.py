"""The store on SQLite and on PostgreSQL: exactly once, texts byte for byte, routes, keys."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.errors import StoreError
from understudy.protocol import Cost, Usage
from understudy.traffic import sample, texts
from understudy.traffic.database import Database, SqliteDatabase
from understudy.traffic.migrations import HISTORY, migrate, schema_version
from understudy.traffic.record import Attempt, Call, Feedback, new_key
from understudy.traffic.rows import ATTEMPT_COLUMNS, CALL_COLUMNS, CALLS
from understudy.traffic.store import Store, open_store

MakeCall = Callable[..., Call]


def tables(store: Store) -> Database:
    """The tables, which no caller may see."""
    return store._database  # pyright: ignore[reportPrivateUsage] - tests look at what is really kept


USAGE = Usage(
    prompt_tokens=90,
    completion_tokens=40,
    cached_tokens=30,
    reasoning_tokens=20,
    audio_tokens=10,
    output_audio_tokens=5,
    cache_write_tokens=3,
    cached_audio_tokens=2,
    cache_write_1h_tokens=1,
)


def body(*contents: str, **fields: object) -> bytes:
    messages = [{"role": "user" if n % 2 == 0 else "assistant", "content": c} for n, c in enumerate(contents)]
    return msgspec.json.encode({"model": "assistant", "messages": messages, **fields})


def test_a_call_comes_back_as_it_was(store: Store, make_call: MakeCall) -> None:
    call = make_call(
        tags={"team": "search"},
        task_id="t1",
        usage=USAGE,
        finish_reason="stop",
        answered_by="gpt-4.1-2025",
        caller="k1",
    )
    store.insert([call], "s", 10, price=lambda _: Cost(0.25, "2026-01-01", "overlay"))
    found = store.call(call.key)
    assert found is not None
    assert found.call == call
    assert found.cost == Cost(0.25, "2026-01-01", "overlay")
    assert found.shape.max_tokens == 0
    assert store.call("nothing") is None


@pytest.mark.parametrize(
    "request_body",
    [
        b"",
        b"{",
        b"not json \x00\x01\xff",
        b'{"messages": "a string"}',
        b'{"messages": []}',
        b'{"messages":[{"role":"user","content":"a"}],"n":"many"}',
        b'  {"model" : "m",\n "messages" : [ {"role": "user", "content": "a"} , {"b":1} ] , "x": 1}  ',
        b'{"input":[{"role":"user","content":"hello"}]}',
        body("same", "same", "same"),
        body("x" * 300, tools=[{"type": "function", "function": {"name": "f" * 600}}]),
        body("data:image/png;base64," + "iVBOR" * 600),
        b'{"a":[{"content":"q"}],"messages":[{"content":"q"},{"content":"q"}]}',
        b'{"messages":[1, {"content":"\\u0000"}, null]}',
        b'{"messages":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"messages":[{"content":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}]}",
    ],
)
def test_bodies_come_back_byte_for_byte(store: Store, make_call: MakeCall, request_body: bytes) -> None:
    calls = [make_call(request=request_body, response=b"data: \x00\xff\n\n", stream=True) for _ in range(2)]
    store.insert(calls, "s", 10)
    assert [c.call.request for c in store.calls(texts=True)] == [request_body] * 2
    assert [c.call.response for c in store.calls(texts=True)] == [b"data: \x00\xff\n\n"] * 2


def test_a_conversation_adds_only_its_new_turns(store: Store, make_call: MakeCall) -> None:
    turns = [f"turn {n}: " + chr(97 + n) * 200 for n in range(6)]
    store.insert([make_call(request=body(*turns[: n + 1]), response=b"") for n in range(6)], "s", 10)
    # one frame for each number of messages, one chain node for each turn
    assert store.counts().blobs == 6 + 6
    assert [c.call.request for c in store.calls(texts=True)] == [body(*turns[: n + 1]) for n in range(6)]


def test_short_turns_share_their_prefix_across_batches(store: Store, make_call: MakeCall) -> None:
    for n in range(1, 5):
        store.insert([make_call(request=body(*"abcd"[:n]), response=b"")], "s", n)
    assert store.counts().blobs == 4 + 4
    assert [c.call.request for c in store.calls(texts=True)][-1] == body(*"abcd")


def test_an_image_is_kept_once_whatever_is_asked_of_it(store: Store, make_call: MakeCall) -> None:
    image = "data:image/png;base64," + "iVBORw0KGgo" * 500
    requests = [
        body(f"question {n}", image=0).replace(b'"image":0', b'"image":"%s"' % image.encode())
        for n in range(3)
    ]
    inside = [body(f"question {n} " + image) for n in range(3)]
    store.insert([make_call(request=r, response=b"") for r in [*requests, *inside]], "s", 1)
    stored = sum(len(bytes(row[0])) for row in tables(store).query("SELECT data FROM blobs"))
    assert stored < 2.5 * len(image)  # once as it is and once as JSON has it
    assert [c.call.request for c in store.calls(texts=True)] == [*requests, *inside]


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_what_was_shown_or_heard_is_kept_once_and_comes_back_to_train_on(
    store: Store, make_call: MakeCall, kind: str
) -> None:
    data = "UklGRiQA" * 700
    part: dict[str, object] = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    if kind == "image":
        part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    asked = [[{"type": "text", "text": f"question {n}"}, part] for n in range(4)]
    calls = [
        make_call(request=msgspec.json.encode({"messages": [{"role": "user", "content": a}]})) for a in asked
    ]
    store.insert(calls, "s", 1)
    stored = sum(len(bytes(row[0])) for row in tables(store).query("SELECT data FROM blobs"))
    assert stored < 1.5 * len(data)
    chats = sample.chats(list(sample.exchanges(store, None)))
    assert [chat[0]["content"] for chat in chats] == asked


def test_a_segment_indexed_again_adds_nothing(store: Store, make_call: MakeCall) -> None:
    calls = [make_call() for _ in range(3)]
    assert store.insert(calls, "seg", 300) == 3
    before = store.counts()
    assert store.insert(calls, "seg", 300) == 0
    assert store.insert(calls, "seg", 200) == 0
    assert store.insert(calls, "another", 300) == 0
    assert store.counts() == before


def test_a_batch_that_overlaps_keeps_each_key_once(store: Store, make_call: MakeCall) -> None:
    calls = [make_call() for _ in range(4)]
    store.insert(calls[:2], "seg", 200)
    assert store.insert([*calls, calls[3]], "seg", 400) == 2
    assert [c.call.key for c in store.calls()] == [c.key for c in calls]
    assert store.reached("seg") == 400


def test_a_crash_within_a_batch_leaves_nothing_of_it(store: Store, make_call: MakeCall) -> None:
    store.insert([make_call()], "seg", 100)

    def dies(_: Call) -> Cost | None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.insert([make_call(), make_call()], "seg", 300, price=dies)
    assert store.counts().calls == 1
    assert store.reached("seg") == 100
    assert store.insert([make_call(), make_call()], "seg", 300) == 2


def test_what_a_stranger_sends_cannot_stop_the_store(store: Store, make_call: MakeCall) -> None:
    huge = Usage(prompt_tokens=10**30, completion_tokens=-5)
    request = b'{"model": "a\\u0000b", "messages": ["no object"], "max_tokens": 1e400}'
    odd = make_call(alias="a\x00b\udc80", usage=huge, request=request, tags={"\x00": "\x00"})
    limit = make_call(request=b'{"messages": [], "max_tokens": %d}' % 10**40)
    assert store.insert([odd, limit, make_call()], "s", 1) == 3
    assert next(store.calls()).call.alias == "a\ufffdb?"


def test_calls_are_filtered_and_paged(store: Store, make_call: MakeCall) -> None:
    calls = [make_call(prompt=f"question {n}", alias="ab"[n % 2], task_id=f"t{n}") for n in range(600)]
    failed = make_call(alias="a", status=503)
    store.insert([*calls, failed], "s", 1)
    assert len(list(store.calls())) == 601
    assert [c.call.key for c in store.calls(alias="b")] == [c.key for c in calls[1::2]]
    assert [c.call.key for c in store.calls(ok=False)] == [failed.key]
    assert [c.call.task_id for c in store.calls(limit=2, ok=True, newest_first=True)] == ["t599", "t598"]
    assert [c.call.task_id for c in store.calls(search='question 17"')] == ["t17"]
    assert [c.call.task_id for c in store.calls(since=calls[598].at, ok=True)] == ["t598", "t599"]
    assert len(list(store.calls(until=calls[10].at))) == 10


def test_feedback_is_kept_once_even_before_its_call(store: Store, make_call: MakeCall) -> None:
    call = make_call()
    said = Feedback(key=new_key(), call=call.key, at=call.at, expected="yes", value=1.0)
    store.insert([said], "s", 1)
    store.insert([call, said], "s", 2)
    assert store.feedback([call.key]) == [said]


def test_shapes_come_from_columns(store: Store, make_call: MakeCall) -> None:
    request = body("hi", max_tokens=7, tools=[{"type": "function"}], stream=True)
    call = make_call(request=request, stream=True, task_id="t")
    store.insert([call, make_call(status=500), make_call(usage=None)], "s", 1)
    store.insert([Feedback(key=new_key(), call=call.key, at=0.0, metric="completed", value=0.0)], "s", 2)
    first, second = store.shapes(alias="assistant")
    assert first.usage == Usage(prompt_tokens=12, completion_tokens=3)
    assert first.features == {"stream", "tools"}
    assert (first.max_tokens, first.task, first.completed) == (7, "t", False)
    assert (second.usage, second.completed) == (Usage(), None)
    assert store.shapes(latest=5) == [first, second]
    assert store.shapes(latest=1) == [second]


@pytest.mark.parametrize(
    ("sent", "parameters"),
    [
        ({}, set()),
        ({"temperature": 1.0, "top_p": 1, "presence_penalty": 0.0}, {"temperature=1"}),
        ({"temperature": 0, "top_k": 1}, {"temperature", "top_k"}),
        ({"temperature": 1.7, "top_p": 0.5}, {"temperature", "temperature>1", "top_p"}),
        ({"temperature": None}, set()),
    ],
)
def test_shapes_tell_what_a_call_sends(
    store: Store, make_call: MakeCall, sent: dict[str, Any], parameters: set[str]
) -> None:
    store.insert([make_call(request=body("hi", **sent)), make_call(request=b"")], "s", 1)
    told, metadata = store.shapes()
    assert told.parameters == parameters
    assert metadata.parameters is None
    assert [c.shape.parameters for c in store.calls()] == [parameters, None]


def test_routes_change_only_from_the_expected_version(store: Store) -> None:
    assert store.set_route("assistant", "openai/a", expected_version=0, by="config", reason="first")
    assert not store.set_route("assistant", "openai/b", expected_version=0, by="x", reason="late")
    assert store.set_route(
        "assistant", "openai/b", expected_version=1, fallback=["o/a"], by="x", reason="why"
    )
    route = store.routes()["assistant"]
    assert (route.version, route.model, route.fallback, route.reason) == (2, "openai/b", ("o/a",), "why")
    assert [r.model for r in store.route_history("assistant")] == ["openai/a", "openai/b"]
    assert store.routes_version() == 2
    assert store.route("other") is None


def test_of_two_movers_at_once_one_wins(store: Store, store_url: str, tmp_path: Path) -> None:
    store.set_route("assistant", "openai/a", expected_version=0, by="config", reason="first")
    gate = threading.Barrier(2)
    won: list[str] = []

    def move(to: str) -> None:
        with open_store(store_url, tmp_path) as own:
            for version in range(1, 11):
                gate.wait()
                if own.set_route("assistant", to, expected_version=version, by=to, reason="race"):
                    won.append(to)

    movers = [threading.Thread(target=move, args=(f"openai/{n}",)) for n in range(2)]
    for mover in movers:
        mover.start()
    for mover in movers:
        mover.join()
    assert len(won) == 10
    assert [r.version for r in store.route_history("assistant")] == list(range(1, 12))


def test_keys_are_shown_once_and_end(store: Store) -> None:
    made = store.create_key("ci")
    assert store.lookup_key(made.secret) == made.key
    assert store.lookup_key(made.secret + "x") is None
    assert store.lookup_key("us-nobody-secret") is None
    assert store.lookup_key("") is None
    kept = tables(store).query("SELECT * FROM keys")
    assert made.secret not in str(kept)
    assert made.secret.split("-", 2)[2] not in str(kept)
    assert store.revoke_key(made.key.id)
    assert not store.revoke_key(made.key.id)
    assert store.lookup_key(made.secret) is None
    assert store.keys()[0].revoked is not None


def test_a_store_of_every_older_version_is_brought_up_to_date(tmp_path: Path, make_call: MakeCall) -> None:
    for version in range(1, len(HISTORY)):
        path = tmp_path / f"v{version}.db"
        old = SqliteDatabase(path)
        assert migrate(old, upto=version) == version
        old.execute(
            "INSERT INTO calls (key, at, alias, target, answered_by, route, status, stream, usage_estimated, "
            "ttft_s, total_s, finish_reason, task_id, tags, caller) VALUES "
            "('0', 1.0, 'old', 'o/m', '', 'chat.completions', 200, 0, 0, 0.1, 0.2, 'stop', '', '', '')"
        )
        old.close()
        with open_store(f"sqlite:///{path}", tmp_path) as store:
            assert schema_version(tables(store)) == len(HISTORY)
            store.insert([make_call()], "s", 1)
            assert [c.call.alias for c in store.calls(texts=True)] == ["old", "assistant"]


def test_a_newer_store_is_refused(store: Store, store_url: str, tmp_path: Path) -> None:
    tables(store).execute("INSERT INTO schema_history VALUES (?, 'm999', 0.0)", (len(HISTORY) + 1,))
    with pytest.raises(StoreError, match="newer Understudy"):
        open_store(store_url, tmp_path)


def test_what_callers_said_is_readable_by_its_owner_alone(tmp_path: Path, make_call: MakeCall) -> None:
    with open_store("sqlite:///private.db", tmp_path) as store:
        store.insert([make_call()], "s", 1)
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("private.db", "private.db-wal", "private.db-shm"), 0o600)


def test_somebody_elses_database_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "theirs.db") as connection:
        connection.execute("CREATE TABLE calls (number TEXT)")
    connection.close()
    with pytest.raises(StoreError, match="not ours: calls"):
        open_store("sqlite:///theirs.db", tmp_path)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.db").write_text("these are my notes, not a database\n" * 100)
    with pytest.raises(StoreError, match="not a database"):
        open_store("sqlite:///notes.db", tmp_path)
    assert (tmp_path / "notes.db").read_text().startswith("these are my notes")


@pytest.mark.parametrize("url", ["mysql://x", "sqlite://", "traffic.db", ""])
def test_an_unknown_store_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(StoreError, match="unknown store"):
        open_store(url, tmp_path)


def test_an_unreachable_server_is_named_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(StoreError) as caught:
        open_store("postgresql://me:hunter2@127.0.0.1:1/db", tmp_path)
    assert "postgresql://me@127.0.0.1:1/db" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_full_disk_is_said_and_nothing_is_half_there(tmp_path: Path, make_call: MakeCall) -> None:
    with open_store("sqlite:///small.db", tmp_path) as store:
        store.insert([make_call()], "s", 1)
        pages = tables(store).query("PRAGMA page_count")[0][0]
        tables(store).execute(f"PRAGMA max_page_count = {pages + 2}")
        with pytest.raises(StoreError, match="full"):
            store.insert([make_call(prompt="".join(new_key() for _ in range(4000)))], "s", 2)
        assert (store.counts().calls, store.reached("s")) == (1, 1)


def said(text: str) -> bytes:
    return json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}).encode()


def streamed(*pieces: str, more: str = "") -> bytes:
    chunks = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in pieces]
    return b"".join(b"data: %b\n\n" % json.dumps(c).encode() for c in chunks) + more.encode()


TOLD = "The tides follow the moon, and the moon follows nobody in particular. " * 4


@pytest.mark.parametrize("answer", [said(TOLD), streamed(*TOLD.split(" "), more="data: [DONE]\n\n")])
@pytest.mark.parametrize("batches", [1, 2], ids=["in one batch", "in two"])
@pytest.mark.parametrize("codec", [b"s", b"3"], ids=["word for word", "nearly"])
def test_an_answer_that_comes_back_is_not_stored_twice(
    store: Store, make_call: MakeCall, answer: bytes, batches: int, codec: bytes
) -> None:
    asked = [{"role": "user", "content": "What of the tides?"}]
    heard = TOLD if answer.startswith(b"{") else TOLD.replace(" ", "")
    heard = heard if codec == b"s" else f"{heard[:-1]} And more."
    follow = [*asked, {"role": "assistant", "content": heard}, {"role": "user", "content": "And the sun?"}]
    first, second = (
        make_call(request=json.dumps({"messages": messages}).encode(), response=answer)
        for messages in (asked, follow)
    )
    for number, records in enumerate([[first, second]] if batches == 1 else [[first], [second]]):
        store.insert(records, f"s{number}", 1)
    codecs = [bytes(row[0])[:1] for row in tables(store).query("SELECT data FROM blobs")]
    assert codecs.count(codec) == 1  # compressed against the answer
    for call in (first, second):
        kept = store.call(call.key)
        assert kept is not None
        assert (kept.call.request, kept.call.response) == (call.request, call.response)
    # the answer is needed as long as the turn that repeats it, and not longer
    assert store.forget(second.at) == 1
    store.sweep()
    kept = store.call(second.key)
    assert kept is not None
    assert kept.call.request == second.request
    assert store.forget(second.at + 1) == 1
    store.sweep()
    assert store.counts().blobs == 0


PIECES = st.lists(st.text(alphabet='ab"\\ é\n{}:,\0\x01', max_size=6), max_size=8)


@given(PIECES, st.sampled_from(["", "data: [DONE]\n\n", "\n\n\n\n", ": ping\n\n", 'data: {"content": "']))
@settings(max_examples=200, deadline=None)
def test_a_folded_stream_unfolds_byte_for_byte(pieces: list[str], more: str) -> None:
    for raw in (streamed(*pieces, more=more), streamed(*pieces).replace(b"\n\n", b"\r\n\r\n"), more.encode()):
        stored = texts.lay_answer(raw)
        assert texts.unpack(stored) == raw
        again = more.encode() + raw
        assert (
            texts.unpack(texts.lay_after(again, 7, texts.spoken_in(stored)), texts.spoken_in(stored)) == again
        )


def test_what_was_packed_by_an_older_version_is_read() -> None:
    first, second = texts.DICTIONARIES
    deflate = zlib.compressobj(3, zlib.DEFLATED, -15, 8, zlib.Z_DEFAULT_STRATEGY, first)
    packed = b"1" + deflate.compress(said(TOLD)) + deflate.flush()
    assert texts.unpack(packed) == texts.spoken_in(packed) == said(TOLD)
    # an edited dictionary would make every store unreadable
    digests = [hashlib.sha256(d).hexdigest()[:16] for d in (first, second)]
    assert digests == ["87792bd147a6b96c", "f06389643ed9799d"]


def test_time_per_token_counts_from_the_first(make_call: MakeCall) -> None:
    usage = Usage(prompt_tokens=9, completion_tokens=41)
    streamed_call = make_call(stream=True, usage=usage, ttft_s=0.5, total_s=2.5)
    assert streamed_call.tpot_s == pytest.approx(0.05)  # forty tokens in two seconds
    whole = make_call(usage=usage, ttft_s=0.5, total_s=2.5)
    one = make_call(stream=True, usage=Usage(completion_tokens=1), ttft_s=0.5, total_s=0.5)
    assert [whole.tpot_s, one.tpot_s, make_call(stream=True, usage=None).tpot_s] == [None] * 3


def test_an_attempt_that_went_as_the_call_did_needs_no_row(store: Store, make_call: MakeCall) -> None:
    def attempt(**fields: Any) -> Attempt:
        values: dict[str, Any] = {
            "target": "openai/gpt-4.1",
            "status": 200,
            "billed": "yes",
            "started": 0.0,
            "ended": 1.0,
        }
        return Attempt(**{**values, **fields})

    odd = (
        [],
        [attempt(error="record cut")],
        [attempt(billed="unknown")],
        [attempt(started=0.01)],
        [attempt(target="openai/other")],
        [attempt(status=0, billed="no", error="cannot connect"), attempt()],
    )
    plain = make_call(at=0.0, total_s=1.0, attempts=[attempt(started=0.0004, ended=1.0004)])
    calls = [make_call(at=0.0, total_s=1.0, attempts=attempts) for attempts in odd]
    store.insert([plain, *calls], "s", 1)
    assert tables(store).query("SELECT COUNT(*) FROM attempts")[0][0] == 6
    assert store.counts().attempts == 7
    for call, attempts in zip([plain, *calls], ([attempt()], *odd), strict=True):
        kept = store.call(call.key)
        assert kept is not None
        assert kept.call.attempts == attempts


def test_what_calls_have_in_common_is_taken_out_of_an_older_store(
    store_url: str, tmp_path: Path, make_call: MakeCall
) -> None:
    """A store of the version before kinds, with calls of several, one without known parameters."""
    before = next(n for n, step in enumerate(HISTORY) if step.name == "m026_create_kinds")
    calls = [
        make_call(),
        make_call(target="openai/other", status=429, task_id="t-1", attempts=[]),
        make_call(stream=True, caller="k1"),
        make_call(usage=None, request=b"not json", response=b""),
    ]
    with open_store(store_url, tmp_path) as store:
        store.insert(
            calls, "s", 1, price=lambda call: Cost(0.5, "2026-01-01", "list") if call.stream else None
        )
        kept, dealt = list(store.calls()), list(store.dealt("assistant", 0.0))
        table = tables(store).query(f"SELECT {CALL_COLUMNS} FROM {CALLS} ORDER BY key")
        sql = f"INSERT INTO attempts ({ATTEMPT_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
        attempts = tables(store).query(f"SELECT {ATTEMPT_COLUMNS} FROM attempts")
        for name in sorted(tables(store).tables()):
            tables(store).execute(f"DROP TABLE {name}")
        migrate(tables(store), upto=before)
        marks = ", ".join("?" * len(table[0]))
        tables(store).many(f"INSERT INTO calls ({CALL_COLUMNS}) VALUES ({marks})", table)
        tables(store).many(sql, attempts)
    with open_store(store_url, tmp_path) as store:
        assert list(store.calls()) == kept
        assert [c.shape.parameters is None for c in store.calls()] == [False, False, False, True]
        assert tables(store).query("SELECT COUNT(*) FROM kinds")[0][0] == 4
        assert [c.call.target for c in store.calls(target="openai/other")] == ["openai/other"]
        assert [m.target for m in store.models()] == [calls[0].target]
        assert list(store.dealt("assistant", 0.0)) == dealt == [("t-1", "openai/other")]
        store.insert([make_call()], "s", 2)
        assert tables(store).query("SELECT COUNT(*) FROM kinds")[0][0] == 4
        assert "calls_before" not in tables(store).tables()
