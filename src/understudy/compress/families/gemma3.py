"""Gemma 3, text: norms before and after both branches, gains stored less one, a scaled embedding."""

from __future__ import annotations

from understudy.compress.families.family import Family

GEMMA3 = Family(
    name="Gemma 3 text",
    model_type="gemma3_text",
    attention_post_norm="post_attention_layernorm",
    ffn_norm="pre_feedforward_layernorm",
    ffn_post_norm="post_feedforward_layernorm",
    gain_offset=1.0,
    scaled_embedding=True,
    heads_divide_width=True,
)
