"""Reads traffic recorded elsewhere: one call per line of JSONL, or per element of a JSON array.

Known forms: plain requests and answers, fine-tuning chats, OpenAI batch files and stored completions, and the
logs of LiteLLM, Langfuse and Helicone. What cannot be read is counted and listed with its line; the rest is
imported. The same file imported twice adds nothing. It ignores prices: they arrive as a function.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec

from understudy.errors import InputError
from understudy.protocol import Json, Usage, usage_of
from understudy.traffic.record import Attempt, Call, Feedback, Record
from understudy.traffic.redact import Redactor
from understudy.traffic.store import Price, Store, unpriced

BATCH = 500
LISTED_FAULTS = 100
_TOO_DEEP = "nested too deeply to be read"


class Fault(NamedTuple):
    """A line that could not be read."""

    line: int
    """From 1; the element's number in a JSON array."""
    reason: str


class Imported(NamedTuple):
    """What became of a file."""

    path: Path
    calls: int
    """New in the store."""
    known: int
    """There already, from an earlier import."""
    feedback: int
    faults: int
    listed: list[Fault]
    """The first `LISTED_FAULTS` of them."""
    forms: dict[str, int]
    """Form of the lines to their number."""


class Told(NamedTuple):
    """What a line says of one call, in whatever form it came."""

    request: Json
    response: Json
    at: float | None = None
    """Unix seconds."""
    status: int = 200
    total_s: float = 0.0
    ttft_s: float = 0.0
    task_id: str = ""
    tags: dict[str, str] = {}
    expected: str = ""
    grades: dict[str, float] = {}


class UnreadableError(Exception):
    """A line that is no recorded call; the text says why."""


def import_file(
    store: Store,
    path: Path,
    *,
    alias: str = "",
    target_of: Callable[[str], str] = lambda model: f"imported/{model}",
    price: Price = unpriced,
    inputs: Iterable[Path] = (),
    redactor: Redactor | None = None,
) -> Imported:
    """Import one file.

    ``alias`` stands in for the model's name as what the application asked for; ``target_of`` gives the
    ENDPOINT/MODEL for the model that answered. ``inputs`` are OpenAI batch input files: a batch output file
    has no prompts of its own. What ``redactor`` finds is taken out before anything is kept. Raises InputError
    when the file cannot be read or not one line of it can.
    """
    requests = {key: body for source in inputs for key, body in _batch_inputs(source)}
    run = _Run(store, path, alias, target_of, price, redactor)
    for line, said in _lines(path, run.fault):
        run.line(line, said, requests)
    run.flush()
    if not run.read:
        first = f"; line {run.listed[0].line}: {run.listed[0].reason}" if run.listed else ""
        raise InputError(
            f"{path}: no recorded call in {run.faults} line(s){first}",
            expected="requests and answers, OpenAI batch output, or a LiteLLM, Langfuse or Helicone log",
            next_step="understudy traffic import --help",
        )
    return Imported(path, run.calls, run.read - run.calls, run.feedback, run.faults, run.listed, run.forms)


class _Run:
    """One file on its way into the store."""

    def __init__(
        self,
        store: Store,
        path: Path,
        alias: str,
        target_of: Callable[[str], str],
        price: Price,
        redactor: Redactor | None,
    ) -> None:
        self.read = self.calls = self.feedback = self.faults = 0
        self.listed: list[Fault] = []
        self.forms: dict[str, int] = {}
        self._store, self._price, self._redactor = store, price, redactor
        self._alias, self._target_of = alias, target_of
        self._mtime = path.stat().st_mtime if path.exists() else 0.0
        # another alias is another import, and leaves the first as it is
        self._segment = f"import/{sha256(str(path.resolve()).encode() + alias.encode()).hexdigest()[:24]}"
        self._waiting: list[Record] = []

    def fault(self, line: int, reason: str) -> None:
        self.faults += 1
        if len(self.listed) < LISTED_FAULTS:
            self.listed.append(Fault(line, reason))

    def line(self, number: int, said: Json, requests: Mapping[str, Json]) -> None:
        try:
            form, told = read_line(said, requests)
            records = _records(said, told, self._alias, self._target_of, self._mtime)
        except UnreadableError as error:
            return self.fault(number, str(error))
        except RecursionError:
            return self.fault(number, _TOO_DEEP)
        except (msgspec.MsgspecError, KeyError, TypeError, ValueError, AttributeError) as error:
            return self.fault(number, f"not in the form it seems to have: {type(error).__name__}: {error}")
        self.read += 1
        self.forms[form] = self.forms.get(form, 0) + 1
        self._waiting += [self._redactor.record(r) for r in records] if self._redactor else records
        if len(self._waiting) >= BATCH:
            self.flush()
        return None

    def flush(self) -> None:
        """Into the store; keys made of the content keep what is there from being added again."""
        self.calls += self._insert([r for r in self._waiting if isinstance(r, Call)])
        self.feedback += self._insert([r for r in self._waiting if isinstance(r, Feedback)])
        self._waiting = []

    def _insert(self, records: Sequence[Record]) -> int:
        if not records:
            return 0
        beyond = self._store.reached(self._segment) + 1
        return self._store.insert(records, self._segment, beyond, price=self._price)


