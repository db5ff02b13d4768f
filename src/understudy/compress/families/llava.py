"""LLaVA 1.5 and its kin: a CLIP or SigLIP tower, a projector of two layers, any plain decoder behind it."""

from __future__ import annotations

from understudy.compress.families.host import Host

LLAVA = Host(
    name="LLaVA",
    model_type="llava",
    writers=("model.multi_modal_projector.linear_2",),
    inner=("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"),
)
