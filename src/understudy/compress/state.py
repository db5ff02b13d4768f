"""What a run needs to go on after it was stopped: tensors and a file that says they are there.

Files are written beside their place and renamed into it. Only what is trained is saved: the rest is in the
checkpoint the run began with. Of sharded tensors the first process writes the whole. It ignores what the
tensors mean (distill).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from understudy.compress.processes import Processes, put, whole
from understudy.errors import ModelError

STATES = ("step", "exp_avg", "exp_avg_sq")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], peers: Processes) -> None:
    """A safetensors file, whole or not at all. Raises ModelError when the disk is full."""
    gathered = {name: whole(tensor).contiguous() for name, tensor in tensors.items()}
    if peers.rank == 0:
        _save(path, gathered)
    peers.wait()


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        save_file(tensors, partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise ModelError(f"cannot write {path}: {error}", next_step="free disk space") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Raises ModelError, naming the file, when it cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read {path}: {error}", next_step=f"remove {path.parent}") from error


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
