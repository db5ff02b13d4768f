"""Bench of mixtures made dense: pooled channels beside whole experts and averages, at equal size.

Prints Markdown. The teacher is a Mixtral of two layers and eight experts, trained here from nothing on drawn
text: eight dialects over one alphabet, each a Markov chain of its own, named by a document's first token, so
that experts have something to specialise in. Students of one size get the same refit, or none, and the same
healing (tokens, order, rate); a mixture that keeps fewer experts stands beside them. Every figure is of
documents that nobody trained on, for several teachers from different seeds. It ignores speed, and says
nothing of mixtures that were trained on real text at size.
"""

from __future__ import annotations

import argparse
import copy
import math
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from understudy.compress import distill
from understudy.compress.calibrate import attention_of, enter, feed_forward_of
from understudy.compress.corpus import Batch, Document, batches, pack
from understudy.compress.decoder import layers_of, mixture_of
from understudy.compress.dense import Pooling, to_dense
from understudy.compress.experts import keep_experts
from understudy.compress.fidelity import Fidelity, fidelity
from understudy.compress.pool import Choice, route
from understudy.compress.teacher import LiveTeacher

DIALECTS, LETTERS, FOLLOWING = 8, 64, 4
"""Letters that may follow a letter in a dialect, the first of them likeliest."""
LENGTH = 64
EXPERTS, CHANNELS = 8, 48
NAMES: dict[Choice, str] = {
    "channels": "pooled channels (ours)",
    "mass": "experts by routed mass",
    "reap": "experts by REAP",
    "average": "averaged experts",
}


class Sizes(NamedTuple):
    """How much of everything."""

    steps: int
    """Of training a teacher."""
    heal: int
    """Tokens of healing."""
    teachers: int
    kept: tuple[int, ...]
    """Experts' worth of channels that students have."""


class Row(NamedTuple):
    """One student."""

    kept: int
    name: str
    parameters: int
    before: Fidelity
    after: Fidelity


class Text:
    """Documents of all dialects; the chains are the same for every teacher."""

    def __init__(self) -> None:
        drawn = torch.Generator().manual_seed(17)
        order = torch.rand(DIALECTS, LETTERS, LETTERS, generator=drawn).argsort(-1)
        self.following = order[:, :, :FOLLOWING]
        self.chance = torch.tensor([0.5, 0.25, 0.15, 0.1])

    def tokens(self, count: int, seed: int) -> torch.Tensor:
        """(count, LENGTH): the dialect's name, then letters."""
        drawn = torch.Generator().manual_seed(seed)
        dialect = torch.arange(count) % DIALECTS
        letters = [torch.randint(LETTERS, (count,), generator=drawn)]
        for _ in range(LENGTH - 2):
            pick = torch.multinomial(self.chance, count, replacement=True, generator=drawn)
            letters.append(self.following[dialect, letters[-1], pick])
        return torch.stack([LETTERS + dialect, *letters], 1)

    def documents(self, count: int, seed: int) -> list[Document]:
        return [Document(row, [False] * LENGTH) for row in self.tokens(count, seed).tolist()]

    @property
    def floor(self) -> float:
        """Perplexity of who knows the chains."""
        return math.exp(-float((self.chance * self.chance.log()).sum()))


def batched(documents: list[Document]) -> list[Batch]:
    return list(batches(pack(documents, LENGTH), 2048))


def trained(text: Text, steps: int, seed: int) -> Any:
    """A mixture, by cross-entropy and the router's own balance loss."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=LETTERS + DIALECTS,
        hidden_size=48,
        intermediate_size=CHANNELS,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=2 * LENGTH,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
    )
    torch.manual_seed(seed)
    model = MixtralForCausalLM(config).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps + 1, pct_start=0.1)
    for step in range(steps):
        tokens = text.tokens(32, 1_000_000 * (seed + 1) + step)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        if step % 100 == 99:
            print(f"teacher {seed}, step {step + 1}: loss {loss.item():.3f}", file=sys.stderr, flush=True)
    model.config.output_router_logits = False
    return model.eval()


@torch.no_grad()
def specialised(model: Any, text: Text) -> float:
    """Bits that letter and dialect tell of a token's experts, mean of the layers: 0 when routing is blind."""
    found: list[float] = []
    documents = text.documents(512, 7)
    mixture, stream = mixture_of(model), enter(model, batched(documents))
    assert mixture is not None
    tokens = torch.cat([batch.tokens for batch in batched(documents)])
    kinds = ((tokens[:, :1] - LETTERS) * LETTERS + tokens)[:, 1:].flatten()
    for index, layer in enumerate(layers_of(model)):
        stream.advance(attention_of(layer), index)
        weights = torch.cat(route(mixture, layer, stream).weights).view(len(documents), LENGTH, EXPERTS)
        table = torch.zeros(DIALECTS * LETTERS, EXPERTS).index_add_(0, kinds, weights[:, 1:].flatten(0, 1))
        found.append(_mutual(table.double() / table.sum()))
        stream.advance(feed_forward_of(layer), index)
    return statistics.mean(found)


