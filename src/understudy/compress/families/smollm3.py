"""SmolLM3: Llama's layer, every fourth of them without rotary positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from understudy.compress.families.family import Family

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _SmolLM3(Family):
    def write_layers(self, model: PreTrainedModel) -> None:
        """Which layers rotate is a list of the configuration, and each layer knows its own."""
        config: Any = self.config(model)
        config.no_rope_layers = [int(layer.self_attn.use_rope) for layer in self.body(model).layers]


SMOLLM3 = _SmolLM3(name="SmolLM3", model_type="smollm3")
