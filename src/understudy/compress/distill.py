"""Heal a pruned student by distillation: schedule, steps, held-out checks, stopping and resuming.

Two stages over the same packed rows: first KL on every real token (heal), then 0.9 KL + 0.1 cross-entropy on
the assistant's tokens (adapt). Weights and optimiser stay in fp32. Everything a step does follows from the
seed, the step's number and the saved state, so a resumed run repeats the uninterrupted one exactly; only a
limit in minutes makes the clock part of the schedule. It ignores pruning and where texts come from.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import msgspec
import torch
from torch import Tensor

from understudy.compress.corpus import (
    Batch,
    Document,
    Row,
    collate,
    fingerprint,
    pack,
    shared_length,
    shuffled,
)
from understudy.compress.decoder import (
    head_weight,
    may_share,
    outside_weights,
    softcap_of,
    vocabulary_weights,
)
from understudy.compress.fidelity import final_hidden, side_of
from understudy.compress.losses import (
    Divergence,
    Loss,
    Options,
    Rows,
    Side,
    distillation_loss,
    kl_rows,
    nll_rows,
)
from understudy.compress.precision import Precision, matmul_precision
from understudy.compress.progress import Progress, silent
from understudy.compress.teacher import LiveTeacher
from understudy.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The recipe of healing. Part of a saved state: a resumed run must have the same."""

    tokens: int = 100_000
    """Tokens of training, epochs counted again and again."""
    minutes: float = 0.0
    """Wall-clock limit (0: none); the schedule is stretched over whichever comes first."""
    learning_rate: float = 3e-5
    """Peak; cosine to a twentieth of it. A refitted student starts near its teacher: more than this throws it
    back first (LOG.md, 2026-11-24)."""
    warm_up: float = 0.06
    """Share of the run in which the rate rises linearly."""
    step_tokens: int = 1024
    """Tokens per optimiser step, padding included. Healing is short, so many small steps beat few large."""
    micro_tokens: int = 512
    """Tokens per forward pass; memory follows this."""
    row_tokens: int = 0
    """Length of packed rows; 0 takes it from the documents."""
    adapt: float = 0.3
    """Share of the run, at its end, spent on the assistant's tokens."""
    adapt_ce: float = 0.1
    """Share of cross-entropy in that stage."""
    adapt_rest: float = 0.1
    """Weight of all other tokens' KL in that stage, so that reading does not decay."""
    train_vocabulary: bool = False
    """Train the embedding and the head too. They are the teacher's own, every row of the head has some
    gradient at every step, and Adam makes noise of full size out of it."""
    divergence: Divergence = "forward"
    temperature: float = 1.0
    weight_decay: float = 0.0
    clip: float = 1.0
    """Largest norm of the whole gradient."""
    checks: int = 4
    """Evaluations on text not trained on, after the one before training."""
    patience: int = 3
    """Checks without a better held-out KL before stopping early."""
    seed: int = 0
    precision: Precision = "auto"


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One optimiser step as it was."""

    step: int
    tokens: int
    """Trained on so far."""
    loss: float
    kl: float
    """Mean KL to the teacher over the tokens the step learnt from."""
    learning_rate: float


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One evaluation on held-out text."""

    step: int
    tokens: int
    kl: float
    """Per token, all tokens."""
    answer_kl: float
    """Per token, the assistant's."""
    answer_nll: float
    """−log of the student's probability of the answers' own tokens, per token."""
    loss: float
    """What the run is to bring down, in the weights of its last stage; the best check's weights are kept."""


class Curve(msgspec.Struct, kw_only=True):
    """The run so far; what is saved of it beside tensors."""

    points: list[Point] = []
    checks: list[Check] = []
    seconds: float = 0.0
    finished: bool = False
    stopped: str = ""
    """Why it ended: tokens | minutes | early."""


class Corpus(NamedTuple):
    """What is trained on, and what is only measured on."""

    train: list[Document]
    held_out: list[Document]


def heal(
    student: PreTrainedModel,
    teacher: LiveTeacher,
    corpus: Corpus,
    settings: Settings,
    state: Path,
    progress: Progress = silent,
) -> Curve:
    """Train ``student`` in place toward the teacher and leave it with its best held-out weights.

    ``state`` is a folder for resuming; a run found there is continued. Ctrl-C saves before it leaves.
    Raises ModelError when nothing can be learnt from the corpus or the saved state is of another run.
    """
    run = _Run(student, teacher, corpus, settings, state, progress)
    with matmul_precision(settings.precision), _interrupt_between_steps() as interrupted:
        run.to_the_end(interrupted)
    return run.curve


