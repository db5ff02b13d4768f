"""Whether a JSON value is what a JSON Schema allows: the keywords that structured outputs use.

A keyword that is not known here raises instead of being passed over: a schema half checked would call wrong
answers right. It ignores annotations (title, description, default, examples, format) and remote references.

Source: JSON Schema 2020-12, json-schema.org/draft/2020-12 (validation and applicator vocabularies).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, cast

from understudy.errors import InputError
from understudy.evaluate.pattern import found
from understudy.protocol import Json

DEEPEST = 64
"""Levels of schemas within schemas, references followed included."""
ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "format", "deprecated", "readOnly", "writeOnly"}
    | {"$schema", "$id", "$defs", "definitions", "$comment", "strict", "name"}
)

Schema = Json | bool


class _At(NamedTuple):
    """A schema being applied: where its references lead, and how deep it stands."""

    root: Schema
    schema: Json
    depth: int


def allows(schema: Schema, value: object) -> bool:
    """Whether ``value`` (decoded JSON) is valid. Raises InputError for a keyword that is not known."""
    return _allows(schema, schema, value, 0)


def _allows(root: Schema, schema: Schema, value: object, depth: int) -> bool:
    if isinstance(schema, bool):
        return schema
    if depth > DEEPEST:
        raise InputError(f"a JSON Schema of more than {DEEPEST} levels", expected="references that end")
    unknown = [k for k in schema if k not in _CHECKS and k not in ANNOTATIONS]
    if unknown:
        raise InputError(
            f"JSON Schema keyword {unknown[0]!r} is not known here", expected="one of: " + ", ".join(_CHECKS)
        )
    at = _At(root, schema, depth)
    return all(_CHECKS[name](at, wanted, value) for name, wanted in schema.items() if name in _CHECKS)


def _inner(at: _At, schema: object, value: object) -> bool:
    return _allows(at.root, cast(Schema, schema), value, at.depth + 1)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_TYPES: dict[str, Callable[[object], bool]] = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "number": _is_number,
    "integer": lambda v: _is_number(v) and float(cast(float, v)).is_integer(),
}


def _type(at: _At, wanted: Any, value: object) -> bool:
    names = cast(list[str], wanted if isinstance(wanted, list) else [wanted])
    return any(_TYPES[name](value) for name in names)


def equal(one: object, other: object) -> bool:
    """JSON's equality: 1 is 1.0, and neither is true."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        a, b = cast(list[object], one), cast(list[object], other)
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(one, dict) and isinstance(other, dict):
        left, right = cast(Json, one), cast(Json, other)
        return left.keys() == right.keys() and all(equal(left[k], right[k]) for k in left)
    return one == other


def _reference(at: _At, wanted: Any, value: object) -> bool:
    if not str(wanted).startswith("#"):
        raise InputError(f"JSON Schema reference {wanted!r}", expected="one within the schema: #/$defs/NAME")
    place: Any = at.root
    for part in str(wanted)[1:].split("/")[1:]:
        place = cast(Json, place).get(part.replace("~1", "/").replace("~0", "~")) if place else None
    if place is None:
        raise InputError(f"JSON Schema reference {wanted!r} leads nowhere", expected="a part of the schema")
    return _inner(at, place, value)


def _properties(at: _At, wanted: Any, value: object) -> bool:
    if not isinstance(value, dict):
        return True
    fields = cast(Json, value)
    return all(_inner(at, schema, fields[name]) for name, schema in wanted.items() if name in fields)


def _matching(at: _At, wanted: Any, value: object) -> bool:
    if not isinstance(value, dict):
        return True
    fields = cast(Json, value).items()
    return all(_inner(at, s, v) for pattern, s in wanted.items() for n, v in fields if found(pattern, n))


def _additional(at: _At, wanted: Any, value: object) -> bool:
    if not isinstance(value, dict):
        return True
    named = cast(Json, at.schema.get("properties") or {})
    patterns = cast(Json, at.schema.get("patternProperties") or {})
    others = [
        v for n, v in cast(Json, value).items() if n not in named and not any(found(p, n) for p in patterns)
    ]
    return all(_inner(at, wanted, v) for v in others)


