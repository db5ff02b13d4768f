"""The plan of a pruning: the shape to reach and the indices kept in each layer.

The shape is decided, shown and saved before a weight is touched; the indices are entered as pruning reaches
each layer, and a plan that has them can be applied again. It ignores how indices are scored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from understudy.compress.decoder import Extras, Shape, layer_parameters, parameters
from understudy.errors import InputError, ModelError

MULTIPLE = 64
"""FFN sizes are multiples of this: what vector units and quantised blocks like."""
FFN_FLOOR = 0.6
"""Share of FFN channels below which query heads are cheaper: SmolLM2-135M at 98.0M parameters, untrained, on
chats: KL 0.616 with 960 channels and 6 heads, 0.650 with 832 channels and all 9."""


class LayerPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What one layer keeps, by index into the teacher's layer; ascending."""

    layer: int
    """The teacher's layer."""
    channels: list[int]
    heads: list[int]
    kv_heads: list[int]
    experts: list[int] = []
    """Routed experts, where a mixture stays one; its channels are then all of theirs."""
    crossing: bool = False
    """It reads pictures by cross-attention."""


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """A shape that was tried to choose the plan's."""

    axis: str
    """The only axis on which it differs from the teacher, or ``plan``: a whole candidate."""
    shape: Shape
    kl: float
    """To the teacher on a few tokens, cut roughly: it compares shapes, and pruning reaches less."""
    sliced: bool = False
    """Cut without a refit."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A pruning, before or after it was carried out."""

    teacher: Shape
    student: Shape
    parameters_before: int
    parameters_after: int
    reason: str
    """How the shape was chosen."""
    layers: list[LayerPlan] = []
    """Empty until pruning has chosen, layer by layer on the pruned prefix."""
    width: list[int] = []
    """Kept dimensions of the hidden stream; empty until chosen."""
    ffns: list[int] = []
    """FFN channels of each layer that stays where they differ; `student.ffn` is then the most of them."""
    measured: list[Measured] = []
    """What the choice rests on, where shapes were measured; the chosen one first."""

    def ffn(self, place: int) -> int:
        """FFN channels of the student's layer at ``place``."""
        return self.ffns[place] if self.ffns else self.student.ffn

    def heads(self, *, crossing: bool) -> tuple[int, int]:
        """Query and KV heads of the student's layers that read pictures, or of the others."""
        if crossing:
            return self.student.cross_heads, self.student.cross_kv_heads
        return self.student.heads, self.student.kv_heads

    @property
    def removed(self) -> float:
        """Share of parameters removed."""
        return 1 - self.parameters_after / self.parameters_before

    def __str__(self) -> str:
        sizes = f" (by layer: {', '.join(map(str, self.ffns))})" if self.ffns else ""
        return (
            f"{self.teacher}\n→ {self.student}{sizes}\n{self.parameters_before / 1e6:.1f}M → "
            f"{self.parameters_after / 1e6:.1f}M parameters (−{self.removed:.1%}); {self.reason}"
        )


def per_layer(plan: Plan, sizes: list[int], extras: Extras) -> Plan:
    """The plan with FFN sizes of their own for the layers that stay."""
    shape = msgspec.structs.replace(plan.student, ffn=max(sizes))
    layers = [layer_parameters(msgspec.structs.replace(shape, ffn=size), extras) for size in sizes]
    rest = parameters(shape, extras) - shape.layers * layer_parameters(shape, extras)
    return msgspec.structs.replace(
        plan,
        student=shape,
        ffns=sizes,
        parameters_after=rest + sum(layers),
        reason=f"{plan.reason}, shared out among the layers by measured damage",
    )


