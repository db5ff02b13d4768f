"""Llama 2, 3 and 3.x, Code Llama, SmolLM2: the plain decoder every default of `Family` describes."""

from __future__ import annotations

from understudy.compress.families.family import Family

LLAMA = Family(name="Llama", model_type="llama", heads_divide_width=True)
