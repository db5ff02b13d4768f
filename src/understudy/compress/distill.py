"""Heal a pruned student by distillation: schedule, steps, held-out checks, stopping and resuming.

Everything a step does follows from the seed, the step's number and the saved state, so a resumed run repeats
the uninterrupted one exactly; only a limit in minutes makes the clock part of the schedule. It ignores
pruning, where texts come from, who the teacher is (signal) and how many processes there are (processes).
"""

from __future__ import annotations

import signal as signals
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import msgspec
import torch
from torch import Tensor

from understudy.compress import lowrank, onpolicy, optimiser
from understudy.compress import state as states
from understudy.compress.corpus import (
    Batch,
    Document,
    collate,
    fingerprint,
    pack,
    shared_length,
    shuffled,
)
from understudy.compress.curve import Curve, Point
from understudy.compress.decoder import (
    head_weight,
    may_share,
    outside_weights,
    shape_of,
    softcap_of,
    vocabulary_weights,
)
from understudy.compress.held_out import HeldOut
from understudy.compress.losses import Divergence, Options, Rows, distillation_loss
from understudy.compress.matching import Matching, depths, states_behind
from understudy.compress.order import Order
from understudy.compress.precision import matmul_precision
from understudy.compress.processes import Processes, is_sharded, processes
from understudy.compress.progress import Progress, TokenSpeed, silent
from understudy.compress.schedule import NEAR, Settings, Stage, Weights, rate_at, stage_at, weights
from understudy.compress.signal import Dense, Signal
from understudy.compress.teacher import LiveTeacher, Teacher
from understudy.errors import InputError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BEST = "best.safetensors"
LEAST_CHUNK = 16
"""Rows of logits below which a smaller chunk saves nothing worth having."""


class Corpus(NamedTuple):
    """What is trained on, and what is only measured on."""

    train: list[Document]
    held_out: list[Document]
    generic: list[Document] = []
    """Texts that are nobody's traffic, mixed in by `Settings.generic`."""


def heal(
    student: PreTrainedModel,
    teacher: Teacher,
    corpus: Corpus,
    settings: Settings,
    state: Path,
    progress: Progress = silent,
    peers: Processes | None = None,
) -> Curve:
    """Train ``student`` in place toward the teacher and leave it with its best held-out weights.

    ``state`` is a folder for resuming; a run found there is continued. Ctrl-C saves before it leaves.
    Raises ModelError when nothing can be learnt from the corpus or the saved state is of another run, and
    InputError for settings that this teacher cannot serve.
    """
    peers = peers or processes()
    _require(teacher, settings, peers)
    if settings.match and any(d.media for part in corpus for d in part):
        raise InputError(f"match = {settings.match:g} on pictures or sound", expected="texts alone")
    run = _Run(student, teacher, corpus, settings, state, progress, peers)
    with matmul_precision(settings.precision), _interrupt_between_steps() as interrupted:
        run.to_the_end(interrupted)
    return run.curve


def _require(teacher: Teacher, settings: Settings, peers: Processes) -> None:
    """Raises InputError for what only a live teacher, or only one process, can do."""
    asked = {
        f"divergence = {settings.divergence}": settings.divergence != "forward",
        f"temperature = {settings.temperature:g}": settings.temperature != 1,
        f"on_policy = {settings.on_policy:g}": settings.on_policy > 0,
        f"match = {settings.match:g}": settings.match > 0,
    }
    for value, wanted in asked.items():
        if wanted and not teacher.exact:
            raise InputError(
                f"{value} without the teacher's whole distributions",
                expected="a live teacher of the student's own tokenizer",
                next_step="name its weights, or leave this at its default",
            )
    if settings.on_policy and peers.size > 1:
        raise InputError(
            f"on_policy = {settings.on_policy:g} in {peers.size} processes",
            expected="one process: sampling is not spread",
            next_step="run the last stage by itself, without torchrun",
        )


@contextmanager
def _interrupt_between_steps() -> Generator[threading.Event]:
    """Ctrl-C sets the event, so that no step is left half-done; a second one breaks off at once."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = signals.getsignal(signals.SIGINT)

    def ask(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            signals.default_int_handler(number, frame)
        interrupted.set()

    signals.signal(signals.SIGINT, ask)
    try:
        yield interrupted
    finally:
        signals.signal(signals.SIGINT, before)


class _Micro(NamedTuple):
    """One forward pass's worth of a step, with what the teacher says of it."""

    batch: Batch
    signal: Signal
    kl: Tensor
    """Weights at the predicting positions."""
    ce: Tensor


