"""Protocol: server-sent events assembled as the vendors' own libraries would."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from understudy import protocol


def sse(*chunks: object, end: bytes = b"\n") -> bytes:
    events = [b"data: " + msgspec.json.encode(chunk) + end + end for chunk in chunks]
    return b"".join([*events, b"data: [DONE]" + end + end])


def piece(**delta: object) -> dict[str, object]:
    return {"id": "c1", "model": "m", "choices": [{"index": 0, "delta": delta}]}


def test_a_stream_becomes_the_answer_it_would_have_been() -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 5}}
    finish = {"id": "c1", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    raw = sse(
        piece(role="assistant", content="Hel"), piece(content="lo"), finish, {"choices": [], "usage": usage}
    )
    body = protocol.assemble_stream(raw)
    assert protocol.answer_text(body) == "Hello"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert protocol.usage_of(body) == protocol.Usage(prompt_tokens=7, completion_tokens=2, cached_tokens=5)


def test_tool_calls_are_joined_by_index() -> None:
    first = {"index": 0, "id": "t1", "type": "function", "function": {"name": "look", "arguments": '{"a"'}}
    second = {"index": 0, "function": {"arguments": ":1}"}}
    body = protocol.assemble_stream(sse(piece(tool_calls=[first]), piece(tool_calls=[second])))
    call = body["choices"][0]["message"]["tool_calls"][0]
    assert (call["id"], call["function"]) == ("t1", {"name": "look", "arguments": '{"a":1}'})


def test_several_choices_text_completions_and_logprobs_are_kept_apart() -> None:
    def text(index: int, value: str) -> dict[str, object]:
        choice = {"index": index, "text": value, "logprobs": {"tokens": [value]}}
        return {"object": "text_completion", "choices": [choice]}

    body = protocol.assemble_stream(sse(text(1, "b"), text(0, "a"), text(1, "B")))
    assert [c["text"] for c in body["choices"]] == ["a", "bB"]
    assert body["choices"][1]["logprobs"]["tokens"] == ["b", "B"]


def test_garbage_and_a_cut_end_lose_nothing_else() -> None:
    raw = b": comment\ndata: not json\n\nevent: x\n" + sse(piece(content="a")) + b'data: {"choices":[]}'
    assert protocol.answer_text(protocol.assemble_stream(raw)) == "a"
    assert len(list(protocol.iter_events(raw))) == 3


@given(st.lists(st.text(max_size=20), max_size=8), st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_any_text_survives_any_line_ending(texts: list[str], end: bytes) -> None:
    raw = sse(*[piece(content=text) for text in texts], end=end)
    assert protocol.answer_text(protocol.assemble_stream(raw)) == "".join(texts)


def test_equal_prompts_have_equal_hashes_whatever_the_sampling() -> None:
    messages = [{"role": "user", "content": "hi"}]
    one = protocol.prompt_hash({"model": "a", "messages": messages, "temperature": 0})
    assert one == protocol.prompt_hash({"messages": messages, "stream": True})
    assert one != protocol.prompt_hash({"messages": [{"role": "user", "content": "ho"}]})


def test_modalities_and_features_are_read_from_the_request() -> None:
    request = {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]},
        ],
        "stream": True,
        "n": 2,
        "response_format": {"type": "json_schema"},
    }
    assert protocol.modalities_of(request) == {"text", "image"}
    assert protocol.features_of(request) == {"stream", "n", "json_schema", "system"}
