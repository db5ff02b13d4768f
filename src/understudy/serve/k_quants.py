"""Matrices in ggml's K types, 256 weights to a block, by llama.cpp's own quantiser.

The `gguf` package reads these types and cannot write them; the library that serves the file exports the C
function that does. It ignores importance matrices.

Source: ggml.h of ggml (ggml_quantize_chunk); llama.cpp's `llama_tensor_get_type` for what stands in where a
row is no multiple of 256.
"""

from __future__ import annotations

import ctypes as c
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from understudy.errors import MissingExtraError, ModelError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

FALLBACK = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
"""For rows that are no multiple of 256, block type by block type; the keys are the types written here."""


@cache
def _quantizer() -> Any:
    """Raises MissingExtraError without xllamacpp, ModelError when its build keeps the function to itself."""
    try:
        extension = import_module("xllamacpp.xllamacpp")
    except ImportError as error:
        raise MissingExtraError("xllamacpp", "serve") from error
    assert extension.__file__ is not None
    try:
        function = c.CDLL(extension.__file__).ggml_quantize_chunk
    except AttributeError as error:
        raise ModelError(
            "this build of xllamacpp does not quantise to K types",
            expected="the version in requirements.lock",
            next_step="export with --kind q8_0 or q4_0",
        ) from error
    function.restype = c.c_size_t
    function.argtypes = [c.c_int, c.c_void_p, c.c_void_p, c.c_int64, c.c_int64, c.c_int64, c.c_void_p]
    return function


def quantize_k(weight: npt.NDArray[np.float32], kind: GGMLQuantizationType) -> npt.NDArray[np.uint8]:
    """``weight`` (rows, n), n a multiple of 256, as (rows, bytes of a row)."""
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[kind]
    rows, columns = weight.shape
    source = np.ascontiguousarray(weight, dtype=np.float32)
    out = np.empty((rows, columns // block * size), dtype=np.uint8)
    written = _quantizer()(int(kind), source.ctypes.data, out.ctypes.data, 0, rows, columns, None)
    if written != out.nbytes:
        raise ModelError(f"ggml wrote {written} bytes of {kind.name}", expected=f"{out.nbytes}")
    return out
