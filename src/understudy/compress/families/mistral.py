"""Mistral: Llama's layer; its sliding window lives in the mask, which transformers prepares."""

from __future__ import annotations

from understudy.compress.families.family import Family

MISTRAL = Family(name="Mistral", model_type="mistral")
