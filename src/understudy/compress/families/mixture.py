"""What an adapter says of a mixture of experts, beside what `Family` says of every decoder.

A mixture's feed-forward branch is seen as a pool: every expert's channels side by side, an expert's output
weighted token by token by its router, shared experts after the routed ones. `dense_config` names the
ordinary decoder that can hold channels chosen from the pool. It ignores how channels or experts are chosen.

transformers keeps all of a layer's routed experts in two tensors, `gate_up_proj` (experts, 2·channels, width)
and `down_proj` (experts, width, channels), and every router returns (logits, weights, indices) per token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from understudy.compress.families.family import Family

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class Expert(NamedTuple):
    """Views of one expert's weights: gate and up (channels, width), down (width, channels)."""

    gate: Tensor
    up: Tensor
    down: Tensor


@dataclass(frozen=True, kw_only=True)
class Mixture(Family):
    """Where a mixture keeps its router and experts, and which dense decoder shares its attention."""

    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    shared: str = ""
    """A gated feed-forward block that every token passes; empty when there is none."""
    shared_gate: str = ""
    """Linear (width → 1) whose sigmoid weighs the shared block; empty when the weight is 1."""
    count_key: str
    """The configuration's name for the number of routed experts."""
    dense: str
    """`model_type` of the dense student."""
    dense_experts: int = 0
    """Routed experts of the dense student: 1 where it is the mixture itself with one expert."""

    def config_changes(self, config: Any) -> dict[str, Any]:
        """What the dense configuration must say otherwise than the mixture's field of the same name."""
        del config
        return {}

    def sparse(self, layer: nn.Module) -> bool:
        """Whether this layer routes; families mix in plain layers."""
        return hasattr(layer.get_submodule(self.ffn), self.experts.removeprefix(self.ffn + "."))

    def pool(self, layer: nn.Module) -> list[Expert]:
        """The layer's experts, routed ones first; of a plain layer its one block."""
        if not self.sparse(layer):
            return [_block(layer.get_submodule(self.ffn))]
        stacked = cast(Any, layer.get_submodule(self.experts))
        halves = (both.chunk(2, dim=0) for both in stacked.gate_up_proj.detach())
        pairs = zip(halves, stacked.down_proj.detach(), strict=True)
        routed = [Expert(gate, up, down) for (gate, up), down in pairs]
        return [*routed, _block(layer.get_submodule(self.shared))] if self.shared else routed

    def activation(self, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        """What is applied to a gate's output."""
        holder = layer.get_submodule(self.experts if self.sparse(layer) else self.ffn)
        return cast("Callable[[Tensor], Tensor]", holder.act_fn)

    def weights(self, layer: nn.Module, x: Tensor) -> Tensor:
        """How much of each expert enters each token's output: x (tokens, width) → (tokens, experts)."""
        if not self.sparse(layer):
            return x.new_ones(len(x), 1)
        import torch

        router = layer.get_submodule(self.router)
        _, weights, indices = router(x)
        routed = x.new_zeros(len(x), len(cast(Any, router).weight))
        routed.scatter_add_(1, indices, weights.to(x.dtype))
        if not self.shared:
            return routed
        if not self.shared_gate:
            return torch.cat([routed, x.new_ones(len(x), 1)], dim=1)
        return torch.cat([routed, layer.get_submodule(self.shared_gate)(x).sigmoid()], dim=1)

    def dense_config(self, model: PreTrainedModel, ffn: int) -> Any:
        """Configuration of a dense decoder with this attention and ``ffn`` channels in each layer."""
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        source = self.config(model)
        target = cast(Any, CONFIG_MAPPING[self.dense])
        known = {field.name for field in dataclasses.fields(target)} - {
            "architectures",
            "transformers_version",
        }
        values = {name: value for name, value in source.to_dict().items() if name in known}
        head_dim = getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads
        if self.dense != self.model_type:
            values["head_dim"] = int(head_dim)
        return target(**values | {"intermediate_size": ffn} | self.config_changes(source))

    def write(self, layer: nn.Module, expert: Expert) -> None:
        """Put chosen channels into a layer of the dense student."""
        block = cast(Any, layer.get_submodule(self.ffn))
        block.gate_proj.weight.copy_(expert.gate)
        block.up_proj.weight.copy_(expert.up)
        block.down_proj.weight.copy_(expert.down)


def _block(block: nn.Module) -> Expert:
    """A plain gated block as an expert. Raises AttributeError for one that isn't gated."""
    parts = cast(Any, block)
    writers = (parts.gate_proj, parts.up_proj, parts.down_proj)
    return Expert(*(linear.weight.detach() for linear in writers))
