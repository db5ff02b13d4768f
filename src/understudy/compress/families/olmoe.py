"""OLMoE: 64 small experts, norms over all query and all key heads together.

No dense decoder of transformers has these norms before rotation and Llama's norms around the branches, so the
dense student is an OLMoE of one expert: a softmax over one is 1, every token passes every channel. Heads
share a norm and are therefore no axis.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from understudy.compress.families.mixture import Expert, Mixture

if TYPE_CHECKING:
    from torch import nn


class _Olmoe(Mixture):
    def config_changes(self, config: Any) -> dict[str, Any]:
        del config
        return {"num_experts": 1, "num_experts_per_tok": 1}

    def write(self, layer: nn.Module, expert: Expert) -> None:
        import torch

        only = cast(Any, layer.get_submodule(self.experts))
        only.gate_up_proj[0].copy_(torch.cat([expert.gate, expert.up]))
        only.down_proj[0].copy_(expert.down)
        cast(Any, layer.get_submodule(self.router)).weight.zero_()


OLMOE = _Olmoe(
    name="OLMoE",
    model_type="olmoe",
    count_key="num_experts",
    dense="olmoe",
    dense_experts=1,
    heads_fixed=True,
)
