"""What a teacher says of some positions, whichever teacher it is.

The loss and the loop know two forms. A live teacher gives its states, from which its head makes exact
distributions (`Dense`). A cached, hosted or black-box one, or one with another tokenizer, gives a few tokens
with a probability each (`Sparse`). It ignores where signals come from (teacher, targets).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Head(NamedTuple):
    """An output matrix (vocab, width), and c of its logit soft-cap (0: none)."""

    weight: Tensor
    softcap: float = 0.0


class Dense(NamedTuple):
    """Whole distributions, as states that a head turns into logits."""

    hidden: Tensor
    """Final hidden states, (rows, width)."""
    head: Head
    layers: tuple[Tensor, ...] = ()
    """States behind the decoder layers that are to be matched, each (rows, width)."""

    @property
    def known(self) -> Tensor:
        """bool (rows,): everywhere."""
        return self.hidden.new_ones(len(self.hidden)).bool()

    def at(self, rows: Tensor) -> Dense:
        """Some of the rows, by mask or index."""
        return Dense(self.hidden[rows], self.head, tuple(states[rows] for states in self.layers))


class Sparse(NamedTuple):
    """Distributions as a few tokens and their probabilities; the same token may stand in a row twice.

    An unbiased sample of a distribution is one, and so is a single recorded token with probability 1. What
    ``mass`` leaves over is in ``rest``: it lies on all tokens that the row does not name, shared among them
    as the student would.
    """

    tokens: Tensor
    """int64 (rows, few); where ``mass`` is 0, any token."""
    mass: Tensor
    """Probabilities, float32 (rows, few)."""
    rest: Tensor
    """Probability of all other tokens together, (rows,)."""
    negentropy: Tensor
    """Σ p·log p of the whole distribution, so that KL is what is reported, (rows,)."""
    known: Tensor
    """bool (rows,): where the teacher said anything."""
    vocab: int
    """Tokens that the teacher knows; the student's further ones are padding."""

    def at(self, rows: Tensor) -> Sparse:
        """Some of the rows, by mask or index."""
        parts = (self.tokens, self.mass, self.rest, self.negentropy, self.known)
        return Sparse(*(part[rows] for part in parts), vocab=self.vocab)


Signal = Dense | Sparse


def joined(parts: Sequence[Sparse]) -> Sparse:
    """Signals one behind the other; all of them of one width and vocabulary."""
    import torch

    first = parts[0]
    columns = zip(*(part[:5] for part in parts), strict=True)
    return Sparse(*(torch.cat(column) for column in columns), vocab=first.vocab)