def save(plan: Plan, path: Path) -> None:
    """Raises ModelError when it cannot be written, a full disk included; what was there then stays."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(msgspec.json.format(msgspec.json.encode(plan), indent=1))
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ModelError(
            f"cannot write the plan {path}: {error.strerror}", expected="a folder with room in it"
        ) from error


def load(path: Path) -> Plan:
    """Raises ModelError when the file is not a plan."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Plan)
    except OSError as error:
        raise ModelError(f"cannot read the plan {path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ModelError(f"{path} is not a pruning plan: {error}") from error


def wanted_parameters(params: str, before: int) -> int:
    """``0.75`` (a share) or ``108M`` (a count) as a number of parameters. Raises InputError."""
    match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?|\.[0-9]+)\s*([KMB]?)\s*", params, re.IGNORECASE)
    if not match:
        raise InputError(f"params = {params!r}", expected="a share like 0.75 or a count like 108M")
    number = float(match[1].replace("_", ""))
    unit = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9}[match[2].upper()]
    wanted = number * before if not match[2] and number <= 1 else number * unit
    if not 0 < wanted <= before or (not match[2] and number > 1 and "." in match[1]):
        raise InputError(
            f"params = {params!r} asks for {wanted / 1e6:.1f}M parameters",
            expected=f"more than 0 and at most the teacher's {before / 1e6:.1f}M",
        )
    return int(wanted)


def decide(
    teacher: Shape,
    extras: Extras,
    *,
    params: str = "",
    ffn: int = 0,
    heads: int = 0,
    kv_heads: int = 0,
    hidden: int = 0,
    layers: int = 0,
    experts: int = 0,
    cross_layers: int = 0,
    cross_heads: int = 0,
) -> Plan:
    """The shape for what was asked: sizes named outright are taken (0: the teacher's), and unless ``ffn`` is
    among them ``params`` decides by rule how many FFN channels, and if need be query heads, remain; `search`
    measures instead.

    A mixture becomes dense, its FFN chosen from all experts' channels, unless ``experts`` says how many of
    them remain. ``layers`` counts all, and without ``cross_layers`` those that read pictures stay. Raises
    InputError when a size is impossible or the budget cannot be reached.
    """
    before = parameters(teacher, extras)
    crossing = cross_layers or teacher.cross_layers
    shape = msgspec.structs.replace(
        teacher,
        heads=heads or teacher.heads * (kv_heads or teacher.kv_heads) // teacher.kv_heads,
        kv_heads=kv_heads or teacher.kv_heads,
        hidden=hidden or teacher.hidden,
        layers=layers or teacher.layers - teacher.cross_layers + crossing,
        cross_layers=crossing,
        ffn=ffn or (_experts_ffn(teacher, extras, experts) if experts else teacher.ffn),
        experts=experts or (extras.mixed.dense_experts if extras.mixed else 0),
    )
    groups = min(teacher.cross_kv_heads, shape.kv_heads)
    shape = msgspec.structs.replace(shape, cross_heads=cross_heads or groups * shape.group)
    check(teacher, shape, extras)
    reason = "sizes as given"
    if params and not (ffn or experts):
        wanted = wanted_parameters(params, before)
        free = not (heads or kv_heads or extras.attention)
        shape, reason = _shrink(teacher, shape, extras, wanted, free_heads=free)
    return plan_of(teacher, shape, extras, reason)


def plan_of(
    teacher: Shape, student: Shape, extras: Extras, reason: str, measured: Sequence[Measured] = ()
) -> Plan:
    """A plan without indices."""
    return Plan(
        teacher=teacher,
        student=student,
        parameters_before=parameters(teacher, extras),
        parameters_after=parameters(student, extras),
        reason=reason,
        measured=list(measured),
    )


def _experts_ffn(teacher: Shape, extras: Extras, experts: int) -> int:
    """Channels of a mixture with fewer experts, the shared ones among them."""
    each = extras.mixed.expert_ffn if extras.mixed else 0
    return teacher.ffn - (teacher.experts - experts) * each


