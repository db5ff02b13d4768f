"""Qwen3-MoE: Qwen3's attention and routed experts only; dense: Qwen3."""

from __future__ import annotations

from typing import Any

from understudy.compress.families.mixture import Mixture


class _Qwen3Moe(Mixture):
    def config_changes(self, config: Any) -> dict[str, Any]:
        """The mixture's window holds in every layer; Qwen3 says for each layer whether it does."""
        kind = "sliding_attention" if config.sliding_window else "full_attention"
        return {"layer_types": [kind] * config.num_hidden_layers}


QWEN3_MOE = _Qwen3Moe(name="Qwen3-MoE", model_type="qwen3_moe", count_key="num_experts", dense="qwen3")
