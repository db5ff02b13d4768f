"""What a step of healing does, by how much of the run is done: its stage, its rate and what it weighs.

Stages over the same packed rows: KL on every real token (heal), then 0.9 KL + 0.1 cross-entropy on the
assistant's tokens (adapt), and last, if asked, reverse KL on answers the student samples itself (on policy).
It ignores the loop that takes the steps (distill).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

from understudy.compress import optimiser
from understudy.compress.losses import Divergence
from understudy.compress.precision import Precision

if TYPE_CHECKING:
    from torch import Tensor

Stage = Literal["heal", "adapt", "on-policy"]
RATE = 4e-4
"""Peak rate for a student at one nat from its teacher, were it not for the bounds."""
LEAST_RATE, MOST_RATE = 2e-5, 2e-4
NEAR = 0.2
"""KL taken for granted where no text is held out to measure it."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The recipe of healing. Part of a saved state: a resumed run must have the same."""

    tokens: int = 100_000
    """Tokens of training, epochs counted again and again."""
    minutes: float = 0.0
    """Wall-clock limit (0: none); the schedule is stretched over whichever comes first."""
    learning_rate: float = 0.0
    """Peak; cosine to a twentieth of it. 0 takes it from how far the student is from its teacher when it
    begins (`rate_for`)."""
    warm_up: float = 0.06
    """Share of the run in which the rate rises linearly."""
    step_tokens: int = 1024
    """Tokens per optimiser step, padding included. Healing is short, so many small steps beat few large."""
    micro_tokens: int = 512
    """Tokens per forward pass; memory follows this."""
    chunk: int = 256
    """Rows whose logits exist at once; halved when memory runs out."""
    row_tokens: int = 0
    """Length of packed rows; 0 takes it from the documents."""
    generic: float = 0.0
    """Share of each step's rows taken from the corpus's generic texts."""
    adapt: float = 0.3
    """Share of the run spent on the assistant's tokens, at its end but for `on_policy`."""
    adapt_ce: float = 0.1
    """Share of cross-entropy in that stage."""
    adapt_rest: float = 0.1
    """Weight of all other tokens' KL in that stage, so that reading does not decay."""
    on_policy: float = 0.0
    """Share of the run, at its very end, spent on answers the student samples, by reverse KL."""
    answer_tokens: int = 64
    """Longest answer sampled there."""
    match: float = 0.0
    """Weight of hidden-state matching beside the divergence; 0: none."""
    match_layers: int = 4
    """Depths at which it matches."""
    lora: int = 0
    """Rank of low-rank corrections trained in place of the weights; 0: the weights are trained."""
    states: optimiser.States = "fp32"
    """Of AdamW: bf16 halves them."""
    train_vocabulary: bool = False
    """Train the embedding and the head too. They are the teacher's own, every row of the head has some
    gradient at every step, and Adam makes noise of full size out of it."""
    divergence: Divergence = "forward"
    temperature: float = 1.0
    weight_decay: float = 0.0
    clip: float = 1.0
    """Largest norm of the whole gradient."""
    checks: int = 5
    """Evaluations on text not trained on, after the one before training. One that finds the student worse
    than at its best takes it back there and halves the rate."""
    patience: int = 4
    """Checks in a row that found nothing better before stopping early."""
    seed: int = 0
    precision: Precision = "auto"


class Weights(NamedTuple):
    """Of KL and of cross-entropy at predicting positions, each (targets,)."""

    kl: Tensor
    ce: Tensor


def rate_for(distance: float, *, lora: bool = False) -> float:
    """Peak rate for a student at this KL from its teacher when training begins, nats a token.

    Adam's first steps are of full size whatever the gradient: near its teacher a student is thrown back by a
    rate that one farther away learns fast at. The square is no theory: at 0.36 nats 2e-5 healed and 7e-5
    harmed, at 0.63 nats 2e-4 healed (LOG.md, 2026-11-25). Low-rank corrections want ten times as much
    (thinkingmachines.ai/blog/lora, 2025).
    """
    rate = min(max(RATE * distance**2, LEAST_RATE), MOST_RATE)
    return 10 * rate if lora else rate


def rate_at(share: float, settings: Settings, distance: float, halvings: int = 0) -> float:
    """The rate when ``share`` of the run is done: linear warm-up, then cosine to a twentieth of the peak."""
    peak = (settings.learning_rate or rate_for(distance, lora=settings.lora > 0)) / 2**halvings
    rise = settings.warm_up
    if share < rise:
        # never 0: the first step would be lost
        return peak * max(share, 0.1 * rise) / rise
    fall = (share - rise) / (1 - rise)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * fall)))


def stage_at(share: float, settings: Settings) -> Stage:
    """The stage when ``share`` of the run is done."""
    if settings.on_policy and share >= 1 - settings.on_policy:
        return "on-policy"
    return "adapt" if share >= 1 - settings.on_policy - settings.adapt else "heal"


def weights(answers: Tensor, known: Tensor, stage: Stage, settings: Settings) -> Weights:
    """What each position weighs; no KL where the teacher said nothing.

    ``answers`` and ``known`` are bool (targets,): the next token is the assistant's; the teacher spoke.
    """
    answers, known = answers.float(), known.float()
    nothing = answers.new_zeros(answers.shape)
    if stage == "heal":
        return Weights(known, nothing)
    if stage == "on-policy":
        return Weights(answers * known, nothing)
    kl = (1 - settings.adapt_ce) * answers + settings.adapt_rest * (1 - answers)
    return Weights(kl * known, settings.adapt_ce * answers)