def read_line(said: Json, requests: Mapping[str, Json]) -> tuple[str, Told]:
    """The name of a line's form and what it tells. Raises UnreadableError."""
    for form, belongs, read in _FORMS:
        if belongs(said):
            return form, read(said, requests)
    raise UnreadableError(f"no known form; its fields are {', '.join(sorted(said)[:8]) or 'none'}")


def _plain(said: Json, requests: Mapping[str, Json]) -> Told:
    del requests
    return Told(
        request=_object(said["request"], "request"),
        response=_object(said["response"], "response"),
        at=_time(said.get("at") or said.get("created")),
        status=int(said.get("status") or 200),
        total_s=float(said.get("total_s") or 0.0),
        ttft_s=float(said.get("ttft_s") or 0.0),
        task_id=str(said.get("task_id") or ""),
        tags=_strings(said.get("tags")),
        expected=_expected(said),
        grades={str(k): float(v) for k, v in (said.get("grades") or {}).items()},
    )


def _chat(said: Json, requests: Mapping[str, Json]) -> Told:
    """A fine-tuning example: the last message is the answer."""
    del requests
    messages = cast(list[Json], said["messages"])
    if not messages or messages[-1].get("role") != "assistant":
        raise UnreadableError("the last message is not the assistant's")
    request = {k: said[k] for k in ("model", "tools", "response_format") if k in said}
    request["messages"] = messages[:-1]
    return Told(request, _completion(messages[-1], str(said.get("model") or "")), expected=_expected(said))


def _batch(said: Json, requests: Mapping[str, Json]) -> Told:
    """A line of an OpenAI batch's output file."""
    key = str(said["custom_id"])
    if key not in requests:
        raise UnreadableError(
            f"the prompt of {key!r} is in the batch's input file: give it with --batch-input"
        )
    answered = said.get("response") or {}
    body = _object(answered.get("body") or {"error": said.get("error")}, "body")
    return Told(
        request=requests[key],
        response=body,
        at=_time(body.get("created")),
        status=int(answered.get("status_code") or 500),
        tags={"processing": "batch"},
    )


def _stored(said: Json, requests: Mapping[str, Json]) -> Told:
    """An OpenAI stored completion with its messages beside it."""
    del requests
    messages = said.get("messages") or said.get("input") or (said.get("request") or {}).get("messages")
    if not messages:
        raise UnreadableError(
            "a completion without its messages: fetch them from /chat/completions/ID/messages"
        )
    request = {
        k: said[k] for k in ("model", "temperature", "tools", "response_format", "seed") if said.get(k)
    }
    request["messages"] = messages
    response = {k: v for k, v in said.items() if k not in ("messages", "input", "request", "metadata")}
    return Told(request, response, _time(said.get("created")), tags=_strings(said.get("metadata")))


def _litellm(said: Json, requests: Mapping[str, Json]) -> Told:
    """A row of LiteLLM's spend log or of its standard logging payload."""
    del requests
    started, ended = _time(said["startTime"]), _time(said.get("endTime"))
    parameters = _maybe_json(said.get("model_parameters") or {})
    request = {**_object(parameters, "model_parameters"), "model": said.get("model_group") or said["model"]}
    request["messages"] = _maybe_json(said["messages"])
    response = _answer(_maybe_json(said["response"]), str(said["model"]))
    failed = said.get("status") == "failure"
    return Told(
        request=request,
        response=response,
        at=started,
        status=500 if failed else 200,
        total_s=_span(started, ended),
        ttft_s=_span(started, _time(said.get("completionStartTime"))),
        task_id=str(said.get("session_id") or said.get("trace_id") or ""),
        tags={str(t): "" for t in _maybe_json(said.get("request_tags") or [])},
    )


