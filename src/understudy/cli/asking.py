"""Teachers behind an endpoint: what they are asked, at what cost, said before anything is asked.

It ignores teachers whose weights are here.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from understudy.cli.bars import bars
from understudy.cli.texts import chats_of, config_at, existing, train_exchanges
from understudy.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from understudy.compress.answers import Sampled, Wanted
    from understudy.compress.capture import Captured
    from understudy.compress.corpus import Document
    from understudy.compress.progress import Progress
    from understudy.config import Config
    from understudy.endpoint import Endpoint
    from understudy.fleet import Reach

ANSWERED = "answered.jsonl"
"""Beside a hosted teacher's targets: the chats they are of."""


def is_endpoint(name: str, config_path: Path) -> bool:
    endpoint, slash, _ = name.partition("/")
    return bool(slash) and not Path(name).exists() and endpoint in config_at(config_path).endpoints


def once(target: str, instead: str) -> None:
    """Raises InputError where as many processes as torchrun started would ask ``target`` the same."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            f"{target} would be asked by every process of torchrun", expected="its targets", next_step=instead
        )


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """The bytes of every token, control tokens' names left empty."""
    from understudy.serve.token_bytes import piece

    added = cast(Any, tokenizer).added_tokens_decoder
    return [b"" if token in added else piece(tokenizer, token, added) for token in range(len(tokenizer))]


def _requests(data: str, alias: str | None, config: Config) -> list[dict[str, Any]]:
    """What to ask a teacher: the training side's prompts, as they were recorded."""
    from understudy.compress.answers import request_of

    if data != "traffic":
        return [request_of(chat) for chat in chats_of(existing(data))]
    return [request_of((), exchange.request) for exchange in train_exchanges(alias, config)]


def sampled(
    target: str,
    samples: int,
    cache: Path,
    yes: bool,
    data: str,
    alias: str | None,
    config_path: Path,
    *,
    logprobs: bool = False,
    address: str = "",
) -> tuple[list[Wanted], list[Sampled]]:
    """Answers of an endpoint, its cost said (and, on a terminal, agreed to) before anything is asked; by the
    Ray cluster at ``address``, if any."""
    import asyncio

    from understudy.compress import answers
    from understudy.evaluate import trial
    from understudy.fleet import reaching

    config = config_at(config_path)
    asked = answers.wanted(target, _requests(data, alias, config), samples, logprobs=logprobs)
    cost = answers.estimate(asked, cache, trial.price_of(config, target))
    click.echo(str(cost), err=True)
    if cost.answers > cost.cached and not yes:
        click.confirm("ask for them?", abort=True, err=True)

    async def ask(reach: Reach, progress: Progress) -> list[Sampled]:
        async with reach(trial.connect(config, target)) as endpoint:
            paced = trial.paced(endpoint, config.evaluate)
            most = config.evaluate.concurrency
            return await answers.sample(paced, asked, cache, concurrency=most, progress=progress)

    with reaching(address) as reach, bars() as progress:
        return asked, asyncio.run(ask(reach, progress))


def capture_prompted(
    target: str,
    out: Path,
    student: Path | None,
    yes: bool,
    texts: list[Callable[[PreTrainedTokenizerBase], list[Document]]],
    config_path: Path,
    address: str = "",
) -> Captured:
    """What a vLLM server says of texts, its cost said (and, on a terminal, agreed to) before it is asked; by
    the Ray cluster at ``address``, if any."""
    from understudy.compress import checkpoint, healing
    from understudy.evaluate import trial
    from understudy.fleet import reaching
    from understudy.protocol import Usage

    if student is None:
        raise InputError(f"{target} has no tokens of its own here", expected="--student CHECKPOINT")
    once(target, f"understudy capture {target} --as-they-are, then distil --targets")
    config, own = config_at(config_path), checkpoint.load(student)
    documents = [document for read in texts for document in read(own.reader)]
    count = sum(len(d.tokens) for d in documents)
    usd = trial.price_of(config, target)(Usage(prompt_tokens=count, completion_tokens=len(documents)))
    cost = "no price known" if usd is None else f"about ${usd:,.4g}"
    missing = healing.uncaptured(out, documents)
    click.echo(
        f"{target} is asked of {len(documents):,} texts ({missing:,} of them new): at most {count:,} prompt "
        f"tokens, {cost}",
        err=True,
    )
    if missing and not yes:
        click.confirm("ask for them?", abort=True, err=True)
    most = config.evaluate.concurrency

    with reaching(address) as reach, bars() as progress:

        @asynccontextmanager
        async def connect() -> AsyncGenerator[Endpoint]:
            async with reach(trial.connect(config, target)) as endpoint:
                yield trial.paced(endpoint, config.evaluate)

        return healing.capture_prompted(target, own, documents, connect, out, most, progress)
