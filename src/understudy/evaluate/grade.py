"""Graders: how right an answer is, in [0, 1]; and the rule that picks one for a recorded exchange.

A grader is a pure function of a reply and what is expected of it, so a certificate's scores can be graded
again by anyone; running code (`code`) is one in so far as the code is. What is expected is the right answer
where feedback gave one; else it is the incumbent's own answer, and the score is agreement, which the report
says. It ignores judges, which decide nothing.

Normalisation and token F1 follow SQuAD's evaluation (Rajpurkar et al. 2016).
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, cast

import msgspec

from understudy.errors import InputError
from understudy.evaluate.pattern import found
from understudy.protocol import Json, answer_text
from understudy.traffic.sample import Exchange

GraderName = Literal[
    "match",
    "exact",
    "normalised",
    "choice",
    "numeric",
    "regex",
    "contains",
    "f1",
    "json",
    "schema",
    "tool_calls",
    "code",
    "similarity",
]


class ToolCall(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One function call a model asked for."""

    name: str
    arguments: str = ""
    """JSON, as the model wrote it."""


class Reply(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """What is graded of an answer."""

    text: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


class Standard(NamedTuple):
    """How an exchange is graded."""

    grader: GraderName
    expected: str
    agreement: bool
    """Expected is the incumbent's own answer: nobody said what is right."""


Grader = Callable[[Reply, str], float]


def reply_of(body: Mapping[str, Any]) -> Reply:
    """Text and tool calls of a chat or text completion's first choice."""
    choices = cast(Sequence[Json], body.get("choices") or [])
    message = cast(Json, (choices[0].get("message") if choices else None) or {})
    calls = [cast(Json, c.get("function") or {}) for c in cast(list[Json], message.get("tool_calls") or [])]
    return Reply(
        answer_text(body),
        tuple(ToolCall(str(c.get("name") or ""), str(c.get("arguments") or "")) for c in calls),
    )


def standard(exchange: Exchange) -> Standard:
    """The grader for an exchange.

    A tag ``grader=NAME`` decides; else a known right answer is matched (`match`, or `json` when JSON was
    asked for). Without one the candidate is compared to the incumbent: tool calls by structure, JSON by
    fields, text by token F1. Raises InputError for a grader that does not exist.
    """
    named = exchange.tags.get("grader", "")
    if named and named not in GRADERS:
        raise InputError(
            f"exchange {exchange.key} is tagged grader={named!r}", expected="one of: " + ", ".join(GRADERS)
        )
    asked_json = wants_json(exchange.request)
    if exchange.expected is not None:
        default: GraderName = "json" if asked_json else "match"
        return Standard(cast(GraderName, named or default), exchange.expected, agreement=False)
    if named == "code":
        raise InputError(
            f"exchange {exchange.key} is tagged grader=code and has no expected answer",
            expected="Python that asserts what the answer's code must do, as feedback `expected`",
        )
    incumbent = reply_of(exchange.body)
    if incumbent.tool_calls:
        return Standard("tool_calls", encode_calls(incumbent.tool_calls), agreement=True)
    default = "json" if asked_json else "f1"
    return Standard(cast(GraderName, named or default), incumbent.text, agreement=True)


def wants_json(request: Json) -> bool:
    """Whether a request asks for an answer in JSON."""
    return "json" in str((request.get("response_format") or {}).get("type", ""))


def grade(grader: GraderName, reply: Reply, expected: str) -> float:
    """The score in [0, 1] of ``reply``; the best one when ``expected`` is a JSON list of right answers.

    JSON nested deeper than can be walked scores 0. Raises InputError where ``expected`` is not what the
    grader needs.
    """
    function = GRADERS[grader]
    try:
        if grader in ("json", "schema", "tool_calls", "code"):
            return function(reply, expected)
        several = alternatives(expected)
        return function(reply, several[0]) if len(several) == 1 else max(function(reply, x) for x in several)
    except RecursionError:
        return 0.0


def alternatives(expected: str) -> list[str]:
    """Right answers: a JSON list of strings holds several, anything else is one."""
    if expected.lstrip().startswith("["):
        try:
            several = msgspec.json.decode(expected, type=list[str])
        except (msgspec.MsgspecError, RecursionError):
            return [expected]
        return several or [expected]
    return [expected]


def encode_calls(calls: Sequence[ToolCall]) -> str:
    """Tool calls as the ``expected`` of the grader `tool_calls`."""
    return msgspec.json.encode(list(calls)).decode()


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "“”‘’«»…–—", " "))
_NUMBER = re.compile(r"[-−+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?%?")
_LETTER = re.compile(r"(?<![A-Za-z0-9'’])\(?([A-Z])\)?(?![A-Za-z0-9'’])")
_SHORT_ANSWERS = frozenset({"yes", "no", "true", "false", "none", "not"})


