"""Bench of the proof: paid calls, wrong verdicts, CPU time.

Prints Markdown. Paired per-item scores of real models come from a folder of CSV or JSONL files
(`--data`, `../shared/data/paired` beside the repository by default); without it that section is left out, and
says so. Blends (a share of one model's answers replaced by the other's, as a router would) fill the gaps
between two real models with realistic smaller ones.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import NormalDist, fmean
from typing import NamedTuple

import uvloop

from understudy import config
from understudy.endpoint import HttpEndpoint
from understudy.evaluate.proof import Proof
from understudy.evaluate.replay import prove
from understudy.evaluate.scores import Table, read
from understudy.evaluate.sequential import Design, SequentialTest, Unit, Verdict, shuffled
from understudy.evaluate.workers import side_by_side
from understudy.protocol import Usage
from understudy.traffic.sample import Exchange

Pairs = list[tuple[float, float]]
DESIGN = Design(0.03, 0.05, 0.10)
NEVER = 1e-300


class Ran(NamedTuple):
    verdict: Verdict
    calls: int


def decide(pairs: Pairs, design: Design) -> Ran:
    test = SequentialTest([Unit(a) for a, _ in pairs], design)
    for a, b in pairs:
        if test.observe(Unit(a), b) is not Verdict.UNDECIDED:
            break
    return Ran(test.verdict, test.calls)


def decide_by_first_formulas(pairs: Pairs, design: Design) -> Ran:
    """DESIGN.md steps 2-5 to the letter, to compare with."""
    grid = (0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6)
    d, n = design.margin, len(pairs)
    bets = [d / (g + d * d) for g in grid]
    passing, failing = [1.0 / len(grid)] * len(grid), [1.0 / len(grid)] * len(grid)
    unseen, gained = math.fsum(a for a, _ in pairs), 0.0
    sa = sb = saa = sab = 0.0
    for t, (a, b) in enumerate(pairs):
        theta = 0.7
        if t >= 20:
            variance = saa / t - (sa / t) ** 2
            slope = (sab / t - sa * sb / t / t) / variance if variance > 1e-9 else 0.7
            theta = (14.0 + t * min(max(slope, 0.0), 1.0)) / (20 + t)
        left = n - t
        zero = ((1 - theta) * unseen - gained) / left
        low = zero - n * d / left
        z = b - theta * a
        up, down = 0.9 / max(low + theta, 1e-9), 0.9 / max(1 - zero, 1e-9)
        passing = [s * (1 + min(x, up) * (z - low)) for s, x in zip(passing, bets, strict=True)]
        failing = [s * (1 - min(x, down) * (z - zero)) for s, x in zip(failing, bets, strict=True)]
        unseen, gained = unseen - a, gained + b - a
        sa, sb, saa, sab = sa + a, sb + b, saa + a * a, sab + a * b
        if sum(passing) >= design.pass_at or low < -theta:
            return Ran(Verdict.PASS, t + 1)
        if sum(failing) >= design.fail_at:
            return Ran(Verdict.FAIL, t + 1)
    return Ran(Verdict.PASS if gained > -d * n else Verdict.FAIL, n)


def oracle_calls(pairs: Pairs, design: Design) -> float:
    """A fixed-n z-test planned for the margin by someone who knows the variance of the paired differences."""
    differences = [b - a for a, b in pairs]
    mean = fmean(differences)
    variance = fmean((x - mean) ** 2 for x in differences)
    z = NormalDist().inv_cdf(1 - design.alpha) + NormalDist().inv_cdf(1 - design.beta)
    planned = z * z * variance / design.margin**2
    return planned / (1 + planned / len(pairs))


class Comparison(NamedTuple):
    name: str
    pairs: Pairs


def comparisons(table: Table, name: str) -> Iterator[Comparison]:
    """Both directions of every two models, and blends of them."""
    for old in table.models:
        for new in table.models:
            shared = [i for i in table.scores[old] if i in table.scores.get(new, {})]
            if old == new or not shared:
                continue
            for share in (0.0625, 0.125, 0.25, 0.5, 1.0):
                rng = random.Random(f"{name}{old}{new}{share}")
                a, b = table.scores[old], table.scores[new]
                pairs = [(a[i], b[i] if rng.random() < share else a[i]) for i in shared]
                yield Comparison(f"{name}: {share:.0%} of {old} by {new}", pairs)


def repeated(
    comparison: Comparison, repeats: int, decision: Callable[[Pairs, Design], Ran] = decide
) -> list[Ran]:
    rng = random.Random(comparison.name)
    return [decision(rng.sample(comparison.pairs, len(comparison.pairs)), DESIGN) for _ in range(repeats)]


def gap(pairs: Pairs) -> float:
    return fmean(b - a for a, b in pairs)


BINS = (-1.0, -0.06, -0.03, -0.015, 0.0, 0.03, 1.0)


def real_models(folder: Path, repeats: int) -> None:
    print("### Paired results of real models\n")
    files = sorted(folder.glob("*.csv")) + sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    if not files:
        print(f"No score files at hand (looked in `{folder.name}`); give `--data FOLDER`.\n")
        return
    print(f"Margin 3 points, α = 5%, β = 10%, {repeats} orders each; calls as a mean over orders.\n")
    found = [c for file in files for c in comparisons(read(file), file.stem)]
    runs = {c.name: repeated(c, repeats) for c in found}
    before = {c.name: repeated(c, repeats, decide_by_first_formulas) for c in found}
    _whole_models([c for c in found if "100%" in c.name], runs, before)
    _by_gap(found, runs, before)


def _whole_models(found: list[Comparison], runs: dict[str, list[Ran]], before: dict[str, list[Ran]]) -> None:
    print("| real models | gap | items | calls | share | oracle fixed-n | first formulas | verdicts |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for c in found:
        calls = fmean(run.calls for run in runs[c.name])
        verdicts = ", ".join(f"{v} {sum(r.verdict is v for r in runs[c.name])}" for v in Verdict)
        old = fmean(run.calls for run in before[c.name])
        print(
            f"| {c.name} | {100 * gap(c.pairs):+.1f} | {len(c.pairs):,} | {calls:,.1f} |"
            f" {calls / len(c.pairs):.2%} | {oracle_calls(c.pairs, DESIGN):,.0f} | {old:,.1f} | {verdicts} |"
        )
    print()


def _by_gap(found: list[Comparison], runs: dict[str, list[Ran]], before: dict[str, list[Ran]]) -> None:
    print("| gap, blends included | pairs | share of items | of oracle | first formulas | wrong PASS |")
    print("| --- | --- | --- | --- | --- | --- |")
    for low, high in [*itertools.pairwise(BINS), (-1.0, 1.0)]:
        inside = [c for c in found if low < gap(c.pairs) <= high]
        if not inside:
            continue
        share = fmean(run.calls / len(c.pairs) for c in inside for run in runs[c.name])
        paid = fmean(fmean(run.calls for run in runs[c.name]) for c in inside)
        oracle = paid / fmean(oracle_calls(c.pairs, DESIGN) for c in inside)
        old = fmean(run.calls / len(c.pairs) for c in inside for run in before[c.name])
        worse = [c for c in inside if gap(c.pairs) <= -DESIGN.margin]
        wrong = [r.verdict is Verdict.PASS for c in worse for r in runs[c.name]]
        label = "all" if (low, high) == (-1.0, 1.0) else f"{100 * low:+.1f} to {100 * high:+.1f}"
        rate = f"{fmean(wrong):.2%}" if wrong else "–"
        print(f"| {label} | {len(inside)} | {share:.2%} | {oracle:.2f} | {old:.2%} | {rate} |")
    print()


def exact_margin(kind: str, n: int = 200, margin: float = 0.05) -> Pairs:
    """Scores whose mean difference is exactly minus the margin."""
    lost = round(n * margin)
    if kind == "right or wrong":
        return (
            [(1.0, 0.0)] * (lost + 15)
            + [(0.0, 1.0)] * 15
            + [(1.0, 1.0)] * 110
            + [(0.0, 0.0)] * (n - 140 - lost)
        )
    if kind == "heavily tied":
        return [(1.0, 0.0)] * lost + [(1.0, 1.0)] * (n - lost)
    if kind == "one bad cluster":
        return [(0.9, 0.9 - 0.5)] * (2 * lost) + [(0.6, 0.6)] * (n - 2 * lost)
    rng = random.Random(1)  # graded
    a = [min(0.95, rng.betavariate(3, 2) + margin) for _ in range(n)]
    noise = [rng.uniform(-0.04, 0.04) for _ in range(n)]
    return [(x, x - margin + e - fmean(noise)) for x, e in zip(a, noise, strict=True)]


def wrong_rates(runs: int) -> None:
    print("### Wrong verdicts, looking after every call\n")
    print(
        f"{runs:,} runs each; the bound is 5% for PASS at the exact margin, 10% for FAIL of an equal model.\n"
    )
    print("| scores | drawn as | wrong PASS | first formulas |")
    print("| --- | --- | --- | --- |")
    design = Design(0.05, 0.05, 0.10)
    for kind in ("right or wrong", "heavily tied", "one bad cluster", "graded"):
        pairs, rng = exact_margin(kind), random.Random(kind)
        orders = [rng.sample(pairs, len(pairs)) for _ in range(runs)]
        rate = fmean(decide(order, design).verdict is Verdict.PASS for order in orders)
        few = orders[: runs // 10]
        old = fmean(decide_by_first_formulas(order, design).verdict is Verdict.PASS for order in few)
        print(f"| {kind} | single items | {rate:.2%} | {old:.2%} |", flush=True)
    clusters = [exact_margin("one bad cluster")[i : i + 10] for i in range(0, 200, 10)]
    rng = random.Random(9)
    rate = fmean(_whole_clusters(rng.sample(clusters, 20), design) is Verdict.PASS for _ in range(runs))
    print(f"| one bad cluster | whole clusters | {rate:.2%} | – |")
    _adversarial(runs, design)
    pairs, rng = (
        [(1.0, 0.0)] * 15 + [(0.0, 1.0)] * 15 + [(1.0, 1.0)] * 120 + [(0.0, 0.0)] * 50,
        random.Random(3),
    )
    rate = fmean(decide(rng.sample(pairs, 200), design).verdict is Verdict.FAIL for _ in range(runs))
    print(f"\nWrong FAIL of an equal model: {rate:.2%}.\n")


def _adversarial(runs: int, design: Design) -> None:
    """Items handed in with all wins first and all losses last, and every verdict asked for again and again:
    only the committed order, drawn from seed and keys, stands between them and a wrong PASS."""
    pairs = sorted(exact_margin("right or wrong"), key=lambda pair: pair[0] - pair[1])
    keys = {f"item-{i:03}": pair for i, pair in enumerate(pairs)}
    wrong = 0
    for seed in range(runs):
        test = SequentialTest([Unit(a) for a, _ in pairs], design)
        ever = False
        for key in shuffled(keys, seed):
            a, b = keys[key]
            test.observe(Unit(a), b)
            # looking on after any verdict, and counting every moment at which one would have said PASS
            ever = ever or (test.path[-1].e_pass >= design.pass_at and test.calls < len(pairs))
        wrong += ever
    print(f"| right or wrong, losses last | single items, peeked at to the end | {wrong / runs:.2%} | – |")


def _whole_clusters(order: Sequence[Pairs], design: Design) -> Verdict:
    units = [Unit(math.fsum(a for a, _ in cluster), len(cluster)) for cluster in order]
    test = SequentialTest(units, design)
    for unit, cluster in zip(units, order, strict=True):
        if test.observe(unit, math.fsum(b for _, b in cluster)) is not Verdict.UNDECIDED:
            break
    return test.verdict


def speed() -> None:
    rng = random.Random(2)
    scores = [float(rng.random() < 0.7) for _ in range(100_000)]
    pairs = [(a, a if rng.random() < 0.8 else float(rng.random() < 0.7)) for a in scores]
    started = time.process_time()
    test = SequentialTest([Unit(a) for a, _ in pairs], Design(0.03, NEVER, NEVER))
    for a, b in pairs:
        if test.observe(Unit(a), b) is not Verdict.UNDECIDED:
            break
    interval = test.interval(0.05)
    spent = time.process_time() - started
    print("### CPU\n")
    print(f"- 100,000 paired items, thresholds out of reach so that {test.calls:,} scores are taken,")
    print(f"  confidence sequence ({interval.low:+.4f}, {interval.high:+.4f}) included: {spent:.2f} CPU-s")


SERVER = """
import asyncio, sys
BODY = b'{"choices":[{"index":0,"message":{"role":"assistant","content":"yes"},"finish_reason":"stop"}],'
BODY += b'"usage":{"prompt_tokens":5,"completion_tokens":1}}'
HEAD = b"HTTP/1.1 200 OK\\r\\ncontent-type: application/json\\r\\ncontent-length: %d\\r\\n\\r\\n" % len(BODY)

