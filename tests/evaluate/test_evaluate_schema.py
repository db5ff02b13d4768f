"""JSON Schema: each keyword by hand, what is not known refused, and what the grader makes of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from understudy.errors import InputError
from understudy.evaluate.grade import Reply, grade
from understudy.evaluate.schema import allows

NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}
CASES: list[tuple[Any, list[Any], list[Any]]] = [
    (True, [1], []),
    (False, [], [1]),
    ({"type": "integer"}, [1, 1.0], [1.5, True, "1", None]),
    ({"type": ["string", "null"]}, ["", None], [0]),
    ({"type": "number"}, [1, 1.5], [True]),
    ({"enum": [1, "a", [1, {"b": True}]]}, [1, 1.0, "a", [1, {"b": True}]], [True, "A", [1, {"b": 1}]]),
    ({"const": {"a": 1}}, [{"a": 1.0}], [{"a": True}, {}]),
    ({"required": ["a"], "properties": {"a": {"type": "string"}}}, [{"a": "x"}, []], [{}, {"a": 1}]),
    ({"properties": {"a": {}}, "additionalProperties": False}, [{"a": 1}, {}], [{"b": 1}]),
    (
        {"patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": {"type": "string"}},
        [{"x1": 1, "y": "s"}],
        [{"x1": "s"}, {"y": 1}],
    ),
    ({"items": {"type": "integer"}}, [[], [1, 2]], [[1, "2"]]),
    ({"prefixItems": [{"type": "string"}], "items": {"type": "integer"}}, [["a", 1]], [["a", "b"], [1]]),
    ({"minItems": 1, "maxItems": 2, "uniqueItems": True}, [[1], [1, True]], [[], [1, 2, 3], [1, 1.0]]),
    (
        {"uniqueItems": True},
        [[True, 1, "1", [1], [True], {"a": 1}, {"a": True}, {"a": [1]}, None, "", [], {}, 0, False]],
        [[{"a": 1, "b": [2.0]}, {"b": [2], "a": 1.0}], [[0], [-0.0]], [False, 0, False], ["x", "y", "x"]],
    ),
    ({"minLength": 2, "maxLength": 3, "pattern": "^a"}, ["ab", 5], ["a", "abcd", "ba"]),
    ({"minimum": 1, "exclusiveMaximum": 2}, [1, 1.9, "x"], [0.9, 2]),
    ({"multipleOf": 0.1}, [0.3, 7], [0.35]),
    ({"minProperties": 1, "maxProperties": 1}, [{"a": 1}], [{}, {"a": 1, "b": 2}]),
    ({"anyOf": [{"type": "string"}, {"minimum": 5}]}, ["a", 6], [4]),
    ({"oneOf": [{"minimum": 1}, {"maximum": 3}]}, [0, 4], [2]),
    ({"allOf": [{"minimum": 1}, {"maximum": 3}], "not": {"const": 2}}, [1, 3], [2, 4]),
    (
        {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
        [{"next": {"next": {}}}],
        [{"next": {"next": 1}}],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "valid", "invalid"), CASES)
def test_keywords(schema: Any, valid: list[Any], invalid: list[Any]) -> None:
    assert all(allows(schema, value) for value in valid)
    assert not any(allows(schema, value) for value in invalid)


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"if": {}}, "'if' is not known"),
        ({"$ref": "https://x/y"}, "within the schema"),
        ({"$ref": "#/$defs/none"}, "leads nowhere"),
        ({"$ref": "#"}, "references that end"),
    ],
)
def test_what_cannot_be_checked_is_refused_not_passed_over(schema: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        allows(schema, 1)


def test_the_grader() -> None:
    schema = json.dumps({"type": "object", "required": ["a"]})
    assert grade("schema", Reply('```json\n{"a": 1}\n```'), schema) == 1.0
    assert grade("schema", Reply('{"b": 1}'), schema) == 0.0
    assert grade("schema", Reply("not JSON"), schema) == 0.0
    with pytest.raises(InputError, match="not a JSON Schema"):
        grade("schema", Reply("1"), "[1]")


def test_unique_items_are_told_without_comparing_each_with_each() -> None:
    """40,000 items: each with each would be 800 million comparisons, minutes of them."""
    held: list[object] = [{"id": i, "of": [i % 7]} for i in range(40_000)]
    assert allows({"uniqueItems": True}, held)
    assert not allows({"uniqueItems": True}, [*held, {"of": [0.0], "id": 0}])