@lru_cache(maxsize=1024)
def normalised(text: str) -> str:
    """Lower case, compatibility forms, no punctuation, no articles, single spaces."""
    plain = unicodedata.normalize("NFKC", text).lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def numbers(text: str) -> list[float]:
    """Numbers in a text, thousands separators and per-cent signs understood (5% is 0.05)."""
    found = [m[0] for m in _NUMBER.finditer(text) if any(c.isdigit() for c in m[0])]
    return [_number(token) for token in found]


def _number(token: str) -> float:
    value = float(token.rstrip("%").replace(",", "").replace("−", "-"))
    return value / 100.0 if token.endswith("%") else value


def _exact(reply: Reply, expected: str) -> float:
    return float(reply.text.strip() == expected.strip())


def _normalised(reply: Reply, expected: str) -> float:
    return float(normalised(reply.text) == normalised(expected))


def _choice(reply: Reply, expected: str) -> float:
    """First standalone capital letter; for a word, the answer's first word."""
    wanted = expected.strip().strip("().:")
    if len(wanted) == 1:
        letters = [m[1] for m in _LETTER.finditer(reply.text)]
        text = reply.text.strip().strip("().:")
        return float((letters[0] if letters else text.upper()) == wanted.upper())
    return float(normalised(reply.text).split(" ")[0] == normalised(wanted))


def _numeric(reply: Reply, expected: str) -> float:
    """The last number of the answer, within one millionth: where a worked solution states its result."""
    wanted, got = numbers(expected), numbers(reply.text)
    if not wanted or not got:
        return 0.0
    return float(abs(got[-1] - wanted[-1]) <= 1e-6 * max(1.0, abs(wanted[-1])))


def _regex(reply: Reply, expected: str) -> float:
    return float(found(expected, reply.text))


def _contains(reply: Reply, expected: str) -> float:
    return float(f" {normalised(expected)} " in f" {normalised(reply.text)} ")


def _f1(reply: Reply, expected: str) -> float:
    """Token F1: twice the shared tokens over all tokens of both."""
    got, wanted = normalised(reply.text).split(), normalised(expected).split()
    if not got or not wanted:
        return float(got == wanted)
    shared = sum((Counter(got) & Counter(wanted)).values())
    return 2.0 * shared / (len(got) + len(wanted))


def _match(reply: Reply, expected: str) -> float:
    """Same answer, said shorter or longer.

    A letter is a choice and a number is numeric. Words match when the normalised answer equals or begins with
    them, or, unless they are as short as yes and no, holds them as whole words.
    """
    wanted, got = normalised(expected), normalised(reply.text)
    if got == wanted:
        return 1.0
    if not wanted or not got:
        return 0.0
    if len(expected.strip().strip("().:")) == 1 and wanted.isalpha():
        return _choice(reply, expected)
    if _NUMBER.fullmatch(expected.strip()) and numbers(expected):
        return _numeric(reply, expected)
    if f"{got} ".startswith(f"{wanted} "):
        return 1.0
    return 0.0 if wanted in _SHORT_ANSWERS or len(wanted) < 3 else _contains(reply, expected)


def _json(reply: Reply, expected: str) -> float:
    """Share of the expected JSON's leaves that the answer holds at the same place; 0 when it is not JSON."""
    got, wanted = _decoded(reply.text), _decoded(expected)
    if got is _NOT_JSON or wanted is _NOT_JSON:
        return float(reply.text.strip() == expected.strip())
    leaves = dict(_leaves(wanted))
    present = dict(_leaves(got))
    union = leaves.keys() | present.keys()
    same = sum(1 for path in leaves if path in present and _same(present[path], leaves[path]))
    return same / len(union) if union else 1.0


def _schema(reply: Reply, expected: str) -> float:
    """1 if the answer is JSON that ``expected``, a JSON Schema, allows."""
    from understudy.evaluate.schema import allows

    got, wanted = _decoded(reply.text), _decoded(expected)
    if not isinstance(wanted, dict | bool):
        raise InputError(f"not a JSON Schema: {expected[:80]!r}", expected="a JSON object")
    return float(got is not _NOT_JSON and allows(cast(Json | bool, wanted), got))


