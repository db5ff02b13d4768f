"""Redaction: what is found, what is not, and that bodies stay what they are."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.config import Redact
from understudy.errors import InputError
from understudy.protocol import assemble_stream
from understudy.traffic.record import Call, Feedback
from understudy.traffic.redact import Redactor, is_card_number, redactor_of

DROP = Redactor(mode="drop")


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("write to jane.doe+x@mail.example.co.uk.", "write to [email]."),
        ("<a@b.io>", "<[email]>"),
        ("call +49 30 901820 or +14155550123", "call [phone] or [phone]"),
        ("call (415) 555-0123 today", "call [phone] today"),
        ("card 4111 1111 1111 1111, ok", "card [card], ok"),
        ("5500-0000-0000-0004", "[card]"),
        ("key sk-proj-abcdefghijklmnopqrstuvwx done", "key [key] done"),
        ("AKIAIOSFODNN7EXAMPLE", "[key]"),
        ("ghp_" + "a1" * 18, "[key]"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "[key]"),
    ],
)
def test_what_is_found(text: str, clean: str) -> None:
    assert DROP.text(text) == clean


@pytest.mark.parametrize(
    "text",
    [
        "on 2025-04-14 at 12:30",
        "4111 1111 1111 1112",  # the last digit is wrong
        "0000 0000 0000 0000",
        "version 1.2.3, 192.168.100.200",
        "order 12345 costs 1764000000 points",
        "a @ b, user@localhost",
        "sk-short",
        "550e8400-e29b-41d4-a716-446655440000",
    ],
)
def test_what_is_left_alone(text: str) -> None:
    assert DROP.text(text) == text


def test_luhn() -> None:
    # Wikipedia's worked example: 1789372997 with check digit 4; padded to a card's length
    assert not is_card_number("17893729974")  # too short for a card
    assert is_card_number("4242424242424242")
    assert not is_card_number("4242424242424241")


def test_equal_findings_have_equal_hashes_under_one_salt() -> None:
    one, other = (Redactor(salt=salt) for salt in (b"one", b"other"))
    assert one.text("a@b.io, a@b.io").split(", ")[0] == one.text("a@b.io")
    assert one.text("a@b.io") != other.text("a@b.io")
    assert one.text("a@b.io") != one.text("c@b.io")


def test_a_body_without_a_finding_is_byte_for_byte_the_same() -> None:
    body = (
        b'{ "messages": [ {"role":"user" , "content":"\\u0041 price of 12"} ], "created": 4242424242424242 }'
    )
    assert DROP.body(body) is body
    assert DROP.body(b"") == b""


def test_a_body_with_one_stays_json_and_numbers_stay_numbers() -> None:
    body = b'{"messages":[{"content":[{"type":"text","text":"I am a@b.io"}]}],"n":4242424242424242}'
    clean = msgspec.json.decode(DROP.body(body))
    assert clean == {
        "messages": [{"content": [{"type": "text", "text": "I am [email]"}]}],
        "n": 4242424242424242,
    }


def test_an_escaped_finding_is_found() -> None:
    assert b"[email]" in DROP.body(b'{"content":"a\\u0040b.io"}')


def test_a_name_is_looked_at_as_well() -> None:
    assert DROP.body(b'{"seen":{"a@b.io":1}}') == b'{"seen":{"[email]":1}}'


def test_what_a_repeated_name_hides_is_not_kept() -> None:
    assert DROP.body(b'{"a": "a@b.io", "a": "x", "n": 1}') == b'{"a":"x","n":1}'


def test_tokens_that_spell_a_finding_go_with_it() -> None:
    said = {"content": "a@b.io"}, {"content": [{"token": "a@"}, {"token": "b.io"}]}
    body = {"logprobs": True, "choices": [{"message": said[0], "logprobs": said[1]}]}
    clean = msgspec.json.decode(DROP.body(msgspec.json.encode(body)))
    assert clean == {"logprobs": True, "choices": [{"message": {"content": "[email]"}, "logprobs": None}]}
    raw = b"data: " + msgspec.json.encode({"choices": [{"delta": said[0], "logprobs": said[1]}]}) + b"\n\n"
    assert b"b.io" not in DROP.stream(raw)


@pytest.mark.parametrize(
    "body",
    [b'{"n":123456789012345678901234567890,"c":"a@b.io"}', b'{"half":"\\ud800","c":"a@b.io"}'],
)
def test_odd_json_is_written_again_as_it_was(body: bytes) -> None:
    assert DROP.body(body) == body.replace(b"a@b.io", b"[email]")


def test_a_finding_with_half_a_character_is_hashed() -> None:
    key = '{"c":"-----BEGIN PRIVATE KEY-----\\ud800-----END PRIVATE KEY-----"}'
    assert re.fullmatch(rb'\{"c":"\[key:[0-9a-f]{8}\]"\}', Redactor(salt=b"s").body(key.encode()))


@pytest.mark.parametrize(
    "raw", [b'data: {"choices":[3]}\n\n', b'data: {"choices":[{"text":7}]}\n\n', b"data: {\n\n"]
)
def test_a_stream_that_makes_no_sense_has_no_finding_left(raw: bytes) -> None:
    assert DROP.stream(raw + b": a@b.io\n\ndata: a@b.io\n\n") == raw + b": [email]\n\ndata: [email]\n\n"


def test_lines_that_have_a_finding_only_together_are_not_kept() -> None:
    key = b"-----BEGIN PRIVATE KEY-----\ndata: MIIE\ndata: -----END PRIVATE KEY-----"
    assert b"MIIE" not in DROP.stream(b"data: " + key + b"\n\n")


def anthropic(*pieces: str) -> list[dict[str, Any]]:
    deltas = [
        {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": piece}}
        for piece in pieces
    ]
    other = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "no harm"}}
    return [{"type": "message_start", "message": {"model": "c"}}, deltas[0], other, *deltas[1:]]


def responses(*pieces: str) -> list[dict[str, Any]]:
    kind = "response.function_call_arguments.delta"
    return [{"type": kind, "item_id": "fc_1", "output_index": 0, "delta": piece} for piece in pieces]


def arguments(*pieces: str) -> list[dict[str, Any]]:
    calls = [[{"index": 0, "function": {"arguments": piece}}] for piece in pieces]
    return [{"choices": [{"index": 0, "delta": {"tool_calls": call}}]} for call in calls]


def gemini(*pieces: str) -> list[dict[str, Any]]:
    return [{"candidates": [{"content": {"parts": [{"text": piece}]}}]} for piece in pieces]


@pytest.mark.parametrize("form", [anthropic, responses, arguments, gemini])
def test_a_finding_is_found_in_pieces_of_every_form(form: Callable[..., list[dict[str, Any]]]) -> None:
    said = form("write to ja", "ne@ex", "ample.org", " and on")
    raw = b"".join(b"event: x\ndata: %b\n\n" % msgspec.json.encode(event) for event in said)
    clean = DROP.stream(raw)
    for piece in (b"to ja", b"ne@ex", b"ample.org"):
        assert piece not in clean
    assert b"write to [email] and on" in clean
    assert (b"no harm" in clean) == (b"no harm" in raw)
    assert clean.count(b"event: x\ndata: {") == len(said)
    assert DROP.stream(clean) == clean


def test_texts_beside_each_other_are_not_read_as_one() -> None:
    first, second = ({"index": n, "delta": {"content": text}} for n, text in enumerate(("jane@", "b.io")))
    raw = b"data: " + msgspec.json.encode({"choices": [first, second]}) + b"\n\n"
    assert DROP.stream(raw) is raw


def test_what_a_repeated_name_hides_in_an_event_is_not_kept() -> None:
    assert DROP.stream(b'data: {"a":"a@b.io","a":"x"}\n\n') == b'data: {"a":"x"}\n\n'


def test_escapes_within_the_arguments_of_a_tool_hide_nothing() -> None:
    said = {"arguments": '{"to": "jane\\u0040b.io", "n": 1}'}
    assert msgspec.json.decode(DROP.body(msgspec.json.encode(said))) == {
        "arguments": '{"to":"[email]","n":1}'
    }


def test_a_body_nested_without_end_is_not_kept() -> None:
    assert DROP.body(b'{"a":' + b"[" * 100_000 + b'"a@b.io"') == b""


def test_settings_make_a_redactor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_SALT", "pepper")
    assert redactor_of(Redact(), tmp_path) is None
    hashing = redactor_of(Redact(rules=["email"], mode="hash", salt="env:THE_SALT"), tmp_path)
    assert hashing is not None
    assert hashing.text("a@b.io") == Redactor(salt=b"pepper").text("a@b.io")
    dropping = redactor_of(Redact(patterns={"ticket": r"TKT-\d+"}), tmp_path)
    assert dropping is not None
    assert dropping.text("TKT-1 a@b.io") == "[ticket] a@b.io"


def test_what_is_no_json_is_text() -> None:
    assert DROP.body(b"<p>mail a@b.io \xff</p>") == b"<p>mail [email] \xff</p>"


def test_an_image_is_not_looked_into() -> None:
    image = "data:image/png;base64," + "4111111111111111/" * 400
    body = msgspec.json.encode({"url": image})
    assert DROP.body(body) is body


def chunks(*pieces: str) -> bytes:
    events = [{"id": "c", "choices": [{"index": 0, "delta": {"content": p}}]} for p in pieces]
    return b"".join(b"data: " + msgspec.json.encode(e) + b"\n\n" for e in events) + b"data: [DONE]\n\n"


def test_a_finding_cut_in_two_by_chunks_is_found(make_call: Callable[..., Call]) -> None:
    call = make_call(stream=True, response=chunks("mail ja", "ne@b", ".io now"), task_id="a@b.io")
    clean = DROP.call(call)
    assert assemble_stream(clean.response)["choices"][0]["message"]["content"] == "mail [email] now"
    assert (clean.task_id, clean.key) == ("[email]", call.key)


def test_a_clean_stream_is_byte_for_byte_the_same() -> None:
    raw = chunks("no", "thing")
    assert DROP.stream(raw) is raw


def test_feedback_is_redacted_too() -> None:
    said = Feedback(key="k", call="c", at=0.0, comment="ask a@b.io", expected="+14155550123")
    clean = DROP.record(said)
    assert isinstance(clean, Feedback)
    assert (clean.comment, clean.expected) == ("ask [email]", "[phone]")


def test_own_patterns_and_a_choice_of_rules() -> None:
    redactor = Redactor(["email"], patterns={"ticket": r"TKT-\d+"}, mode="drop")
    assert redactor.text("TKT-12 of a@b.io, +14155550123") == "[ticket] of [email], +14155550123"


def test_bad_settings_are_named() -> None:
    with pytest.raises(InputError, match="salt"):
        Redactor()
    with pytest.raises(InputError, match="'emails'"):
        Redactor(["emails"], mode="drop")
    with pytest.raises(InputError, match="'x'"):
        Redactor(patterns={"x": "("}, mode="drop")


@given(st.text(alphabet="a0.@-+ (", max_size=3000))
@settings(max_examples=50)
def test_redacting_twice_changes_nothing_more(text: str) -> None:
    once = DROP.text(text)
    assert DROP.text(once) == once


def test_hostile_text_takes_no_time_without_end() -> None:
    # each would take hours with an unbounded pattern
    for text in ("a" * 200_000 + " ", "1 " * 100_000, "a@" + "b." * 100_000, "+1" * 100_000 + " "):
        DROP.text(text)
