"""Answers sampled from a teacher behind an endpoint, to the team's own prompts, each paid for once.

Every answer is a line of a file under a key made of who was asked what for the how-many-eth time, so a run
that is repeated, or was interrupted, asks only what is missing. With ``logprobs`` the endpoint's likeliest
tokens are kept too: a hosted teacher's signal. It ignores prices (the caller knows them) and training.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec

from understudy.compress.align import Guess, Piece, guesses, numbers_of, told_of
from understudy.compress.document import Chat, Document
from understudy.compress.progress import Progress, silent
from understudy.compress.targets import Told
from understudy.endpoint import Endpoint
from understudy.errors import EndpointError, InputError
from understudy.protocol import Json, Usage, text_of

LEFT_OUT = ("stream", "stream_options", "model", "n", "logprobs", "top_logprobs", "user")
"""Fields of a recorded request that say how, not what."""
LIKELIEST = 20
"""Most alternatives a token that the protocol tells."""
GUESSED_TOKENS = 256
"""Of an answer of which nobody knows a length."""
BYTES_PER_TOKEN = 4


class Sampled(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One answer: a line of the cache."""

    key: str
    target: str
    message: Json
    finish: str = ""
    logprobs: list[Json] = []
    """As the protocol has them, a record a token."""
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Wanted(NamedTuple):
    """One answer to ask for."""

    key: str
    request: Json


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """What sampling would take, before anything is asked."""

    answers: int
    cached: int
    prompt_tokens: int
    completion_tokens: int
    usd: float | None
    """None: nobody tells a price."""

    def __str__(self) -> str:
        money = "no price known" if self.usd is None else f"about ${self.usd:,.4g}"
        return (
            f"{self.answers - self.cached:,} answers to ask for ({self.cached:,} of {self.answers:,} are "
            f"cached): about {self.prompt_tokens:,} prompt and {self.completion_tokens:,} completion tokens, "
            f"{money}"
        )


def request_of(messages: Sequence[Mapping[str, Any]], recorded: Mapping[str, Any] | None = None) -> Json:
    """What to ask: a recorded request without how it was sent, or the messages up to the last answer."""
    if recorded is not None:
        return {name: value for name, value in recorded.items() if name not in LEFT_OUT}
    prompt = messages[:-1] if messages and messages[-1].get("role") == "assistant" else messages
    return {"messages": [{k: v for k, v in m.items() if k != "weight"} for m in prompt]}


def wanted(target: str, requests: Iterable[Json], samples: int, *, logprobs: bool = False) -> list[Wanted]:
    """``samples`` answers to each different request, at the temperature it was recorded with, or 1."""
    found: dict[str, Wanted] = {}
    for request in requests:
        asked = request | ({"logprobs": True, "top_logprobs": LIKELIEST} if logprobs else {})
        if samples > 1:
            asked = {"temperature": 1.0} | asked
        for number in range(samples):
            digest = hashlib.sha256(msgspec.json.encode([target, asked, number], order="sorted"))
            found.setdefault(digest.hexdigest(), Wanted(digest.hexdigest(), asked))
    return list(found.values())


def known(cache: Path) -> dict[str, Sampled]:
    """Answers of a cache by key; a last line cut short by a crash is left out.

    Raises InputError naming any other line that is no answer.
    """
    found: dict[str, Sampled] = {}
    lines = cache.read_bytes().split(b"\n") if cache.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            if line:
                one = msgspec.json.decode(line, type=Sampled)
                found[one.key] = one
        except msgspec.MsgspecError as error:
            if number < len(lines):
                raise InputError(f"{cache}:{number} is no answer: {error}") from error
    return found


