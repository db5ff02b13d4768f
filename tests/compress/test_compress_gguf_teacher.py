"""A teacher read from a GGUF file reads text as the file's own engine does."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from understudy.compress.checkpoint import load, save
from understudy.serve.export import export_gguf


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    """Byte-level BPE that would merge 1 and 9, were digits not split first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "<s>", "</s>", "19"])}
    bpe = Tokenizer(models.BPE(vocabulary, [("1", "9")]))
    digits = pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def test_numbers_stay_digits_from_gguf_to_checkpoint(tmp_path: Path, make, words) -> None:
    teacher = save(make(vocab_size=len(words)), words, tmp_path / "teacher")
    export_gguf(teacher, tmp_path / "teacher.gguf", "f32")
    loaded = load(tmp_path / "teacher.gguf")
    assert loaded.tokenizer.tokenize("1984") == ["1", "9", "8", "4"]
    save(loaded.model, loaded.tokenizer, tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").tokenize("1984") == ["1", "9", "8", "4"]
