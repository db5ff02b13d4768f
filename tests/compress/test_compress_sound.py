"""Models that hear: Voxtral from prepared sound to a checkpoint that loads, and what its chats would need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import seeing
import torch
from transformers import AutoModelForMultimodalLM, WhisperFeatureExtractor

from understudy.compress import checkpoint
from understudy.compress import plan as plans
from understudy.compress.corpus import Batch
from understudy.compress.decoder import extras_of, shape_of, states_of
from understudy.compress.fidelity import fidelity
from understudy.compress.prune import Method, prune
from understudy.errors import ModelError


def sounds() -> list[Batch]:
    return [seeing.heard(seed) for seed in (3, 5, 7)]


def test_voxtral_from_prepared_sound_to_a_checkpoint_that_loads(tmp_path: Path):
    """What the processor would make is given; everything behind it is the way of the other families."""
    teacher, model, text = seeing.model_of("voxtral"), seeing.model_of("voxtral"), sounds()
    plan = plans.decide(shape_of(model), extras_of(model), ffn=16, hidden=40, heads=4)
    prune(model, plan, text)
    refitted = fidelity(teacher, model, text).kl
    out = checkpoint.save(model, seeing.tokenizer_of("voxtral"), tmp_path / "student")
    again: Any = AutoModelForMultimodalLM.from_pretrained(out).eval()
    assert shape_of(again) == plan.student
    with torch.no_grad():
        for batch in text:
            torch.testing.assert_close(states_of(again, batch), states_of(model, batch), rtol=0, atol=0)
    sliced = seeing.model_of("voxtral")
    prune(sliced, plan, text, Method(refit=False, reread=0.0, pull=0.0))
    assert refitted < fidelity(teacher, sliced, text).kl


def test_voxtrals_own_processor_is_refused_by_name(tmp_path: Path):
    folder = checkpoint.save(seeing.model_of("voxtral"), seeing.tokenizer_of("voxtral"), tmp_path / "voxtral")
    WhisperFeatureExtractor(feature_size=16, chunk_length=1).save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "VoxtralProcessor"}))
    with pytest.raises(ModelError, match=r"only mistral-common writes[\s\S]*Qwen2-Audio's"):
        checkpoint.load(folder)
