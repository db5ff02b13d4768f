"""Mllama (Llama 3.2 Vision): some layers read the picture by cross-attention instead of the text.

A cross-attention layer is seen as every other: two branches that add to the stream, whose heads and channels
are chosen and refitted by what enters *its* writers, layer by layer. Its queries read the stream, its keys
and values the projected picture, both branches pass a gate, and a text without a picture passes it by.
transformers builds all layers from one number of heads and derives their size from the width, so the number
is the same in both kinds of layers; which heads they are is each layer's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from understudy.compress.families.family import Family
from understudy.compress.families.host import Host

if TYPE_CHECKING:
    from torch import Tensor, nn

_OTHERS = frozenset({"cross_attention_states", "cross_attention_mask", "full_text_row_masked_out_mask"})


class _Text(Family):
    """Layers that attend to the text."""

    def of_layer(self, layer: nn.Module) -> Family:
        if not hasattr(layer, "cross_attn"):
            return self
        paths = {part: f"cross_attn.{part}_proj" for part in "qkvo"}
        known = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed: dict[str, Any] = known | paths | {"attention": "cross_attn", "gated": True}
        return _Cross(**changed)

    def attention_call(self, call: Mapping[str, Any]) -> Mapping[str, Any] | None:
        return {name: value for name, value in call.items() if name not in _OTHERS}


class _Cross(Family):
    """Layers that attend to the picture."""

    def attention_call(self, call: Mapping[str, Any]) -> Mapping[str, Any] | None:
        if call.get("cross_attention_states") is None:
            return None
        states = call["cross_attention_states"]
        return {"cross_attention_states": states, "attention_mask": call["cross_attention_mask"]}

    def readers(self, layer: nn.Module) -> list[nn.Linear]:
        return [cast("nn.Linear", layer.get_submodule(self.q))]

    def scale_attention(self, layer: nn.Module, out: Tensor) -> Tensor:
        return cast(Any, layer).cross_attn_attn_gate.tanh() * out

    def scale_ffn(self, layer: nn.Module, out: Tensor, call: Mapping[str, Any]) -> Tensor:
        seen = call.get("full_text_row_masked_out_mask")
        gate = cast(Any, layer).cross_attn_mlp_gate.tanh()
        return gate * (out if seen is None else seen[:, 0] * out)


MLLAMA_TEXT = _Text(name="Mllama text", model_type="mllama_text_model", heads_fill_width=True)
MLLAMA = Host(name="Mllama", model_type="mllama", crossing="model.multi_modal_projector", layers_fixed=True)
