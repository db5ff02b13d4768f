"""Qwen2 and Qwen2.5: Llama's layer with biases on q, k and v, which are read off the modules."""

from __future__ import annotations

from understudy.compress.families.family import Family

QWEN2 = Family(name="Qwen2", model_type="qwen2")
