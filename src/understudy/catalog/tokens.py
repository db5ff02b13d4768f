"""How many tokens another model makes of the calls you recorded, counted instead of bounded.

Words need a copy of the candidate's tokenizer (``tokenizer.json``), which the overlay names; pictures need
the published rules of both vendors, the candidate's and that of the model which answered. Both need recorded
texts. It ignores chat templates beyond a few tokens a message: those the recorded count holds too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from understudy.catalog import pictures
from understudy.catalog.facts import Catalog, ModelFacts
from understudy.catalog.plan import TOKENIZER_BOUND, TokenRatio
from understudy.config import Config
from understudy.errors import InputError, MissingExtraError

LATEST = 200
"""Calls that are counted: the latest."""
LEAST = 20
"""Prompt tokens of a call worth counting: in a shorter one the template is most of it."""


class Counted(NamedTuple):
    """One recorded call: what was sent, and how many prompt tokens its model made of it."""

    request: Mapping[str, Any]
    prompt_tokens: int
    model: str = ""
    """ENDPOINT/MODEL that answered."""


def ratios_by_model(
    config: Config,
    catalog: Catalog,
    recorded: Callable[[], Iterable[Counted]],
    only: Collection[str] = (),
    *,
    pictures_sent: bool = False,
) -> dict[str, TokenRatio]:
    """Ratios of all models (or of ``only``, by id) whose tokenizer the overlay names and, with
    ``pictures_sent``, of those with a rule for pictures. ``recorded`` is asked for calls if there is one.

    Raises as `token_ratio` does.
    """
    asked = [m for m in catalog if not only or m.id in only]
    own = [m for m in asked if m.tokenizer]
    ruled = [m for m in asked if pictures_sent and not m.tokenizer and pictures.rule_of(m.id)]
    counted = list(recorded()) if own or ruled else []
    told = {m.id: token_ratio(config.path(m.tokenizer.value), counted, m.id) for m in own if m.tokenizer}
    seen = [(call, pictures.tokens_of(call.model, call.request)) for call in counted]
    for facts in ruled if any(tokens for _, tokens in seen) else []:
        told[facts.id] = _picture_ratio(facts, seen, catalog)
    return {model: ratio for model, ratio in told.items() if ratio}


def _picture_ratio(
    facts: ModelFacts, seen: Iterable[tuple[Counted, int | None]], catalog: Catalog
) -> TokenRatio | None:
    """By the rules of both vendors, words as recorded (another vendor's at most by its bound); ``seen`` are
    the tokens that pictures had, None where nobody can tell."""
    here, there, most = 0, 0, 0.0
    count = 0
    for call, tokens in seen:
        wanted = pictures.tokens_of(facts.id, call.request)
        if tokens is None or wanted is None or call.prompt_tokens < max(LEAST, tokens):
            continue
        answered = catalog.find(call.model)
        bound = 1.0 if answered and answered.vendor == facts.vendor else TOKENIZER_BOUND
        words = call.prompt_tokens - tokens
        here, there, count = here + words + wanted, there + call.prompt_tokens, count + 1
        most = max(most, (words * bound + wanted) / call.prompt_tokens)
    by = "its rule for pictures"
    return TokenRatio(here / there, most, count, said=1.0, by=by) if count else None


def token_ratio(tokenizer: Path, calls: Iterable[Counted], model: str = "") -> TokenRatio | None:
    """Tokens per recorded token over calls of text, and of pictures where ``model``'s rule for them is known;
    None when there is none.

    Raises InputError for a file that is no tokenizer, MissingExtraError without the package tokenizers.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingExtraError("tokenizers", "serve") from error
    try:
        count = cast(Any, Tokenizer.from_file(str(tokenizer)))
    except Exception as error:  # the package raises bare Exception for a missing and for a broken file
        raise InputError(
            f"cannot read the tokenizer {tokenizer}: {error}",
            expected="a tokenizer.json",
            next_step="correct `tokenizer` in the overlay",
        ) from error
    here: list[int] = []
    there: list[int] = []
    pictured = 0
    for call in calls:
        texts, seen = _texts(call.request), pictures.tokens_of(model, call.request)
        if texts and seen is not None and call.prompt_tokens >= LEAST:
            words = sum(len(count.encode(text, add_special_tokens=False).ids) for text in texts)
            here.append(words + seen)
            there.append(call.prompt_tokens)
            pictured += seen
    if not here:
        return None
    most = max(mine / theirs for mine, theirs in zip(here, there, strict=True))
    return TokenRatio(sum(here) / sum(there), most, len(here), said=1.0 if pictured else None)


def _texts(request: Mapping[str, Any]) -> list[str]:
    """Every text of a chat request; empty when something in it is neither text nor a picture."""
    texts: list[str] = []
    for message in cast(list[dict[str, Any]], request.get("messages") or []):
        content = message.get("content")
        if isinstance(content, str):
            texts.append(content)
            continue
        parts = cast("list[dict[str, Any]]", content if isinstance(content, list) else [{}])
        if any(part.get("type") not in ("text", "image_url") for part in parts):
            return []
        texts += [str(part.get("text") or "") for part in parts if part.get("type") == "text"]
    return texts if not request.get("tools") else []
