"""DeepSeek-V2 and -V3, and GLM-4-MoE of the same build: leading plain layers, then routed and shared experts.

Their attention has no dense sibling, but their own configuration can: with `first_k_dense_replace` at the
number of layers every layer is a plain gated block. DeepSeek's heads read a shared latent and are no axis.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from understudy.compress.families.mixture import Mixture

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class _PlainFirst(Mixture):
    def config_changes(self, config: Any) -> dict[str, Any]:
        return {"first_k_dense_replace": config.num_hidden_layers}


class _DeepSeek(_PlainFirst):
    def readers(self, layer: nn.Module) -> list[nn.Linear]:
        """The query's own projection or the first of its two, then the latent shared by keys and values."""
        attention = cast(Any, layer.get_submodule(self.attention))
        query = attention.q_proj if attention.q_lora_rank is None else attention.q_a_proj
        return [query, attention.kv_a_proj_with_mqa]

    def heads(self, model: PreTrainedModel) -> tuple[int, int, int]:
        config = self.config(model)
        return config.num_attention_heads, config.num_attention_heads, config.v_head_dim


DEEPSEEK_V2, DEEPSEEK_V3 = (
    _DeepSeek(
        name=name,
        model_type=model_type,
        shared="mlp.shared_experts",
        count_key="n_routed_experts",
        dense=model_type,
        heads_fixed=True,
    )
    for name, model_type in (("DeepSeek-V2", "deepseek_v2"), ("DeepSeek-V3", "deepseek_v3"))
)
GLM4_MOE = _PlainFirst(
    name="GLM-4-MoE",
    model_type="glm4_moe",
    shared="mlp.shared_experts",
    count_key="n_routed_experts",
    dense="glm4_moe",
)
