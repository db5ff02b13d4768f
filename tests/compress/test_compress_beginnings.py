"""Shared beginnings: nothing is lost, nothing sees more or less than it would alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.compress.beginnings import LEAST_SHARED, bundles, distinct_tokens
from understudy.compress.corpus import Document, collate, encode_chat, pack, take
from understudy.compress.decoder import may_share
from understudy.compress.fidelity import final_hidden

LEAD = list(range(3, 3 + LEAST_SHARED + 2))


def chat(*own: int, lead: list[int] = LEAD) -> Document:
    return Document([*lead, *own], [False] * len(lead) + [True] * len(own))


def whole(bundle: list[Document]) -> list[Document]:
    """The documents a bundle was made from."""
    if len(bundle) == 1:
        return bundle
    first, *rest = bundle
    return [Document(first.tokens[: d.start] + d.tokens, first.answer[: d.start] + d.answer) for d in rest]


def test_a_bundle_by_hand():
    (bundle,) = bundles([chat(40, 41), chat(30), chat(40, 42)], 64)
    assert [d.tokens for d in bundle] == [LEAD, [LEAD[-1], 30], [LEAD[-1], 40, 41], [LEAD[-1], 40, 42]]
    assert [(d.start, d.after) for d in bundle] == [(0, -1)] + [(len(LEAD) - 1, 0)] * 3
    assert bundle[1].answer == [False, True]


def test_two_tasks_are_two_bundles():
    other = [5, *LEAD[1:]]
    found = bundles([chat(40), chat(41, lead=other), chat(42), chat(43, lead=other)], 64)
    assert sorted(len(b) for b in found) == [3, 3]


def test_a_short_common_beginning_is_left_alone():
    assert [len(b) for b in bundles([chat(40, lead=LEAD[:8]), chat(41, lead=LEAD[:8])], 64)] == [1, 1]


def test_a_bundle_fits_its_row_and_repeats_the_beginning():
    found = bundles([chat(40 + n) for n in range(8)], len(LEAD) + 6)
    assert all(sum(len(d.tokens) for d in b) <= len(LEAD) + 6 for b in found)
    assert [b[0].tokens for b in found] == [LEAD] * len(found)
    assert sum(len(b) - 1 for b in found) == 8


def test_a_document_that_is_anothers_beginning_keeps_a_token():
    (bundle,) = bundles([chat(), chat(40)], 64)
    assert sorted(d.tokens for d in whole(bundle)) == [LEAD, [*LEAD, 40]]
    assert min(len(d.tokens) for d in bundle[1:]) == 2


documents_drawn = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 20), st.lists(st.integers(3, 6), min_size=2, max_size=9)),
    min_size=1,
    max_size=24,
)


@given(documents_drawn, st.sampled_from([40, 64, 128]))
@settings(max_examples=200)
def test_nothing_is_lost(drawn: list[tuple[int, int, list[int]]], length: int) -> None:
    documents = [chat(*own, lead=[n, *LEAD[:shared]]) for n, shared, own in drawn]
    found = [d for bundle in bundles(documents, length) for d in whole(bundle)]
    assert sorted(d.tokens for d in found) == sorted(d.tokens for d in documents)
    rows = pack(documents, length, share=True)
    assert all(row.tokens <= length for row in rows)
    assert sum(row.tokens for row in rows) <= sum(len(d.tokens) for d in documents)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_a_continuation_sees_what_it_would_alone(family, make):
    model = make(family, **({"sliding_window": 64} if family == "gemma3_text" else {}))
    documents = [chat(40, 41), chat(30, 31, 32), chat(40, 42), chat(9, 8, lead=[7, 7])]
    rows = pack(documents, 64, share=True)
    assert sum(row.tokens for row in rows) < sum(len(d.tokens) for d in documents)
    batch = collate(rows)
    with torch.no_grad():
        shared = final_hidden(model, batch)
        alone = {tuple(d.tokens): final_hidden(model, collate(pack([d], 64))) for d in documents}
    numbers = batch.document[batch.predicts]
    placed = [d for row in rows for d in row.documents]
    for number, piece in enumerate(placed):
        lead = placed[0].tokens[: piece.start] if piece.after >= 0 else []
        seen = (*lead, *piece.tokens)
        wanted = next(states for tokens, states in alone.items() if tokens[: len(seen)] == seen)
        here = slice(piece.start, piece.start + len(piece.tokens) - 1)
        torch.testing.assert_close(shared[numbers == number], wanted[here], rtol=1e-4, atol=1e-5)


def test_a_narrow_window_may_not_share(make):
    assert may_share(make("llama"), 512)
    assert not may_share(make("mistral"), 64)
    assert may_share(make("mistral", sliding_window=64), 64)


def test_a_common_beginning_counts_once_in_a_budget():
    documents = [chat(*range(40, 47)) for _ in range(3)]
    assert list(distinct_tokens(documents)) == [25, 9, 9]
    assert len(take(documents, 34, seed=0)) == 2
    assert len(take(documents, 34, seed=0, share=True)) == 2
    assert len(take(documents, 35, seed=0, share=True)) == 3


def test_a_message_without_weight_is_read_and_not_learnt(tokenizer):
    turn = [{"role": "user", "content": "is it warm"}, {"role": "assistant", "content": "yes"}]
    example = [turn[0], turn[1] | {"weight": 0}]
    learnt = encode_chat(tokenizer, [*example, *turn])
    assert sum(learnt.answer) == 2
    assert learnt.tokens == encode_chat(tokenizer, [*turn, *turn]).tokens
