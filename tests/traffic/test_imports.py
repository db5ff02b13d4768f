"""Imports and exports: every form, broken lines, the same file twice, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from understudy.errors import InputError
from understudy.protocol import Cost, Usage
from understudy.traffic.exports import COLUMNS, export, row
from understudy.traffic.imports import import_file
from understudy.traffic.record import Call, Feedback, new_key
from understudy.traffic.redact import Redactor
from understudy.traffic.sample import exchanges
from understudy.traffic.store import Store

REQUEST = {"model": "gpt-4.1", "messages": [{"role": "user", "content": "Is the sky blue?"}]}
ANSWER = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1_790_000_000,
    "model": "gpt-4.1-2025-04-14",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 12, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}},
}
USAGE = Usage(prompt_tokens=12, completion_tokens=3, cached_tokens=4)


def write(path: Path, *lines: Any) -> Path:
    path.write_bytes(
        b"".join(line if isinstance(line, bytes) else msgspec.json.encode(line) + b"\n" for line in lines)
    )
    return path


FORMS: dict[str, dict[str, Any]] = {
    "plain": {"request": REQUEST, "response": ANSWER, "at": 1_790_000_000.0, "task_id": "t", "total_s": 1.5},
    "stored completion": {**ANSWER, "messages": REQUEST["messages"], "metadata": {"team": "a"}},
    "litellm": {
        "call_type": "acompletion",
        "model": "gpt-4.1",
        "messages": msgspec.json.encode(REQUEST["messages"]).decode(),
        "response": msgspec.json.encode(ANSWER).decode(),
        "startTime": "2026-09-21T14:13:20",
        "endTime": "2026-09-21T14:13:21.500000",
        "session_id": "t",
    },
    "langfuse": {
        "type": "GENERATION",
        "model": "gpt-4.1",
        "input": {"messages": REQUEST["messages"]},
        "output": {"role": "assistant", "content": "yes"},
        "usageDetails": {"input": 8, "output": 3, "input_cached_tokens": 4},
        "startTime": "2026-09-21T14:13:20.000Z",
        "endTime": "2026-09-21T14:13:21.500Z",
        "traceId": "t",
    },
    "helicone": {
        "request_body": REQUEST,
        "response_body": ANSWER,
        "request_created_at": "2026-09-21T14:13:20Z",
        "delay_ms": 1500,
        "response_status": 200,
        "request_properties": {"Helicone-Session-Id": "t"},
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_the_same_call(store: Store, tmp_path: Path, form: str) -> None:
    path = write(tmp_path / "log.jsonl", FORMS[form])
    done = import_file(store, path, target_of=lambda model: f"openai/{model}")
    assert (done.calls, done.faults, done.forms) == (1, 0, {form: 1})
    call = next(store.calls()).call
    # a stored completion names the model that answered, not the one asked for
    asked = "gpt-4.1-2025-04-14" if form == "stored completion" else "gpt-4.1"
    assert (call.alias, call.target) == (asked, f"openai/{asked}")
    assert (call.at, call.usage) == (1_790_000_000, USAGE)
    found = exchanges(store, None)[0]
    assert (found.request["messages"], found.answer) == (REQUEST["messages"], "yes")
    if form != "stored completion":
        assert (call.task_id, call.total_s) == ("t", 1.5)


def test_a_fine_tuning_chat_has_its_answer_last(store: Store, tmp_path: Path) -> None:
    chat = {"messages": [*REQUEST["messages"], {"role": "assistant", "content": "yes"}], "expected": "yes"}
    done = import_file(store, write(tmp_path / "chats.jsonl", chat), alias="assistant")
    assert (done.calls, done.feedback) == (1, 1)
    found = exchanges(store, "assistant")[0]
    assert (found.answer, found.expected, found.usage) == ("yes", "yes", None)
    assert len(found.request["messages"]) == 1


def test_batch_output_finds_its_prompts_in_the_input(store: Store, tmp_path: Path) -> None:
    asked = write(tmp_path / "in.jsonl", {"custom_id": "1", "method": "POST", "url": "/v1", "body": REQUEST})
    answered = {"custom_id": "1", "response": {"status_code": 200, "body": ANSWER}, "error": None}
    lost = {"custom_id": "2", "response": {"status_code": 200, "body": ANSWER}, "error": None}
    path = write(tmp_path / "out.jsonl", answered, lost)
    done = import_file(store, path, inputs=[asked])
    assert (done.calls, done.faults) == (1, 1)
    assert "--batch-input" in done.listed[0].reason
    assert next(store.calls()).call.tags == {"processing": "batch"}


def test_broken_lines_are_counted_and_listed_and_the_rest_is_imported(store: Store, tmp_path: Path) -> None:
    path = write(
        tmp_path / "log.jsonl",
        FORMS["plain"],
        b"{broken\n",
        b"\n",
        {"something": "else"},
        b"\xff\xfe\n",
        {"request": "text", "response": {}},
        {"messages": [{"role": "user", "content": "no answer"}]},
        {**FORMS["langfuse"], "startTime": "yesterday"},
        {**FORMS["plain"], "at": 1_790_000_001.0},
    )
    done = import_file(store, path)
    assert (done.calls, done.faults) == (2, 6)
    assert [f.line for f in done.listed] == [2, 4, 5, 6, 7, 8]
    reasons = [f.reason for f in done.listed]
    assert "not a JSON object" in reasons[0]
    assert "no known form; its fields are something" in reasons[1]
    assert "request is not an object" in reasons[3]
    assert "not the assistant's" in reasons[4]


def test_many_faults_are_all_counted_but_not_all_listed(store: Store, tmp_path: Path) -> None:
    done = import_file(store, write(tmp_path / "log.jsonl", FORMS["plain"], *[b"x\n"] * 250))
    assert (done.faults, len(done.listed)) == (250, 100)


def test_the_same_file_twice_adds_nothing(store: Store, tmp_path: Path) -> None:
    lines = [{**FORMS["plain"], "at": 1_790_000_000.0 + n, "expected": "yes"} for n in range(1100)]
    path = write(tmp_path / "log.jsonl", *lines)
    first, second = import_file(store, path), import_file(store, path)
    assert (first.calls, first.known, first.feedback) == (1100, 0, 1100)
    assert (second.calls, second.known, second.feedback) == (0, 1100, 0)
    assert import_file(store, path, alias="other").calls == 1100


def test_a_json_array_is_taken_too(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "export.json"
    path.write_bytes(msgspec.json.encode([FORMS["langfuse"], 7, FORMS["helicone"]]))
    done = import_file(store, path)
    assert (done.calls, [f.line for f in done.listed]) == (2, [2])


@pytest.mark.parametrize("content", [b"", b"\n\n", b"[", b"[]", b"a,b\n1,2\n", b"\x00" * 100])
def test_a_file_with_nothing_to_import_is_named(store: Store, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"log\.jsonl"):
        import_file(store, path)


def test_an_absent_file_is_named(store: Store, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        import_file(store, tmp_path / "absent.jsonl")


def test_an_import_is_priced(store: Store, tmp_path: Path) -> None:
    import_file(store, write(tmp_path / "log.jsonl", FORMS["plain"]), price=lambda _: Cost(0.5, "", "test"))
    assert next(store.calls()).cost == Cost(0.5, "", "test")


STREAM = (
    b'data: {"choices":[{"index":0,"delta":{"content":"yes"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
)


def test_what_is_exported_can_be_imported(
    store: Store, tmp_path: Path, make_call: Callable[..., Call]
) -> None:
    calls = [make_call(prompt=f"q{n}", task_id="t", tags={"a": "b"}) for n in range(501)]
    streamed = make_call(stream=True, response=STREAM)
    said = Feedback(key=new_key(), call=streamed.key, at=1.0, expected="yes", value=1.0, metric="correct")
    store.insert([*calls, streamed, said], "s", 1)
    assert export(store, tmp_path / "out.jsonl", alias="assistant") == 502
    done = import_file(store, tmp_path / "out.jsonl", alias="copy")
    assert (done.calls, done.faults) == (502, 0)
    before, after = (exchanges(store, alias) for alias in ("assistant", "copy"))
    assert [e.prompt_hash for e in before] == [e.prompt_hash for e in after]
    assert [(e.answer, e.expected, e.at) for e in before] == [(e.answer, e.expected, e.at) for e in after]
    assert after[-1].grades == {"correct": 1.0}
    assert after[0].tags == {"a": "b"}


def test_parquet_has_one_row_for_each_call(
    store: Store, tmp_path: Path, make_call: Callable[..., Call]
) -> None:
    pq = pytest.importorskip("pyarrow.parquet", reason="pip install 'understudy[benchmarks]'")
    store.insert(
        [make_call(), make_call(usage=None, request=b"")], "s", 1, price=lambda _: Cost(0.5, "", "x")
    )
    assert export(store, tmp_path / "out.parquet", "parquet") == 2
    table = pq.read_table(tmp_path / "out.parquet")
    assert tuple(table.column_names) == COLUMNS
    first = table.to_pylist()[0]
    assert msgspec.json.decode(first["request"])["messages"][0]["content"] == "Is the sky blue?"
    assert (first["cost_usd"], first["stream"], first["status"]) == (0.5, False, 200)


def test_columns_are_those_of_a_row(store: Store, make_call: Callable[..., Call]) -> None:
    store.insert([make_call()], "s", 1)
    assert tuple(row(next(store.calls()), [])) == COLUMNS


def test_a_folder_that_is_not_there_is_named(store: Store, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        export(store, tmp_path / "absent" / "out.jsonl")


def test_what_is_redacted_never_enters_the_store(store: Store, tmp_path: Path) -> None:
    line = {"messages": [{"role": "user", "content": "I am a@b.io"}, {"role": "assistant", "content": "hi"}]}
    file = write(tmp_path / "chats.jsonl", line)
    redactor = Redactor(["email"], mode="drop")
    assert import_file(store, file, redactor=redactor).calls == 1
    assert import_file(store, file, redactor=redactor).calls == 0
    (kept,) = store.calls(texts=True)
    assert b"I am [email]" in kept.call.request


def nested(depth: int) -> bytes:
    return b'{"messages": [], "a": ' + b"[" * depth + b"]" * depth + b"}"


def test_what_is_nested_without_end_costs_only_itself(
    store: Store, tmp_path: Path, make_call: Callable[..., Call]
) -> None:
    """Depths around the interpreter's own limit too: what can just be read cannot always be written again."""
    depths = [10, *range(800, 1000), 100_000]
    store.insert([make_call(request=nested(d), response=nested(d)) for d in depths], "s", 1)
    assert export(store, tmp_path / "out.jsonl") == len(depths)
    rows = [msgspec.json.decode(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()]
    assert ("a" in rows[0]["request"], "a" in rows[-1]["response"]) == (True, False)
    lines = [b'{"request": %b, "response": {"choices": []}}\n' % nested(d) for d in depths]
    done = import_file(store, write(tmp_path / "in.jsonl", *lines))
    assert done.calls + done.faults == len(depths)
    assert (done.calls > 1, done.faults > 1) == (True, True)
    assert done.listed[-1].reason == "nested too deeply to be read"


def test_an_array_nested_without_end_is_named(store: Store, tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_bytes(b"[" * 100_000 + b"]" * 100_000)
    with pytest.raises(InputError, match="nested too deeply"):
        import_file(store, tmp_path / "deep.json")
