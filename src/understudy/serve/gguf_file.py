"""A GGUF file's header: enough to say what it is, and that it is whole, before an engine loads it.

It ignores the weights themselves; tokens and other long arrays are skipped.

Source: GGUF specification version 3, ggml docs/gguf.md (little-endian files).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from understudy.errors import ModelError

_SCALARS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


class GgufHeader(NamedTuple):
    """What the header says."""

    metadata: dict[str, Any]
    """Scalars and strings by key; arrays are left out."""
    tensors: int
    parameters: int
    """Elements of all tensors."""
    end: int
    """Byte where the last tensor ends."""


def read_header(path: Path) -> GgufHeader:
    """The header of a GGUF file. Raises ModelError if the file is absent, not GGUF, or cut off."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = _read(file)
    except FileNotFoundError as error:
        raise ModelError(f"no such model file: {path}", expected="a GGUF file") from error
    except IsADirectoryError as error:
        raise ModelError(f"{path} is a folder", expected="a GGUF file") from error
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", expected="a GGUF file") from error
    except (struct.error, UnicodeDecodeError, ValueError, KeyError, OverflowError, MemoryError) as error:
        raise _unusable(path, f"is not a whole GGUF file: {error}") from error
    if header.end > size:
        raise _unusable(path, f"is cut off: {size:,} of {header.end:,} bytes")
    return header


def _unusable(path: Path, what: str) -> ModelError:
    return ModelError(
        f"{path} {what}",
        expected="a complete GGUF file",
        next_step=f"copy or download it again, or: understudy export CHECKPOINT --out {path.name}",
    )


def _read(file: BinaryIO) -> GgufHeader:
    if file.read(4) != b"GGUF":
        raise ValueError("the first bytes are not 'GGUF'")
    version, tensors, entries = struct.unpack("<IQQ", file.read(20))
    if version not in (2, 3):
        raise ValueError(f"version {version}, expected 2 or 3")
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        key = _string(file)
        value = _value(file, _scalar(file, 4))
        if value is not None:
            metadata[key] = value
    infos = [_tensor(file) for _ in range(tensors)]
    alignment = int(metadata.get("general.alignment", 32))
    start = -(-file.tell() // alignment) * alignment
    ends = [offset + _size(kind, elements) for elements, kind, offset in infos]
    return GgufHeader(metadata, tensors, sum(i[0] for i in infos), start + max(ends, default=0))


def _scalar(file: BinaryIO, kind: int) -> Any:
    form = _SCALARS[kind]
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _string(file: BinaryIO) -> str:
    length = _scalar(file, 10)
    raw = file.read(length)
    if len(raw) < length:
        raise ValueError("it ends within a string")
    return raw.decode()


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _scalar(file, kind)
    inner, count = _scalar(file, 4), _scalar(file, 10)
    if inner in _SCALARS:
        file.seek(count * struct.calcsize(_SCALARS[inner]), 1)
        return None
    for _ in range(count):
        if inner == _STRING:
            file.seek(_scalar(file, 10), 1)
        else:
            _value(file, inner)
    return None


def _tensor(file: BinaryIO) -> tuple[int, int, int]:
    """Elements, ggml type and offset of the next tensor."""
    _string(file)
    elements = 1
    for _ in range(_scalar(file, 4)):
        elements *= _scalar(file, 10)
    return elements, _scalar(file, 4), _scalar(file, 10)


def _size(kind: int, elements: int) -> int:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    return elements // block * size
