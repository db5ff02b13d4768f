"""Exchanges, the split by prompt, chats, and the hash that names a sample."""

from __future__ import annotations

import io
from collections.abc import Callable

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.traffic.exports import export
from understudy.traffic.record import Attempt, Call, Feedback, new_key
from understudy.traffic.sample import Exchange, chats, exchanges, sample_hash, shapes, split
from understudy.traffic.store import Store

MakeCall = Callable[..., Call]

STREAM = b"""data: {"choices":[{"index":0,"delta":{"role":"assistant","content":"ye"}}]}

data: {"choices":[{"index":0,"delta":{"content":"s"},"finish_reason":"stop"}]}

data: [DONE]

"""


def exchange(prompt_hash: str, answer: str = "a") -> Exchange:
    return Exchange(
        key=new_key(),
        at=0.0,
        alias="a",
        target="o/m",
        request={},
        body={},
        answer=answer,
        expected=None,
        grades={},
        task_id="",
        tags={},
        prompt_hash=prompt_hash,
        usage=None,
        status=200,
        total_s=0.0,
        ttft_s=0.0,
    )


def test_an_exchange_has_the_answer_and_what_was_said_of_it(store: Store, make_call: MakeCall) -> None:
    streamed = make_call(response=STREAM, stream=True)
    plain = make_call(answer="no")
    said = [
        Feedback(key=new_key(), call=plain.key, at=1.0, expected="maybe"),
        Feedback(key=new_key(), call=plain.key, at=2.0, expected="yes"),
        Feedback(key=new_key(), call=plain.key, at=3.0, metric="helpful", value=0.5),
    ]
    broken = make_call(response=b"<html>")
    hidden = make_call(request=b"", response=b"")
    failed = make_call(status=500, response=b'{"error": {"message": "overloaded"}}', stream=True)
    store.insert([streamed, plain, *said, broken, hidden, failed], "s", 1)
    first, second = exchanges(store, "assistant")
    assert (first.answer, first.expected, first.body["choices"][0]["finish_reason"]) == ("yes", None, "stop")
    assert (second.answer, second.expected, second.grades) == ("no", "yes", {"helpful": 0.5})
    assert first.prompt_hash == second.prompt_hash
    assert exchanges(store, "assistant", only_ok=False)[-1].body["error"]["message"] == "overloaded"
    assert exchanges(store, "other") == []
    assert len(exchanges(store, None)) == 2
    assert len(shapes(store, "assistant").calls) == 4


def test_an_answer_that_broke_off_is_not_sampled(store: Store, make_call: MakeCall) -> None:
    tried = Attempt(target="o/m", status=0, billed="no", started=0.0, ended=0.1, error="cannot connect")
    whole = Attempt(target="o/m", status=200, billed="yes", started=0.1, ended=1.0)
    broken = msgspec.structs.replace(whole, billed="unknown", error="connection closed by the upstream")
    retried = make_call(attempts=[tried, whole])
    cut = make_call(response=STREAM[:90], stream=True, attempts=[tried, broken])
    store.insert([retried, cut], "s", 1)
    assert [e.key for e in exchanges(store, "assistant")] == [retried.key]
    assert [e.key for e in exchanges(store, "assistant", only_ok=False)] == [retried.key, cut.key]


def test_chats_end_with_the_recorded_answer(store: Store, make_call: MakeCall) -> None:
    store.insert([make_call(answer="no"), make_call(response=b'{"choices": []}')], "s", 1)
    assert chats(exchanges(store, "assistant")) == [
        [{"role": "user", "content": "Is the sky blue?"}, {"role": "assistant", "content": "no"}]
    ]


def test_right_answers_stand_in_for_recorded_ones(store: Store, make_call: MakeCall) -> None:
    asked = [make_call(answer="no", tags={"grader": g} if g else {}) for g in ("", "contains", "code")]
    right = ("yes", '["it is", "yes"]', "assert answer()")
    said = [
        Feedback(key=new_key(), call=c.key, at=1.0, expected=e) for c, e in zip(asked, right, strict=True)
    ]
    store.insert([*asked, *said], "s", 1)
    sample = exchanges(store, "assistant")
    assert [c[-1]["content"] for c in chats(sample, right=True)] == ["yes", "it is", "no"]
    assert [c[-1]["content"] for c in chats(sample)] == ["no", "no", "no"]


def test_earlier_answers_are_read_and_not_learnt(store: Store, make_call: MakeCall) -> None:
    store.insert([make_call(answer="no")], "s", 1)
    (one,) = exchanges(store, "assistant")
    shown = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    (chat,) = chats([one._replace(request={"messages": [*shown, {"role": "user", "content": "3+3?"}]})])
    assert [m.get("weight") for m in chat] == [None, 0, None, None]


