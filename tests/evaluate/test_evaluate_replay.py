"""Replaying: nothing paid twice, nothing counted out of order, nothing lost to a kill."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from understudy import config
from understudy.endpoint import ScriptedModel
from understudy.errors import EndpointError, EvidenceError, InputError
from understudy.evaluate.asking import asked
from understudy.evaluate.evidence import (
    EXCHANGES,
    ProofHeader,
    file_name,
    read_exchanges,
    read_lines,
    write_exchanges,
)
from understudy.evaluate.item import Call, Item, drawn
from understudy.evaluate.metrics import metrics_of
from understudy.evaluate.panel import Panel, Rates
from understudy.evaluate.proof import Proof, weigh
from understudy.evaluate.replay import Progress, forecast, prove
from understudy.evaluate.sequential import Design, SequentialTest, Unit, Verdict, shuffled
from understudy.protocol import Answer, Usage
from understudy.traffic.sample import Exchange

SETTINGS = config.Evaluate(margin=0.10, concurrency=4, seed=3)


def traffic(count: int, *, right: float = 0.8, expected: bool = True) -> list[Exchange]:
    """Questions `q0`, `q1`, …; the right answer to each is its number's parity."""
    rng = random.Random(count)
    return [_exchange(i, rng.random() < right, expected) for i in range(count)]


def parity(i: int) -> str:
    return "even" if i % 2 == 0 else "odd"


