"""Idefics3 and SmolVLM: a SigLIP tower whose patches are folded by a scale factor, then one projection."""

from __future__ import annotations

from understudy.compress.families.host import Host

IDEFICS3, SMOLVLM = (
    Host(
        name=name,
        model_type=model_type,
        decoder="model.text_model",
        writers=("model.connector.modality_projection.proj",),
    )
    for name, model_type in (("Idefics3", "idefics3"), ("SmolVLM", "smolvlm"))
)
