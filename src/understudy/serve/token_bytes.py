"""The bytes each token of a transformers tokenizer stands for.

Byte-level BPE writes every byte as one printable character; SentencePiece writes a space as ▁ and odd bytes
as <0xE2>. It ignores tokenizers that are neither (WordPiece): their tokens stand for their own text.

Source: openai/gpt-2 encoder.py, bytes_to_unicode; SentencePiece, byte fallback.
"""

from __future__ import annotations

import re
from typing import Any

_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in set(_PRINTABLE)]
BYTE_OF_CHAR = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + index): byte for index, byte in enumerate(_OTHERS)
}


def piece(tokenizer: Any, token: int, added: dict[int, Any]) -> bytes:
    """A token's bytes; control tokens as their name. ``added`` is ``tokenizer.added_tokens_decoder``."""
    text = tokenizer.convert_ids_to_tokens(token) or ""
    if token in added:
        return str(text).encode()
    if fallback := re.fullmatch(r"<0x([0-9A-F]{2})>", text):
        return bytes.fromhex(fallback[1])
    if "\u2581" not in text and all(char in BYTE_OF_CHAR for char in text):
        return bytes(BYTE_OF_CHAR[char] for char in text)
    return str(text).replace("\u2581", " ").encode()
