"""A checkpoint folder -> one GGUF file that llama.cpp computes to the same tokens.

Tensors are read, arranged, quantised and written one at a time, so memory holds one; the file appears under
its name only when it is whole. It ignores importance matrices, which need llama.cpp's own tools.

Source: GGUF specification; gguf (the writer and the quantisers).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from understudy.errors import MissingExtraError, ModelError
from understudy.protocol import Json
from understudy.serve import gguf_layout as layout
from understudy.serve.gguf_tokenizer import Vocabulary, vocabulary
from understudy.serve.k_quants import FALLBACK, quantize_k

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

KINDS = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0")
"""Types of the matrices; norms and biases are always f32."""


class ExportReport(NamedTuple):
    """What was written."""

    path: Path
    architecture: str
    kind: str
    parameters: int
    tensors: int
    bytes: int
    context: int
    seconds: float


def export_gguf(checkpoint: Path, out: Path, kind: str = "f16") -> ExportReport:
    """Write a checkpoint as GGUF.

    Raises ModelError for an unknown kind, family or tokenizer, a folder that is not a whole checkpoint, and a
    full disk; ``out`` is then as it was.
    """
    started = time.monotonic()
    if kind not in KINDS:
        raise ModelError(f"unknown kind {kind!r}", expected="one of: " + ", ".join(KINDS))
    source = _Checkpoint(checkpoint)
    family, shape = layout.family_of(source.config), layout.shape_of(source.config)
    plan = _plan(source, family, shape, kind)
    _check_space(out, sum(tensor.bytes for tensor in plan))
    with _whole_file(out) as part:
        writer = _writer(part, family.architecture)
        _describe(writer, source, family, shape, kind)
        _write(writer, plan, source)
    return ExportReport(
        path=out,
        architecture=family.architecture,
        kind=kind,
        parameters=sum(tensor.elements for tensor in plan),
        tensors=len(plan),
        bytes=out.stat().st_size,
        context=layout.metadata(source.config, family, shape)["context_length"],
        seconds=time.monotonic() - started,
    )


class _Checkpoint:
    """A folder's config, tensors and tokenizer, read as they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = self._json("config.json")
        # a multimodal checkpoint keeps its language model's config inside
        self.config = cast(Json, self.config.get("text_config") or self.config)
        self._files = self._weights()

    def _json(self, name: str, optional: bool = False) -> Json:
        path = self.folder / name
        if optional and not path.exists():
            return {}
        try:
            return cast(Json, json.loads(path.read_text()))
        except OSError as error:
            raise _not_whole(self.folder, f"{name}: {error.strerror}") from error
        except ValueError as error:
            raise _not_whole(self.folder, f"{name} is not JSON: {error}") from error

    def _weights(self) -> dict[str, tuple[str, Any]]:
        """Tensor name without its prefix -> (name in the file, open file)."""
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise MissingExtraError("safetensors", "serve") from error
        index = self._json("model.safetensors.index.json", optional=True)
        names = sorted(set(index.get("weight_map", {"": "model.safetensors"}).values()))
        found: dict[str, tuple[str, Any]] = {}
        for name in names:
            try:
                file = safe_open(self.folder / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise _not_whole(self.folder, f"{name}: {error}") from error
            found |= {_short(key): (key, file) for key in file.keys()}  # noqa: SIM118 - not a dict
        return found

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        key, file = self._files[name]
        return tuple(file.get_slice(key).get_shape())

    def tensor(self, name: str) -> layout.Array:
        key, file = self._files[name]
        return cast(layout.Array, file.get_tensor(key).float().numpy())

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise _not_whole(self.folder, f"tokenizer: {error}") from error

    def end_tokens(self) -> list[int]:
        ends = self._json("generation_config.json", optional=True).get("eos_token_id")
        return ends if isinstance(ends, list) else []


def _short(name: str) -> str:
    for prefix in ("model.language_model.", "language_model.model.", "language_model.", "model."):
        name = name.removeprefix(prefix)
    return name


def _not_whole(folder: Path, why: str) -> ModelError:
    return ModelError(
        f"{folder} is not a whole checkpoint: {why}",
        expected="config.json, *.safetensors and a tokenizer",
        next_step="understudy own writes one",
    )


class _Tensor(NamedTuple):
    place: layout.Place
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    bytes: int
    data: layout.Array | None = None
    """Set when it is not in the checkpoint."""

    @property
    def elements(self) -> int:
        return int(np.prod(self.shape))


def _plan(source: _Checkpoint, family: layout.Family, shape: layout.Shape, kind: str) -> list[_Tensor]:
    places = layout.places(family, shape, source.names)
    _check_shapes([_tensor(place, source.shape(place.source), kind) for place in places], shape)
    shapes = [layout.cut_shape(place, source.shape(place.source)) for place in places]
    plan = [_tensor(place, size, kind) for place, size in zip(places, shapes, strict=True)]
    factors = layout.rope_factors(source.config, shape)
    if factors is not None:
        rope = _tensor(layout.Place("rope_freqs.weight", ""), factors.shape, "f32")
        plan.append(rope._replace(data=factors))
    return plan


def _tensor(place: layout.Place, shape: tuple[int, ...], kind: str) -> _Tensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    chosen = kind
    if len(shape) == 1:
        chosen = "f32"
    elif place.name in ("token_embd.weight", "output.weight") and kind[:2] in ("q4", "q5"):
        chosen = "q8_0"  # the vocabulary suffers most and is read once a token
    for standby in (FALLBACK.get(chosen, "f16"), "f16"):
        if shape[-1] % GGML_QUANT_SIZES[GGMLQuantizationType[chosen.upper()]][0]:
            chosen = standby
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[chosen.upper()]]
    return _Tensor(place, shape, GGMLQuantizationType[chosen.upper()], int(np.prod(shape)) // block * size)


def _check_shapes(plan: Sequence[_Tensor], shape: layout.Shape) -> None:
    """The config and the weights agree. llama.cpp would say so too, but of tensors renamed."""
    query, pair = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    expected = {
        "token_embd.weight": (shape.vocabulary, shape.hidden),
        "blk.0.attn_q.weight": (query, shape.hidden),
        "blk.0.attn_k.weight": (pair, shape.hidden),
        "blk.0.attn_output.weight": (shape.hidden, query),
        "blk.0.ffn_down.weight": (shape.hidden, shape.ffn),
    }
    for tensor in plan:
        wanted = expected.get(tensor.place.name.replace(f"blk.{tensor.place.name.split('.')[1]}.", "blk.0."))
        if wanted and tensor.shape != wanted:
            raise ModelError(
                f"{tensor.place.source} has shape {tensor.shape}, config.json says {wanted}",
                expected="uniform layers as declared in config.json",
            )


def _check_space(out: Path, needed: int) -> None:
    folder = out.absolute().parent
    if not folder.is_dir():
        raise ModelError(f"no such folder: {folder}", next_step=f"mkdir -p {folder}")
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise _no_space(out, f"{needed:,} bytes needed, {free:,} free")


def _no_space(out: Path, why: str) -> ModelError:
    return ModelError(
        f"no space for {out}: {why}", expected="a disk with room", next_step="choose another --out"
    )


@contextmanager
def _whole_file(out: Path) -> Generator[Path, None, None]:
    """A path to write to, put in the place of ``out`` when all went well and removed otherwise."""
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(out)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _no_space(out, "the disk is full") from error
        raise ModelError(f"cannot write {out}: {error.strerror}", expected="a writable folder") from error
    finally:
        part.unlink(missing_ok=True)


def _writer(path: Path, architecture: str) -> GGUFWriter:
    from gguf import GGUFWriter

    return GGUFWriter(path, architecture)


def _describe(
    writer: GGUFWriter, source: _Checkpoint, family: layout.Family, shape: layout.Shape, kind: str
) -> None:
    from gguf import LlamaFileType

    names = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}
    names |= {"q4_k": "MOSTLY_Q4_K_S", "q5_k": "MOSTLY_Q5_K_S"}
    writer.add_type("model")
    writer.add_name(source.folder.absolute().name)
    writer.add_file_type(LlamaFileType[names.get(kind, f"MOSTLY_{kind.upper()}")])
    writer.add_quantization_version(2)
    for key, value in layout.metadata(source.config, family, shape).items():
        name = f"{family.architecture}.{key}"
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, list):
            writer.add_array(name, cast(list[int], value))
        else:
            writer.add_uint32(name, value)
    tokenizer = source.tokenizer()
    form = json.loads(tokenizer.backend_tokenizer.to_str())
    _describe_tokens(writer, vocabulary(form, shape.vocabulary))
    _describe_special(writer, tokenizer, source.end_tokens())


