"""Tokens, answer marks, packing: the off-by-one and pad-equals-end places."""

from __future__ import annotations

import pytest
import torch

from understudy.compress.corpus import (
    Document,
    batches,
    collate,
    encode_chat,
    encode_text,
    fingerprint,
    pack,
    row_length,
    shared_length,
    take,
    windows,
)
from understudy.compress.fidelity import final_hidden
from understudy.errors import InputError

CHAT = [{"role": "user", "content": "is it warm"}, {"role": "assistant", "content": "yes the sun"}]


def answers_of(tokenizer, chat):
    d = encode_chat(tokenizer, chat)
    return [tokenizer.convert_ids_to_tokens(t) for t, mine in zip(d.tokens, d.answer, strict=True) if mine]


def test_answers_are_the_assistants_words_and_its_end(tokenizer):
    assert answers_of(tokenizer, CHAT) == ["yes", "the", "sun", "</s>"]


def test_every_assistant_turn_counts(tokenizer):
    chat = [*CHAT, {"role": "user", "content": "why"}, {"role": "assistant", "content": "because"}]
    assert answers_of(tokenizer, chat) == ["yes", "the", "sun", "</s>", "because", "</s>"]


def test_a_template_that_rewrites_earlier_turns(tokenizer):
    """The content is then found by its own text."""
    before = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.last %}<s>{{ m['role'] }} {% endif %}"
        "{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>dog {% endif %}"
    )
    try:
        assert answers_of(tokenizer, CHAT) == ["yes", "the", "sun"]
    finally:
        tokenizer.chat_template = before


def test_no_template_is_refused(tokenizer):
    before = tokenizer.chat_template
    tokenizer.chat_template = None
    try:
        with pytest.raises(InputError, match="no chat template"):
            encode_chat(tokenizer, CHAT)
    finally:
        tokenizer.chat_template = before


def test_text_has_no_answers(tokenizer):
    document = encode_text(tokenizer, "the cat sat")
    assert len(document.tokens) == 3
    assert not any(document.answer)


def test_labels_and_masks_by_hand():
    # pad and end-of-turn are both 2: only lengths may tell padding
    chat = Document([5, 6, 2, 7, 2], [False, False, False, True, True])
    note = Document([8, 2], [False, False])
    (batch,) = batches(pack([chat, note], 9), 9)
    assert batch.tokens.tolist() == [[5, 6, 2, 7, 2, 8, 2]]
    assert batch.labels.tolist()[0][:6] == [6, 2, 7, 2, 8, 2]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    assert batch.predicts.tolist() == [[True, True, True, True, False, True, False]]
    assert batch.answers.tolist() == [[False, False, True, True, False, False, False]]
    assert batch.real.all()


def test_padding_is_nobodys(make):
    long, short = Document([3] * 6, [True] * 6), Document([4, 5], [True, True])
    batch = collate([*pack([long], 6), *pack([short], 6)])
    assert batch.real.sum() == 8
    assert batch.predicts.sum() == batch.answers.sum() == 6
    assert batch.document.tolist() == [[0] * 6, [1, 1, -1, -1, -1, -1]]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_document_does_not_see_its_neighbours(family, make, documents):
    model = make(family)
    with torch.no_grad():
        (together,) = batches(pack(documents[:6], 128), 128)
        packed = final_hidden(model, together)
        order = sorted(documents[:6], key=lambda d: (-len(d.tokens), d.tokens))
        alone = torch.cat([final_hidden(model, collate(pack([d], 128))) for d in order])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


def test_packing_loses_and_splits_nothing(documents):
    rows = pack(documents, 40)
    assert sorted(d.tokens for row in rows for d in row.documents) == sorted(d.tokens for d in documents)
    assert all(row.tokens <= 40 for row in rows)
    assert sum(row.tokens for row in rows) > 0.9 * 40 * (len(rows) - 1)
    assert pack(documents[::-1], 40) == rows


def test_long_documents_are_cut_into_windows():
    document = Document(list(range(3, 12)), [False] * 9)
    assert [len(w.tokens) for w in windows([document], 4)] == [4, 4]


def test_row_length_holds_most_documents():
    assert row_length([Document([1] * 70, [])] * 19 + [Document([1] * 400, [])]) == 512
    assert row_length([Document([1] * 70, [])] * 39 + [Document([1] * 400, [])]) == 128
    assert row_length([]) == 64


def test_rows_are_longer_only_where_beginnings_are_shared():
    alike = [Document([7] * 40 + [i] * 40, [False] * 80) for i in range(9)]
    other = [Document([i] * 80, [False] * 80) for i in range(9)]
    assert (shared_length(alike), shared_length(other)) == (256, 128)
    assert shared_length([]) == 64


def test_take_stops_at_the_budget_and_follows_the_seed(documents):
    taken = take(documents, 30, seed=1)
    assert 30 <= sum(len(d.tokens) for d in taken) < 60
    assert take(documents, 30, seed=1) == taken != take(documents, 30, seed=2)


def test_fingerprint_sees_tokens_marks_and_bounds():
    one = Document([1, 23], [False, True])
    others = [Document([12, 3], [False, True]), Document([1, 23], [True, True])]
    apart = [Document([1], [False]), Document([23], [True])]
    assert len({fingerprint([d]) for d in (one, *others)} | {fingerprint(apart)}) == 4
