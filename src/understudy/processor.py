"""A model's own processor: chats with pictures or sound go in, tensors come out.

Content parts are OpenAI's: `image_url` (a data URL, or the path of a file where that is allowed) and
`input_audio` (WAV, base64); nothing is fetched from elsewhere. Several families' processors also take video,
which needs torchvision; still pictures don't, so where torchvision is missing a processor is loaded without
that part. `compress` and `serve` both read chats through here. It ignores models and training.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import shutil
import wave
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from understudy import voxtral
from understudy.errors import InputError, MissingExtraError, ModelError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Message = dict[str, Any]

FILES = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("chat_template.json", "chat_template.jinja", voxtral.WORDS),
)
"""What a processor consists of beside its tokenizer."""
OF_TEXT = ("input_ids", "attention_mask", "offset_mapping")
"""Of what a processor makes, what a tokenizer makes too; the rest is what a model sees and hears."""


@cache
def without_video(kind: Any) -> Any:
    """A processor class that may stand without its part for video."""

    class Still(kind):  # type: ignore[misc]  # a class known at run time only
        def check_argument_for_proper_class(self, argument_name: str, argument: object) -> Any:
            if argument_name == "video_processor" and argument is None:
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    Still.__name__ = Still.__qualname__ = kind.__name__
    return Still


def load(name: str) -> Any:
    """The processor of a checkpoint folder or hub id. Raises ModelError when it cannot be loaded."""
    from transformers import AutoProcessor

    try:
        if voxtral.speaks(name):
            return voxtral.load(name)
        return AutoProcessor.from_pretrained(name, trust_remote_code=False)
    except (ImportError, AttributeError, ValueError) as error:
        if "video" not in str(error).lower() and "torchvision" not in str(error).lower():
            raise ModelError(f"cannot load the processor of {name}: {error}") from error
    return _still(name)


def _still(name: str) -> Any:
    """Put together from its parts, video left out."""
    import transformers
    from transformers import AutoImageProcessor, AutoTokenizer
    from transformers.processing_utils import ProcessorMixin

    settings, _ = cast(Any, ProcessorMixin).get_processor_dict(name)
    kind = getattr(transformers, str(settings.get("processor_class") or ""), None)
    if kind is None:
        raise ModelError(f"{name} does not say which processor it has", expected="processor_config.json")
    known = {"image_seq_len", "chat_template"} & set(settings)
    return without_video(kind)(
        image_processor=AutoImageProcessor.from_pretrained(name),
        tokenizer=AutoTokenizer.from_pretrained(name),
        video_processor=None,
        **{key: settings[key] for key in known},
    )


def save(processor: Any, folder: Path, source: Path | None) -> None:
    """Put a processor's files into a checkpoint folder; the teacher's own, byte for byte, where they lie."""
    files = [source / name for name in FILES] if source is not None else []
    if not any(file.is_file() for file in files):
        _write(processor, folder)
    for file in files:
        if file.is_file():
            shutil.copy(file, folder / file.name)


def _write(processor: Any, folder: Path) -> None:
    if getattr(processor, "video_processor", processor) is not None:
        processor.save_pretrained(str(folder))
        return
    processor.image_processor.save_pretrained(str(folder))
    (folder / "chat_template.jinja").write_text(processor.chat_template or "")
    settings = {"processor_class": type(processor).__name__}
    if hasattr(processor, "image_seq_len"):
        settings["image_seq_len"] = processor.image_seq_len
    (folder / "processor_config.json").write_text(json.dumps(settings, indent=1))


class Part(NamedTuple):
    """One picture or sound as it was sent."""

    sound: bool
    raw: bytes


def opened(chat: Sequence[Message], *, files: bool = False) -> tuple[list[Message], list[Part]]:
    """A chat with bare placeholders for its pictures and sounds, and these in the order they stand in.

    ``files`` allows paths of files, which a chat that came over the network must not name. Raises InputError
    for a part that cannot be read.
    """
    parts: list[Part] = []
    messages: list[Message] = []
    for message in chat:
        content = list(_content(message.get("content"), parts, files=files))
        messages.append({**message, "content": content})
    return messages, parts


def _content(content: object, parts: list[Part], *, files: bool) -> Iterator[dict[str, str]]:
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
        part = _part(piece, files=files)
        parts.append(part)
        yield {"type": "audio" if part.sound else "image"}


def _part(piece: dict[str, Any], *, files: bool) -> Part:
    """Raises InputError for what is neither a picture nor a sound that is here."""
    form = piece.get("type")
    if form in ("image_url", "input_image", "image"):
        given = piece.get("image_url") or piece.get("url") or piece.get("path") or ""
        url = str(given.get("url") or "") if isinstance(given, dict) else str(given)
        return Part(False, _bytes_of(url, files=files))
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


def _bytes_of(url: str, *, files: bool) -> bytes:
    if url.startswith("data:"):
        return _decoded(url.partition(",")[2], "image_url")
    if not files or ("://" in url and not url.startswith("file://")):
        raise InputError(
            f"image_url {url[:80]!r} lies elsewhere",
            expected="a data URL" + (" or the path of a file" if files else "") + ": nothing is fetched",
        )
    path = Path(url.removeprefix("file://"))
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"image_url: cannot read {path}: {error.strerror}") from error


def _decoded(data: str, name: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{name}: not base64: {error}") from error


def rendered(processor: Any, messages: Sequence[Message], *, prompt: bool) -> str:
    """The chat in the model's template, one placeholder for each picture or sound.

    Raises InputError for what the template refuses.
    """
    from jinja2 import TemplateError

    words = processor.tokenizer
    given: dict[str, Any] = {"chat_template": processor.chat_template or words.chat_template}
    try:
        return words.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt, **given
        )
    except TemplateError as error:
        raise InputError(
            f"the model's chat template refuses a chat: {error}", expected="roles and parts that it knows"
        ) from error


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
