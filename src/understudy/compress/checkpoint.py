"""Load a teacher from wherever it lies, and save a student so that everything else can load it.

A checkpoint is written beside its place and renamed into it, so a folder that exists is whole. It ignores
GGUF export, which is `serve`'s.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import struct
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from understudy import processor as processors
from understudy.compress.decoder import family_of
from understudy.compress.families import HOSTS, Host
from understudy.compress.streaming import is_streamed, open_streamed, save_streamed
from understudy.config import resolve_path
from understudy.errors import MissingExtraError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Loaded(NamedTuple):
    """A model in memory, fp32, in evaluation mode."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    """As the user named it."""
    digest: str
    """SHA-256 (hex) of the weight files, or the hub's commit."""
    folder: Path
    """Where its licence may lie."""
    processor: Any = None
    """What makes tensors of pictures or sound; None for a text model."""

    @property
    def reader(self) -> PreTrainedTokenizerBase:
        """What reads chats: the processor where there is one."""
        return self.processor or self.tokenizer


def load(source: str | Path, root: Path = Path(), *, stream: bool = False) -> Loaded:
    """A decoder from a hub id, a checkpoint folder, a GGUF file or ``package:NAME/FILE``.

    With ``stream`` the layers of a dense decoder stay in its safetensors files (streaming). Raises ModelError
    for what is absent, truncated, not finite, or of an unknown family; MissingExtraError without the extra
    `compress`.
    """
    _require_extra()
    name = str(source)
    path = resolve_path(name, root)
    if path.exists():
        folder = path if path.is_dir() else path.parent
        return _checked(_load_local(path, stream=stream), name, digest_of(path), folder)
    if _looks_like_path(name):
        raise ModelError(
            f"no model at {path}",
            expected="a hub id (owner/name), a checkpoint folder, a .gguf file or package:NAME/FILE",
        )
    folder = _fetched(name)
    return _checked(_load_local(folder, stream=stream), name, f"hub:{folder.name}", folder)


_NOT_NEEDED = ("*.gguf", "*.onnx*", "*.pth", "*.msgpack", "*.h5", "original/*", "onnx/*")


def _fetched(name: str) -> Path:
    """The folder of a hub id in the cache, named by its commit."""
    from huggingface_hub import snapshot_download

    with _quiet(), _as_model_error(name):
        return Path(snapshot_download(name, ignore_patterns=list(_NOT_NEEDED)))


def _require_extra() -> None:
    from importlib.util import find_spec

    for package in ("torch", "transformers"):
        if find_spec(package) is None:
            raise MissingExtraError(package, "compress")


def _looks_like_path(name: str) -> bool:
    return name.startswith(("/", ".", "~", "package:")) or name.endswith(".gguf") or name.count("/") != 1


class _Found(NamedTuple):
    """What a checkpoint holds."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    processor: Any = None


def _load_local(path: Path, *, stream: bool) -> _Found:
    if path.is_dir():
        return (_streamed(path) if stream else None) or _from_transformers(str(path))
    if path.read_bytes()[:4] != b"GGUF":
        raise ModelError(f"{path} is not a GGUF file", expected="a file that begins with the bytes GGUF")
    return _from_transformers(str(path.parent), gguf_file=path.name)


def _streamed(folder: Path) -> _Found | None:
    from transformers import AutoTokenizer

    with _quiet(), _as_model_error(str(folder)):
        model = None if _host(str(folder)) else open_streamed(folder)
        return model and _Found(model, AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False))


def _from_transformers(name: str, **where: str) -> _Found:
    """Weights, tokenizer and, of a model that sees or hears, its processor; never with code from the
    checkpoint."""
    import torch
    from transformers import AutoTokenizer

    with _quiet(), _as_model_error(where.get("gguf_file", name)):
        host = None if where else _host(name)
        model = _auto_class(host).from_pretrained(name, dtype=torch.float32, trust_remote_code=False, **where)
        if host is not None:
            processor = processors.load(name)
            return _Found(model, processor.tokenizer, processor)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **where)
    if where:
        _split_digits(tokenizer, Path(name) / where["gguf_file"])
    return _Found(model, tokenizer)


def _host(name: str) -> Host | None:
    """How a checkpoint sees or hears, by its configuration; None for a text model."""
    from transformers import AutoConfig

    model_type = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
    return next((host for host in HOSTS if host.model_type == model_type), None)


def _auto_class(host: Host | None) -> Any:
    import transformers

    if host is None:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForMultimodalLM if host.hears else transformers.AutoModelForImageTextToText


_DIGITS_ALONE = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell"})
"""llama.cpp's names of the GPT-2 pre-tokenizers that take each digit as a word of its own."""


