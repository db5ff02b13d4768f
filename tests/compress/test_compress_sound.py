"""Models that hear: Voxtral's chats token by token as mistral-common writes them, and its student served."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import seeing
import tekken
import torch
from transformers import AutoModelForMultimodalLM, WhisperFeatureExtractor

from understudy import processor as processors
from understudy.compress import checkpoint
from understudy.compress.corpus import Chat, encode_chat
from understudy.errors import InputError, ModelError
from understudy.voxtral import Voxtral

needs_mistral = pytest.mark.skipif(find_spec("mistral_common") is None, reason="mistral-common not installed")
PLAIN: Chat = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "is"}, {"type": "text", "text": " it\n"}]},
    {"role": "assistant", "content": "the  red it is é✓  "},
    {"role": "user", "content": "it is red "},
    {"role": "assistant", "content": "\nyes"},
]


def ears(seconds: int) -> Any:
    return WhisperFeatureExtractor(feature_size=16, chunk_length=seconds)


def sounds() -> list[Chat]:
    """At the rate that the model hears, so that nobody's resampling counts; one is longer than a stretch."""
    chats = seeing.chats("audio")[:4]
    parts = [p for chat in chats for m in chat if isinstance(m["content"], list) for p in m["content"]]
    for number, part in enumerate(part for part in parts if part["type"] == "input_audio"):
        part["input_audio"] = {
            "data": seeing.tone(300.0 + number, 0.3 + 31 * (number == 2), 16000),
            "format": "wav",
        }
    return chats


@needs_mistral
def test_tokens_and_features_are_the_own_processors(tmp_path: Path):
    """Of a tokenizer and sounds made here: transformers' VoxtralProcessor with mistral-common behind it."""
    from transformers import VoxtralProcessor
    from transformers.tokenization_mistral_common import MistralCommonBackend

    words = tekken.write(tmp_path, seconds=30)
    own = Voxtral(ears(30), words)
    theirs: Any = VoxtralProcessor(ears(30), MistralCommonBackend(str(words), mode="finetuning"))
    for chat in [*sounds(), PLAIN]:
        messages, parts = processors.opened(chat)
        made = processors.processed(own, processors.rendered(own, messages, prompt=False), parts)
        wanted = theirs.apply_chat_template([_as_theirs(message) for message in chat])
        assert made["input_ids"].tolist() == wanted["input_ids"].tolist()
        assert ("input_features" in wanted) is bool(parts)
        if parts:
            torch.testing.assert_close(made["input_features"], wanted["input_features"], rtol=0, atol=1e-4)


def _as_theirs(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, list):
        content = [
            {"type": "audio", "base64": p["input_audio"]["data"]} if "input_audio" in p else p
            for p in content
        ]
    return {"role": message["role"], "content": content}


@needs_mistral
def test_a_student_is_read_by_its_own_processor(tmp_path: Path):
    from transformers import AutoProcessor

    out = seeing.saved("voxtral", tmp_path / "student")
    theirs = AutoProcessor.from_pretrained(out)
    assert type(theirs).__name__ == "VoxtralProcessor"
    document = encode_chat(checkpoint.load(out).reader, PLAIN)
    wanted = theirs.apply_chat_template(PLAIN[:2])["input_ids"][0].tolist()
    assert document.tokens[: len(wanted)] == wanted


def test_a_checkpoint_as_the_hub_holds_it(tmp_path: Path):
    """No tokenizer.json and no processor_config.json: tekken.json and the ears' file are all there is."""
    folder = seeing.saved("voxtral", tmp_path / "voxtral")
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        (folder / name).unlink(missing_ok=True)
    loaded = checkpoint.load(folder)
    chat = seeing.chats("audio")[0]
    document = encode_chat(loaded.reader, chat)
    assert document.tokens.count(tekken.MARKS.index("[AUDIO]")) == 25
    model: Any = AutoModelForMultimodalLM.from_pretrained(folder).eval()
    assert document.media is not None
    with torch.no_grad():
        said = model(input_ids=torch.tensor([document.tokens]), **document.media.tensors()).logits
    assert said.shape == (1, len(document.tokens), tekken.VOCAB)


def test_what_is_not_written_is_named(tmp_path: Path):
    chat = seeing.chats("audio")[0]
    words = seeing.processor_of("voxtral")
    with pytest.raises(InputError, match="without tools"):
        encode_chat(words, [*chat[:1], {"role": "tool", "content": "x"}, chat[1]])
    folder = seeing.saved("voxtral", tmp_path / "voxtral")
    (folder / "tekken.json").unlink()
    with pytest.raises(ModelError, match=r"tekken\.json"):
        checkpoint.load(folder)
    (folder / "tekken.json").write_text(json.dumps({"config": {}}))
    with pytest.raises(ModelError, match="cannot load"):
        checkpoint.load(folder)
