"""What a verdict rests on: right answers, a judge, or likeness; never a mixture, never unsaid."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from understudy import config
from understudy.endpoint import ScriptedModel
from understudy.errors import InputError
from understudy.evaluate.doubt import Preference, doubts, is_blind
from understudy.evaluate.evidence import item_of
from understudy.evaluate.grade import Reply
from understudy.evaluate.item import Call, Item
from understudy.evaluate.judge import JudgedHeader, Judgement, file_name, read_lines
from understudy.evaluate.metrics import metrics_of, primary
from understudy.evaluate.panel import LOOKED_AT, Panel, Rates
from understudy.evaluate.proof import Proof, weigh
from understudy.evaluate.replay import Bench, forecast, prove
from understudy.evaluate.sequential import Verdict
from understudy.evaluate.walk import Walk
from understudy.traffic.sample import Exchange

SETTINGS = config.Evaluate(margin=0.10, seed=3, concurrency=4)
JUDGED = msgspec.structs.replace(SETTINGS, judge="other/claude")
RATES = Rates(0.05, 0.10, 1)


def traffic(known: int, unknown: int, *, right: float = 0.8) -> list[Exchange]:
    """Questions with a right answer (``yes``), then some of which nobody knows it."""
    rng = random.Random(known + unknown)
    return [_exchange(i, i < known, rng.random() < right) for i in range(known + unknown)]


def _exchange(i: int, known: bool, right: bool) -> Exchange:
    answer = "yes" if right else "no"
    return Exchange(
        key=f"key{i:04}", at=float(i), alias="a", target="host/old",
        request={"messages": [{"role": "user", "content": f"{'known' if known else 'open'} {i}"}]},
        body={"choices": [{"message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}]},
        answer=answer, expected="yes" if known else None, grades={}, task_id="",
        tags={"task": "known" if known else "open"}, prompt_hash=str(i),
        usage=None, status=200, total_s=0.1, ttft_s=0.1,
    )  # fmt: skip


def candidate(answers: Mapping[str, str]) -> ScriptedModel:
    """Says to every kind of question the same."""

    def script(request: Mapping[str, Any]) -> str:
        return answers[str(request["messages"][0]["content"]).split()[0]]

    return ScriptedModel("local/new", script)


def prefers(word: str) -> ScriptedModel:
    return ScriptedModel("other/claude", preferring(word))


def preferring(word: str) -> Callable[[Mapping[str, Any]], str]:
    """A judge that prefers the answer that holds ``word``; a tie when both do, or neither."""

    def script(request: Mapping[str, Any]) -> str:
        shown = str(request["messages"][1]["content"])
        first, second = (word in shown.partition(f"--- Answer {x}")[2].partition("--- end")[0] for x in "AB")
        return f"verdict: {'TIE' if first == second else 'A' if first else 'B'}"

    return script


def items_of(sample: Sequence[Exchange]) -> list[Item]:
    return [item_of(exchange) for exchange in sample]


async def test_likeness_no_longer_holds_a_better_candidate_down(tmp_path: Path) -> None:
    """Half of the items have no right answer, and on them the candidate says something else entirely."""
    sample = traffic(200, 190, right=0.6)
    proof = await prove(candidate({"known": "yes", "open": "otherwise"}), sample, SETTINGS, evidence=tmp_path)
    assert (proof.verdict, proof.leading) == ("PASS", "correct")
    reported = {m.name: m for m in proof.metrics}["agreement"]
    assert not reported.required
    assert reported.verdict == "UNDECIDED"
    assert reported.candidate == 0.0
    assert proof.rests_on == (
        "Rests on known right answers (200 of 390 items);"
        " says nothing of 190 items without a known right answer."
    )
    assert proof.candidate_mean == 1.0  # no likeness in the mean
    assert proof.candidate_tokens.calls == proof.candidate_tokens.completed


async def test_unlike_alone_is_undecided_and_stops_early(tmp_path: Path) -> None:
    proof = await prove(candidate({"open": "otherwise"}), traffic(0, 300), SETTINGS, evidence=tmp_path)
    assert proof.verdict == "UNDECIDED"
    assert proof.calls < 60
    assert proof.strata == []


async def test_a_few_right_answers_carry_no_pass_for_all_the_rest(tmp_path: Path) -> None:
    sample = traffic(20, 200, right=1.0)
    unlike = await prove(candidate({"known": "yes", "open": "no"}), sample, SETTINGS, evidence=tmp_path / "u")
    assert unlike.verdict == "UNDECIDED"
    like = await prove(candidate({"known": "yes", "open": "yes"}), sample, SETTINGS, evidence=tmp_path / "l")
    assert like.verdict == "PASS"
    assert [m.name for m in like.metrics if m.required] == ["correct", "agreement"]


async def test_with_a_judge_a_candidate_can_win_where_nobody_knows_what_is_right(tmp_path: Path) -> None:
    sample, judge = traffic(100, 200), prefers("better")
    model = candidate({"known": "yes", "open": "better"})
    proof = await prove(model, sample, JUDGED, evidence=tmp_path, judge=Bench(judge))
    assert proof.verdict == "PASS"
    results = {m.name: m for m in proof.metrics}
    assert results["preferred"].required
    assert (results["preferred"].incumbent, results["preferred"].candidate) == (0.5, 1.0)
    assert "the judge's preference (200 of 300 items)" in proof.rests_on
    assert {(s.task, s.metric) for s in proof.strata} == {("known", "correct"), ("open", "preferred")}
    lines = read_lines(tmp_path / file_name("local/new", "judged-"), JudgedHeader, Judgement).records
    assert judge.calls == len(lines) == len({line.key for line in lines}) < 200


async def test_a_judge_that_prefers_the_incumbent_fails_a_candidate_that_is_right_elsewhere(
    tmp_path: Path,
) -> None:
    model = candidate({"known": "yes", "open": "worse"})
    judge = ScriptedModel("other/claude", lambda r: "verdict: " + ("B" if "worse" in _first(r) else "A"))
    proof = await prove(model, traffic(100, 200), JUDGED, evidence=tmp_path, judge=Bench(judge))
    assert (proof.verdict, proof.leading) == ("FAIL", "preferred")
    assert proof.beta == 0.05  # two metrics that can fail share the ten per cent


def _first(request: Mapping[str, Any]) -> str:
    return str(request["messages"][1]["content"]).partition("--- Answer A")[2].partition("--- end")[0]


async def test_a_silent_judge_decides_nothing(tmp_path: Path) -> None:
    judge = ScriptedModel("other/claude", lambda request: "hm")
    model = candidate({"open": "something"})
    proof = await prove(model, traffic(0, 60), JUDGED, evidence=tmp_path, judge=Bench(judge))
    assert proof.verdict == "UNDECIDED"
    assert proof.doubts == ["The judge gave no verdict on 100% of the pairs: its word decides nothing."]


async def test_a_killed_run_judges_nothing_twice(tmp_path: Path) -> None:
    sample = traffic(0, 150)
    whole = await prove(
        candidate({"open": "better"}), sample, JUDGED, evidence=tmp_path / "w", judge=Bench(prefers("better"))
    )
    compared: list[str] = []

    class Dies(ScriptedModel):
        """Killed at its fourth comparison."""

        async def chat(self, request: Mapping[str, Any]) -> Any:
            if self.calls == 3:
                raise asyncio.CancelledError
            compared.append(str(request["messages"][1]["content"]).split("open ")[1].split()[0])
            return await super().chat(request)

    proof: Proof | None = None
    asked = 0
    for _ in range(60):
        model = candidate({"open": "better"})
        dies = Dies("other/claude", preferring("better"))
        try:
            proof = await prove(model, sample, JUDGED, evidence=tmp_path / "k", judge=Bench(dies))
            break
        except asyncio.CancelledError:
            continue
        finally:
            asked += model.calls
    assert proof is not None
    assert (proof.verdict, proof.e_pass, proof.calls) == (whole.verdict, whole.e_pass, whole.calls)
    assert len(compared) == len(set(compared))
    assert asked == proof.paid


async def test_people_can_take_a_judges_pass_back(tmp_path: Path) -> None:
    sample = traffic(0, 100)
    judge = prefers("better")
    await prove(candidate({"open": "better"}), sample, JUDGED, evidence=tmp_path, judge=Bench(judge))
    from understudy.evaluate.evidence import ProofHeader, read_exchanges
    from understudy.evaluate.item import Call
    from understudy.evaluate.judge import preferences

    header, calls = read_lines(tmp_path / file_name("local/new"), ProofHeader, Call)
    lines = read_lines(tmp_path / file_name("local/new", "judged-"), JudgedHeader, Judgement).records
    items = read_exchanges(tmp_path).records
    told = preferences(lines)
    assert weigh(header, items, calls, told, Preference(0.5, 0.35, 0.65)).verdict == "PASS"
    against = weigh(header, items, calls, told, Preference(0.2, 0.1, 0.3))
    assert against.verdict == "UNDECIDED"
    assert "People prefer the incumbent" in against.doubts[0]


async def test_more_metrics_must_all_hold(tmp_path: Path) -> None:
    sample = traffic(200, 0)
    form = {"form": config.Metric(grader="form", margin=0.05), "exact": config.Metric(grader="exact")}
    settings = msgspec.structs.replace(SETTINGS, metrics=form)
    good = await prove(candidate({"known": "yes"}), sample, settings, evidence=tmp_path / "good")
    assert good.verdict == "PASS"
    assert [(m.name, m.margin, m.beta) for m in good.metrics] == [
        ("correct", 0.10, pytest.approx(0.1 / 3)),
        ("form", 0.05, pytest.approx(0.1 / 3)),
        ("exact", 0.10, pytest.approx(0.1 / 3)),
    ]
    wordy = await prove(
        candidate({"known": "Yes, that is so."}), sample, settings, evidence=tmp_path / "wordy"
    )
    assert (wordy.verdict, wordy.leading) == ("FAIL", "exact")
    assert {m.name: str(m.verdict) for m in wordy.metrics}["correct"] != "FAIL"
    unknown = msgspec.structs.replace(SETTINGS, metrics={"x": config.Metric(grader="magic")})
    with pytest.raises(InputError, match=r"evaluate\.metrics\.x: no grader 'magic'"):
        metrics_of(items_of(sample), unknown)


def test_items_that_decide_nothing_are_looked_at_only_for_a_while() -> None:
    items = items_of(traffic(300, 290))
    panel = Panel(metrics_of(items, SETTINGS), [(item,) for item in items], RATES)
    known = [i for i in items if not i.agreement]
    for item in [i for i in items if i.agreement][:LOOKED_AT]:
        assert panel.wants((item,))
        panel.observe((item,), lambda metric, place: 0.0)
    assert not panel.wants(([i for i in items if i.agreement][LOOKED_AT],))
    assert panel.wants((known[0],))


def test_each_item_has_one_metric_that_says_how_good_it_is() -> None:
    items = items_of(traffic(3, 4))
    with_tools = msgspec.structs.replace(
        items[-1], reply=msgspec.convert({"tool_calls": [{"name": "f"}]}, type(items[-1].reply))
    )
    listed = [*items[:-1], with_tools]
    metrics = metrics_of(listed, JUDGED)
    assert [primary(metrics, item).name for item in listed] == ["correct"] * 3 + ["preferred"] * 3 + [
        "tool calls"
    ]
    plain = metrics_of(listed, SETTINGS)
    assert primary(plain, listed[4]).name == "agreement"


@pytest.mark.parametrize("seed", range(3))
def test_false_passes_stay_rare_when_all_must_hold(seed: int) -> None:
    """One metric lies exactly at its margin, the other is far above (intersection-union)."""
    items = items_of(traffic(60, 60, right=1.0))
    metrics = metrics_of(items, msgspec.structs.replace(SETTINGS, judge="other/claude"))
    lost = {item.key for item in [i for i in items if not i.agreement][:6]}  # six of 60: exactly ten points
    rng = random.Random(seed)
    passes = 0
    for _ in range(130):
        panel = Panel(metrics, [(item,) for item in items], RATES)
        for item in rng.sample(items, len(items)):
            if panel.settled:
                break
            right = float(item.key not in lost)
            panel.observe((item,), lambda m, place, right=right: right if m.basis == "right" else 1.0)
        passes += panel.verdict is Verdict.PASS
    assert passes / 130 <= 0.05 + 3 * (0.05 * 0.95 / 130) ** 0.5


def test_the_forecast_names_what_a_pass_needs_and_counts_the_judge() -> None:
    told = forecast(traffic(100, 100), JUDGED, runs=5)
    assert told.rests_on == ["correct", "preferred"]
    assert 0 < told.judge_calls <= told.judge_calls_most == 100
    assert told.expected_if_worse < told.expected_if_as_good


async def test_nought_beside_nought_is_no_pass(tmp_path: Path) -> None:
    """Neither is ever right: not worse, and nothing known."""
    sample = traffic(300, 0, right=0.0)
    proof = await prove(candidate({"known": "no"}), sample, SETTINGS, evidence=tmp_path)
    assert (proof.verdict, proof.incumbent_mean, proof.candidate_mean) == ("UNDECIDED", 0.0, 0.0)
    assert proof.metrics[0].verdict == "PASS"  # what the test alone would say
    [doubt] = proof.doubts
    assert "“correct” tells nothing apart here: the incumbent scores 0.0% on it" in doubt


async def test_a_task_that_the_incumbent_never_does_passes_nothing_by_itself(tmp_path: Path) -> None:
    """The traffic as a whole tells enough; that one task, nought beside nought, does not."""
    known = [e._replace(key=f"a{e.key}") for e in traffic(150, 0, right=1.0)]
    failed = [e._replace(expected="yes") for e in traffic(0, 60, right=0.0)]

    def script(request: Mapping[str, Any]) -> str:
        task, number = str(request["messages"][0]["content"]).split()
        return "yes" if task == "known" and int(number) % 30 else "no"

    proof = await prove(ScriptedModel("local/new", script), [*known, *failed], SETTINGS, evidence=tmp_path)
    assert (proof.verdict, proof.doubts) == ("PASS", [])
    [blind] = [s for s in proof.strata if s.task == "open"]
    assert (blind.difference, blind.verdict) == (0.0, "UNDECIDED")
    assert blind.interval[0] > -SETTINGS.margin  # what the test alone would call a PASS


def test_the_few_that_were_asked_do_not_make_a_metric_blind() -> None:
    """The incumbent fails at all that were asked and is right on three in four of the rest."""
    items = items_of([_exchange(i, known=True, right=i >= 20) for i in range(80)])
    [metric] = metrics_of(items, SETTINGS)
    walk = Walk([metric], [(item,) for item in items], RATES)
    for item in items[:20]:
        walk.take((item,), {item.key: Call(key=item.key, reply=Reply(text="yes"), score=1.0)}, {})
    own = walk.panel.own[metric.name]
    assert walk.panel.verdict is Verdict.PASS
    assert doubts(walk, {}) == []
    assert not is_blind(metric, walk.pairs, items, own)
    assert is_blind(metric, walk.pairs, items[:20], own)


async def test_a_grader_that_takes_anything_is_no_pass(tmp_path: Path) -> None:
    sample = [e._replace(expected=".*", tags={"grader": "regex"}) for e in traffic(300, 0)]
    proof = await prove(candidate({"known": "whatever"}), sample, SETTINGS, evidence=tmp_path)
    assert proof.verdict == "UNDECIDED"
    assert "an empty answer to every question 100.0%" in proof.doubts[0]


async def test_all_right_beside_all_right_is_a_pass(tmp_path: Path) -> None:
    """All scores alike, and yet a wrong answer would have shown."""
    proof = await prove(candidate({"known": "yes"}), traffic(300, 0, right=1.0), SETTINGS, evidence=tmp_path)
    assert (proof.verdict, proof.doubts) == ("PASS", [])


async def test_a_judge_that_calls_everything_even_is_no_pass(tmp_path: Path) -> None:
    judge = ScriptedModel("other/claude", lambda request: "verdict: TIE")
    model = candidate({"open": "something else"})
    proof = await prove(model, traffic(0, 300), JUDGED, evidence=tmp_path, judge=Bench(judge))
    assert proof.verdict == "UNDECIDED"
    assert "pairs of unlike answers even" in proof.doubts[0]
