"""The model card that travels with a student: where it comes from, what was cut, how far from its teacher.

Plain Markdown with the front matter hubs read. It ignores benchmarks: those are in the certificate.
"""

from __future__ import annotations

from collections.abc import Sequence

from understudy.compress.decoder import Shape
from understudy.compress.plan import Plan

_AXES = (
    ("layers", "layers"),
    ("width", "hidden"),
    ("FFN channels", "ffn"),
    ("query heads", "heads"),
    ("KV heads", "kv_heads"),
    ("head dimension", "head_dim"),
    ("vocabulary", "vocab"),
)


def model_card(plan: Plan, facts: Sequence[str]) -> str:
    """README.md of a checkpoint; ``facts`` are lines of lineage and fidelity."""
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags: [structured-pruning, knowledge-distillation, understudy]",
            "---",
            "",
            "# A student made by Understudy",
            "",
            f"{plan.parameters_before / 1e6:.1f}M → {plan.parameters_after / 1e6:.1f}M parameters "
            f"(−{plan.removed:.1%}); {plan.reason}.",
            "",
            *_table(plan.teacher, plan.student),
            "",
            "## Lineage and fidelity",
            "",
            *(f"- {fact}" for fact in facts),
            "",
            "The teacher's licence applies. It loads with `AutoModelForCausalLM.from_pretrained` as it is.",
            "",
        ]
    )


def _table(teacher: Shape, student: Shape) -> list[str]:
    rows = [f"| {name} | {getattr(teacher, key)} | {getattr(student, key)} |" for name, key in _AXES]
    return ["| | teacher | student |", "| --- | --- | --- |", *rows]
