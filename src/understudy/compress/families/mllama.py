"""Mllama (Llama 3.2 Vision): some layers read the picture by cross-attention instead of the text.

A cross-attention layer is seen as every other: two branches that add to the stream, whose heads and channels
are chosen and refitted by what enters *its* writers, layer by layer. Its queries read the stream, its keys
and values the projected picture, both branches pass a gate, and a text without a picture passes it by.
These layers and their heads are axes of their own: `cross_attention_layers` says which remain. transformers
builds all layers from one number of heads and derives their size from the width, so fewer heads in these
alone are filled up with zeros, whole KV groups at a time: a zero value head stays zero in healing, whereas a
zero query head in a living group sees the mean of its values and would come alive.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from understudy.compress.families.family import Family
from understudy.compress.families.host import Host

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

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

    def heads(self, model: PreTrainedModel) -> tuple[int, int, int]:
        config = self.config(model)
        size = config.hidden_size // config.num_attention_heads
        text = next(layer for layer in self.body(model).layers if hasattr(layer, "self_attn"))
        return text.self_attn.o_proj.in_features // size, text.self_attn.k_proj.out_features // size, size

    def write_layers(self, model: PreTrainedModel) -> None:
        decoder = self.body(model)
        crossing = [place for place, layer in enumerate(decoder.layers) if hasattr(layer, "cross_attn")]
        decoder.cross_attention_layers = crossing
        self.config(model).cross_attention_layers = crossing

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
MLLAMA = Host(name="Mllama", model_type="mllama", crossing="model.multi_modal_projector")