def _exchange(i: int, right: bool, expected: bool) -> Exchange:
    answer = parity(i if right else i + 1)
    return Exchange(
        key=f"key{i:04}", at=float(i), alias="assistant", target="host/old",
        request={
            "model": "assistant", "messages": [{"role": "user", "content": f"q{i}"}],
            "stream": True, "stream_options": {"include_usage": True}, "temperature": 0.5, "max_tokens": 9,
        },
        body={"choices": [{"message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}]},
        answer=answer, expected=parity(i) if expected else None, grades={}, task_id=f"t{i // 2}",
        tags={"task": "low" if i % 3 else "high"}, prompt_hash=f"hash{i}",
        usage=Usage(prompt_tokens=5, completion_tokens=1), status=200, total_s=0.2, ttft_s=0.1,
    )  # fmt: skip


def number(request: Mapping[str, Any]) -> int:
    return int(str(request["messages"][-1]["content"])[1:])


def perfect(name: str = "local/new", **more: Any) -> ScriptedModel:
    return ScriptedModel(name, lambda request: parity(number(request)), **more)


def wrong(name: str = "local/bad") -> ScriptedModel:
    return ScriptedModel(name, lambda request: parity(number(request) + 1))


def calls_in(folder: Path, name: str) -> list[Call]:
    return read_lines(folder / file_name(name), ProofHeader, Call).records


async def test_a_better_candidate_passes_without_asking_everything(tmp_path: Path) -> None:
    model = perfect()
    proof = await prove(model, traffic(200), SETTINGS, evidence=tmp_path)
    assert proof.verdict == "PASS"
    assert proof.calls < 120
    assert proof.paid == model.calls == len(calls_in(tmp_path, "local/new"))
    assert proof.paid <= proof.calls + SETTINGS.concurrency
    assert proof.candidate_mean == 1.0
    assert {s.task for s in proof.strata} == {"high", "low"}
    assert proof.candidate_tokens.completed == proof.calls


async def test_a_worse_candidate_fails_and_the_answers_stand_side_by_side(tmp_path: Path) -> None:
    proof = await prove(wrong(), traffic(200), SETTINGS, evidence=tmp_path)
    assert proof.verdict == "FAIL"
    assert proof.calls < 40
    first = proof.examples[0]
    assert first.incumbent != first.candidate
    assert first.prompt.startswith("q")


async def test_the_seed_is_committed_before_the_first_call(tmp_path: Path) -> None:
    path = tmp_path / file_name("local/new")
    seen: list[ProofHeader] = []

    def script(request: Mapping[str, Any]) -> str:
        seen.append(read_lines(path, ProofHeader, Call).header)
        return "even"

    await prove(ScriptedModel("local/new", script), traffic(20), SETTINGS, evidence=tmp_path)
    assert seen[0].seed == 3
    assert seen[0].exchanges_sha256


async def test_killed_ten_times_it_pays_for_nothing_twice(tmp_path: Path) -> None:
    sample = traffic(150)
    whole = await prove(perfect(), sample, SETTINGS, evidence=tmp_path / "whole")
    paid: list[str] = []

    class Dies(ScriptedModel):
        """Killed at its tenth call."""

        async def chat(self, request: Mapping[str, Any]) -> Answer:
            if self.calls == 9:
                raise asyncio.CancelledError
            paid.append(request["messages"][0]["content"])
            return await super().chat(request)

    proof: Proof | None = None
    for _ in range(30):
        model = Dies("local/new", lambda request: parity(number(request)))
        try:
            proof = await prove(model, sample, SETTINGS, evidence=tmp_path / "killed")
            break
        except asyncio.CancelledError:
            with (tmp_path / "killed" / file_name("local/new")).open("ab") as file:
                file.write(b'{"key":"cut off')  # as a kill in mid-write leaves it
    assert proof is not None
    assert len(paid) == len(set(paid))
    assert (proof.verdict, proof.calls, proof.e_pass) == (whole.verdict, whole.calls, whole.e_pass)


async def test_killed_after_any_line_or_within_one_it_says_the_same(tmp_path: Path) -> None:
    """Every state that a kill can leave: after each line, and with the next one half written."""
    sample = traffic(20)
    whole = await prove(perfect(), sample, SETTINGS, evidence=tmp_path / "whole")
    written = (tmp_path / "whole" / file_name("local/new")).read_bytes().splitlines(keepends=True)
    for kept in range(len(written)):
        for more in (b"", written[kept][: len(written[kept]) // 2]):
            folder = tmp_path / f"{kept}{bool(more)}"
            folder.mkdir()
            (folder / file_name("local/new")).write_bytes(b"".join(written[:kept]) + more)
            model = perfect()
            proof = await prove(model, sample, SETTINGS, evidence=folder)
            assert (proof.verdict, proof.calls, proof.e_pass) == (whole.verdict, whole.calls, whole.e_pass)
            keys = [call.key for call in calls_in(folder, "local/new")]
            assert len(keys) == len(set(keys))
            assert model.calls == len(keys) - max(kept - 1, 0)


async def test_a_finished_proof_is_read_not_repeated(tmp_path: Path) -> None:
    sample = traffic(100)
    first = await prove(perfect(), sample, SETTINGS, evidence=tmp_path)
    again = perfect()
    assert await prove(again, sample, SETTINGS, evidence=tmp_path) == first
    assert again.calls == 0


async def test_what_answers_fast_gains_no_weight(tmp_path: Path) -> None:
    """Right answers come at once, wrong ones late; the verdict is that of one call at a time."""

    class Uneven(ScriptedModel):
        async def chat(self, request: Mapping[str, Any]) -> Answer:
            right = number(request) % 4 != 0
            await asyncio.sleep(0 if right else 0.002)
            answer = await super().chat(request)
            text = parity(number(request) if right else number(request) + 1)
            return answer._replace(body={"choices": [{"message": {"content": text}}]})

    sample = traffic(120)
    proofs = [
        await prove(
            Uneven("local/new", lambda _: ""),
            sample,
            config.Evaluate(margin=0.1, seed=3, concurrency=n),
            evidence=tmp_path / str(n),
        )
        for n in (1, 16)
    ]
    assert proofs[0].verdict == proofs[1].verdict
    assert proofs[0].calls == proofs[1].calls
    assert proofs[0].path == proofs[1].path


async def test_the_recorded_parameters_are_asked_without_streaming(tmp_path: Path) -> None:
    asks: list[Mapping[str, Any]] = []

    def script(request: Mapping[str, Any]) -> str:
        asks.append(request)
        return "even"

    await prove(ScriptedModel("local/new", script), traffic(12), SETTINGS, evidence=tmp_path)
    assert "stream" not in asks[0]
    assert "stream_options" not in asks[0]
    assert (asks[0]["temperature"], asks[0]["max_tokens"]) == (0.5, 9)
    assert asked({"stream": True, "n": 1}) == {"n": 1}


async def test_errors_score_zero_and_are_a_guard(tmp_path: Path) -> None:
    def every_other(call: int) -> bool:
        return call % 2 == 0

    model = perfect(fail=every_other)
    proof = await prove(model, traffic(100), SETTINGS, evidence=tmp_path)
    assert proof.verdict == "FAIL"
    errors = next(g for g in proof.guards if g.name == "errors")
    assert errors.worse
    assert errors.candidate == pytest.approx(0.5, abs=0.2)
    assert any("503" in example.candidate for example in proof.examples)


class Gone(ScriptedModel):
    """Answers ``good`` calls, then is out of reach; ``status`` is what it says then."""

    def __init__(self, good: int, status: int | None, back: int = 10**9) -> None:
        super().__init__("local/new", lambda request: parity(number(request)))
        self.good, self.status, self.back = good, status, back

    async def chat(self, request: Mapping[str, Any]) -> Answer:
        answer = await super().chat(request)
        if self.good < self.calls <= self.back:
            raise EndpointError("local/new is out of reach", status=self.status)
        return answer


@pytest.mark.parametrize("status", [None, 401])
async def test_a_dead_endpoint_is_not_a_bad_model(tmp_path: Path, status: int | None) -> None:
    sample = traffic(100)
    with pytest.raises(EndpointError):
        await prove(Gone(10, status), sample, SETTINGS, evidence=tmp_path)
    assert len(calls_in(tmp_path, "local/new")) <= 13
    assert not any(call.error for call in calls_in(tmp_path, "local/new"))
    proof = await prove(perfect(), sample, SETTINGS, evidence=tmp_path)
    assert proof.verdict == "PASS"


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_a_short_silence_is_the_candidates_error(tmp_path: Path, concurrency: int) -> None:
    settings = config.Evaluate(margin=0.1, seed=3, concurrency=concurrency)
    await prove(Gone(10, None, back=12), traffic(60), settings, evidence=tmp_path)
    assert sum(bool(call.error) for call in calls_in(tmp_path, "local/new")) == 2


async def test_the_budget_ends_undecided_and_can_be_raised(tmp_path: Path) -> None:
    sample = traffic(100)
    small = config.Evaluate(margin=0.05, seed=3, budget=6, concurrency=2)
    model = ScriptedModel("local/same", lambda request: sample[number(request)].answer)
    proof = await prove(model, sample, small, evidence=tmp_path)
    assert (proof.verdict, proof.calls, proof.paid) == ("UNDECIDED", 6, 6)
    proof = await prove(model, sample, config.Evaluate(margin=0.05, seed=3, concurrency=2), evidence=tmp_path)
    assert proof.verdict == "PASS"
    assert proof.paid == model.calls


async def test_evidence_of_another_question_is_refused(tmp_path: Path) -> None:
    sample = traffic(30)
    await prove(perfect(), sample, SETTINGS, evidence=tmp_path)
    with pytest.raises(InputError, match=r"margin 0\.1 there, 0\.2 here"):
        await prove(perfect(), sample, config.Evaluate(margin=0.2, seed=3), evidence=tmp_path)
    with pytest.raises(InputError, match="another sample"):
        await prove(perfect(), traffic(31), SETTINGS, evidence=tmp_path)


async def test_without_right_answers_agreement_is_measured(tmp_path: Path) -> None:
    sample = traffic(100, expected=False)
    model = ScriptedModel("local/same", lambda request: sample[number(request)].answer)
    proof = await prove(model, sample, SETTINGS, evidence=tmp_path)
    assert (proof.agreement, proof.leading, proof.verdict) == (1.0, "agreement", "PASS")
    assert proof.metrics[0].good == -0.10
    assert "likeness to the incumbent" in proof.rests_on


async def test_progress_tells_each_counted_call(tmp_path: Path) -> None:
    seen: list[Progress] = []
    proof = await prove(perfect(), traffic(80), SETTINGS, evidence=tmp_path, progress=seen.append)
    assert [p.calls for p in seen] == list(range(1, proof.calls + 1))
    assert seen[-1].verdict == "PASS"


async def test_the_proof_follows_from_the_files_alone(tmp_path: Path) -> None:
    """Also when a score in the file was changed by hand: it is graded anew."""
    proof = await prove(perfect(), traffic(80), SETTINGS, evidence=tmp_path)
    header, calls = read_lines(tmp_path / file_name("local/new"), ProofHeader, Call)
    items = read_exchanges(tmp_path).records
    forged = [Call(key=c.key, reply=c.reply, score=0.0, usage=c.usage, total_s=c.total_s) for c in calls]
    assert weigh(header, items, calls) == proof
    assert weigh(header, items, forged).verdict == "PASS"
    order = shuffled([item.key for item in items], header.seed)
    assert {call.key for call in calls} == set(order[: len(calls)])


def conversations(count: int, turns: int) -> list[Exchange]:
    return [x._replace(task_id=f"talk {i // turns}") for i, x in enumerate(traffic(count))]


WHOLE = msgspec.structs.replace(SETTINGS, unit="cluster")


async def test_whole_conversations_are_drawn_and_count_as_one(tmp_path: Path) -> None:
    """The e-values are those of the same draws given to the test by hand, sums over conversations."""
    sample = conversations(200, 4)
    proof = await prove(perfect(), sample, WHOLE, evidence=tmp_path)
    header, calls = read_lines(tmp_path / file_name("local/new"), ProofHeader, Call)
    items = read_exchanges(tmp_path).records
    assert (header.unit, proof.unit, proof.verdict, proof.clusters) == ("cluster", "cluster", "PASS", 50)
    assert weigh(header, items, calls) == proof
    talks: dict[str, list[Item]] = {}
    for item in items:
        talks.setdefault(item.cluster, []).append(item)
    units = {name: Unit(sum(i.score for i in talk), len(talk)) for name, talk in talks.items()}
    test = SequentialTest(list(units.values()), Design(0.10))
    order = shuffled(units, header.seed)
    for name in order:
        if test.observe(units[name], 4.0) is not Verdict.UNDECIDED:
            break
    assert (proof.calls, proof.e_pass) == (test.calls, test.path[-1].e_pass)
    assert {call.key for call in calls} >= {i.key for name in order[: test.calls // 4] for i in talks[name]}


@pytest.mark.parametrize("concurrency", [1, 3, 16])
async def test_conversations_killed_anywhere_say_the_same(tmp_path: Path, concurrency: int) -> None:
    """Also in the middle of one, and with fewer calls at once than one has turns."""
    settings = msgspec.structs.replace(WHOLE, concurrency=concurrency)
    sample = conversations(60, 5)
    whole = await prove(perfect(), sample, settings, evidence=tmp_path / "whole")
    written = (tmp_path / "whole" / file_name("local/new")).read_bytes().splitlines(keepends=True)
    for kept in range(1, len(written), 3):
        folder = tmp_path / str(kept)
        folder.mkdir()
        (folder / file_name("local/new")).write_bytes(b"".join(written[:kept]) + b'{"key":"cut')
        model = perfect()
        proof = await prove(model, sample, settings, evidence=folder)
        assert (proof.verdict, proof.calls, proof.e_pass) == (whole.verdict, whole.calls, whole.e_pass)
        keys = [call.key for call in calls_in(folder, "local/new")]
        assert len(keys) == len(set(keys)) == kept - 1 + model.calls


async def test_a_conversation_that_does_not_fit_into_the_budget_is_not_begun(tmp_path: Path) -> None:
    sample = conversations(60, 5)
    model = perfect()
    proof = await prove(model, sample, msgspec.structs.replace(WHOLE, budget=13), evidence=tmp_path)
    assert (proof.verdict, proof.calls, proof.paid, model.calls) == ("UNDECIDED", 10, 10, 10)
    header, calls = read_lines(tmp_path / file_name("local/new"), ProofHeader, Call)
    assert weigh(header, read_exchanges(tmp_path).records, calls) == proof
    with pytest.raises(InputError, match="unit cluster there, item here"):
        await prove(model, sample, SETTINGS, evidence=tmp_path)


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_money_that_ends_within_a_conversation_ends_the_run(tmp_path: Path, concurrency: int) -> None:
    """What was paid of it is kept, and not counted; nobody waits for the rest of it."""
    settings = msgspec.structs.replace(WHOLE, budget_usd=0.135, concurrency=concurrency)
    for _ in range(2):  # gone on with, it pays for nothing more
        async with asyncio.timeout(20):
            proof = await prove(
                perfect(), conversations(60, 5), settings, evidence=tmp_path, price=lambda usage: 0.01
            )
        assert (proof.verdict, proof.calls, proof.paid) == ("UNDECIDED", 10, 13)


async def test_whole_conversations_raise_no_false_pass(tmp_path: Path) -> None:
    """Losses that come in whole conversations, exactly at the margin, each metric and stratum by itself."""
    sample = [x._replace(tags={}, expected=x.answer) for x in conversations(120, 4)]
    lost = {f"talk {i}" for i in range(3)}  # 12 of 120 items: ten points
    talk_of = {x.request["messages"][0]["content"]: x.task_id for x in sample}
    items = write_exchanges(tmp_path, sample)
    passes = 0
    for seed in range(300):
        order = drawn(items, seed, "cluster")
        panel = Panel(metrics_of(items, WHOLE), order, Rates(0.05, 0.10, 1))
        for together in order:
            if panel.settled:
                break
            bad = talk_of[together[0].prompt] in lost
            panel.observe(together, lambda metric, place, bad=bad: float(not bad))
        passes += panel.verdict is Verdict.PASS
    assert passes / 300 <= 0.05 + 3 * (0.05 * 0.95 / 300) ** 0.5


def test_no_traffic_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no held-out exchanges"):
        write_exchanges(tmp_path, [])


def test_broken_evidence_names_file_and_line(tmp_path: Path) -> None:
    write_exchanges(tmp_path, traffic(3))
    path = tmp_path / EXCHANGES
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"key":1}\n')
    with pytest.raises(EvidenceError, match=r"exchanges\.jsonl line 2"):
        read_exchanges(tmp_path)
    path.unlink()
    with pytest.raises(EvidenceError, match="cannot be read"):
        read_exchanges(tmp_path)


def test_a_cut_last_line_is_left_out(tmp_path: Path) -> None:
    items = write_exchanges(tmp_path, traffic(3))
    with (tmp_path / EXCHANGES).open("ab") as file:
        file.write(b'{"key":"x"')
    assert read_exchanges(tmp_path).records == items
    assert isinstance(items[0], Item)


def test_file_names_of_models_never_collide() -> None:
    names = {file_name(model) for model in ("a/b", "a-b", "a:b", "ä/b")}
    assert len(names) == 4
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-._") for name in names)


def test_the_forecast_is_made_without_a_call() -> None:
    told = forecast(traffic(200), SETTINGS, runs=5)
    assert (told.items, told.most_calls) == (200, 200)
    assert told.expected_if_worse < told.expected_if_as_good <= 200
    assert told.prompt_tokens == pytest.approx(5 * told.expected_if_as_good)
    assert told.prompt_tokens_most == 1000
