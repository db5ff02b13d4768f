"""A student from a teacher by a plan, whatever the teacher is: dense, or a mixture made dense or smaller.

A mixture is made dense first, then pruned on the usual axes; or it keeps its form and only loses experts. It
ignores how the plan's shape was decided (plan) and healing (distill).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from understudy.compress import plan as plans
from understudy.compress.corpus import Batch
from understudy.compress.decoder import extras_of, mixture_of, shape_of
from understudy.compress.dense import Pooling, to_dense
from understudy.compress.experts import keep_experts
from understudy.compress.journal import Journal
from understudy.compress.plan import LayerPlan, Plan
from understudy.compress.progress import Progress, silent
from understudy.compress.prune import Method, prune
from understudy.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Student(NamedTuple):
    model: PreTrainedModel
    plan: Plan
    """With the indices kept."""


def student_of(
    model: PreTrainedModel,
    plan: Plan,
    batches: Sequence[Batch],
    method: Method = Method(),  # noqa: B008 -- an immutable tuple
    progress: Progress = silent,
    journal: Journal | None = None,
) -> Student:
    """Carry out a plan; ``model`` may be changed in place. A ``journal`` is kept for a dense teacher only.

    Raises ModelError for a plan made for another shape and for calibration without a token.
    """
    if mixture_of(model) is None:
        return Student(model, prune(model, plan, batches, method, progress, journal))
    _check(model, plan)
    if _stays(model, plan):
        return _smaller(model, plan, batches, progress)
    return _dense(model, plan, batches, method, progress)


def _stays(model: PreTrainedModel, plan: Plan) -> bool:
    mixed = extras_of(model).mixed
    return mixed is not None and plan.student.experts > mixed.dense_experts


def _check(model: PreTrainedModel, plan: Plan) -> None:
    shape = shape_of(model)
    if shape != plan.teacher:
        raise ModelError(f"the plan is for {plan.teacher}", expected=f"a plan for this model: {shape}")
    plans.check(plan.teacher, plan.student, extras_of(model))
    for kept in plan.layers:
        inside = all(0 <= c < plan.teacher.ffn for c in kept.channels)
        if (
            not inside
            or len(set(kept.channels)) < len(kept.channels)
            or len(kept.channels) > plan.student.ffn
        ):
            raise ModelError(
                f"layer {kept.layer} of the plan keeps {len(kept.channels)} channels",
                expected=f"at most {plan.student.ffn} different ones below {plan.teacher.ffn}",
            )


def _smaller(model: PreTrainedModel, plan: Plan, batches: Sequence[Batch], progress: Progress) -> Student:
    given = [layer.experts for layer in plan.layers]
    kept = keep_experts(model, plan.student.experts, batches, progress=progress, given=given)
    heads, kv_heads = list(range(plan.teacher.heads)), list(range(plan.teacher.kv_heads))
    layers = [
        LayerPlan(layer=i, channels=[], heads=heads, kv_heads=kv_heads, experts=experts)
        for i, experts in enumerate(kept)
    ]
    return Student(model, msgspec.structs.replace(plan, layers=layers))


def _dense(
    model: PreTrainedModel, plan: Plan, batches: Sequence[Batch], method: Method, progress: Progress
) -> Student:
    """Channels out of the pool first, then whatever else the plan takes away."""
    pooling = Pooling(
        refit=method.refit,
        ridge=method.ridge,
        pull=method.pull,
        reread=method.reread,
        precision=method.precision,
    )
    given = {layer.layer: layer.channels for layer in plan.layers}
    made = to_dense(model, plan.student.ffn, batches, pooling, progress, given)
    rest = msgspec.structs.replace(plan, teacher=shape_of(made.model), layers=_all_channels(plan))
    done = (
        _untouched(rest)
        if rest.teacher == rest.student
        else prune(made.model, rest, batches, method, progress)
    )
    layers = [msgspec.structs.replace(layer, channels=made.channels[layer.layer]) for layer in done.layers]
    return Student(made.model, msgspec.structs.replace(plan, layers=layers, width=done.width))


def _all_channels(plan: Plan) -> list[LayerPlan]:
    every = list(range(plan.student.ffn))
    return [msgspec.structs.replace(layer, channels=every) for layer in plan.layers]


def _untouched(plan: Plan) -> Plan:
    shape = plan.student
    heads, kv_heads = list(range(shape.heads)), list(range(shape.kv_heads))
    layers = [LayerPlan(layer=i, channels=[], heads=heads, kv_heads=kv_heads) for i in range(shape.layers)]
    return msgspec.structs.replace(plan, layers=layers)
