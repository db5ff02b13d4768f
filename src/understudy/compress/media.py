"""Chats with pictures or sound as documents, through the model's own processor.

Content parts are OpenAI's: `image_url` (a data URL, or the path of a file), `input_audio` (WAV, base64);
nothing is fetched from elsewhere. A document keeps what was sent, not its tensors, which are many times
larger: they are made when a batch needs them, and remembered while small. It ignores how the model reads
them (families).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import wave
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from understudy.compress.corpus import Chat, Document
from understudy.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

REMEMBER_BYTES = 1 << 20
"""Tensors of a document up to this size are kept between epochs."""
_PER_TOKEN = ("token_type_ids", "mm_token_type_ids", "cross_attention_mask")
"""Of what processors make, what has an entry for each token: (1, length, …)."""
_TEXT = ("input_ids", "attention_mask", "offset_mapping")


class Part(NamedTuple):
    """One picture or sound as it was sent."""

    sound: bool
    raw: bytes


class Media:
    """What one document shows: its tensors by name, the first dimension counting pictures or documents."""

    def __init__(self, processor: Any, text: str, parts: Sequence[Part]) -> None:
        self._processor, self._text, self._parts = processor, text, tuple(parts)
        self._tensors: dict[str, Tensor] | None = None
        digest = hashlib.sha256()
        for part in parts:
            digest.update(hashlib.sha256(part.raw).digest())
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        """Pictures and sounds."""
        return len(self._parts)

    def tensors(self) -> dict[str, Tensor]:
        if self._tensors is not None:
            return self._tensors
        made = processed(self._processor, self._text, self._parts)
        tensors = {name: value for name, value in made.items() if name not in _TEXT}
        if sum(t.numel() * t.element_size() for t in tensors.values()) <= REMEMBER_BYTES:
            self._tensors = tensors
        return tensors


def stacked(media: Sequence[Media | None], length: int) -> dict[str, Tensor]:
    """Several documents' tensors as one call takes them, padded with zeros to the largest of each name.

    Zeros are what processors pad with: a picture that is not there, a token of no special type.
    """
    import torch
    from torch.nn import functional

    given = [one.tensors() for one in media if one is not None]
    found: dict[str, Tensor] = {}
    for name in given[0]:
        values = [one[name] for one in given if name in one]
        largest = [max(sizes) for sizes in zip(*(v.shape[1:] for v in values), strict=True)]
        if name in _PER_TOKEN:
            largest[0] = length
        padded: list[Tensor] = []
        for value in values:
            more = [
                n
                for size, most in zip(reversed(value.shape[1:]), reversed(largest), strict=True)
                for n in (0, most - size)
            ]
            padded.append(functional.pad(value, more))
        found[name] = torch.cat(padded)
    return found


def encode(processor: Any, chat: Chat) -> Document:
    """A chat as the model reads it; a picture's placeholders are tokens that nobody is to write.

    As `corpus.encode_chat` otherwise. Raises InputError for parts that cannot be read and without a template.
    """
    if not (processor.chat_template or processor.tokenizer.chat_template):
        raise InputError(
            "the processor has no chat template",
            expected="a chat model",
            next_step="name an instruction-tuned teacher",
        )
    messages, parts = opened(chat)
    text = rendered(processor, messages, prompt=False)
    made = processed(processor, text, parts)
    place = _Places(processor, text, parts, made["offset_mapping"][0])
    spans = [_span(processor, messages, i, text) for i in _learnt(chat)]
    wide = [(place.of(start), place.of(stop)) for start, stop in spans]
    answer = [
        any(start <= begin and end <= stop for start, stop in wide) and end > begin
        for begin, end in made["offset_mapping"][0].tolist()
    ]
    media = Media(processor, text, parts) if parts else None
    return Document(made["input_ids"][0].tolist(), answer, media=media)


def _learnt(chat: Chat) -> list[int]:
    return [i for i, m in enumerate(chat) if m.get("role") == "assistant" and m.get("weight", 1)]


def opened(chat: Chat) -> tuple[list[dict[str, Any]], list[Part]]:
    """A chat with bare placeholders for its pictures and sounds, and these in the order they stand in."""
    parts: list[Part] = []
    messages: list[dict[str, Any]] = []
    for message in chat:
        content = list(_content(message.get("content"), parts))
        messages.append({**message, "content": content})
    return messages, parts


def _content(content: object, parts: list[Part]) -> Iterator[dict[str, str]]:
    if content is None:
        return
    if not isinstance(content, list):
        yield {"type": "text", "text": str(content)}
        return
    for piece in cast("list[dict[str, Any]]", content):
        form = piece.get("type")
        if form in ("text", "input_text", "output_text"):
            yield {"type": "text", "text": str(piece.get("text") or "")}
            continue
        part = _part(piece)
        parts.append(part)
        yield {"type": "audio" if part.sound else "image"}


def _part(piece: dict[str, Any]) -> Part:
    """Raises InputError for what is neither a picture nor a sound that is here."""
    form = piece.get("type")
    if form in ("image_url", "input_image", "image"):
        given = piece.get("image_url") or piece.get("url") or piece.get("path") or ""
        url = str(given.get("url") or "") if isinstance(given, dict) else str(given)
        return Part(False, _bytes_of(url, "image_url"))
    if form == "input_audio":
        audio = cast("dict[str, Any]", piece.get("input_audio") or {})
        if audio.get("format") != "wav":
            raise InputError(
                f"input_audio with format {audio.get('format')!r}", expected="wav, the one format read here"
            )
        return Part(True, _decoded(str(audio.get("data") or ""), "input_audio"))
    raise InputError(
        f"a content part of type {form!r}",
        expected="text, image_url or input_audio parts, as in OpenAI's API",
    )


def _bytes_of(url: str, name: str) -> bytes:
    if url.startswith("data:"):
        return _decoded(url.partition(",")[2], name)
    if "://" in url and not url.startswith("file://"):
        raise InputError(
            f"{name} {url[:80]!r} lies elsewhere",
            expected="a data URL or the path of a file: nothing is fetched",
            next_step="download it and name the file",
        )
    path = Path(url.removeprefix("file://"))
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{name}: cannot read {path}: {error.strerror}") from error


def _decoded(data: str, name: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{name}: not base64: {error}") from error


def rendered(processor: Any, messages: Sequence[dict[str, Any]], *, prompt: bool) -> str:
    """The chat in the model's template, one placeholder for each picture or sound."""
    words = processor.tokenizer
    given: dict[str, Any] = {"chat_template": processor.chat_template or words.chat_template}
    return words.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt, **given)


