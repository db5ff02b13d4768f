"""Gemma 3: norms before and after both branches, gains stored less one, a scaled embedding."""

from __future__ import annotations

from typing import Any

from understudy.compress.families.family import Family
from understudy.compress.families.host import Host


class Gemma(Family):
    """Its embedding is multiplied by √width."""

    def embedding_scale(self, width: int) -> float:
        return width**0.5

    def rescale_embedding(self, embedding: Any, width: int) -> None:
        embedding.scalar_embed_scale = width**0.5
        embedding.embed_scale.fill_(width**0.5)


GEMMA3 = Gemma(
    name="Gemma 3 text",
    model_type="gemma3_text",
    attention_post_norm="post_attention_layernorm",
    ffn_norm="pre_feedforward_layernorm",
    ffn_post_norm="post_feedforward_layernorm",
    gain_offset=1.0,
    heads_divide_width=True,
)
GEMMA3_VISION = Host(
    name="Gemma 3",
    model_type="gemma3",
    columns=("model.multi_modal_projector.mm_input_projection_weight",),
)
