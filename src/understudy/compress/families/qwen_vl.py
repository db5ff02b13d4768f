"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: positions in time, height and width; Qwen3's pictures enter thrice.

Qwen3-VL adds features of several depths of its tower behind its first layers (DeepStack, arXiv 2406.04334),
so its layers stay; Qwen2's heads fill the width, Qwen3's have a size of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from understudy.compress.families.family import Family
from understudy.compress.families.host import Host

if TYPE_CHECKING:
    from torch import Tensor


class _QwenVl(Host):
    def positions(self, positions: Tensor) -> Tensor:
        """The text's own positions, then the same in time, height and width: (4, rows, length)."""
        return positions[None].expand(4, -1, -1)


QWEN2_VL_TEXT = Family(name="Qwen2-VL text", model_type="qwen2_vl_text", heads_fill_width=True)
QWEN2_5_VL_TEXT = Family(name="Qwen2.5-VL text", model_type="qwen2_5_vl_text", heads_fill_width=True)
QWEN3_VL_TEXT = Family(name="Qwen3-VL text", model_type="qwen3_vl_text")
QWEN2_VL = _QwenVl(
    name="Qwen2-VL",
    model_type="qwen2_vl",
    writers=("model.visual.merger.mlp.2",),
    width_keys=("vision_config.hidden_size",),
)
QWEN2_5_VL = _QwenVl(
    name="Qwen2.5-VL",
    model_type="qwen2_5_vl",
    writers=("model.visual.merger.mlp.2",),
    width_keys=("vision_config.out_hidden_size",),
)
QWEN3_VL = _QwenVl(
    name="Qwen3-VL",
    model_type="qwen3_vl",
    writers=("model.visual.merger.linear_fc2", "model.visual.deepstack_merger_list.*.linear_fc2"),
    width_keys=("vision_config.out_hidden_size",),
    layers_fixed=True,
)