def _tool_calls(reply: Reply, expected: str) -> float:
    """Same functions in the same order: half for the name, half for the arguments, mean over calls."""
    try:
        wanted = msgspec.json.decode(expected, type=list[ToolCall])
    except msgspec.MsgspecError as error:
        raise InputError(
            f"not a list of tool calls: {expected[:80]!r}: {error}", expected='[{"name": …, "arguments": …}]'
        ) from error
    longest = max(len(wanted), len(reply.tool_calls))
    if not longest:
        return 1.0
    return sum(_call_score(g, w) for g, w in zip(reply.tool_calls, wanted, strict=False)) / longest


def _call_score(got: ToolCall, wanted: ToolCall) -> float:
    if got.name != wanted.name:
        return 0.0
    return 0.5 + 0.5 * _json(Reply(got.arguments or "{}"), wanted.arguments or "{}")


_CODE = re.compile(r"```[ \t]*(?:(?:python|py)[ \t]*)?\n(.*?)```", re.DOTALL | re.IGNORECASE)


def _code(reply: Reply, expected: str) -> float:
    """1 if the answer's Python and then ``expected``, Python that asserts, run to the end in the sandbox."""
    from understudy.evaluate.sandbox import run

    blocks = cast(list[str], _CODE.findall(reply.text)) or [reply.text]
    return float(run("\n".join([*blocks, expected])).passed)


def _similarity(reply: Reply, expected: str) -> float:
    from understudy.evaluate.similarity import similarity

    return similarity(reply.text, expected)


_NOT_JSON = object()
_FENCE = "```"


def _decoded(text: str) -> object:
    """A text's JSON, a code fence about it taken off; no regular expression, for those that find a fence take
    time with the cube of the blanks in an answer."""
    plain = text.strip()
    if plain.startswith(_FENCE) and plain.endswith(_FENCE) and len(plain) >= 2 * len(_FENCE):
        plain = plain[len(_FENCE) : -len(_FENCE)].removeprefix("json").strip()
    try:
        return msgspec.json.decode(plain)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _NOT_JSON


def is_json(text: str) -> bool:
    """Whether a text is JSON, with or without a code fence about it."""
    return _decoded(text) is not _NOT_JSON


def well_formed(reply: Reply, finish_reason: str, json_asked: bool, tools: Sequence[str]) -> bool:
    """Whether an answer can be used at all: neither empty nor cut off, JSON where it was asked for, and calls
    only of functions that were offered, with a JSON object as arguments."""
    if finish_reason == "length" or not (reply.text.strip() or reply.tool_calls):
        return False
    if reply.tool_calls:
        return calls_exist(reply.tool_calls, tools)
    return not json_asked or is_json(reply.text)


def calls_exist(calls: Sequence[ToolCall], tools: Sequence[str]) -> bool:
    """Whether all of these could be carried out."""
    return all(call.name in tools and isinstance(_decoded(call.arguments or "{}"), dict) for call in calls)


def _leaves(value: object, path: str = "") -> list[tuple[str, object]]:
    if isinstance(value, dict) and value:
        items = cast(dict[str, object], value).items()
        return [leaf for key, inner in items for leaf in _leaves(inner, f"{path}.{key}")]
    if isinstance(value, list) and value:
        inners = cast(list[object], value)
        return [leaf for i, inner in enumerate(inners) for leaf in _leaves(inner, f"{path}[{i}]")]
    return [(path, value)]


def _same(got: object, wanted: object) -> bool:
    if isinstance(got, str) and isinstance(wanted, str):
        return normalised(got) == normalised(wanted)
    return (type(got) is type(wanted) and got == wanted) or _equal_numbers(got, wanted)


def _equal_numbers(got: object, wanted: object) -> bool:
    if isinstance(got, bool) or isinstance(wanted, bool):
        return False
    return isinstance(got, int | float) and isinstance(wanted, int | float) and abs(got - wanted) <= 1e-9


_REFUSAL = re.compile(
    r"\b(i (can(no|')t|cannot|am (not able|unable)|won't)|i'm (sorry|unable|not able)|as an ai)\b",
    re.IGNORECASE,
)


def refuses(text: str) -> bool:
    """Whether an answer opens like a refusal; a guard metric, not a grade."""
    return _REFUSAL.search(text[:200].replace("’", "'")) is not None


GRADERS: dict[str, Grader] = {
    "match": _match,
    "exact": _exact,
    "normalised": _normalised,
    "choice": _choice,
    "numeric": _numeric,
    "regex": _regex,
    "contains": _contains,
    "f1": _f1,
    "json": _json,
    "schema": _schema,
    "tool_calls": _tool_calls,
    "code": _code,
    "similarity": _similarity,
}
