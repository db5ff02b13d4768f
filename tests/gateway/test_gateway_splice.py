"""Finding the model's name in a body: the right span, or a refusal, for any JSON a client can write."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.gateway.refusal import Refusal
from understudy.gateway.splice import read_head, splice

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text() | st.just("model"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["model", "stream", "x", "Model", 'mo"del']), inner, max_size=4)
    ),
    max_leaves=12,
)
BODIES = st.fixed_dictionaries(
    {"model": st.text(min_size=1)},
    optional={"stream": st.booleans(), "tools": JSON, "messages": JSON, "é": JSON},
)


def _shuffled(body: dict[str, Any], order: list[int]) -> dict[str, Any]:
    keys = [key for _, key in sorted(zip(order, body, strict=False))]
    return {key: body[key] for key in [*keys, *(k for k in body if k not in keys)]}


@given(
    body=BODIES,
    order=st.lists(st.integers(), min_size=5, max_size=5),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 0, 2]),
    new=st.text(min_size=1),
)
def test_only_the_models_value_changes(
    body: dict[str, Any], order: list[int], ascii_only: bool, indent: int | None, new: str
) -> None:
    body = _shuffled(body, order)
    try:
        raw = json.dumps(body, ensure_ascii=ascii_only, indent=indent).encode()
    except UnicodeEncodeError:
        return
    if re.search(r"\\ud[89a-f]", raw.decode()):
        return  # lone surrogates are covered below
    head = read_head(raw)
    assert head.model == body["model"]
    assert head.stream is body.get("stream", False)
    assert json.loads(raw[head.start : head.end]) == body["model"]
    name = json.dumps(new).encode()
    spliced = splice(raw, head, name)
    assert json.loads(spliced) == {**body, "model": new}
    assert spliced[: head.start] == raw[: head.start]
    assert spliced[head.start + len(name) :] == raw[head.end :]


@pytest.mark.parametrize(
    ("raw", "model"),
    [
        (b'{"m\\u006fdel":"a"}', "a"),
        (b'{"model":"\\u0061\\"b"}', 'a"b'),
        (b'{"x":"\\u0065","model" \n:\t"a"}', "a"),
        (b' \r\n{"tools":[{"model":"b"}],"model":"a","metadata":{"model":{"model":1}}} ', "a"),
        (b'{"messages":["\\"model\\":\\"b\\"", "\\\\"],"model":"a","x":"model"}', "a"),
        (b'{"model":"a","Model":"b"}', "a"),
    ],
)
def test_odd_spellings_are_found(raw: bytes, model: str) -> None:
    head = read_head(raw)
    assert head.model == model
    assert json.loads(splice(raw, head, b'"Z"')) == {**json.loads(raw), "model": "Z"} | (
        {"model": "Z"} if b"m\\u006fdel" not in raw else {}
    )


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b'{"model":"a","model":"b"}', "duplicate_key"),
        (b'{"model":"a","model":"a"}', "duplicate_key"),
        (b'{"m\\u006Fdel":"b","model":"a"}', "duplicate_key"),
        (b'{"model":"a","m\\u006fdel":"b"}', "duplicate_key"),
        (b'{"x":12,"model":"a","x":1,"y":{"model":2}}', "duplicate_key"),
        (b'{"x":1,"model":"a","x":12,"y":{"model":2}}', "duplicate_key"),
        (b"", "invalid_json"),
        (b"model=a", "invalid_json"),
        (b'{"model":"a"', "invalid_json"),
        (b'{"model":"a"}{}', "invalid_json"),
        (b'{"model":"a","x":"\xff"}', "invalid_json"),
        (b'{"model":"a","x":"\\ud800"}', "invalid_json"),
        (b'\xef\xbb\xbf{"model":"a"}', "invalid_json"),
        (b'{"model":"a","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "invalid_json"),
        (b'{"messages":[]}', "invalid_value"),
        (b'{"x":{"model":"a"}}', "invalid_value"),
        (b'{"model":null}', "invalid_value"),
        (b'{"model":["a"]}', "invalid_value"),
        (b'{"model":"a","stream":"yes"}', "invalid_value"),
        (b'["model"]', "invalid_value"),
    ],
)
def test_what_cannot_be_routed_is_refused(raw: bytes, code: str) -> None:
    with pytest.raises(Refusal) as refusal:
        read_head(raw)
    assert (refusal.value.status, refusal.value.code) == (400, code)