class Fake(asyncio.Protocol):
    def connection_made(self, transport): self.transport, self.data = transport, b""
    def data_received(self, data):
        self.data += data
        while b"\\r\\n\\r\\n" in self.data:
            head, _, rest = self.data.partition(b"\\r\\n\\r\\n")
            size = int(head.lower().partition(b"content-length:")[2].split(b"\\r")[0])
            if len(rest) < size: return
            self.data = rest[size:]
            asyncio.get_running_loop().call_later(0.5, self.transport.write, HEAD + BODY)

async def main():
    server = await asyncio.get_running_loop().create_server(Fake, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


@contextmanager
def fake_endpoint() -> Generator[int]:
    """The port of an endpoint that answers after half a second, in a process of its own."""
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield int(server.stdout.readline())
    finally:
        server.terminate()
        server.wait()


def in_flight(items: int, concurrency: int) -> None:
    with fake_endpoint() as port:
        bare = uvloop.run(_bare(port, items, concurrency))
        print(f"- The HTTP client alone, {concurrency:,} calls in flight: {bare:,.0f} CPU-µs a call")
        uvloop.run(_in_flight(port, items, concurrency))


async def _bare(port: int, items: int, concurrency: int) -> float:
    """CPU-µs a call of the client without an evaluation around it."""
    url = f"http://127.0.0.1:{port}/v1"
    waiting = iter([_exchange(i, "yes").request for i in range(items)])

    async with HttpEndpoint("fake/m", url, "m", connections=concurrency) as endpoint:

        async def work() -> None:
            for request in waiting:
                await endpoint.chat(request)

        before = time.process_time()
        await side_by_side(work, concurrency)
        return 1e6 * (time.process_time() - before) / items


KILLED = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, {here!r})
import evaluate
asyncio.run(evaluate.resumed({port}, Path({folder!r})))
"""


async def resumed(port: int, folder: Path) -> Proof:
    """One evaluation of 300 items, begun or gone on with."""
    rng = random.Random(6)
    sample = [_exchange(i, "yes" if rng.random() < 0.5 else "no") for i in range(300)]
    settings = config.Evaluate(margin=0.05, concurrency=8)
    async with HttpEndpoint("fake/m", f"http://127.0.0.1:{port}/v1", "m") as endpoint:
        return await prove(endpoint, sample, settings, evidence=folder)


def killed_ten_times() -> None:
    """An evaluation in a process that is killed (SIGKILL) ten times while it calls, and one left alone."""
    here = str(Path(__file__).resolve().parent)
    with ExitStack() as stack:
        port = stack.enter_context(fake_endpoint())
        whole, cut = (stack.enter_context(tempfile.TemporaryDirectory()) for _ in range(2))
        left_alone = asyncio.run(resumed(port, Path(whole)))
        file, kills, lines = Path(cut) / "fake-m-*.jsonl", 0, 0
        while kills < 10:
            program = KILLED.format(here=here, port=port, folder=cut)
            child = subprocess.Popen([sys.executable, "-c", program])
            lines = _await_lines(file, lines + 8, child)
            if child.poll() is not None:
                break
            child.kill()
            child.wait()
            kills += 1
        proof = asyncio.run(resumed(port, Path(cut)))
        keys = [line.split(b'"', 4)[3] for line in _lines(file)[1:]]
    same = all(getattr(proof, n) == getattr(left_alone, n) for n in ("verdict", "calls", "e_pass", "e_fail"))
    print(f"- Killed {kills} times and gone on with: {proof.verdict} after {proof.calls} calls, the same as")
    print(f"  left alone: {same}; {len(keys)} calls kept, {len(keys) - len(set(keys))} of them twice")


def _lines(pattern: Path) -> list[bytes]:
    found = sorted(pattern.parent.glob(pattern.name))
    return found[0].read_bytes().splitlines() if found else []


def _await_lines(pattern: Path, wanted: int, child: subprocess.Popen[bytes]) -> int:
    """Wait until the evidence has grown, or the child has ended."""
    until = time.monotonic() + 60
    while len(_lines(pattern)) < wanted and child.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    return len(_lines(pattern))


async def _in_flight(port: int, items: int, concurrency: int) -> None:
    rng = random.Random(4)
    sample = [_exchange(i, "yes" if rng.random() < 0.5 else "no") for i in range(items)]
    settings = config.Evaluate(margin=0.01, alpha=1e-12, beta=1e-12, concurrency=concurrency)
    url = f"http://127.0.0.1:{port}/v1"
    with tempfile.TemporaryDirectory() as folder:
        async with HttpEndpoint("fake/m", url, "m", connections=concurrency) as endpoint:
            before, started = time.process_time(), time.perf_counter()
            proof = await prove(endpoint, sample, settings, evidence=Path(folder))
            spent, wall = time.process_time() - before, time.perf_counter() - started
    print(f"- {proof.paid:,} calls, up to {concurrency:,} in flight, graded, tested and written as evidence:")
    print(f"  {1e6 * spent / proof.paid:,.0f} CPU-µs a call, {proof.paid / wall:,.0f} calls a second")


def _exchange(i: int, answer: str) -> Exchange:
    return Exchange(
        key=f"{i:08}", at=0.0, alias="a", target="old/m",
        request={"messages": [{"role": "user", "content": f"question {i}"}]},
        body={"choices": [{"message": {"role": "assistant", "content": answer}}]},
        answer=answer, expected="yes" if i % 2 else "no", grades={}, task_id="", tags={}, prompt_hash=str(i),
        usage=Usage(prompt_tokens=5, completion_tokens=1), status=200, total_s=0.5, ttft_s=0.5,
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    here = Path(__file__).resolve().parent
    parser.add_argument("--data", type=Path, default=here.parent.parent / "shared" / "data" / "paired")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--runs", type=int, default=20_000)
    given = parser.parse_args()
    real_models(given.data, given.repeats)
    wrong_rates(given.runs)
    speed()
    in_flight(20_000, 2_000)
    killed_ten_times()
