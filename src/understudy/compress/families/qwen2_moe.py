"""Qwen2-MoE and Qwen1.5-MoE: routed experts beside a shared one with a gate of its own; dense: Qwen2."""

from __future__ import annotations

from understudy.compress.families.mixture import Mixture

QWEN2_MOE = Mixture(
    name="Qwen2-MoE",
    model_type="qwen2_moe",
    shared="mlp.shared_expert",
    shared_gate="mlp.shared_expert_gate",
    count_key="num_experts",
    dense="qwen2",
)
