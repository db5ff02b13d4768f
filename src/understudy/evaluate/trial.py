"""One evaluation, from an alias's recorded traffic to a certificate.

Candidates are asked one after another, each until its own verdict. It ignores benchmarks, speed and how an
own model was made: a drill adds those to the same evidence folder.
"""

from __future__ import annotations

import asyncio
import platform
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from understudy import __version__, config
from understudy.catalog.facts import catalog_of
from understudy.catalog.plan import Plan, make_plan
from understudy.catalog.prices import pricer
from understudy.endpoint import Endpoint, HttpEndpoint, http_endpoint
from understudy.errors import InputError
from understudy.evaluate import benchmarks
from understudy.evaluate.benchmarks import Accuracy, BenchmarkHeader, PairedDifference, Scored
from understudy.evaluate.certificate import EVIDENCE, PLAN, Certificate, Question, write_question
from understudy.evaluate.certify import write
from understudy.evaluate.evidence import (
    Lines,
    ProofHeader,
    file_name,
    incumbent_of,
    read_exchanges,
    read_lines,
)
from understudy.evaluate.flicker import measure
from understudy.evaluate.item import Call
from understudy.evaluate.judge import header_of, judge_pairs, refuse_kin
from understudy.evaluate.replay import Bench, Progress, prove
from understudy.evaluate.thrift import CachedEndpoint, PacedEndpoint, Price
from understudy.evaluate.users import UserFigures, figures, marks_of, write_marks
from understudy.fleet import Reach, itself
from understudy.protocol import Usage
from understudy.traffic.sample import Exchange, exchanges, sample_hash, shapes, split
from understudy.traffic.store import open_store

Report = Callable[[str, Progress], None]
T = TypeVar("T")


def users(settings: config.Config, alias: str) -> list[UserFigures]:
    """What the alias's users had to put up with, by the model that answered them; today's model first."""
    with open_store(settings.store.url, Path(settings.root)) as store:
        marks = marks_of(exchanges(store, alias, only_ok=False))
    if not marks:
        raise InputError(
            f"no exchange of {alias!r} is recorded with its texts",
            expected="an alias with recorded chat traffic",
            next_step="understudy traffic show, then understudy up and send traffic through it",
        )
    today = settings.aliases[alias].model if alias in settings.aliases else marks[0].model
    return figures(marks, today)


def held_out(settings: config.Config, alias: str) -> list[Exchange]:
    """The alias's held-out exchanges. Raises InputError when there are none."""
    with open_store(settings.store.url, Path(settings.root)) as store:
        recorded = exchanges(store, alias)
    sample = split(recorded, settings.evaluate.held_out).held_out
    if not sample:
        raise InputError(
            f"no held-out exchange of {alias!r} among {len(recorded)} recorded with their texts",
            expected="an alias with recorded chat traffic",
            next_step="understudy traffic show, then understudy up and send traffic through it",
        )
    return sample


def connect(settings: config.Config, target: str) -> HttpEndpoint:
    """A client of ENDPOINT/MODEL, whichever form it speaks. Raises InputError."""
    endpoint, model = settings.endpoint_of(target)
    key = config.resolve_secret(endpoint.api_key, Path(settings.root))
    most = settings.evaluate.concurrency
    return http_endpoint(target, endpoint, model, api_key=key, connections=max(most, 1))


def paced(client: Endpoint, settings: config.Evaluate) -> Endpoint:
    """``client`` at the config's pace."""
    rate = settings.requests_per_minute
    return PacedEndpoint(client, rate) if rate else client


def thrifty(client: Endpoint, loaded: config.Config, settings: config.Evaluate) -> Endpoint:
    """``client`` at the config's pace and behind its cache."""
    slow = paced(client, settings)
    return CachedEndpoint(slow, loaded.path(settings.cache)) if settings.cache else slow


class _Billed(NamedTuple):
    target: str
    usage: Usage | None
    at: float
    tags: Mapping[str, str]
    response: bytes = b""
    """Not at hand when a price is asked for; a price that an answer states itself does not count here."""


def price_of(loaded: config.Config, target: str) -> Price:
    """What a call to ENDPOINT/MODEL costs today, by the overlay and the catalog."""
    billed = pricer(catalog_of(loaded), loaded.endpoints)

    def price(usage: Usage) -> float | None:
        found = billed(_Billed(target, usage, time.time(), {}))
        return None if found is None else found.usd

    return price


async def evaluate(
    loaded: config.Config,
    alias: str,
    targets: Sequence[str],
    sample: Sequence[Exchange],
    settings: config.Evaluate,
    out: Path,
    progress: Report | None = None,
    *,
    repeats: int = 1,
    reach: Reach = itself,
) -> Certificate:
    """Prove every target on ``sample`` and write the certificate into ``out``.

    ``repeats`` above 1 asks the first questions again, that many times in all, of every candidate and of the
    incumbent. Run again it pays for nothing twice. ``reach`` says from where the replay is
    asked; what came is written down here either way. Raises what `prove` raises; the evidence paid for stays.
    """
    clients = [connect(loaded, target) for target in targets]
    if settings.judge:
        refuse_kin(settings.judge, [incumbent_of(sample), *targets])
    plan = _plan(loaded, alias, incumbent_of(sample), targets, out)
    async with AsyncExitStack() as stack:
        judge = await judge_of(loaded, settings, stack)
        for client in [await stack.enter_async_context(reach(client)) for client in clients]:
            await prove(
                thrifty(client, loaded, settings),
                sample,
                settings,
                evidence=out / EVIDENCE,
                candidates=len(targets),
                progress=_named(progress, client.name),
                price=price_of(loaded, client.name),
                judge=judge,
            )
    if repeats > 1:
        await _repeat(loaded, [incumbent_of(sample), *targets], sample, settings, out, repeats)
    if settings.judge:
        await _judge(loaded, targets, sample, settings, out)
    with open_store(loaded.store.url, Path(loaded.root)) as store:
        write_marks(out / EVIDENCE, marks_of(exchanges(store, alias, only_ok=False)))
    question = _question(alias, targets, sample, settings, plan)
    fallbacks = loaded.aliases[alias].fallback if alias in loaded.aliases else []
    write_question(out, msgspec.structs.replace(question, fallbacks=fallbacks))
    return write(out)