@given(st.lists(st.integers(0, 40), max_size=60), st.floats(0.05, 0.95))
@settings(max_examples=100)
def test_equal_prompts_never_stand_on_both_sides(prompts: list[int], held_out: float) -> None:
    sample = [exchange(f"{hash((p, 'x')) & (2**256 - 1):064x}") for p in prompts]
    parts = split(sample, held_out)
    assert len(parts.train) + len(parts.held_out) == len(sample)
    assert not {e.prompt_hash for e in parts.train} & {e.prompt_hash for e in parts.held_out}
    alone = [split([e], held_out).held_out for e in sample]
    assert [e for one in alone for e in one] == parts.held_out


def test_the_split_has_the_share_asked_for(store: Store, make_call: MakeCall) -> None:
    store.insert([make_call(prompt=f"question {n}") for n in range(2000)], "s", 1)
    held_out = len(split(exchanges(store, "assistant"), 0.3).held_out)
    assert abs(held_out - 600) < 4 * (2000 * 0.3 * 0.7) ** 0.5  # four standard deviations


def test_the_hash_sees_every_answer_and_is_order_true() -> None:
    one, two = exchange("a1", "yes"), exchange("b2", "no")
    assert sample_hash([one, two]) == sample_hash([one, two])
    changed = [two._replace(answer="yes"), two._replace(expected="x"), two._replace(prompt_hash="c")]
    assert len({sample_hash([one, t]) for t in [two, *changed]} | {sample_hash([two, one])}) == 5


def test_a_metadata_record_still_has_a_shape(store: Store, make_call: MakeCall) -> None:
    store.insert([make_call(request=b"", response=b"", stream=True)], "s", 1)
    assert shapes(store).calls[0].features == {"stream"}
    assert msgspec.json.encode(shapes(store).calls[0].usage) == b'{"prompt_tokens":12,"completion_tokens":3}'


def test_messages_and_responses_are_read_as_chats(store: Store, make_call: MakeCall) -> None:
    tool = {"name": "look", "input_schema": {"type": "object"}}
    asked = {"model": "assistant", "max_tokens": 9, "messages": [{"role": "user", "content": "Is it?"}]}
    message = {
        "id": "m1",
        "model": "claude",
        "content": [
            {"type": "text", "text": "yes"},
            {"type": "tool_use", "id": "t", "name": "look", "input": {}},
        ],
        "stop_reason": "tool_use",
        "usage": {"input_tokens": 3, "output_tokens": 4},
    }
    part = {"type": "output_text", "text": "yes", "annotations": []}
    response = {"id": "resp_1", "model": "gpt", "output": [{"type": "message", "content": [part]}]}
    calls = [
        make_call(
            route="messages",
            request=msgspec.json.encode(asked | {"tools": [tool]}),
            response=msgspec.json.encode(message),
            attempts=[
                Attempt(target="c/m", status=200, billed="yes", started=0.0, ended=1.0, form="anthropic")
            ],
        ),
        make_call(
            route="responses",
            request=msgspec.json.encode({"model": "assistant", "input": "Is it?"}),
            response=msgspec.json.encode(response),
        ),
        make_call(prompt="Is it?"),
        make_call(
            route="messages", request=msgspec.json.encode(asked | {"tools": [{"type": "bash_20250124"}]})
        ),
    ]
    store.insert(calls, "s", 1)
    first, second, third = exchanges(store, "assistant")
    assert (first.answer, second.answer, third.answer) == ("yes", "yes", "yes")
    assert second.prompt_hash == third.prompt_hash != first.prompt_hash
    assert chats([first])[0][-1]["tool_calls"][0]["function"]["name"] == "look"
    shape = shapes(store, "assistant").calls[0]
    assert ("tools" in shape.features, shape.max_tokens) == (True, 9)
    stored = store.call(calls[0].key)
    assert stored is not None
    assert stored.call.attempts[0].form == "anthropic"
    out = io.BytesIO()
    export(store, out)
    rows = [msgspec.json.decode(line) for line in out.getvalue().splitlines()]
    assert [row["request"].get("messages", [{}])[0].get("content") for row in rows] == ["Is it?"] * 3 + [None]
    assert rows[1]["response"]["choices"][0]["message"]["content"] == "yes"


def test_a_plan_reads_a_window_or_the_latest_calls(store: Store, make_call: MakeCall) -> None:
    """Of several targets both begin where the one that was cut begins: rates would not be of one time."""
    mixed = [make_call(target="o/often" if n % 4 else "o/seldom") for n in range(40)]
    store.insert(mixed, "s", 1)
    assert shapes(store, "assistant") == shapes(store, "assistant", latest=0) == shapes(store, latest=41)
    assert shapes(store, "assistant").whole
    last = shapes(store, "assistant", latest=6)
    assert ([call.at for call in last.calls], last.whole) == ([call.at for call in mixed[-6:]], False)
    since = shapes(store, "assistant", since=mixed[30].at)
    assert ([call.at for call in since.calls], since.whole) == ([call.at for call in mixed[30:]], True)
    both = shapes(store, targets=("o/often", "o/seldom"), latest=6)
    often = [call.at for call in mixed if call.target == "o/often"][-6:]
    assert min(call.at for call in both.calls) == often[0]
    assert len(both.calls) == 6 + sum(call.at >= often[0] for call in mixed if call.target == "o/seldom")
    assert not both.whole
