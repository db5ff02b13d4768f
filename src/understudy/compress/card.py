"""The model card that travels with a student: where it comes from, what was cut, how far from its teacher.

Plain Markdown with the front matter hubs read. Benchmarks are run later, by others, and entered afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from understudy.compress.decoder import Shape
from understudy.compress.plan import Plan
from understudy.compress.vllm_rules import vllm_faults

_AXES = (
    ("layers", "layers"),
    ("width", "hidden"),
    ("FFN channels", "ffn"),
    ("query heads", "heads"),
    ("KV heads", "kv_heads"),
    ("layers of cross-attention", "cross_layers"),
    ("their query heads", "cross_heads"),
    ("head dimension", "head_dim"),
    ("vocabulary", "vocab"),
)


BENCHMARKS = "## Benchmarks"


class Benchmark(NamedTuple):
    """Shares of items right, with standard errors."""

    suite: str
    items: int
    teacher: float
    teacher_se: float
    student: float
    student_se: float


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
    axes = [(name, key) for name, key in _AXES if "cross" not in key or teacher.cross_layers]
    rows = [f"| {name} | {getattr(teacher, key)} | {getattr(student, key)} |" for name, key in axes]
    return ["| | teacher | student |", "| --- | --- | --- |", *rows]


def enter_benchmarks(checkpoint: Path, rows: Sequence[Benchmark]) -> None:
    """Put a table of benchmarks at the end of a checkpoint's card, in the place of an earlier one."""
    path = checkpoint / "README.md"
    card = path.read_text().partition(BENCHMARKS)[0].rstrip() if path.exists() else ""
    lines = [
        f"| {row.suite} | {row.items} | {row.teacher:.1%} ± {row.teacher_se:.1%} | "
        f"{row.student:.1%} ± {row.student_se:.1%} |"
        for row in rows
    ]
    head = ["| benchmark | items | teacher | student |", "| --- | --- | --- | --- |"]
    path.write_text("\n".join([card, "", BENCHMARKS, "", *head, *lines, ""]).lstrip())


def loads_in_vllm(config: dict[str, Any]) -> str:
    """A line for the card: whether vLLM's rules for a config.json are kept."""
    faults = vllm_faults(config)
    return "vLLM: " + (
        "; ".join(faults) if faults else "its rules for a config.json are kept (not run there)"
    )
