"""A tiny tekken.json, Mistral's file of a tokenizer: bytes, a few merges, and Voxtral's marks."""

from __future__ import annotations

import base64
import json
from pathlib import Path

MARKS = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"),
    *("[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]", "[ARGS]"),
    *("[CALL_ID]", "[THINK]", "[/THINK]", "[AUDIO]", "[BEGIN_AUDIO]", "[TRANSCRIBE]"),
)
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
MERGES = (
    *(b"it", b"is", b"th", b"the", b"re", b"red", b"ye", b"yes", b"no", b"bl", b"ue", b"blue", b"gr", b"en"),
    *(b"een", b"green", b" is", b" it", b" the", b" red", b" yes", b" no", b" blue", b" green"),
)
VOCAB = len(MARKS) + 256 + len(MERGES)


def write(folder: Path, seconds: int) -> Path:
    """Sounds are filled up to so many ``seconds``; a second is 12.5 placeholders."""
    words = [bytes([value]) for value in range(256)] + list(MERGES)
    vocabulary = [
        {
            "rank": rank,
            "token_bytes": base64.b64encode(word).decode(),
            "token_str": word.decode(errors="replace"),
        }
        for rank, word in enumerate(words)
    ]
    config = {
        "pattern": PATTERN,
        "num_vocab_tokens": len(words),
        "default_vocab_size": VOCAB,
        "default_num_special_tokens": len(MARKS),
        "version": "v7",
    }
    audio = {
        "sampling_rate": 16000,
        "frame_rate": 12.5,
        "chunk_length_s": float(seconds),
        "audio_encoding_config": {"num_mel_bins": 16, "hop_length": 160, "window_size": 400},
    }
    marks = [{"rank": rank, "token_str": mark, "is_control": True} for rank, mark in enumerate(MARKS)]
    path = folder / "tekken.json"
    path.write_text(
        json.dumps({"config": config, "vocab": vocabulary, "special_tokens": marks, "audio": audio})
    )
    return path
