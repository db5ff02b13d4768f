"""A layer that lies in safetensors files until it is needed: its weights come in as fp32 and go again.

A layer that was changed is written to a file of its own and read from there from then on. It ignores whole
models (streaming) and when a layer is needed (`Layer.awake`).
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

if TYPE_CHECKING:
    from torch import Tensor, nn


class Place(NamedTuple):
    """Where a layer's tensors are: files by tensor name, and what stands before the names in them."""

    files: dict[str, Path]
    prefix: str

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored."""
        from safetensors import safe_open

        key = self.prefix + name
        with safe_open(self.files[key], framework="pt") as file:
            return cast("Tensor", file.get_tensor(key))


class Shelf:
    """Keeps one layer's weights; hangs on its module as ``shelf``."""

    def __init__(self, place: Place, dtype: Any) -> None:
        self.place, self.dtype = place, dtype

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy is made of a layer that is awake, and lies in memory."""

    @contextmanager
    def awake(self, module: nn.Module) -> Generator[None]:
        """The weights in memory while the block runs. Nothing happens to a layer that is awake already."""
        if not any(parameter.is_meta for parameter in module.parameters()):
            yield
            return
        self._fetch(module)
        try:
            yield
        finally:
            self._leave(module)

    def _fetch(self, module: nn.Module) -> None:
        for owner, name, path in _parameters(module):
            set_parameter(owner, name, self.place.read(path).float())

    def _leave(self, module: nn.Module) -> None:
        for owner, name, _ in _parameters(module):
            set_parameter(owner, name, owner.get_parameter(name).to("meta"))


def shelf_of(module: nn.Module) -> Shelf | None:
    """None for a layer that lies in memory."""
    return cast("Shelf | None", getattr(module, "shelf", None))


def write_layer(module: nn.Module, path: Path) -> None:
    """A layer's weights as a file, whole or not there."""
    from safetensors.torch import save_file

    part = path.with_name(path.name + ".part")
    weights = {name: parameter.detach().contiguous() for name, parameter in module.named_parameters()}
    save_file(weights, part)
    part.replace(path)


def read_layer(module: nn.Module, path: Path) -> None:
    """Give a layer the weights in a file, of whatever shape: at once, or, on a shelf, when it is awake."""
    names = [name for _, _, name in _parameters(module)]
    place = Place(dict.fromkeys(names, path), "")
    shelf = shelf_of(module)
    for owner, name, path_ in _parameters(module):
        weight = place.read(path_)
        set_parameter(owner, name, weight.to("meta") if shelf else weight)
    if shelf:
        shelf.place = place


def _parameters(module: nn.Module) -> list[tuple[nn.Module, str, str]]:
    """(owner, name, path) of every parameter."""
    found: list[tuple[nn.Module, str, str]] = []
    for path, _ in module.named_parameters():
        owner, _, name = path.rpartition(".")
        found.append((module.get_submodule(owner), name, path))
    return found


def set_parameter(owner: nn.Module, name: str, weight: Tensor) -> None:
    """Put a weight, of whatever shape, where a module had one."""
    from torch import nn

    setattr(owner, name, nn.Parameter(weight, requires_grad=False))
    if isinstance(owner, nn.Linear) and name == "weight":
        owner.out_features, owner.in_features = weight.shape