class _Sums(NamedTuple):
    """Of one step, over all processes."""

    loss: float
    kl: float
    """Weighted sum of the divergence."""
    weight: float
    """Sum of its weights."""
    tokens: float


class _Run:
    """One healing: model, optimiser, place in the schedule."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: Teacher,
        corpus: Corpus,
        settings: Settings,
        state: Path,
        progress: Progress,
        peers: Processes,
    ) -> None:
        self.student, self.teacher, self.settings = student, teacher, settings
        self.state, self.progress, self.peers = state, progress, peers
        self._lay_out(corpus)
        self.identity = "".join(map(fingerprint, corpus))
        self._prepare(student)
        self.optimiser = optimiser.adamw(
            self.parameters, settings.learning_rate, settings.weight_decay, settings.states
        )
        self.curve = Curve(chunk=settings.chunk, micro=max(1, settings.micro_tokens // self.length))
        self.started = time.monotonic()
        self.speed = TokenSpeed()

    def _lay_out(self, corpus: Corpus) -> None:
        """Pack everything into rows of one length."""
        own, generic = corpus.train, corpus.generic if self.settings.generic else []
        self.length = self.settings.row_tokens or shared_length([*own, *generic])
        share = may_share(self.student, self.length) and self.teacher.may_share(self.length)
        packed = [pack(part, self.length, share=share) for part in (own, generic)]
        self.rows = [row for part in packed for row in part]
        self.held_out = HeldOut(
            pack(corpus.held_out, self.length, share=share),
            self.teacher,
            answers=1 - self.settings.adapt_ce if self.settings.adapt else 0.0,
            ce=self.settings.adapt_ce if self.settings.adapt else 0.0,
            rest=self.settings.adapt_rest if self.settings.adapt else 1.0,
        )
        if not self.rows:
            raise ModelError("nothing to learn from", expected="chats or texts of at least two tokens")
        per_step = max(1, self.settings.step_tokens // self.length)
        self.order = Order(
            len(packed[0]), len(packed[1]), per_step, self.settings.generic, self.settings.seed
        )
        room = self.length - self.settings.answer_tokens
        self.prompts = onpolicy.prompts_of(own, room) if self.settings.on_policy else []
        if self.settings.on_policy and not self.prompts:
            raise ModelError(
                "no prompt to sample answers to", expected=f"chats that ask in fewer than {room} tokens"
            )

    def _prepare(self, student: PreTrainedModel) -> None:
        """Say what is trained, add what only training needs, and spread it over the processes."""
        settings = self.settings
        kept = [] if settings.train_vocabulary else vocabulary_weights(student)
        frozen = {id(p) for p in (*kept, *outside_weights(student))}
        for parameter in student.parameters():
            parameter.requires_grad_(id(parameter) not in frozen)
        if settings.lora:
            lowrank.correct(student, settings.lora, settings.seed)
        self.matching, self.depths = _matching(student, self.teacher, settings)
        self.peers.shard(student)
        if self.matching is not None:
            self.matching.to(self.peers.device)
        if isinstance(self.teacher, LiveTeacher):
            self.teacher.join(self.peers)
        self.trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
        extra = self.matching.named_parameters() if self.matching is not None else ()
        self.learnt = self.trained | {f"matching.{n}": p for n, p in extra}
        self.parameters = list(self.learnt.values())

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
            asked = self.peers.summed([float(interrupted.is_set())])[0]
            if asked and not self.curve.finished:
                self.save()
                raise KeyboardInterrupt
        states.fill(self.trained, states.Tensors(self.state / BEST))
        if self.settings.lora:
            lowrank.merge(self.student)
        self.student.requires_grad_(True)

    def share(self) -> float:
        """How much of the run is done, in [0, 1]: by tokens or by the clock, whichever is further."""
        share = self.tokens / self.settings.tokens
        if self.settings.minutes:
            spent = self.peers.agreed(self._seconds())
            share = max(share, spent / (60 * self.settings.minutes))
        return min(share, 1.0)

    def _seconds(self) -> float:
        """Wall-clock of the run so far, resumed parts included; kept in the curve."""
        now = time.monotonic()
        self.curve.seconds, self.started = self.curve.seconds + now - self.started, now
        return self.curve.seconds

    def _step(self) -> None:
        share, start = self.share(), self.curve.checks[0].kl
        rate = rate_at(share, self.settings, start if self.held_out.rows else NEAR, self.curve.halvings)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        sums = self._within_memory(stage_at(share, self.settings))
        optimiser.clip(self.parameters, self.settings.clip, self.peers)
        self.optimiser.step()
        self.optimiser.zero_grad()
        kl = sums.kl / max(sums.weight, 1.0)
        tokens = self.tokens + round(sums.tokens)
        self.curve.points.append(
            Point(step=self.step + 1, tokens=tokens, loss=sums.loss, kl=kl, learning_rate=rate)
        )
        self.speed.add(sums.tokens)
        self.progress("heal", *self._place(), self._note())

    def _place(self) -> tuple[int, int]:
        return int(self.share() * self.settings.tokens), self.settings.tokens

    def _note(self) -> str:
        checks = self.curve.checks
        held_out = f"held out {checks[0].kl:.3f} → {checks[-1].kl:.3f}" if checks else ""
        return " · ".join(
            [f"KL {self.curve.points[-1].kl:.3f}", held_out, str(self.speed), *self.curve.notes[-1:]]
        )

    def _within_memory(self, stage: Stage) -> _Sums:
        """A step's gradient, with smaller pieces if memory runs out; said, and kept for the next steps."""
        while True:
            try:
                return self._accumulate(stage)
            except (MemoryError, RuntimeError) as error:
                if self.peers.size > 1 or not _out_of_memory(error):
                    raise
                self._shrink(error)
            self.optimiser.zero_grad()

    def _shrink(self, error: Exception) -> None:
        """Half as many rows of logits at once, then half as many rows of text; ModelError at the end."""
        curve = self.curve
        if curve.chunk > LEAST_CHUNK:
            curve.chunk //= 2
            said = f"out of memory: logits of {curve.chunk} rows at once from step {self.step + 1} on"
        elif curve.micro > 1:
            curve.micro //= 2
            said = f"out of memory: {curve.micro} rows of text at once from step {self.step + 1} on"
        else:
            raise ModelError(
                f"out of memory with one row of {self.length} tokens at a time",
                next_step="a shorter row_tokens, --lora, or --states bf16",
            ) from error
        curve.notes.append(said)
        self.progress("heal", *self._place(), said)

    def _accumulate(self, stage: Stage) -> _Sums:
        """The sums of one step over all processes, its gradient left in the parameters."""
        parts = list(self._sampled() if stage == "on-policy" else self._read(stage))
        mine = [float(sum(p.kl.sum() + p.ce.sum() for p in parts)), float(sum(p.kl.sum() for p in parts))]
        tokens = float(sum(int(p.batch.real.sum()) for p in parts if bool((p.kl + p.ce).any())))
        normaliser, weight, tokens = self.peers.summed([*mine, tokens])
        divergence: Divergence = "reverse" if stage == "on-policy" else self.settings.divergence
        loss, kl = 0.0, 0.0
        for part in parts:
            got = self._learn(part, normaliser, divergence)
            loss, kl = loss + got[0], kl + got[1]
        self.peers.sum_gradients(p for p in self.parameters if not is_sharded(p))
        loss, kl = self.peers.summed([loss, kl])
        return _Sums(loss, kl, weight, tokens)

    def _read(self, stage: Stage) -> Iterator[_Micro]:
        """This process's share of a step's rows. Every process makes as many forward passes: with FSDP each
        is a meeting; one that has no rows left reads some again at no weight."""
        indices = self.order.step(self.step)
        most = -(-len(indices) // self.peers.size)
        mine = indices[self.peers.rank * most : (self.peers.rank + 1) * most]
        idle = [indices[0]] * (most - len(mine))
        for number, start in enumerate(range(0, most, self.curve.micro)):
            part = [*mine, *idle][start : start + self.curve.micro]
            weighed = max(0, min(len(mine) - number * self.curve.micro, len(part)))
            yield self._micro(part, weighed, stage)

    def _micro(self, indices: list[int], weighed: int, stage: Stage) -> _Micro:
        rows = [self.rows[i] for i in indices]
        batch = collate(rows).to(self.peers.device)
        signal = self.teacher.signal(indices, rows)
        kl, ce = self._weights(batch, signal, stage)
        counted = sum(row.targets for row in rows[:weighed])
        kl[counted:], ce[counted:] = 0, 0
        return _Micro(batch, signal, kl, ce)

    def _weights(self, batch: Batch, signal: Signal, stage: Stage) -> Weights:
        known = signal.known.to(self.peers.device)
        return weights(batch.answers[batch.predicts], known, stage, self.settings)

    def _sampled(self) -> Iterator[_Micro]:
        """Answers the student gives now, scored by the teacher."""
        teacher = cast(LiveTeacher, self.teacher)
        count = max(1, self.settings.step_tokens // self.length)
        order = shuffled(range(len(self.prompts)), self.settings.seed * 1_000_003 + self.step)
        prompts = [self.prompts[i] for i in order[: 2 * count]]
        seed = self.settings.seed * 1_000_003 + self.step
        rows = pack(onpolicy.sampled(self.student, prompts, self.settings.answer_tokens, seed), self.length)
        for start in range(0, len(rows), self.curve.micro):
            batch = collate(rows[start : start + self.curve.micro]).to(self.peers.device)
            signal = teacher.unremembered(batch)
            yield _Micro(batch, signal, *self._weights(batch, signal, "on-policy"))

    def _learn(self, part: _Micro, normaliser: float, divergence: Divergence) -> tuple[float, float]:
        """Loss and weighted KL of one part, its gradient added to the parameters'."""
        final, layers = states_behind(self.student, part.batch, self.depths)
        options = Options(
            divergence=divergence,
            temperature=self.settings.temperature,
            softcap=softcap_of(self.student),
            chunk=self.curve.chunk,
        )
        rows = Rows(part.signal, part.batch.labels[part.batch.predicts], part.kl, part.ce)
        found = distillation_loss(
            final, head_weight(self.student), rows, normaliser=normaliser, options=options
        )
        total = found.total
        if self.matching is not None:
            wanted = cast(Dense, part.signal).layers
            total = total + self.settings.match / max(normaliser, 1.0) * self.matching(
                layers, wanted, part.kl
            )
        cast(Any, total).backward()
        return float(total.detach()), float(found.kl)

    def _check(self) -> None:
        """Held-out KL over all tokens and over the assistant's; the best weights are put aside."""
        found = self.held_out.check(self.student, self.peers.device, self.curve.micro)
        self.curve.checks.append(msgspec.structs.replace(found, step=self.step, tokens=self.tokens))
        if not self.held_out.rows or self.curve.best == len(self.curve.checks) - 1:
            self._keep_best()
        else:
            self._step_back()
        self.speed.pause()

    def _step_back(self) -> None:
        """To the best weights, with half the rate and without momentum: what led away from there is wrong."""
        states.fill(self.trained, states.Tensors(self.state / BEST))
        self.optimiser.state.clear()
        self.curve.halvings += 1

    def _stop_early(self) -> None:
        if self.curve.since_best >= self.settings.patience and not self.curve.finished:
            self.curve.finished, self.curve.stopped = True, "early"
        if self.curve.finished and self.held_out.rows:
            self.curve.notes.append(self.curve.handed_out)

    def _keep_best(self) -> None:
        states.write_tensors(self.state / BEST, self.trained, self.peers)

    def save(self) -> None:
        """State for resuming. The curve comes last, for it says that the tensors are there."""
        name = f"step-{self.step}.safetensors"
        if not self.curve.finished:  # a finished run needs its best weights only
            tensors = dict(self.learnt) | states.optimiser_tensors(self.optimiser, self.learnt)
            states.write_tensors(self.state / name, tensors, self.peers)
        self._seconds()
        if self.peers.rank:
            return
        saved = _Saved(identity=self.identity, settings=self.settings, curve=self.curve)
        states.write_bytes(self.state / "state.json", msgspec.json.encode(saved))
        for old in self.state.glob("step-*.safetensors"):
            if old.name != name:
                old.unlink()

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
            tensors = states.Tensors(self.state / f"step-{self.step}.safetensors")
            states.fill(self.learnt, tensors)
            states.fill_optimiser(self.optimiser, self.learnt, tensors)


def _matching(
    student: PreTrainedModel, teacher: Teacher, settings: Settings
) -> tuple[Matching | None, list[int]]:
    """The projections and the student's depths; the teacher is told which of its own to keep."""
    if not settings.match:
        return None, []
    live = cast(LiveTeacher, teacher)
    own, wanted = shape_of(student), shape_of(live.model)
    live.layers = tuple(depths(wanted.layers, settings.match_layers))
    found = depths(own.layers, len(live.layers))
    return Matching(len(found), own.hidden, wanted.hidden), found


def _out_of_memory(error: BaseException) -> bool:
    """torch has a class of its own for accelerators only."""
    said = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in said


def put_best(student: PreTrainedModel, settings: Settings, state: Path) -> None:
    """Give a student that was not trained here, as it was before, the best weights of a run."""
    if settings.lora:
        lowrank.correct(student, settings.lora, settings.seed)
    best = states.Tensors(state / BEST)
    states.fill({n: p for n, p in student.named_parameters() if n in best}, best)
    if settings.lora:
        lowrank.merge(student)
    student.requires_grad_(True)


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
