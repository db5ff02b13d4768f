"""The architectures Understudy can prune, one file each; a new one is a file and a line here."""

from __future__ import annotations

from understudy.compress.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE
from understudy.compress.families.family import Family
from understudy.compress.families.gemma3 import GEMMA3
from understudy.compress.families.llama import LLAMA
from understudy.compress.families.mistral import MISTRAL
from understudy.compress.families.mixtral import MIXTRAL
from understudy.compress.families.mixture import Mixture
from understudy.compress.families.olmoe import OLMOE
from understudy.compress.families.qwen2 import QWEN2
from understudy.compress.families.qwen2_moe import QWEN2_MOE
from understudy.compress.families.qwen3 import QWEN3
from understudy.compress.families.qwen3_moe import QWEN3_MOE

MIXTURES: tuple[Mixture, ...] = (MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE)
FAMILIES: tuple[Family, ...] = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA3, *MIXTURES)
