"""Money, pace and cache: nothing paid beyond the purse, nothing asked twice, nothing sooner than allowed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from understudy import config
from understudy.endpoint import ScriptedModel
from understudy.errors import EndpointError, InputError
from understudy.evaluate.evidence import ProofHeader, file_name, read_lines
from understudy.evaluate.item import Call
from understudy.evaluate.replay import forecast, prove
from understudy.evaluate.thrift import CachedEndpoint, PacedEndpoint, Purse
from understudy.protocol import Usage
from understudy.traffic.sample import Exchange

Sample = Callable[[int], list[Exchange]]
SETTINGS = config.Evaluate(margin=0.05, concurrency=4, seed=2)


def dollars(usage: Usage) -> float:
    """A cent a call, whatever its size."""
    return 0.01 if usage.prompt_tokens else 0.0


def unknown(usage: Usage) -> None:
    """Nobody knows what a call costs."""


def fair(name: str = "local/new") -> ScriptedModel:
    """As often right as wrong: undecided for long."""
    return ScriptedModel(name, lambda request: "yes" if len(str(request)) % 2 else "no")


async def test_money_ends_the_run_and_more_money_goes_on(tmp_path: Path, sample: Sample) -> None:
    settings = config.Evaluate(margin=0.05, concurrency=4, seed=2, budget_usd=0.055)
    model = fair()
    proof = await prove(model, sample(120), settings, evidence=tmp_path, price=dollars)
    assert (proof.verdict, model.calls, proof.paid) == ("UNDECIDED", 5, 5)
    again = await prove(model, sample(120), settings, evidence=tmp_path, price=dollars)
    assert (again.paid, model.calls) == (5, 5)
    more = config.Evaluate(margin=0.05, concurrency=4, seed=2, budget_usd=0.105)
    assert (await prove(model, sample(120), more, evidence=tmp_path, price=dollars)).paid == 10


@pytest.mark.parametrize("price", [None, unknown])
async def test_a_budget_in_money_needs_a_price(tmp_path: Path, sample: Sample, price: Any) -> None:
    settings = config.Evaluate(budget_usd=1.0)
    with pytest.raises(InputError, match="no price of local/new is known"):
        await prove(fair(), sample(20), settings, evidence=tmp_path, price=price)


def test_the_purse_holds_back_for_calls_in_flight_and_learns_from_dear_ones() -> None:
    purse = Purse(1.0, lambda usage: usage.completion_tokens / 100)
    assert purse.reserve("a", Usage(completion_tokens=40))
    assert purse.reserve("b", Usage(completion_tokens=40))
    assert not purse.reserve("c", Usage(completion_tokens=40))
    purse.settle("a", Usage(completion_tokens=10), 2)
    purse.settle("b", None, 1)
    assert purse.spent == pytest.approx(0.2)
    assert purse.reserve("c", Usage(completion_tokens=1))
    assert purse.reserve("d", Usage(completion_tokens=60))
    assert not purse.reserve("e", Usage(completion_tokens=1))


def test_the_forecast_tells_money(sample: Sample) -> None:
    told = forecast(sample(60), SETTINGS, prices=[dollars, lambda u: u.prompt_tokens / 1000], runs=3)
    assert told.usd_most == pytest.approx(60 * 0.03)
    assert told.usd is not None
    assert told.usd_most is not None
    assert told.usd <= told.usd_most
    assert forecast(sample(60), SETTINGS, prices=[dollars, lambda _: None], runs=1).usd is None


async def test_the_cache_answers_for_another_evaluation(tmp_path: Path, sample: Sample) -> None:
    first = fair()
    proof = await prove(
        CachedEndpoint(first, tmp_path / "cache"), sample(80), SETTINGS, evidence=tmp_path / "one"
    )
    second = fair()
    cached = await prove(
        CachedEndpoint(second, tmp_path / "cache"), sample(80), SETTINGS, evidence=tmp_path / "two"
    )
    assert second.calls <= SETTINGS.concurrency
    assert cached.paid == second.calls
    assert proof.paid == first.calls > 10
    assert (cached.verdict, cached.calls, cached.e_pass) == (proof.verdict, proof.calls, proof.e_pass)


async def test_another_parameter_or_model_is_another_question(tmp_path: Path) -> None:
    def ask(model: ScriptedModel, **more: Any) -> Any:
        return CachedEndpoint(model, tmp_path).chat({"messages": [{"role": "user", "content": "q"}], **more})

    one, other = fair(), fair("local/other")
    await ask(one, temperature=0)
    await ask(one, temperature=0)
    assert one.calls == 1
    await ask(one, temperature=1)
    await ask(other, temperature=0)
    assert (one.calls, other.calls) == (2, 1)
    _damage(tmp_path)
    await ask(one, temperature=0)
    assert one.calls == 3


def _damage(folder: Path) -> None:
    for path in folder.rglob("*.json"):
        assert path.stat().st_mode & 0o077 == 0
        path.write_bytes(b"{cut")


async def test_errors_are_not_kept(tmp_path: Path) -> None:
    model = ScriptedModel("local/m", lambda _: "yes", fail=lambda call: call == 1)
    endpoint = CachedEndpoint(model, tmp_path)
    request: Mapping[str, Any] = {"messages": []}
    with pytest.raises(EndpointError):
        await endpoint.chat(request)
    assert (await endpoint.chat(request)).text == "yes"


async def test_the_pace_is_even_however_many_ask_at_once() -> None:
    """30 a minute: five calls start at 0, 2, 4, 6 and 8 seconds; after a pause the next starts at once."""
    now = 100.0
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    endpoint = PacedEndpoint(fair(), 30.0, clock=lambda: now, sleep=sleep)
    await asyncio.gather(*(endpoint.chat({"messages": []}) for _ in range(5)))
    assert waited == [2.0, 4.0, 6.0, 8.0]
    now = 200.0
    await endpoint.complete({"prompt": "q"})
    assert len(waited) == 4


async def test_a_verbose_candidate_does_not_overrun_the_money_with_what_is_in_flight(
    tmp_path: Path, sample: Sample
) -> None:
    """Each answer costs twenty times what the recorded one did, and 64 might be in flight."""
    verbose = ScriptedModel("local/new", lambda request: "word " * 20, delay_s=0.01)
    settings = config.Evaluate(margin=0.05, concurrency=64, seed=2, budget_usd=1.0)
    proof = await prove(
        verbose, sample(300), settings, evidence=tmp_path, price=lambda usage: usage.completion_tokens / 100
    )
    assert proof.paid == 5


async def test_a_pace_that_is_wrong_ends_the_run_and_scores_nothing(tmp_path: Path, sample: Sample) -> None:
    class Busy(ScriptedModel):
        async def chat(self, request: Any) -> Any:
            if self.calls == 7:
                raise EndpointError("local/new answered 429: slow down", status=429)
            return await super().chat(request)

    model = Busy("local/new", lambda request: "yes")
    with pytest.raises(EndpointError, match="429"):
        await prove(model, sample(120), SETTINGS, evidence=tmp_path)
    kept = read_lines(tmp_path / file_name("local/new"), ProofHeader, Call).records
    assert [call.error for call in kept] == [""] * len(kept)
    calm = ScriptedModel("local/new", lambda request: "yes")
    proof = await prove(calm, sample(120), SETTINGS, evidence=tmp_path)
    assert (proof.paid, calm.calls) == (len(kept) + calm.calls, proof.paid - len(kept))