async def judge_of(loaded: config.Config, settings: config.Evaluate, stack: AsyncExitStack) -> Bench | None:
    """The config's judge, connected for as long as ``stack`` is open."""
    if not settings.judge:
        return None
    client = await stack.enter_async_context(connect(loaded, settings.judge))
    return Bench(
        thrifty(client, loaded, settings), _retires(loaded, settings.judge), price_of(loaded, settings.judge)
    )


async def _repeat(
    loaded: config.Config,
    models: Sequence[str],
    sample: Sequence[Exchange],
    settings: config.Evaluate,
    out: Path,
    repeats: int,
) -> None:
    items = read_exchanges(out / EVIDENCE).records
    for client in [connect(loaded, model) for model in models]:
        async with client:
            await measure(
                paced(client, settings),
                sample,
                items,
                repeats=repeats,
                seed=settings.seed,
                evidence=out / EVIDENCE,
                concurrency=settings.concurrency,
            )


async def _judge(
    loaded: config.Config,
    targets: Sequence[str],
    sample: Sequence[Exchange],
    settings: config.Evaluate,
    out: Path,
) -> None:
    """Each candidate's asked answers against the incumbent's, by the judge of the config."""
    evidence = out / EVIDENCE
    items = read_exchanges(evidence).records
    async with connect(loaded, settings.judge) as client:
        for target in targets:
            header = header_of(
                settings.judge,
                target,
                incumbent_of(sample),
                rubric=settings.rubric,
                seed=settings.seed,
                evidence=evidence,
                retires=_retires(loaded, settings.judge),
            )
            calls = read_lines(evidence / file_name(target), ProofHeader, Call).records
            await judge_pairs(
                thrifty(client, loaded, settings),
                sample,
                items,
                calls,
                header,
                evidence=evidence,
                concurrency=settings.concurrency,
            )


class BenchmarkReport(msgspec.Struct, frozen=True, kw_only=True):
    """Benchmarks of one model or two."""

    accuracies: list[Accuracy]
    differences: list[PairedDifference]
    """The second model's less the first's, on the same items."""


async def benchmark(
    loaded: config.Config,
    models: Sequence[str],
    suites: Sequence[str],
    folder: Path,
    out: Path,
    *,
    items: int,
    generative: bool = False,
) -> BenchmarkReport:
    """Run built-in benchmarks on one endpoint or two; answers are kept in ``out`` and not paid for again."""
    settings = loaded.evaluate
    report = BenchmarkReport(accuracies=[], differences=[])
    for suite in suites:
        drawn = benchmarks.draw(suite, folder, items=items, seed=settings.seed, generative=generative)
        for model in models:
            async with connect(loaded, model) as client:
                figure = await benchmarks.run(
                    thrifty(client, loaded, settings),
                    suite,
                    drawn,
                    evidence=out,
                    seed=settings.seed,
                    concurrency=settings.concurrency,
                )
            report.accuracies.append(figure)
        if len(models) > 1:
            first, second = (_kept(out, suite, model) for model in models[:2])
            versus = benchmarks.paired(suite, first, second)
            report.differences.extend([versus] if versus else [])
    return report


def _kept(out: Path, suite: str, model: str) -> Lines[BenchmarkHeader, Scored]:
    return read_lines(out / file_name(model, f"bench-{suite}-"), BenchmarkHeader, Scored)


def _retires(loaded: config.Config, model: str) -> str:
    """ISO date on which a model retires, by the catalog; empty where it knows none."""
    facts = catalog_of(loaded).find(model)
    return facts.retires.value.isoformat() if facts and facts.retires else ""


def run(evaluation: Coroutine[Any, Any, T]) -> T:
    """`evaluate` on uvloop where there is one: a third less CPU per call with thousands in flight."""
    if sys.platform == "win32":
        return asyncio.run(evaluation)
    import uvloop

    return uvloop.run(evaluation)


def _named(progress: Report | None, name: str) -> Callable[[Progress], None] | None:
    if progress is None:
        return None
    return lambda now: progress(name, now)


def _plan(loaded: config.Config, alias: str, incumbent: str, targets: Sequence[str], out: Path) -> Plan:
    with open_store(loaded.store.url, Path(loaded.root)) as store:
        plan = make_plan(catalog_of(loaded), incumbent, shapes(store, alias).calls, targets, now=time.time())
    path = out / EVIDENCE / PLAN
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(plan), indent=1) + b"\n")
    return plan


def _question(
    alias: str, targets: Sequence[str], sample: Sequence[Exchange], settings: config.Evaluate, plan: Plan
) -> Question:
    retires = plan.incumbent.retires
    return Question(
        alias=alias,
        incumbent=incumbent_of(sample),
        candidates=list(targets),
        created=time.time(),
        retires=retires.isoformat() if retires else "",
        reason=f"catalog of {plan.catalog_read.isoformat()}" if retires else "",
        sample_sha256=sample_hash(sample),
        seeds={"order": settings.seed},
        versions={"understudy": __version__, "python": platform.python_version()},
    )
