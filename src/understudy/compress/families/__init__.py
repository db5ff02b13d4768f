"""The architectures Understudy can prune, one file each; a new one is a file and a line here.

`FAMILIES` are text models, `HOSTS` models that see or hear, and `DECODERS` what may be inside a host. The
page docs/architectures.md shows how each is seen.
"""

from __future__ import annotations

from understudy.compress.families.audio import QWEN2_AUDIO, VOXTRAL
from understudy.compress.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE
from understudy.compress.families.family import Family
from understudy.compress.families.gemma3 import GEMMA3, GEMMA3_VISION
from understudy.compress.families.host import Host
from understudy.compress.families.idefics3 import IDEFICS3, SMOLVLM
from understudy.compress.families.llama import LLAMA
from understudy.compress.families.llava import LLAVA
from understudy.compress.families.mistral import MISTRAL
from understudy.compress.families.mixtral import MIXTRAL
from understudy.compress.families.mixture import Mixture
from understudy.compress.families.mllama import MLLAMA, MLLAMA_TEXT
from understudy.compress.families.olmoe import OLMOE
from understudy.compress.families.qwen2 import QWEN2
from understudy.compress.families.qwen2_moe import QWEN2_MOE
from understudy.compress.families.qwen3 import QWEN3
from understudy.compress.families.qwen3_moe import QWEN3_MOE
from understudy.compress.families.qwen_vl import (
    QWEN2_5_VL,
    QWEN2_5_VL_TEXT,
    QWEN2_VL,
    QWEN2_VL_TEXT,
    QWEN3_VL,
    QWEN3_VL_TEXT,
)
from understudy.compress.families.smollm3 import SMOLLM3

MIXTURES: tuple[Mixture, ...] = (MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE)
DENSE: tuple[Family, ...] = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA3, SMOLLM3)
FAMILIES: tuple[Family, ...] = (*DENSE, *MIXTURES)
DECODERS: tuple[Family, ...] = (*FAMILIES, QWEN2_VL_TEXT, QWEN2_5_VL_TEXT, QWEN3_VL_TEXT, MLLAMA_TEXT)
HOSTS: tuple[Host, ...] = (
    *(LLAVA, IDEFICS3, SMOLVLM, GEMMA3_VISION, QWEN2_VL, QWEN2_5_VL, QWEN3_VL, MLLAMA),
    *(QWEN2_AUDIO, VOXTRAL),
)
