"""A tokenizer.json as GGUF metadata: byte-level BPE (GPT-2's kind) and SentencePiece BPE with byte fallback.

llama.cpp splits text by rules it knows by name, so the name is found from the split rules themselves; rules
it does not know are an error, never a silent default. It ignores unigram and WordPiece tokenizers.

Source: tokenizers' JSON form; llama.cpp's pre-tokenizer names (llama-vocab).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from understudy.errors import ModelError
from understudy.protocol import Json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS: dict[tuple[str, ...], str] = {
    ("bytes+words",): "gpt-2",
    ("digits", "bytes+words"): "smollm",
    (_LLAMA3, "bytes"): "llama-bpe",
    (_QWEN2, "bytes"): "qwen2",
    (_TEKKEN, "bytes"): "tekken",
}


class Vocabulary(NamedTuple):
    """Tokens in the order of their ids."""

    model: str
    """llama.cpp's name of the kind: gpt2 or llama."""
    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    """For gpt2; empty otherwise."""
    scores: list[float]
    """For llama; empty otherwise."""
    space_prefix: bool


def vocabulary(form: Json, size: int) -> Vocabulary:
    """The vocabulary in a tokenizer.json, padded to ``size`` ids (the model's embeddings).

    Raises ModelError for a kind of tokenizer or split rules that llama.cpp does not know.
    """
    model = cast(Json, form["model"])
    if model.get("type") != "BPE":
        raise ModelError(f"a {model.get('type')} tokenizer cannot be exported", expected="BPE")
    tokens = [f"[PAD{index}]" for index in range(size)]
    kinds = [UNUSED] * size
    for text, index in cast(Mapping[str, int], model["vocab"]).items():
        _place(tokens, kinds, index, text, _kind(text, bool(model.get("byte_fallback"))))
    for added in cast(list[Json], form.get("added_tokens") or []):
        _place(tokens, kinds, added["id"], added["content"], CONTROL if added["special"] else USER_DEFINED)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    if model.get("byte_fallback"):
        scores = _scores(tokens, merges)
        return Vocabulary("llama", "default", tokens, kinds, [], scores, _prepends_space(form))
    return Vocabulary("gpt2", _split_name(form), tokens, kinds, merges, [], False)


def _place(tokens: list[str], kinds: list[int], index: int, text: str, kind: int) -> None:
    if index >= len(tokens):
        raise ModelError(
            f"token {index} ({text!r}) is beyond the model's {len(tokens)} embeddings",
            expected="tokenizer and model of one checkpoint",
        )
    tokens[index], kinds[index] = text, kind


def _kind(text: str, byte_fallback: bool) -> int:
    if byte_fallback and re.fullmatch(r"<0x[0-9A-F]{2}>", text):
        return BYTE
    return UNKNOWN if byte_fallback and text == "<unk>" else NORMAL


def _scores(tokens: Sequence[str], merges: Sequence[str]) -> list[float]:
    """SentencePiece scores that make llama.cpp merge in the same order: the earlier the merge, the higher."""
    rank: dict[str, int] = {}
    for index, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        rank.setdefault(left + right, index)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _prepends_space(form: Json) -> bool:
    """Whether text gets a space in front: by a normaliser (Llama 2) or by Metaspace (later)."""
    normalizers = _steps(form.get("normalizer"), "normalizers")
    splits = _steps(form.get("pre_tokenizer"), "pretokenizers")
    by_space = any(s["type"] == "Metaspace" and s.get("prepend_scheme", "always") != "never" for s in splits)
    return by_space or any(step["type"] == "Prepend" for step in normalizers)


def _steps(step: Json | None, inside: str) -> list[Json]:
    if not step:
        return []
    return cast(list[Json], step[inside]) if step["type"] == "Sequence" else [step]


def _split_name(form: Json) -> str:
    """llama.cpp's name for these split rules. Raises ModelError if it has none."""
    rules = tuple(_rule(step) for step in _steps(form.get("pre_tokenizer"), "pretokenizers"))
    if rules not in _SPLITS:
        raise ModelError(
            f"llama.cpp has no name for the tokenizer's split rules {rules}",
            expected="those of " + ", ".join(sorted(_SPLITS.values())),
            next_step="serve the checkpoint folder as it is, or convert it with llama.cpp's own tools",
        )
    return _SPLITS[rules]


def _rule(step: Json) -> str:
    if step["type"] == "ByteLevel":
        return "bytes+words" if step.get("use_regex", True) else "bytes"
    if step["type"] == "Digits" and step.get("individual_digits"):
        return "digits"
    if step["type"] == "Split":
        return str(cast(dict[str, Any], step["pattern"]).get("Regex", step["pattern"]))
    return str(step["type"])