@contextmanager
def _interrupt_between_steps() -> Generator[threading.Event]:
    """Ctrl-C sets the event, so that no step is left half-done; a second one breaks off at once."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            signal.default_int_handler(number, frame)
        interrupted.set()

    signal.signal(signal.SIGINT, ask)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


class _Order:
    """Which rows each step learns from: epochs shuffled by seed and number."""

    def __init__(self, rows: list[Row], per_step: int, seed: int) -> None:
        self.rows, self.per_step, self.seed = rows, per_step, seed
        self._epochs: dict[int, list[int]] = {}

    def step(self, number: int) -> list[int]:
        """Indices of the rows of a step, counted from 0."""
        first = number * self.per_step
        return [self._at(i) for i in range(first, first + self.per_step)]

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, len(self.rows))
        if epoch not in self._epochs:
            self._epochs = {
                e: order for e, order in self._epochs.items() if e >= epoch - 1
            }  # a step may straddle two
            self._epochs[epoch] = shuffled(range(len(self.rows)), self.seed * 1_000_003 + epoch)
        return self._epochs[epoch][place]


class _Run:
    """One healing: model, optimiser, place in the schedule."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: LiveTeacher,
        corpus: Corpus,
        settings: Settings,
        state: Path,
        progress: Progress,
    ) -> None:
        self.student, self.teacher, self.settings = student, teacher, settings
        self.state, self.progress = state, progress
        length = settings.row_tokens or shared_length(corpus.train)
        share = all(may_share(model, length) for model in (student, teacher.model))
        self.rows = pack(corpus.train, length, share=share)
        self.held_out = pack(corpus.held_out, length, share=share)
        if not self.rows:
            raise ModelError("nothing to learn from", expected="chats or texts of at least two tokens")
        self.micro = max(1, settings.micro_tokens // length)
        self.order = _Order(self.rows, max(1, settings.step_tokens // length), settings.seed)
        self.identity = fingerprint(corpus.train) + fingerprint(corpus.held_out)
        self.curve = Curve()
        kept = [] if settings.train_vocabulary else vocabulary_weights(student)
        frozen = {id(p) for p in (*kept, *outside_weights(student))}
        for parameter in student.parameters():
            parameter.requires_grad_(id(parameter) not in frozen)
        self.parameters = [p for p in student.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(
            self.parameters,
            lr=settings.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.started = time.monotonic()

    @property
    def tokens(self) -> int:
        return self.curve.points[-1].tokens if self.curve.points else 0

    @property
    def step(self) -> int:
        return len(self.curve.points)

    def to_the_end(self, interrupted: threading.Event) -> None:
        """Steps until tokens, minutes or patience are used up; raises KeyboardInterrupt, saved, if asked."""
        self._resume()
        if not self.curve.checks:
            self._check()
        while not self.curve.finished:
            self._step()
            share = self.share()
            if share >= 1:
                self.curve.finished = True
                self.curve.stopped = "tokens" if self.tokens >= self.settings.tokens else "minutes"
            if share >= len(self.curve.checks) / self.settings.checks or self.curve.finished:
                self._check()
                self._stop_early()
                self.save()
            if interrupted.is_set() and not self.curve.finished:
                self.save()
                raise KeyboardInterrupt
        self._restore_best()
        self.student.requires_grad_(True)

    def share(self) -> float:
        """How much of the run is done, in [0, 1]: by tokens or by the clock, whichever is further."""
        share = self.tokens / self.settings.tokens
        if self.settings.minutes:
            share = max(share, self._seconds() / (60 * self.settings.minutes))
        return min(share, 1.0)

    def _seconds(self) -> float:
        """Wall-clock of the run so far, resumed parts included; kept in the curve."""
        now = time.monotonic()
        self.curve.seconds, self.started = self.curve.seconds + now - self.started, now
        return self.curve.seconds

    def _rate(self, share: float) -> float:
        """Linear warm-up, then cosine to a twentieth of the peak."""
        peak, rise = self.settings.learning_rate, self.settings.warm_up
        if share < rise:
            # never 0: the first step would be lost
            return peak * max(share, 0.1 * rise) / rise
        fall = (share - rise) / (1 - rise)
        return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * fall)))

    def _step(self) -> None:
        share = self.share()
        indices = self.order.step(self.step)
        rate = self._rate(share)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        adapting = share >= 1 - self.settings.adapt
        loss, kl, learnt = self._accumulate(indices, adapting=adapting)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        self.optimiser.step()
        self.optimiser.zero_grad()
        tokens = self.tokens + sum(self.rows[i].tokens for i in indices)
        self.curve.points.append(
            Point(step=self.step + 1, tokens=tokens, loss=loss, kl=kl / learnt, learning_rate=rate)
        )
        self.progress("heal", *self._place(), self._note())

    def _place(self) -> tuple[int, int]:
        return int(self.share() * self.settings.tokens), self.settings.tokens

    def _note(self) -> str:
        check = f"held-out KL {self.curve.checks[-1].kl:.3f}" if self.curve.checks else ""
        return f"KL {self.curve.points[-1].kl:.3f}, {check}"

    def _accumulate(self, indices: list[int], *, adapting: bool) -> tuple[float, float, float]:
        """Loss, weighted KL sum and total KL weight of one step, its gradient left in the parameters."""
        batches = [collate([self.rows[i] for i in part]) for part in self._micro(indices)]
        weights = [self._weights(batch, adapting=adapting) for batch in batches]
        normaliser = float(sum(kl.sum() + ce.sum() for kl, ce in weights))
        loss, kl_sum = 0.0, 0.0
        for part, batch, (kl, ce) in zip(self._micro(indices), batches, weights, strict=True):
            states = self.teacher.hidden(part, [self.rows[i] for i in part])
            result = self._loss(batch, Rows(states, batch.labels[batch.predicts], kl, ce), normaliser)
            cast(Any, result.total).backward()
            loss, kl_sum = loss + float(result.total.detach()), kl_sum + float(result.kl)
        return loss, kl_sum, max(float(sum(kl.sum() for kl, _ in weights)), 1.0)

    def _micro(self, indices: list[int]) -> Iterator[list[int]]:
        for start in range(0, len(indices), self.micro):
            yield indices[start : start + self.micro]

    def _weights(self, batch: Batch, *, adapting: bool) -> tuple[Tensor, Tensor]:
        """Weights of KL and cross-entropy at the predicting positions."""
        answers = batch.answers[batch.predicts].float()
        if not adapting:
            return torch.ones_like(answers), torch.zeros_like(answers)
        ce = self.settings.adapt_ce * answers
        return (1 - self.settings.adapt_ce) * answers + self.settings.adapt_rest * (1 - answers), ce

    def _loss(self, batch: Batch, rows: Rows, normaliser: float) -> Loss:
        options = Options(
            divergence=self.settings.divergence,
            temperature=self.settings.temperature,
            softcap=softcap_of(self.student),
        )
        return distillation_loss(
            final_hidden(self.student, batch),
            head_weight(self.student),
            rows,
            self.teacher.head,
            normaliser=normaliser,
            options=options,
        )

    @torch.no_grad()
    def _check(self) -> None:
        """Held-out KL over all tokens and over the assistant's; the best weights are put aside."""
        totals = torch.zeros(5, dtype=torch.float64)
        for start in range(0, len(self.held_out), self.micro):
            part = self.held_out[start : start + self.micro]
            totals += self._held_out_sums(-1 - start, part)
        best = min((c.loss for c in self.curve.checks), default=math.inf)
        self.curve.checks.append(self._found(*totals.tolist()))
        if self.curve.checks[-1].loss < best or not self.held_out:
            self._keep_best()

    def _found(self, tokens: float, kl: float, answers: float, answer_kl: float, nll: float) -> Check:
        """A check from its sums: numbers of tokens and of answer tokens, and what was summed over each."""
        kl, answer_kl, nll = kl / max(tokens, 1), answer_kl / max(answers, 1), nll / max(answers, 1)
        loss, ce = kl, self.settings.adapt_ce
        if self.settings.adapt and answers:
            loss = (1 - ce) * answer_kl + ce * nll + self.settings.adapt_rest * kl
        return Check(
            step=self.step, tokens=self.tokens, kl=kl, answer_kl=answer_kl, answer_nll=nll, loss=loss
        )

    def _held_out_sums(self, key: int, part: Sequence[Row]) -> Tensor:
        """Tokens, their KL, answer tokens, their KL, their −log probability: sums over held-out rows."""
        batch = collate(part)
        states = self.teacher.hidden([key - i for i in range(len(part))], part)
        own = side_of(self.student, final_hidden(self.student, batch))
        kl = kl_rows(Side(states, self.teacher.head), own).double()
        answers = batch.answers[batch.predicts]
        nll = nll_rows(Side(own.hidden[answers], own.head), batch.labels[batch.predicts][answers]).double()
        sums = [float(kl.sum()), float(answers.sum()), float(kl[answers].sum()), float(nll.sum())]
        return torch.tensor([float(len(kl)), *sums], dtype=torch.float64)

    def _stop_early(self) -> None:
        best = min(range(len(self.curve.checks)), key=lambda i: self.curve.checks[i].loss)
        if len(self.curve.checks) - 1 - best >= self.settings.patience and not self.curve.finished:
            self.curve.finished, self.curve.stopped = True, "early"

    def _keep_best(self) -> None:
        _write_tensors(self.state / "best.safetensors", _weights_of(self.student))

    def _restore_best(self) -> None:
        _read_weights(self.student, self.state / "best.safetensors")

    def save(self) -> None:
        """State for resuming. The curve comes last, for it says that the tensors are there."""
        if not self.curve.finished:  # a finished run needs its best weights only
            tensors = _weights_of(self.student) | self._optimiser_tensors()
            _write_tensors(self.state / f"step-{self.step}.safetensors", tensors)
        self._seconds()
        saved = _Saved(identity=self.identity, settings=self.settings, curve=self.curve)
        _write(self.state / "state.json", msgspec.json.encode(saved))
        for old in self.state.glob("step-*.safetensors"):
            if old.name != f"step-{self.step}.safetensors":
                old.unlink()

    def _optimiser_tensors(self) -> dict[str, Tensor]:
        names = {id(p): n for n, p in self.student.named_parameters()}
        return {
            f"optimiser.{part}.{names[id(p)]}": value
            for p, kept in self.optimiser.state.items()
            for part, value in cast(dict[str, Tensor], kept).items()
        }

    def _resume(self) -> None:
        path = self.state / "state.json"
        if not path.exists():
            return
        saved = msgspec.json.decode(path.read_bytes(), type=_Saved)
        if (saved.identity, saved.settings) != (self.identity, self.settings):
            raise ModelError(
                f"{self.state} holds a run with other texts or settings",
                next_step="remove that folder, or repeat the settings of that run",
            )
        self.curve = saved.curve
        self.started = time.monotonic()
        if not self.curve.finished:
            self._load(self.state / f"step-{self.step}.safetensors")

    def _load(self, path: Path) -> None:
        tensors = _read_weights(self.student, path)
        for name, parameter in self.student.named_parameters():
            prefix = {part: f"optimiser.{part}.{name}" for part in ("step", "exp_avg", "exp_avg_sq")}
            if prefix["step"] in tensors:
                kept = {part: tensors[key] for part, key in prefix.items()}
                cast(Any, self.optimiser.state)[parameter] = kept


def forget(state: Path) -> None:
    """Remove what `heal` keeps for resuming, once the result is safe elsewhere."""
    for pattern in ("step-*.safetensors", "best.safetensors", "state.json", "*.partial"):
        for file in state.glob(pattern):
            file.unlink()
    if state.is_dir() and not any(state.iterdir()):
        state.rmdir()


class _Saved(msgspec.Struct, kw_only=True):
    """state.json."""

    identity: str
    settings: Settings
    curve: Curve


def _weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Weights by name, a tied one once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@torch.no_grad()
def _read_weights(model: PreTrainedModel, path: Path) -> dict[str, Tensor]:
    """Put saved weights into the model; returns all tensors of the file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read {path}: {error}", next_step=f"remove {path.parent}") from error
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[name])
    return tensors


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file, whole or not at all. Raises ModelError when the disk is full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise ModelError(f"cannot write {path}: {error}", next_step="free disk space") from error


def _write(path: Path, content: bytes) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    os.replace(partial, path)