def _langfuse(said: Json, requests: Mapping[str, Json]) -> Told:
    """A generation as Langfuse exports observations."""
    del requests
    asked, answered = _maybe_json(said["input"]), _maybe_json(said["output"])
    request = (
        dict(asked) if isinstance(asked, dict) and "messages" in asked else {"messages": _messages(asked)}
    )
    request |= {"model": said.get("model") or "", **(_maybe_json(said.get("modelParameters")) or {})}
    started, ended = _time(said["startTime"]), _time(said.get("endTime"))
    response = _answer(answered, str(said.get("model") or ""))
    if "usage" not in response:
        response["usage"] = _langfuse_usage(said.get("usageDetails") or said.get("usage") or {})
    return Told(
        request=request,
        response=response,
        at=started,
        status=500 if said.get("level") == "ERROR" else 200,
        total_s=_span(started, ended),
        ttft_s=_span(started, _time(said.get("completionStartTime"))),
        task_id=str(said.get("sessionId") or said.get("traceId") or ""),
        tags=_strings(_maybe_json(said.get("metadata"))),
    )


def _langfuse_usage(usage: Json) -> Json:
    read = int(usage.get("input_cached_tokens") or usage.get("cache_read_input_tokens") or 0)
    written = int(usage.get("input_cache_creation") or usage.get("cache_creation_input_tokens") or 0)
    return {
        "prompt_tokens": int(usage.get("input") or usage.get("promptTokens") or 0) + read + written,
        "completion_tokens": int(usage.get("output") or usage.get("completionTokens") or 0),
        "prompt_tokens_details": {"cached_tokens": read, "cache_write_tokens": written},
    }


def _helicone(said: Json, requests: Mapping[str, Json]) -> Told:
    """A request as Helicone exports it."""
    del requests
    started = _time(said.get("request_created_at") or said.get("created_at"))
    ended = _time(said.get("response_created_at"))
    delay = said.get("delay_ms") or said.get("latency")
    return Told(
        request=_object(_maybe_json(said["request_body"]), "request_body"),
        response=_object(_maybe_json(said["response_body"]), "response_body"),
        at=started,
        status=int(said.get("response_status") or said.get("status") or 200),
        total_s=float(delay) / 1000 if delay else _span(started, ended),
        ttft_s=float(said.get("time_to_first_token") or 0) / 1000,
        task_id=str((said.get("request_properties") or {}).get("Helicone-Session-Id") or ""),
        tags=_strings(said.get("request_properties") or said.get("properties")),
    )


_Belongs = Callable[[Json], bool]
_Read = Callable[[Json, Mapping[str, Json]], Told]
_FORMS: tuple[tuple[str, _Belongs, _Read], ...] = (
    ("helicone", lambda s: "request_body" in s and "response_body" in s, _helicone),
    ("openai batch", lambda s: "custom_id" in s and "response" in s, _batch),
    ("litellm", lambda s: "startTime" in s and "messages" in s and "response" in s, _litellm),
    ("langfuse", lambda s: "startTime" in s and "input" in s and "output" in s, _langfuse),
    ("stored completion", lambda s: str(s.get("object", "")).startswith("chat.completion"), _stored),
    ("plain", lambda s: "request" in s and "response" in s, _plain),
    ("chat", lambda s: isinstance(s.get("messages"), list), _chat),
)
"""Asked in this order: the first that belongs reads the line."""


def _records(
    said: Json, told: Told, alias: str, target_of: Callable[[str], str], mtime: float
) -> list[Record]:
    asked = str(told.request.get("model") or "unknown")
    at = told.at if told.at is not None else mtime
    answered_by = str(told.response.get("model") or "")
    key = _key(at, said, alias)
    target = target_of(asked)
    usage = usage_of(told.response)
    attempt = Attempt(
        target=target,
        status=told.status,
        billed="yes" if told.status < 400 else "unknown",
        started=at,
        ended=at + told.total_s,
    )
    call = Call(
        key=key,
        at=at,
        route="chat.completions" if "messages" in told.request else "completions",
        alias=alias or asked,
        target=target,
        status=told.status,
        request=msgspec.json.encode(told.request),
        response=msgspec.json.encode(told.response),
        attempts=[attempt],
        answered_by=answered_by,
        fingerprint=str(told.response.get("system_fingerprint") or ""),
        usage=usage if usage != Usage() else None,
        ttft_s=told.ttft_s,
        total_s=told.total_s,
        finish_reason=_finish(told.response),
        task_id=told.task_id,
        tags=told.tags,
    )
    return [call, *_feedback(told, call)]