def _split_digits(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Put back the rule that splits numbers into digits: transformers drops it when it reads a GGUF file, and
    the student would then read numbers in other tokens than its teacher."""
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import Digits, Sequence

    field = GGUFReader(path).get_field("tokenizer.ggml.pre")
    rules = getattr(tokenizer, "backend_tokenizer", None)
    if field is None or rules is None or field.contents() not in _DIGITS_ALONE:
        return
    if "Digits" not in str(rules.pre_tokenizer):
        rules.pre_tokenizer = Sequence([Digits(individual_digits=True), rules.pre_tokenizer])


@contextmanager
def _as_model_error(name: str) -> Generator[None]:
    """What the loaders raise for files that are absent, cut short or malformed, as one error."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, LookupError, EOFError, RuntimeError, struct.error, SafetensorError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"cannot load {name}: {first}",
            expected="complete weights and tokenizer of a decoder",
            next_step="check the name, fetch the files again, or see the network",
        ) from error


@contextmanager
def _quiet() -> Generator[None]:
    """Without the loaders' own progress bars and notes: ours tell the story.

    The GGUF reader's bar heeds no setting, so standard error is set aside meanwhile.
    """
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _checked(found: _Found, name: str, digest: str, folder: Path) -> Loaded:
    model, tokenizer, processor = found
    family_of(model)
    _forget_quantisation(model)
    for parameter_name, parameter in model.named_parameters():
        if not parameter.is_meta and not bool(parameter.isfinite().all()):
            raise ModelError(
                f"{name}: {parameter_name} holds values that are not finite", expected="finite weights"
            )
    return Loaded(cast(Any, model).eval(), tokenizer, name, digest, folder, processor)


def _forget_quantisation(model: PreTrainedModel) -> None:
    """Weights read from GGUF are plain fp32 by now; what is left of the quantiser would forbid saving."""
    loose = cast(Any, model)
    loose.hf_quantizer = None
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(loose.config, name):
            delattr(loose.config, name)
    loose.is_quantized = False


def digest_of(path: Path) -> str:
    """SHA-256 (hex) of a file, or of a checkpoint folder's weights, configuration and tokenizer."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(_identity(path))
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _identity(folder: Path) -> Iterator[Path]:
    kinds = ("*.safetensors", "config.json", "tokenizer*.json", "tekken.json", "tokenizer.model", "*.jinja")
    for pattern in (*kinds, "*processor_config.json"):
        yield from folder.glob(pattern)


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    card: str = "",
    licence_from: Path | None = None,
    processor: Any = None,
) -> Path:
    """Write a standard checkpoint to ``out``, replacing what was there; nothing half-written remains.

    The files of a ``processor`` come along, from the folder of the licence if they are there.
    Raises ModelError when it cannot be written, a full disk included.
    """
    with whole_folder(out) as folder, _quiet():
        save_streamed(model, folder) if is_streamed(model) else model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        if processor is not None:
            processors.save(processor, folder, licence_from)
        if card:
            (folder / "README.md").write_text(card)
        for licence in _licences(licence_from):
            shutil.copy(licence, folder / licence.name)
    return out


_LEGAL = ("LICEN", "NOTICE", "USE_POLICY")


def _licences(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    return [p for p in sorted(folder.iterdir()) if p.is_file() and p.name.upper().startswith(_LEGAL)]


@contextmanager
def whole_folder(out: Path) -> Generator[Path]:
    """A temporary folder that becomes ``out`` when the block ends well and vanishes when it does not."""
    from safetensors import SafetensorError

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise ModelError(f"cannot write {out}: {error.strerror}") from error
    try:
        yield folder
        _replace(folder, out)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"cannot write {out}: {error}", next_step="free disk space or choose another --out"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _replace(folder: Path, out: Path) -> None:
    folder.chmod(0o755)
    if not out.exists():
        os.rename(folder, out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
    os.rename(out, old / out.name)
    os.rename(folder, out)
    shutil.rmtree(old, ignore_errors=True)
