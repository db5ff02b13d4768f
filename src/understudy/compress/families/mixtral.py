"""Mixtral: Mistral's attention, experts in place of its feed-forward block; dense: Mistral."""

from __future__ import annotations

from understudy.compress.families.mixture import Mixture

MIXTRAL = Mixture(name="Mixtral", model_type="mixtral", count_key="num_local_experts", dense="mistral")
