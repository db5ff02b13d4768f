"""Logprobs of given tokens by llama.cpp: the same file, kernels and rounding as the served model.

llama.cpp's server reports logprobs of generated tokens only, so this calls the C functions that the
`xllamacpp` library exports. No header comes with it: parameter structs are taken as opaque blobs from
llama.cpp's own `*_default_params`, and only seven fields, checked first, are changed; anything
unexpected raises ModelError instead of guessing. The weights are mapped from the same file, so their pages
are shared with the server.

It ignores batching across requests (scoring) and text (the engine tokenises).

Source: llama.h of llama.cpp (llama_batch, llama_decode, llama_memory_seq_rm).
"""

from __future__ import annotations

import ctypes as c
import struct
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from understudy.errors import ModelError
from understudy.serve.engine import Scored, ScoreJob, TokenScore

LOGIT_BYTES = 64 * 2**20
"""Memory for logits at once; sets how many tokens are computed in one go."""


class _Blob(c.Structure):
    """A parameter struct of unknown fields: larger than any, passed by value as the C ABI passes structs."""

    _fields_ = [("bytes", c.c_ubyte * 1024)]


class _Batch(c.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.POINTER(c.c_float)),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    ]


_HANDLE = c.c_void_p
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_model_default_params": (_Blob, []),
    "llama_context_default_params": (_Blob, []),
    "llama_model_load_from_file": (_HANDLE, [c.c_char_p, _Blob]),
    "llama_init_from_model": (_HANDLE, [_HANDLE, _Blob]),
    "llama_model_get_vocab": (_HANDLE, [_HANDLE]),
    "llama_vocab_n_tokens": (c.c_int32, [_HANDLE]),
    "llama_n_ctx": (c.c_uint32, [_HANDLE]),
    "llama_n_batch": (c.c_uint32, [_HANDLE]),
    "llama_set_n_threads": (None, [_HANDLE, c.c_int32, c.c_int32]),
    "llama_token_to_piece": (c.c_int32, [_HANDLE, c.c_int32, c.c_char_p, c.c_int32, c.c_int32, c.c_bool]),
    "llama_batch_init": (_Batch, [c.c_int32, c.c_int32, c.c_int32]),
    "llama_batch_free": (None, [_Batch]),
    "llama_decode": (c.c_int32, [_HANDLE, _Batch]),
    "llama_get_logits": (c.POINTER(c.c_float), [_HANDLE]),
    "llama_get_memory": (_HANDLE, [_HANDLE]),
    "llama_memory_seq_rm": (c.c_bool, [_HANDLE, c.c_int32, c.c_int32, c.c_int32]),
    "llama_free": (None, [_HANDLE]),
    "llama_model_free": (None, [_HANDLE]),
}


@cache
def _library() -> Any:
    """llama.cpp's functions with their types. Raises ModelError when one is not exported."""
    extension = import_module("xllamacpp.xllamacpp")
    assert extension.__file__ is not None
    library = c.CDLL(extension.__file__)
    try:
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as error:
        raise _incompatible(str(error)) from error
    return library


def _incompatible(what: str) -> ModelError:
    return ModelError(
        f"this build of xllamacpp cannot score prompts: {what}",
        expected="the version in requirements.lock",
        next_step="pip install --require-hashes --no-deps -r requirements.lock",
    )


class _Place(NamedTuple):
    """What the model predicted after one token of the sequence."""

    logprob: float
    """Of the token that did follow; nan at the end of the sequence."""
    top: tuple[tuple[int, float], ...]


