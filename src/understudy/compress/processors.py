"""A model's processor: what makes tensors of pictures and sound, loaded, saved and put up with.

Several families' processors also take video, which needs torchvision; still pictures don't. Where torchvision
is missing, such a processor is loaded without its part for video. It ignores chats (media).
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any, cast

from understudy.errors import ModelError

FILES = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("chat_template.json", "chat_template.jinja"),
)
"""What a processor consists of beside its tokenizer."""


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
