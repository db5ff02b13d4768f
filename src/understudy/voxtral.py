"""Voxtral's chats without mistral-common: tekken's words, Mistral's template, Whisper's ears.

transformers' own VoxtralProcessor lets mistral-common write a chat, which tells no token's place in the text,
so nobody could say what the assistant wrote. Here the same tokens come from a template and from tekken.json
as transformers converts it; a test holds them against mistral-common's, and features against the processor's.
Tools and transcription requests are not written. It ignores how a sound is read (processor).

Source: mistral-common's InstructTokenizerV7 and AudioConfig; transformers' VoxtralProcessor.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

WORDS = "tekken.json"
SOUND = "[AUDIO]"
TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}[INST]{% elif m['role'] == 'system' %}[SYSTEM_PROMPT]"
    "{% elif m['role'] != 'assistant' or m.get('tool_calls') %}"
    "{{ raise_exception('Voxtral is read without tools') }}{% endif %}"
    "{% set said = namespace(before='') %}{% for p in m['content'] %}"
    "{% if p['type'] == 'audio' %}[BEGIN_AUDIO]" + SOUND + "{% else %}"
    # adjacent texts of a message are one, two lines apart
    "{% if said.before == 'text' %}{{ '\\n\\n' }}{% endif %}"
    # an answer ends without blanks
    "{{ p['text'].rstrip(' ') if m['role'] == 'assistant' else p['text'] }}{% endif %}"
    "{% set said.before = p['type'] %}{% endfor %}"
    "{% if m['role'] == 'user' %}[/INST]{% elif m['role'] == 'system' %}[/SYSTEM_PROMPT]"
    "{% else %}{{ '</s>' }}{% endif %}{% endfor %}"
)


def speaks(name: str) -> bool:
    """Whether a checkpoint folder or hub id is a Voxtral."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(name, trust_remote_code=False).model_type == "voxtral"


def load(name: str) -> Voxtral:
    """Raises OSError where tekken.json or preprocessor_config.json is missing."""
    from transformers import AutoFeatureExtractor
    from transformers.utils.hub import cached_file

    words = cached_file(name, WORDS)
    assert words is not None, "cached_file raises for what is missing"
    return Voxtral(AutoFeatureExtractor.from_pretrained(name), Path(words))


class Voxtral:
    """A processor as `processor` and `compress.media` use one."""

    audio_token = SOUND
    chat_template = TEMPLATE

    def __init__(self, ears: Any, words: Path) -> None:
        from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

        self.feature_extractor = ears
        self.tokenizer: Any = convert_tekken_tokenizer(str(words), chat_template=TEMPLATE)
        self.words = words
        per_second = json.loads(words.read_text())["audio"]["frame_rate"]
        self.each = round(ears.chunk_length * per_second)
        """Placeholders of a stretch of sound, which a shorter sound is filled up to."""

    def __call__(
        self, text: Sequence[str], audio: Sequence[np.ndarray] = (), sampling_rate: int = 0, **wanted: Any
    ) -> dict[str, Tensor]:
        """One chat: its tokens with every sound's placeholders written out, and (stretches, mel, frames)."""
        import torch

        heard = [self._stretches(sound, sampling_rate) for sound in audio]
        pieces = text[0].split(SOUND)
        if len(pieces) != len(heard) + 1:
            raise ValueError(f"{len(pieces) - 1} places for {len(heard)} sounds")
        counts = [SOUND * (self.each * len(one)) for one in heard] + [""]
        whole = "".join(piece + count for piece, count in zip(pieces, counts, strict=True))
        made = dict(self.tokenizer([whole], **wanted))
        return made | ({"input_features": torch.cat(heard)} if heard else {})

    def _stretches(self, sound: np.ndarray, rate: int) -> Tensor:
        """Filled up with silence to whole stretches, then mel frames, stretch by stretch."""
        ears = self.feature_extractor
        given = {"padding": True, "truncation": False, "pad_to_multiple_of": ears.n_samples}
        made = ears(sound, sampling_rate=rate, return_tensors="pt", **given)["input_features"]
        stretches = cast("Tensor", made).reshape(ears.feature_size, -1, ears.nb_max_frames)
        return stretches.transpose(0, 1)

    def save_pretrained(self, folder: str) -> None:
        self.feature_extractor.save_pretrained(folder)
        shutil.copy(self.words, Path(folder) / WORDS)
        (Path(folder) / "processor_config.json").write_text('{"processor_class": "VoxtralProcessor"}')
