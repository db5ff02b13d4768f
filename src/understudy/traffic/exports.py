"""Writes recorded calls to JSONL or Parquet, one row per call, streams assembled, feedback beside them.

What is written as JSONL can be imported again (form `plain`). Anthropic's messages and OpenAI's responses are
written as the chat completions they amount to. It ignores texts that were not recorded, are no JSON, cannot
be said in chat completions, or are nested too deeply to be written: such a request or answer is an empty
object.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec

from understudy.errors import InputError, MissingExtraError
from understudy.forms.recorded import answer_as_chat, request_as_chat
from understudy.protocol import Json
from understudy.traffic.record import Feedback
from understudy.traffic.store import Store, StoredCall

COLUMNS = (
    "key",
    "at",
    "alias",
    "target",
    "answered_by",
    "status",
    "stream",
    "request",
    "response",
    "usage",
    "cost_usd",
    "price_source",
    "ttft_s",
    "tpot_s",
    "total_s",
    "finish_reason",
    "task_id",
    "tags",
    "expected",
    "grades",
)
Format = Literal["jsonl", "parquet"]
PAGE = 500


def export(store: Store, out: Path | BinaryIO, format: Format = "jsonl", **filters: Any) -> int:
    """Write the calls that `Store.calls` gives for ``filters``; returns how many.

    Raises InputError when the file cannot be written, MissingExtraError for Parquet without pyarrow.
    """
    if not isinstance(out, Path):
        return _write_jsonl(store, out, filters)
    try:
        if format == "parquet":
            return _write_parquet(store, out, filters)
        with out.open("wb") as file:
            return _write_jsonl(store, file, filters)
    except OSError as error:
        raise InputError(
            f"cannot write {out}: {error.strerror}", expected="a file in a folder that is there"
        ) from error


def exported(store: Store, filters: Json) -> Iterator[list[Json]]:
    """Rows page by page."""
    page: list[StoredCall] = []
    for stored in store.calls(**filters, texts=True):
        page.append(stored)
        if len(page) == PAGE:
            yield _rows(store, page)
            page = []
    if page:
        yield _rows(store, page)


def _rows(store: Store, page: list[StoredCall]) -> list[Json]:
    said: dict[str, list[Feedback]] = {}
    for feedback in store.feedback([c.call.key for c in page]):
        said.setdefault(feedback.call, []).append(feedback)
    return [_writable(row(stored, said.get(stored.call.key, []))) for stored in page]


def row(stored: StoredCall, said: list[Feedback]) -> Json:
    """One call as a flat object; ``request`` and ``response`` are a chat (or text) completion's."""
    call, cost = stored.call, stored.cost
    expected = [f.expected for f in said if f.expected]
    return {
        "key": call.key,
        "at": call.at,
        "alias": call.alias,
        "target": call.target,
        "answered_by": call.answered_by,
        "status": call.status,
        "stream": call.stream,
        "request": request_as_chat(call.route, call.request) or {},
        "response": answer_as_chat(call.route, call.response, call.stream) or {},
        "usage": msgspec.to_builtins(call.usage) if call.usage else None,
        "cost_usd": cost.usd if cost else None,
        "price_source": cost.source if cost else "",
        "ttft_s": call.ttft_s,
        "tpot_s": call.tpot_s,
        "total_s": call.total_s,
        "finish_reason": call.finish_reason,
        "task_id": call.task_id,
        "tags": call.tags,
        "expected": expected[-1] if expected else "",
        "grades": {f.metric: f.value for f in said if f.value is not None},
    }


def _writable(row: Json) -> Json:
    """The row; what could just be read may still be too deep to be written one level further down."""
    try:
        msgspec.json.encode([row])
    except RecursionError:
        return {**row, "request": {}, "response": {}}
    return row


def _write_jsonl(store: Store, file: BinaryIO, filters: Json) -> int:
    count = 0
    for rows in exported(store, filters):
        file.write(msgspec.json.Encoder().encode_lines(rows))
        count += len(rows)
    return count


def _write_parquet(store: Store, out: Path, filters: Json) -> int:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("pyarrow", "benchmarks") from error
    text, number = pa.string(), pa.float64()
    kinds = {"at": number, "cost_usd": number, "ttft_s": number, "tpot_s": number}
    kinds |= {"total_s": number}
    kinds |= {"status": pa.int64(), "stream": pa.bool_()}
    schema = pa.schema([(name, kinds.get(name, text)) for name in COLUMNS])
    count = 0
    with pq.ParquetWriter(out, schema, compression="zstd") as writer:
        for rows in exported(store, filters):
            table = [{k: _cell(v) for k, v in r.items()} for r in rows]
            writer.write_table(pa.Table.from_pylist(table, schema=schema))
            count += len(rows)
    return count


def _cell(value: object) -> object:
    """Objects as JSON text: their fields differ from call to call, and a column has one type."""
    return msgspec.json.encode(value).decode() if isinstance(value, dict) else value