def _items(at: _At, wanted: Any, value: object) -> bool:
    """All items after those that prefixItems speaks of."""
    if not isinstance(value, list):
        return True
    start = len(cast(list[Any], at.schema.get("prefixItems") or []))
    return all(_inner(at, wanted, item) for item in cast(list[object], value)[start:])


def _first_items(at: _At, wanted: Any, value: object) -> bool:
    if not isinstance(value, list):
        return True
    return all(_inner(at, s, v) for s, v in zip(wanted, cast(list[object], value), strict=False))


def _unique(at: _At, wanted: Any, value: object) -> bool:
    if not wanted or not isinstance(value, list):
        return True
    held = cast(list[object], value)
    try:
        return len({_identity(one) for one in held}) == len(held)
    except RecursionError:  # too deep to be walked to its end, but perhaps not to its first difference
        return not any(equal(a, b) for i, a in enumerate(held) for b in held[:i])


def _identity(value: object) -> Hashable:
    """What two values have in common exactly when they are `equal`."""
    if isinstance(value, list):
        return ("list", *[_identity(one) for one in cast(list[object], value)])
    if isinstance(value, dict):
        return ("dict", frozenset((name, _identity(one)) for name, one in cast(Json, value).items()))
    return (bool, value) if isinstance(value, bool) else cast(Hashable, value)


def _multiple(at: _At, wanted: Any, value: object) -> bool:
    if not _is_number(value):
        return True
    if wanted <= 0:
        raise InputError(f"JSON Schema multipleOf {wanted}", expected="a number above 0")
    times = cast(float, value) / wanted
    return math.isfinite(times) and math.isclose(times, round(times), abs_tol=1e-9)


def _size(kind: type | tuple[type, ...], holds: Callable[[int, Any], bool]) -> _Check:
    return lambda at, wanted, value: (
        not isinstance(value, kind) or holds(len(cast(Sequence[Any], value)), wanted)
    )


def _number(holds: Callable[[Any, Any], bool]) -> _Check:
    return lambda at, wanted, value: not _is_number(value) or holds(value, wanted)


_Check = Callable[[_At, Any, object], bool]
_CHECKS: dict[str, _Check] = {
    "$ref": _reference,
    "type": _type,
    "enum": lambda at, wanted, value: any(equal(one, value) for one in wanted),
    "const": lambda at, wanted, value: equal(wanted, value),
    "properties": _properties,
    "patternProperties": _matching,
    "required": lambda at, wanted, value: not isinstance(value, dict) or all(n in value for n in wanted),
    "additionalProperties": _additional,
    "minProperties": _size(dict, lambda n, w: n >= w),
    "maxProperties": _size(dict, lambda n, w: n <= w),
    "items": _items,
    "prefixItems": _first_items,
    "minItems": _size(list, lambda n, w: n >= w),
    "maxItems": _size(list, lambda n, w: n <= w),
    "uniqueItems": _unique,
    "minLength": _size(str, lambda n, w: n >= w),
    "maxLength": _size(str, lambda n, w: n <= w),
    "pattern": lambda at, wanted, value: not isinstance(value, str) or found(str(wanted), value),
    "minimum": _number(lambda v, w: v >= w),
    "maximum": _number(lambda v, w: v <= w),
    "exclusiveMinimum": _number(lambda v, w: v > w),
    "exclusiveMaximum": _number(lambda v, w: v < w),
    "multipleOf": _multiple,
    "allOf": lambda at, wanted, value: all(_inner(at, s, value) for s in wanted),
    "anyOf": lambda at, wanted, value: any(_inner(at, s, value) for s in wanted),
    "oneOf": lambda at, wanted, value: sum(_inner(at, s, value) for s in wanted) == 1,
    "not": lambda at, wanted, value: not _inner(at, wanted, value),
}