def processed(processor: Any, text: str, parts: Sequence[Part]) -> dict[str, Tensor]:
    """What the processor makes of a rendered chat. Raises InputError for what it cannot read."""
    given: dict[str, Any] = {}
    if pictures := [_picture(part.raw) for part in parts if not part.sound]:
        given["images"] = [pictures]
    if sounds := [part.raw for part in parts if part.sound]:
        rate = int(processor.feature_extractor.sampling_rate)
        given |= {"audio": [_waveform(raw, rate) for raw in sounds], "sampling_rate": rate}
    wanted = {"return_tensors": "pt", "return_offsets_mapping": True, "add_special_tokens": False}
    try:
        return dict(processor(text=[text], **given, **wanted))
    except (ValueError, TypeError, IndexError) as error:
        raise InputError(
            f"the processor refuses a chat with {len(parts)} pictures or sounds: {error}",
            expected="what the model's own template and processor allow",
        ) from error


def _picture(raw: bytes) -> Any:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingExtraError("pillow", "compress") from error
    try:
        return Image.open(io.BytesIO(raw)).convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise InputError(f"a picture cannot be read: {error}", expected="PNG, JPEG, WebP or GIF") from error


def _waveform(raw: bytes, rate: int) -> np.ndarray:
    """Samples in [−1, 1], one channel, at ``rate`` per second."""
    import numpy as np

    try:
        with wave.open(io.BytesIO(raw)) as sound:
            width, channels, found = sound.getsampwidth(), sound.getnchannels(), sound.getframerate()
            frames = sound.readframes(sound.getnframes())
    except (wave.Error, EOFError) as error:
        raise InputError(f"a sound cannot be read: {error}", expected="WAV, PCM") from error
    if width not in (2, 4):
        raise InputError(f"WAV of {8 * width} bits", expected="16 or 32 bits")
    samples = np.frombuffer(frames, "<i2" if width == 2 else "<i4").reshape(-1, channels).mean(1)
    return resampled((samples / 2.0 ** (8 * width - 1)).astype(np.float32), found, rate)


def resampled(samples: np.ndarray, found: int, wanted: int) -> np.ndarray:
    """The band-limited signal through the samples, read at another rate: its spectrum cut or padded."""
    import numpy as np

    if found == wanted or not len(samples):
        return samples
    count = round(len(samples) * wanted / found)
    spectrum = np.fft.rfft(samples)
    resized = np.zeros(count // 2 + 1, dtype=spectrum.dtype)
    size = min(len(spectrum), len(resized))
    resized[:size] = spectrum[:size]
    return (np.fft.irfft(resized, count) * (count / len(samples))).astype(np.float32)


class _Places:
    """Where a character of the rendered chat stands once placeholders are written out as many tokens."""

    def __init__(self, processor: Any, text: str, parts: Sequence[Part], offsets: Tensor) -> None:
        self.processor, self.text, self.parts = processor, text, parts
        self.shift = _last(offsets) - self._plain(text)

    def of(self, place: int) -> int:
        """All placeholders before it have moved it, and none behind it."""
        if not self.parts:
            return place
        names = _placeholders(self.processor)
        if not any(name in self.text[place:] for name in names):
            return place + self.shift
        beginning = self.text[:place]
        count = sum(beginning.count(name) for name in names)
        made = processed(self.processor, beginning, self.parts[:count])
        return place + _last(made["offset_mapping"][0]) - self._plain(beginning)

    def _plain(self, text: str) -> int:
        """Where the last token ends as long as placeholders are single tokens."""
        encoded = self.processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return max((int(stop) for _, stop in encoded["offset_mapping"]), default=0)


def _last(offsets: Tensor) -> int:
    return int(offsets[:, 1].max()) if len(offsets) else 0


def _placeholders(processor: Any) -> list[str]:
    """What stands for a picture or sound in a rendered chat."""
    names = ("boi_token", "image_token", "audio_token")
    found = [str(getattr(processor, name)) for name in names if getattr(processor, name, None)]
    return found[:1] if hasattr(processor, "boi_token") else found


def _span(processor: Any, messages: list[dict[str, Any]], index: int, text: str) -> tuple[int, int]:
    """Where message ``index`` stands in the rendered text, its header left out."""
    before = rendered(processor, messages[:index], prompt=True) if index else ""
    after = rendered(processor, messages[: index + 1], prompt=False)
    if text.startswith(before) and text.startswith(after):
        return len(before), len(after.rstrip("\n"))
    content = "".join(part.get("text", "") for part in messages[index]["content"])
    start = text.rfind(content)
    return (start, start + len(content)) if content and start >= 0 else (0, 0)