def _shrink(
    teacher: Shape, shape: Shape, extras: Extras, wanted: int, *, free_heads: bool
) -> tuple[Shape, str]:
    """FFN channels first: per parameter they cost half of what other axes do, until `FFN_FLOOR`.

    Query heads join when the FFN alone would have to fall below it.
    """
    groups = range(shape.group, 0, -1) if free_heads else (shape.group,)
    fewer = [msgspec.structs.replace(shape, heads=group * shape.kv_heads) for group in groups]
    allowed = [s for s in fewer if not extras.heads_divide_width or s.hidden % s.heads == 0]
    if extras.heads_fill_width:
        allowed = [s for s in allowed if s.hidden == s.heads * s.head_dim]
    sized = [(s, ffn) for s in allowed if (ffn := _largest_ffn(s, extras, wanted)) is not None]
    if not sized:
        least = parameters(msgspec.structs.replace(allowed[-1], ffn=min(MULTIPLE, shape.ffn)), extras)
        raise InputError(
            f"{wanted:,.0f} parameters cannot be reached with heads and FFN channels",
            expected=f"at least {least:,}",
            next_step="ask for more parameters, or fewer --kv-heads",
        )
    floor = FFN_FLOOR * (extras.mixed.active if extras.mixed else teacher.ffn)
    chosen, ffn = next((pair for pair in sized if pair[1] >= floor), sized[-1])
    reason = f"the largest FFN within {wanted / 1e6:.1f}M parameters"
    return msgspec.structs.replace(chosen, ffn=ffn), reason


def _largest_ffn(shape: Shape, extras: Extras, wanted: int) -> int | None:
    step = min(MULTIPLE, shape.ffn)
    for ffn in range(shape.ffn, 0, -1):
        if (ffn % step == 0 or ffn == shape.ffn) and parameters(
            msgspec.structs.replace(shape, ffn=ffn), extras
        ) <= wanted:
            return ffn
    return None


def check(teacher: Shape, student: Shape, extras: Extras) -> None:
    """Raises InputError naming the first size that cannot be."""
    _check_experts(teacher, student, extras)
    _check_crossing(teacher, student)
    for name, size, most in (
        ("ffn", student.ffn, teacher.ffn),
        ("kv_heads", student.kv_heads, teacher.kv_heads),
        ("heads", student.heads, teacher.heads),
        ("hidden", student.hidden, teacher.hidden),
        ("layers", student.layers, teacher.layers),
    ):
        if not 1 <= size <= most:
            raise InputError(f"{name} = {size}", expected=f"1 to {most}, the teacher's")
    if extras.attention:
        _check_fixed(teacher, student, extras)
    if extras.layers_fixed and student.layers != teacher.layers:
        raise InputError(
            f"layers = {student.layers}",
            expected=f"{teacher.layers}: pictures enter between the layers of this family",
            next_step="take channels, heads or width instead",
        )
    if extras.heads_fill_width and student.hidden != student.heads * student.head_dim:
        raise InputError(
            f"{student.heads} query heads of {student.head_dim} with width {student.hidden}",
            expected=f"width {student.heads * student.head_dim}: transformers derives the head dimension of "
            "this family from both",
            next_step="take heads and width away together, or channels only",
        )
    if student.heads % student.kv_heads or student.group > teacher.group:
        raise InputError(
            f"{student.heads} query heads over {student.kv_heads} KV heads",
            expected=f"the same number, 1 to {teacher.group}, of query heads for each KV head: "
            + ", ".join(str(n * student.kv_heads) for n in range(1, teacher.group + 1)),
        )
    if extras.heads_divide_width and student.hidden % student.heads:
        raise InputError(
            f"{student.heads} query heads with width {student.hidden}",
            expected="heads that divide the width: transformers refuses others for this family",
        )


def _check_fixed(teacher: Shape, student: Shape, extras: Extras) -> None:
    """Heads that share a norm or a latent stay as they are, and with them the width they read; a student that
    keeps a router's form keeps its layers too."""
    single = extras.mixed is not None and extras.mixed.dense_experts > 0
    for name in ("heads", "kv_heads", "hidden", *(("layers",) if single else ())):
        if getattr(student, name) != getattr(teacher, name):
            raise InputError(
                f"{name} = {getattr(student, name)}",
                expected=f"{getattr(teacher, name)}: this family can only lose FFN channels",
            )