def _describe_tokens(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    writer.add_add_space_prefix(vocabulary.space_prefix)


def _describe_special(writer: GGUFWriter, tokenizer: Any, ends: Sequence[int]) -> None:
    """Special tokens, whether text gets them, and the chat template."""
    for token, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if token is not None:
            add(token)
    if others := [token for token in ends if token != tokenizer.eos_token_id]:
        writer.add_eot_token_id(others[0])
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    with_special = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(with_special[: -len(plain)] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(with_special[-1:] == [tokenizer.eos_token_id] and len(with_special) > len(plain))
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _write(writer: GGUFWriter, plan: Sequence[_Tensor], source: _Checkpoint) -> None:
    from gguf.quants import quantize

    for tensor in plan:
        # the writer takes a quantised tensor's shape in bytes
        byte_shape = (*tensor.shape[:-1], tensor.bytes // int(np.prod(tensor.shape[:-1])))
        writer.add_tensor_info(tensor.place.name, byte_shape, np.dtype(np.uint8), tensor.bytes, tensor.type)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in plan:
            weight = source.tensor(tensor.place.source) if tensor.data is None else tensor.data
            arranged = np.ascontiguousarray(layout.arrange(tensor.place, weight))
            by_ggml = tensor.type.name.lower() in FALLBACK
            stored = quantize_k(arranged, tensor.type) if by_ggml else quantize(arranged, tensor.type)
            writer.write_tensor_data(np.ascontiguousarray(stored))
    finally:
        writer.close()
