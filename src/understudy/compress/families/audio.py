"""Qwen2-Audio and Voxtral: a Whisper encoder, a projector, and a Qwen2 or Llama decoder behind it."""

from __future__ import annotations

from understudy.compress.families.host import Host

QWEN2_AUDIO = Host(
    name="Qwen2-Audio",
    model_type="qwen2_audio",
    hears=True,
    writers=("model.multi_modal_projector.linear",),
)
VOXTRAL = Host(
    name="Voxtral",
    model_type="voxtral",
    hears=True,
    writers=("model.multi_modal_projector.linear_2",),
    inner=("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"),
)