class LlamaScorer:
    """A model and one sequence of context; not thread-safe. Make it with `open_scorer`."""

    def __init__(self, model: int, context: int) -> None:
        self._llama = _library()
        self._model = model
        self._context = context
        self._vocab = self._llama.llama_model_get_vocab(model)
        self._memory = self._llama.llama_get_memory(context)
        self._rows: int = self._llama.llama_n_batch(context)
        self._batch = self._llama.llama_batch_init(self._rows, 0, 1)
        self._vocabulary: int = self._llama.llama_vocab_n_tokens(self._vocab)
        self._held: list[int] = []
        self._places: list[_Place] = []
        self._top = 0

    def score(self, jobs: Sequence[ScoreJob]) -> list[Scored]:
        """Scores in the order of the jobs. Raises ModelError when llama.cpp cannot compute.

        Jobs are walked in lexicographic order and the sequence is cut back to the common prefix each time,
        so whatever prompts share (few-shot examples, a question with four endings) is computed once. A token
        costs these kernels nearly the same in short batches as in long ones, so little is lost by it.
        """
        order = sorted(range(len(jobs)), key=lambda index: jobs[index].tokens)
        scores = {index: self._score(jobs[index]) for index in order}
        return [scores[index] for index in range(len(jobs))]

    def _score(self, job: ScoreJob) -> Scored:
        tokens = list(job.tokens)
        start = self._cut_to_common(tokens, job.top)
        while start < len(tokens):
            end = min(start + self._rows, len(tokens))
            self._decode(tokens[start:end], start)
            # what follows the last token is not known: any token may stand for it
            self._places += self._read(np.array([*tokens[start + 1 : end + 1], 0][: end - start]), job.top)
            self._held += tokens[start:end]
            start = end
        scored = [TokenScore(tokens[0], None, ())]
        places = zip(tokens[1:], self._places, strict=False)
        return Scored((*scored, *(TokenScore(t, p.logprob, p.top) for t, p in places)), self._places[-1].top)

    def _cut_to_common(self, tokens: Sequence[int], top: int) -> int:
        """Keep what is held of the same tokens; how many. The last common one is computed anew: what it
        predicted was kept for another follower."""
        common = 0
        if top == self._top:
            pairs = zip(tokens, self._held, strict=False)
            common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(self._held)))
        keep = max(common - 1, 0)
        self._llama.llama_memory_seq_rm(self._memory, 0, keep, -1)
        self._held, self._places, self._top = self._held[:keep], self._places[:keep], top
        return keep

    def _decode(self, tokens: Sequence[int], start: int) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for row, token in enumerate(tokens):
            batch.token[row], batch.pos[row], batch.logits[row] = token, start + row, 1
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, 0
        if code := self._llama.llama_decode(self._context, batch):
            self._cut_to_common((), self._top)
            raise ModelError(f"llama.cpp could not compute {len(tokens)} tokens (llama_decode: {code})")

    def _read(self, following: npt.NDArray[np.int64], top: int) -> list[_Place]:
        """Log-softmax of the logits just computed, at the tokens that follow and at the likeliest."""
        rows = len(following)
        pointer = self._llama.llama_get_logits(self._context)
        logits = np.ctypeslib.as_array(pointer, (rows, self._vocabulary))
        peak = logits.max(axis=1, keepdims=True)
        norm = (peak[:, 0] + np.log(np.exp(logits - peak).sum(axis=1))).astype(np.float64)
        chosen = logits[np.arange(rows), following] - norm
        best = _likeliest(logits, top)
        values = np.take_along_axis(logits, best, axis=1) - norm[:, None]
        tops = [tuple(zip(b, v, strict=True)) for b, v in zip(best.tolist(), values.tolist(), strict=True)]
        return [_Place(*pair) for pair in zip(chosen.tolist(), tops, strict=True)]

    def generate(self, count: int) -> None:
        """Compute ``count`` tokens one after the other, as generation does; which ones does not matter."""
        self._cut_to_common((), self._top)
        for place in range(count):
            self._decode([0], place)
        self._cut_to_common((), self._top)

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for; a control token's name."""
        buffer = c.create_string_buffer(512)
        length = self._llama.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
        return buffer.raw[: max(length, 0)]

    def close(self) -> None:
        self._llama.llama_batch_free(self._batch)
        self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)


def _likeliest(logits: npt.NDArray[np.float32], top: int) -> npt.NDArray[np.int64]:
    """Indices of the ``top`` largest logits of each row, largest first."""
    if top <= 1:
        return logits.argmax(axis=1)[:, None][:, :top]
    some = np.argpartition(logits, -top, axis=1)[:, -top:]
    order = np.argsort(-np.take_along_axis(logits, some, axis=1), axis=1, kind="stable")
    return np.take_along_axis(some, order, axis=1)


_FLASH_ATTENTION = 52
"""Byte offset in llama_context_params of flash_attn_type (−1 automatic, 0 off), the last of four enums."""
_CACHE_TYPES = 104
"""Of type_k and type_v: ggml types, 0 F32, 1 F16."""


def _known(params: _Blob) -> bool:
    """Whether the defaults stand where this file writes."""
    sizes = struct.unpack_from("<4I", params.bytes)
    enums = struct.unpack_from("<4i", params.bytes, _FLASH_ATTENTION - 12)
    types = struct.unpack_from("<2i", params.bytes, _CACHE_TYPES)
    return (sizes, enums, types) == ((512, 2048, 512, 1), (-1, -1, -1, -1), (1, 1))


def open_scorer(path: Path, context: int, threads: int) -> LlamaScorer:
    """A scorer for a GGUF file. Raises ModelError when the file or this build of llama.cpp will not do."""
    llama = _library()
    params = llama.llama_context_default_params()
    if not _known(params):
        raise _incompatible("llama_context_params has changed")
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    if not model:
        raise ModelError(f"llama.cpp cannot load {path} for scoring", expected="a GGUF model")
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    rows = max(16, min(context, 512, LOGIT_BYTES // (4 * vocabulary)))
    struct.pack_into("<4I", params.bytes, 0, context, rows, rows, 1)
    # keys and values in F32, without flash attention: in F16 a log-probability is off by up to 0.1
    struct.pack_into("<i", params.bytes, _FLASH_ATTENTION, 0)
    struct.pack_into("<2i", params.bytes, _CACHE_TYPES, 0, 0)
    handle = llama.llama_init_from_model(model, params)
    if not handle or llama.llama_n_ctx(handle) < context or llama.llama_n_batch(handle) != rows:
        llama.llama_model_free(model)
        raise _incompatible("it does not make the context asked for")
    llama.llama_set_n_threads(handle, threads, threads)
    return LlamaScorer(model, handle)
