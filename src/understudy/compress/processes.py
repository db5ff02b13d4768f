"""One process or several: what a training loop has to agree on with its peers.

Under ``torchrun`` the same command runs once a GPU (or, on CPUs, once a process over gloo): accelerate
brings the processes together, FSDP2 shards the decoder's layers and their gradients, which are summed, and
the vocabulary stays whole on every process, for the loss reads it outside the decoder. It ignores what is
trained.

Source: torch.distributed.fsdp.fully_shard (FSDP2); huggingface.co/docs/accelerate `PartialState`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from understudy.compress.decoder import body, layers_of, vocabulary_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")


class Processes(Protocol):
    """All processes of a run, seen from one of them."""

    rank: int
    size: int
    device: torch.device

    def shard(self, model: PreTrainedModel) -> None:
        """Spread the decoder's parameters over the processes, in place."""
        ...

    def summed(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the processes, in float64."""
        ...

    def agreed(self, value: float) -> float:
        """The first process's value, for all."""
        ...

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients of parameters that every process holds whole."""
        ...

    def wait(self) -> None:
        """Until all processes are here."""
        ...


class Alone:
    """One process: nothing to agree on."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def shard(self, model: PreTrainedModel) -> None:
        model.to(self.device)  # pyright: ignore[reportArgumentType] -- torch's overloads hide behind a decorator

    def summed(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def agreed(self, value: float) -> float:
        return value

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Nothing."""

    def wait(self) -> None:
        """Nothing."""


class Group:
    """The processes that torchrun started."""

    def __init__(self) -> None:
        from accelerate import PartialState

        self.state = PartialState(cpu=not torch.cuda.is_available())
        self.rank, self.size = self.state.process_index, self.state.num_processes
        self.device = cast(torch.device, self.state.device)

    def shard(self, model: PreTrainedModel) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model.to(self.device)  # pyright: ignore[reportArgumentType] -- as above
        mesh = init_device_mesh(self.device.type, (self.size,))
        whole = set(vocabulary_weights(model))
        for module in (*(layer.module for layer in layers_of(model)), body(model)):
            sharded = cast(Any, fully_shard)(module, mesh=mesh, ignored_params=whole)
            # the loss is divided by the tokens of all processes, so their gradients add up
            sharded.set_gradient_divide_factor(1.0)
            # gloo knows sums only
            sharded.set_force_sum_reduction_for_comms(True)

    def summed(self, values: Sequence[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def agreed(self, value: float) -> float:
        first = torch.tensor([value], dtype=torch.float64, device=self.device)
        torch.distributed.broadcast(first, src=0)
        return float(first)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)

    def wait(self) -> None:
        self.state.wait_for_everyone()


def processes() -> Processes:
    """This process by itself, or among those of torchrun."""
    return Group() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Alone()


def is_sharded(tensor: Tensor) -> bool:
    """Whether only a part of it is here."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, detached; every process must ask for it."""
    tensor = tensor.detach()
    return cast(Tensor, cast(Any, tensor).full_tensor()) if is_sharded(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What of it is here."""
    return cast(Tensor, cast(Any, tensor).to_local()) if is_sharded(tensor) else tensor


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    if is_sharded(target):
        from torch.distributed.tensor import distribute_tensor

        sharded = cast(Any, target)
        value = distribute_tensor(value.to(target.device), sharded.device_mesh, sharded.placements)
    target.copy_(value)