def _mutual(joint: torch.Tensor) -> float:
    """Mutual information of a joint distribution, bits."""
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return float((torch.special.xlogy(joint, joint) - torch.special.xlogy(joint, apart)).sum() / math.log(2))


class Bench:
    """One teacher and what becomes of it."""

    def __init__(self, text: Text, sizes: Sizes, seed: int) -> None:
        self.sizes, self.seed = sizes, seed
        self.teacher = trained(text, sizes.steps, seed)
        self.bits = specialised(self.teacher, text)
        self.calibration = batched(text.documents(512, 11))
        self.corpus = distill.Corpus(text.documents(2048, 12), text.documents(64, 13))
        self.held_out = batched(text.documents(256, 14))

    def rows(self) -> list[Row]:
        return [row for kept in self.sizes.kept for row in self._of_size(kept)]

    def _of_size(self, kept: int) -> list[Row]:
        found: list[Row] = []
        for choice, name in NAMES.items():
            for refit in (False, True):
                pooling = Pooling(choice, refit=refit, **({} if refit else {"pull": 0.0, "reread": 0.0}))
                made = to_dense(self.teacher, kept * CHANNELS, self.calibration, pooling).model
                found.append(self._row(kept, f"{name}, {'refitted' if refit else 'only scaled'}", made))
        for choice in ("mass", "reap"):
            smaller = copy.deepcopy(self.teacher)
            keep_experts(smaller, kept, self.calibration, choice)
            found.append(self._row(kept, f"fewer experts, {choice} (stays a mixture)", smaller))
        return found

    def _row(self, kept: int, name: str, student: Any) -> Row:
        before = fidelity(self.teacher, student, self.held_out)
        settings = distill.Settings(
            tokens=self.sizes.heal, learning_rate=1e-3, adapt=0.0, train_vocabulary=True, seed=self.seed
        )
        with tempfile.TemporaryDirectory() as folder:
            teacher = LiveTeacher(self.teacher)
            distill.heal(student, teacher, self.corpus, settings, Path(folder))
        after = fidelity(self.teacher, student.eval(), self.held_out)
        print(f"{kept} {name}: {before.kl:.4f} {after.kl:.4f}", file=sys.stderr, flush=True)
        return Row(kept, name, student.num_parameters(), before, after)


def table(rows: list[list[Row]]) -> str:
    """Means over the teachers, the range of the healed KL beside."""
    lines = [
        "| kept | student | parameters | KL pruned | KL healed (range) | "
        "perplexity healed | top-1 as teacher |\n| --- | --- | --- | --- | --- | --- | --- |"
    ]
    for same in zip(*rows, strict=True):
        first = same[0]

        def mean(read: Callable[[Row], float], same: tuple[Row, ...] = same) -> float:
            return statistics.mean(map(read, same))

        healed = [row.after.kl for row in same]
        lines.append(
            f"| {first.kept} of {EXPERTS} | {first.name} | {first.parameters:,} | "
            f"{mean(lambda r: r.before.kl):.3f} | {mean(lambda r: r.after.kl):.4f} "
            f"({min(healed):.4f} to {max(healed):.4f}) | {mean(lambda r: r.after.student_perplexity):.3f} | "
            f"{mean(lambda r: r.after.agreement):.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--heal", type=int, default=20_000)
    parser.add_argument("--teachers", type=int, default=2)
    parser.add_argument("--kept", type=int, nargs="+", default=[2, 4])
    given = parser.parse_args()
    sizes, text = Sizes(given.steps, given.heal, given.teachers, tuple(given.kept)), Text()
    started = time.process_time()
    benches = [Bench(text, sizes, seed) for seed in range(sizes.teachers)]
    rows = [bench.rows() for bench in benches]
    teacher = benches[0].teacher
    perplexities = [r[0].after.teacher_perplexity for r in rows]
    print(
        f"{sizes.teachers} Mixtrals of {teacher.num_parameters():,} parameters ({EXPERTS} experts of "
        f"{CHANNELS} channels, 2 a token) trained here for {sizes.steps:,} steps on {DIALECTS} drawn "
        f"dialects: perplexity {min(perplexities):.3f} to {max(perplexities):.3f} where {text.floor:.3f} is "
        f"the least possible; a "
        f"token's letter and dialect tell {min(b.bits for b in benches):.2f} to "
        f"{max(b.bits for b in benches):.2f} bits of its expert. Students of one size, the same "
        f"{sizes.heal:,} tokens of healing; means over the teachers, KL to the teacher in nats a token.\n"
    )
    print(table(rows))
    minutes = (time.process_time() - started) / 60
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\n{minutes:.1f} CPU-minutes, peak {peak:,.0f} MiB.")


if __name__ == "__main__":
    main()
