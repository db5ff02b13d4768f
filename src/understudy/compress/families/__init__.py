"""The architectures Understudy can prune, one file each; a new one is a file and a line here."""

from __future__ import annotations

from understudy.compress.families.family import Family
from understudy.compress.families.gemma3 import GEMMA3
from understudy.compress.families.llama import LLAMA
from understudy.compress.families.mistral import MISTRAL
from understudy.compress.families.qwen2 import QWEN2
from understudy.compress.families.qwen3 import QWEN3

FAMILIES: tuple[Family, ...] = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA3)