def _feedback(told: Told, call: Call) -> list[Feedback]:
    said: list[Feedback] = []
    if told.expected:
        said.append(
            Feedback(
                key=_key(call.at, call.key, "expected"), call=call.key, at=call.at, expected=told.expected
            )
        )
    for metric, value in told.grades.items():
        key = _key(call.at, call.key, metric)
        said.append(Feedback(key=key, call=call.key, at=call.at, metric=metric, value=value))
    return said


def _key(at: float, content: object, more: str) -> str:
    """A UUIDv7's form with a hash for noise: the same line always has the same key."""
    noise = sha256(msgspec.json.encode([content, more], order="sorted")).hexdigest()
    return f"{max(0, int(at * 1000)) & (2**48 - 1):012x}7{noise[:3]}8{noise[3:18]}"


def _lines(path: Path, fault: Callable[[int, str], None]) -> Iterator[tuple[int, Json]]:
    try:
        with path.open("rb") as file:
            start = file.read(64).lstrip()[:1]
            file.seek(0)
            if start == b"[":
                yield from _elements(path, file.read(), fault)
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield from _line(number, line, fault)
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}", expected="a file of recorded calls"
        ) from error


def _line(number: int, line: bytes, fault: Callable[[int, str], None]) -> Iterator[tuple[int, Json]]:
    try:
        yield number, msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        fault(number, f"not a JSON object: {error}")
    except RecursionError:
        fault(number, _TOO_DEEP)


def _elements(path: Path, raw: bytes, fault: Callable[[int, str], None]) -> Iterator[tuple[int, Json]]:
    try:
        elements = msgspec.json.decode(raw, type=list[msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is not a JSON array: {error}", expected="a whole array, or JSONL"
        ) from error
    except RecursionError as error:
        raise InputError(
            f"{path} is {_TOO_DEEP}", expected="JSONL, where one bad line costs only itself"
        ) from error
    for number, element in enumerate(elements, start=1):
        yield from _line(number, bytes(element), fault)


def _batch_inputs(path: Path) -> Iterator[tuple[str, Json]]:
    faults: list[Fault] = []
    for number, line in _lines(path, lambda n, reason: faults.append(Fault(n, reason))):
        if not isinstance(line.get("body"), dict) or "custom_id" not in line:
            faults.append(Fault(number, "no custom_id and body"))
            continue
        yield str(line["custom_id"]), cast(Json, line["body"])
    if faults:
        raise InputError(
            f"{path}: line {faults[0].line}: {faults[0].reason}",
            expected="an OpenAI batch input file, each line with custom_id and body",
        )


def _answer(said: object, model: str) -> Json:
    """A completion, whether the log has it whole, as a message, or as text."""
    if isinstance(said, dict):
        answer = cast(Json, said)
        return answer if "choices" in answer or "error" in answer else _completion(answer, model)
    if isinstance(said, list) and said:
        return _completion(cast(list[Json], said)[-1], model)
    return _completion({"content": said if isinstance(said, str) else ""}, model)


def _completion(message: Json, model: str) -> Json:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": "stop"}
    return {"object": "chat.completion", "model": model, "choices": [choice]}


def _messages(said: object) -> list[Json]:
    if isinstance(said, list):
        return cast(list[Json], said)
    if isinstance(said, str):
        return [{"role": "user", "content": said}]
    raise UnreadableError("the input has no messages")


def _object(value: object, name: str) -> Json:
    if not isinstance(value, dict):
        raise UnreadableError(f"{name} is not an object")
    return cast(Json, value)


def _maybe_json(value: Any) -> Any:
    """Exports to CSV and back leave JSON within strings."""
    if isinstance(value, str) and value[:1] in ("{", "["):
        try:
            return msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError):
            return value
    return value


def _expected(said: Json) -> str:
    value = said.get("expected", said.get("ideal", ""))
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _strings(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        return {}
    pairs = cast(Json, value).items()
    return {str(k): v if isinstance(v, str) else msgspec.json.encode(v).decode() for k, v in pairs}


def _time(value: object) -> float | None:
    """Unix seconds from a number (milliseconds when absurdly large) or ISO 8601 (UTC when it has no zone)."""
    if value is None or value == "":
        return None
    if isinstance(value, (int, float)):
        return float(value) / 1000 if value > 1e11 else float(value)
    moment = dt.datetime.fromisoformat(str(value))
    return (moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)).timestamp()


def _span(start: float | None, end: float | None) -> float:
    return max(0.0, end - start) if start is not None and end is not None else 0.0


def _finish(response: Json) -> str:
    choices = cast(list[Json], response.get("choices") or [])
    return str(choices[0].get("finish_reason") or "") if choices else ""
