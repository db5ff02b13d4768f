"""Bench of the distillation loss: CPU-seconds, peak memory and gradient error of the layer at the head.

Prints Markdown. N=2048 rows, H=576, V=49,152, half of the rows masked, forward and backward; each
implementation in a process of its own, so that peaks are its own. Peers: the dense formula of TRL's GKD
trainer written out, and TRL's and Liger's own losses where those packages are installed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from importlib.util import find_spec

import torch

from understudy.compress.losses import Head, Options, Rows, distillation_loss
from understudy.compress.precision import Precision, matmul_precision

ROWS, WIDTH, VOCAB = 2048, 576, 49_152
NAMES = {
    "ours-fp32": "ours, fp32",
    "ours-bf16": "ours, products with bf16 inputs",
    "dense-fp32": "full logits (TRL GKD's formula), fp32",
    "dense-bf16": "full logits (TRL GKD's formula), bf16",
    "liger": "Liger's chunked loss, uncompiled",
}


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, head, teacher's states, teacher's head; a student that is near its teacher."""
    torch.manual_seed(0)
    head, states = torch.randn(VOCAB, WIDTH) * 0.05, torch.randn(ROWS, WIDTH)
    return states + 0.3 * torch.randn(ROWS, WIDTH), head, states, head.clone()


def ours(precision: Precision) -> list[torch.Tensor]:
    hidden, head, states, teacher = problem()
    hidden.requires_grad_(), head.requires_grad_()
    mask = (torch.arange(ROWS) % 2).float()
    rows = Rows(states, torch.zeros(ROWS, dtype=torch.int64), mask, torch.zeros(ROWS))
    with matmul_precision(precision):
        loss = distillation_loss(
            hidden, head, rows, Head(teacher), normaliser=ROWS / 2, options=Options(chunk=256)
        )
        loss.total.backward()
    return [hidden.grad, head.grad]


def dense(dtype: torch.dtype) -> list[torch.Tensor]:
    hidden, head, states, teacher = (x.to(dtype) for x in problem())
    hidden.requires_grad_(), head.requires_grad_()
    mask = torch.arange(ROWS) % 2 == 1
    student = torch.log_softmax(hidden @ head.T, -1)
    wanted = torch.log_softmax(states @ teacher.T, -1)
    loss = torch.nn.functional.kl_div(student, wanted, reduction="none", log_target=True)
    (loss[mask].sum() / mask.sum()).backward()
    return [hidden.grad, head.grad]


def liger() -> list[torch.Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    hidden, head, states, teacher = problem()
    hidden.requires_grad_(), head.requires_grad_()
    labels = torch.where(torch.arange(ROWS) % 2 == 1, 0, -100)
    # β = 0 is forward KL
    loss = LigerFusedLinearJSDLoss(beta=0.0, weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=False)
    loss(hidden, head, states, teacher, labels).backward()
    return [hidden.grad, head.grad]


RUNS = {
    "ours-fp32": lambda: ours("fp32"),
    "ours-bf16": lambda: ours("bf16"),
    "dense-fp32": lambda: dense(torch.float32),
    "dense-bf16": lambda: dense(torch.bfloat16),
    "liger": liger,
}


def exact() -> list[torch.Tensor]:
    """The gradients in float64, masked rows left out, a quarter of the rows at a time."""
    hidden, head, states, teacher = (x.double() for x in problem())
    grads = [torch.zeros_like(hidden), torch.zeros_like(head)]
    mask = torch.arange(ROWS) % 2 == 1
    for part in torch.arange(ROWS)[mask].chunk(8):
        p, q = (torch.softmax(x @ w.T, -1) for x, w in ((states[part], teacher), (hidden[part], head)))
        slope = (q - p) / (ROWS / 2)
        grads[0][part] = slope @ head
        grads[1] += slope.T @ hidden[part]
    return grads


def one(name: str) -> None:
    """Run in a child: CPU-seconds, peak above the problem itself, and the gradients' errors."""
    torch.zeros(8, 8) @ torch.zeros(8, 8)
    data = problem()
    before = resource.getrusage(resource.RUSAGE_SELF)
    del data
    grads = RUNS[name]()
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    peak = (after.ru_maxrss - before.ru_maxrss) / 1024
    wanted = exact()
    errors = [float((g.double() - w).norm() / w.norm()) for g, w in zip(grads, wanted, strict=True)]
    print(json.dumps({"cpu": cpu, "peak": peak, "error": max(errors)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", choices=list(RUNS), help="one implementation, as JSON")
    arguments = parser.parse_args()
    if arguments.one:
        one(arguments.one)
        return
    print(f"Loss layer, forward and backward: N={ROWS:,}, H={WIDTH}, V={VOCAB:,}, half of the rows masked.\n")
    print("| implementation | CPU-s | peak above its inputs, MiB | largest gradient error |")
    print("| --- | --- | --- | --- |")
    for name, title in NAMES.items():
        if name == "liger" and find_spec("liger_kernel") is None:
            print(f"| {title} | not installed | | |")
            continue
        command = [sys.executable, __file__, "--one", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ, check=True)
        found = json.loads(done.stdout)
        print(f"| {title} | {found['cpu']:.1f} | {found['peak']:,.0f} | {found['error']:.1e} |", flush=True)


if __name__ == "__main__":
    main()