def _check_crossing(teacher: Shape, student: Shape) -> None:
    """Layers that read pictures, and their heads."""
    if not teacher.cross_layers:
        if student.cross_layers or student.cross_heads:
            raise InputError(
                "sizes of cross-attention layers",
                expected="a teacher that reads pictures through such layers",
            )
        return
    others, most = student.layers - student.cross_layers, teacher.layers - teacher.cross_layers
    if not 1 <= student.cross_layers <= teacher.cross_layers or not 1 <= others <= most:
        raise InputError(
            f"{student.layers} layers, {student.cross_layers} of them cross-attention",
            expected=f"1 to {teacher.cross_layers} that read pictures and 1 to {most} others",
        )
    step, groups = max(student.group, 1), min(teacher.cross_kv_heads, student.kv_heads)
    if student.cross_heads not in range(step, groups * step + 1, step):
        raise InputError(
            f"cross_heads = {student.cross_heads}",
            expected=f"whole KV groups of {step}: " + ", ".join(str(n * step) for n in range(1, groups + 1)),
        )


def _check_experts(teacher: Shape, student: Shape, extras: Extras) -> None:
    if student.experts == (extras.mixed.dense_experts if extras.mixed else 0):
        return
    if extras.mixed is None:
        raise InputError(f"experts = {student.experts}", expected="a mixture of experts to take them from")
    least, step = extras.mixed.least, extras.mixed.groups
    if not least <= student.experts <= teacher.experts or student.experts % step:
        raise InputError(
            f"experts = {student.experts}",
            expected=f"{least} to {teacher.experts} in steps of {step}",
            next_step="leave --experts out for a dense student",
        )
    ffn = _experts_ffn(teacher, extras, student.experts)
    if student != msgspec.structs.replace(teacher, experts=student.experts, ffn=ffn):
        raise InputError(
            f"{student.experts} experts beside other sizes",
            expected="experts as the only axis of a student that stays a mixture",
        )


def check_layers(plan: Plan) -> None:
    """Raises ModelError when a plan's indices do not belong to its shapes."""
    order = [kept.layer for kept in plan.layers]
    inside = all(0 <= index < plan.teacher.layers for index in order)
    if len(order) != plan.student.layers or order != sorted(set(order)) or not inside:
        raise ModelError(
            f"the plan keeps layers {order}",
            expected=f"{plan.student.layers} different ones below {plan.teacher.layers}, ascending",
        )
    if plan.width and not _are_indices(plan.width, plan.student.hidden, plan.teacher.hidden):
        raise ModelError(
            f"the plan keeps {len(plan.width)} dimensions of the width",
            expected=f"{plan.student.hidden} different indices below {plan.teacher.hidden}",
        )
    if plan.ffns and (len(plan.ffns) != len(order) or max(plan.ffns) != plan.student.ffn):
        raise ModelError(
            f"the plan has FFN sizes {plan.ffns}",
            expected=f"one for each of {len(order)} layers, {plan.student.ffn} at most",
        )
    for place, kept in enumerate(plan.layers):
        heads, kv_heads = plan.heads(crossing=kept.crossing)
        for name, indices, count, most in (
            ("channels", kept.channels, plan.ffn(place), plan.teacher.ffn),
            ("heads", kept.heads, heads, plan.teacher.heads),
            ("KV heads", kept.kv_heads, kv_heads, plan.teacher.kv_heads),
        ):
            if not _are_indices(indices, count, most):
                raise ModelError(
                    f"layer {kept.layer} of the plan keeps {len(indices)} {name}",
                    expected=f"{count} different indices below {most}",
                )
        _check_groups(plan, kept)


def _are_indices(indices: list[int], count: int, most: int) -> bool:
    return len(set(indices)) == len(indices) == count and all(0 <= i < most for i in indices)


def _check_groups(plan: Plan, kept: LayerPlan) -> None:
    groups = [head // plan.teacher.group for head in kept.heads]
    wanted = [g for g in sorted(kept.kv_heads) for _ in range(plan.student.group)]
    if sorted(groups) != wanted:
        raise ModelError(
            f"layer {kept.layer} of the plan keeps heads {kept.heads} with KV heads {kept.kv_heads}",
            expected=f"{plan.student.group} query heads of each kept KV group",
        )
