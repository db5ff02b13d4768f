"""What a run needs to go on after it was stopped: tensors and a file that says they are there.

Files are written beside their place and renamed into it. Only what is trained is saved: the rest is in the
checkpoint the run began with. Of sharded tensors the first process writes the whole. It ignores what the
tensors mean (distill).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from understudy.compress.processes import Processes, put, whole
from understudy.errors import ModelError

STATES = ("step", "exp_avg", "exp_avg_sq")


DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
"""What is saved, by its name in the format."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], peers: Processes) -> None:
    """A safetensors file, whole or not at all, with one whole tensor in memory at a time.

    Every process must call it. Raises ModelError when the disk is full. Format: a length, a JSON header, and
    the values one behind the other (huggingface.co/docs/safetensors).
    """
    values = (whole(tensor) for tensor in tensors.values())
    if peers.rank == 0:
        _save(path, _header(tensors), values)
    for _ in values:
        # sharded ones are put together by all processes
        pass
    peers.wait()


def _save(path: Path, header: bytes, values: Iterator[Tensor]) -> None:
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(header)
            for value in values:
                file.write(_bytes(value.cpu().contiguous()))
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise ModelError(f"cannot write {path}: {error}", next_step="free disk space") from error


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """The length and the header, padded so that values begin at a multiple of 8."""
    entries, begin = dict[str, object](), 0
    for name, tensor in tensors.items():
        end = begin + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    """Its values where they lie."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class Tensors(Mapping[str, Tensor]):
    """A safetensors file whose tensors are read when they are asked for, each into memory of its own: a file
    that is mapped would stay in memory as a whole. Raises ModelError, naming it, when it cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                self._entries = cast(dict[str, dict[str, Any]], json.loads(file.read(size)))
            self._entries.pop("__metadata__", None)
            self._start = 8 + size
            last = max((entry["data_offsets"][1] for entry in self._entries.values()), default=0)
            if path.stat().st_size != self._start + last:
                raise ValueError(f"{path.stat().st_size} bytes in place of {self._start + last}")
        except (OSError, ValueError, KeyError, TypeError, MemoryError, OverflowError) as error:
            raise ModelError(f"cannot read {path}: {error}", next_step=f"remove {path.parent}") from error

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        kinds = {text: dtype for dtype, text in DTYPES.items()}
        value = torch.empty(entry["shape"], dtype=kinds[entry["dtype"]])
        with self.path.open("rb") as file:
            file.seek(self._start + entry["data_offsets"][0])
            file.readinto(_bytes(value))
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def write_bytes(path: Path, content: bytes) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def fill(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Put saved weights into parameters of the same names."""
    for name, parameter in parameters.items():
        put(parameter, tensors[name])


def optimiser_tensors(
    optimiser: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The optimiser's states under names of their own."""
    return {
        f"optimiser.{part}.{name}": cast(dict[str, Tensor], optimiser.state[parameter])[part]
        for name, parameter in parameters.items()
        if parameter in optimiser.state
        for part in STATES
    }


def fill_optimiser(
    optimiser: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
) -> None:
    """Put saved states where `optimiser_tensors` found them."""
    for name, parameter in parameters.items():
        kept = {part: tensors.get(f"optimiser.{part}.{name}") for part in STATES}
        if kept["step"] is not None:
            cast(Any, optimiser.state)[parameter] = {
                part: _like(parameter, cast(Tensor, value), part) for part, value in kept.items()
            }


def _like(parameter: nn.Parameter, value: Tensor, part: str) -> Tensor:
    """A state where the optimiser keeps it: beside its parameter, the count of steps by itself."""
    if part == "step":
        return value
    state = torch.zeros_like(parameter, dtype=value.dtype)
    put(state, value)
    return state
