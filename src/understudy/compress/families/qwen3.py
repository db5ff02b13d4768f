"""Qwen3: Llama's layer with a norm on each query and key head, which no axis of pruning touches."""

from __future__ import annotations

from understudy.compress.families.family import Family

QWEN3 = Family(name="Qwen3", model_type="qwen3")