def estimate(asked: Sequence[Wanted], cache: Path, price: Any = None) -> Estimate:
    """Calls, tokens and money; ``price`` takes the usage of one call and gives US dollars or None."""
    there = known(cache)
    missing = [w for w in asked if w.key not in there]
    length = _usual_length(there)
    prompts = [len(msgspec.json.encode(w.request.get("messages"))) // BYTES_PER_TOKEN for w in missing]
    replies = [min(length, int(w.request.get("max_tokens") or length)) for w in missing]
    usd: float | None = None
    if price is not None:
        each = [
            price(Usage(prompt_tokens=p, completion_tokens=c)) for p, c in zip(prompts, replies, strict=True)
        ]
        usd = None if None in each else float(sum(each))
    return Estimate(
        answers=len(asked),
        cached=len(asked) - len(missing),
        prompt_tokens=sum(prompts),
        completion_tokens=sum(replies),
        usd=usd,
    )


def _usual_length(there: Mapping[str, Sampled]) -> int:
    lengths = [one.completion_tokens for one in there.values() if one.completion_tokens]
    return round(sum(lengths) / len(lengths)) if lengths else GUESSED_TOKENS


async def sample(
    endpoint: Endpoint,
    asked: Sequence[Wanted],
    cache: Path,
    *,
    concurrency: int = 8,
    progress: Progress = silent,
) -> list[Sampled]:
    """Ask what is missing, write each answer down as it comes, and return all there are, in order.

    A request that fails is left out; raises EndpointError when every one of them does.
    """
    there = known(cache)
    missing = [w for w in asked if w.key not in there]
    cache.parent.mkdir(parents=True, exist_ok=True)
    _cut_torn_line(cache)
    gate, faults = asyncio.Semaphore(concurrency), list[EndpointError]()
    with cache.open("ab") as file:

        async def one(want: Wanted) -> None:
            async with gate:
                try:
                    found = await _ask(endpoint, want)
                except EndpointError as error:
                    faults.append(error)
                    return
            there[want.key] = found
            file.write(msgspec.json.encode(found) + b"\n")
            file.flush()
            done = sum(w.key in there for w in asked)
            progress("generate", done, len(asked), f"{len(faults)} failed" if faults else "")

        await asyncio.gather(*(one(want) for want in missing))
    if missing and len(faults) == len(missing):
        raise faults[0]
    return [there[w.key] for w in asked if w.key in there]


def _cut_torn_line(cache: Path) -> None:
    """What a crash left half-written goes, or the next answer would be written behind it."""
    if cache.exists():
        content = cache.read_bytes()
        if content and not content.endswith(b"\n"):
            cache.write_bytes(content[: content.rfind(b"\n") + 1])


async def _ask(endpoint: Endpoint, want: Wanted) -> Sampled:
    answer = await endpoint.chat(want.request)
    choices = cast(list[Json], answer.body.get("choices") or [])
    if not choices or not choices[0].get("message"):
        raise EndpointError(f"{endpoint.name} answered without a message")
    told = cast(Json, choices[0].get("logprobs") or {})
    usage = answer.usage
    return Sampled(
        key=want.key,
        target=endpoint.name,
        message=cast(Json, choices[0]["message"]),
        finish=str(choices[0].get("finish_reason") or ""),
        logprobs=cast(list[Json], told.get("content") or []),
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
    )


def chats_of(asked: Sequence[Wanted], found: Sequence[Sampled]) -> list[Chat]:
    """Prompts with their sampled answers; answers that were cut off at a limit or are empty are left out."""
    requests = {w.key: w.request for w in asked}
    return [
        [*cast(Chat, requests[one.key]["messages"]), one.message]
        for one in found
        if one.key in requests and one.finish != "length" and _said(one)
    ]


def _said(one: Sampled) -> bool:
    return bool(text_of(one.message.get("content")).strip() or one.message.get("tool_calls"))


# a hosted teacher's log-probabilities as a signal


class Hosted:
    """Answers with their log-probabilities, told in the student's tokens."""

    def __init__(
        self, documents: Sequence[Document], found: Sequence[Sampled], vocabulary: Sequence[bytes]
    ) -> None:
        """``documents`` are the chats of ``found``, in the same order; ``vocabulary`` the bytes of tokens."""
        self.vocabulary = vocabulary
        self.numbers = numbers_of(vocabulary)
        self._said = {tuple(d.tokens): one for d, one in zip(documents, found, strict=True)}

    def told(self, documents: Sequence[Document]) -> list[Told]:
        return [told_of(self._guesses(d)[1:], LIKELIEST + 1) for d in documents]

    def _guesses(self, document: Document) -> list[Guess]:
        """Of the answer's tokens; that it ends where it did is certain too, for it did."""
        one = self._said[tuple(document.tokens)]
        places = [i for i, said in enumerate(document.answer) if said]
        found = [Guess((), (), known=False)] * len(document.tokens)
        pieces = [_piece(token) for token in one.logprobs]
        written = b"".join(piece.text for piece in pieces)
        own, length = list[int](), 0
        for place in places:
            if length >= len(written):
                break
            own.append(place)
            length += len(self.vocabulary[document.tokens[place]])
        tokens = [document.tokens[i] for i in own]
        texts = [self.vocabulary[t] for t in tokens]
        for place, guess in zip(own, guesses(tokens, texts, pieces, self.numbers), strict=True):
            found[place] = guess
        if one.finish == "stop" and len(places) == len(own) + 1 and own and found[own[-1]].known:
            found[places[-1]] = Guess((document.tokens[places[-1]],), (0.0,))
        return found


def _piece(token: Mapping[str, Any]) -> Piece:
    others = cast(list[Json], token.get("top_logprobs") or [])
    value = token.get("logprob")
    return Piece(
        _bytes(token),
        float(value) if value is not None else math.nan,
        [(_bytes(other), float(other["logprob"])) for other in others],
    )


def _bytes(token: Mapping[str, Any]) -> bytes:
    """Servers that tell no bytes tell the text."""
    raw = cast("list[int] | None", token.get("bytes"))
    return bytes(raw) if raw else str(token.get("token") or "").encode()
