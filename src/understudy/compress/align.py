"""A teacher with other tokens: what it says of a text, told in the student's tokens.

Both write the same bytes. Where both have a boundary before and after one token each, the teacher's likeliest
tokens that the student has too keep their probabilities, and all others are one bucket. Where a span takes
several tokens on either side, its log-probability under the teacher, by the chain rule, is shared equally
among the student's tokens of the span: a student that gives each its share gives the span what the teacher
gives it. Where a teacher's probability is not known, nothing is said. It ignores who the teacher is: an open
model (`Aligner`) or one behind an endpoint that tells log-probabilities (answers).

Beside it: ULD compares sorted probabilities without regard to which token they are of (arXiv 2402.12030).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from understudy.compress.corpus import Row, collate
from understudy.compress.document import Document
from understudy.compress.losses import Side, logit_blocks
from understudy.compress.targets import Told
from understudy.compress.teacher import LiveTeacher
from understudy.errors import ModelError


class Piece(NamedTuple):
    """One token of the teacher's, and what it thought there."""

    text: bytes
    log_p: float
    """NaN where it is not known."""
    others: Sequence[tuple[bytes, float]] = ()
    """Its likeliest tokens there with their log-probabilities; this one may be among them."""


class Guess(NamedTuple):
    """What is said of one of the student's tokens; probabilities that are missing lie on all others."""

    tokens: Sequence[int]
    log_p: Sequence[float]
    known: bool = True


UNKNOWN = Guess((), (), known=False)


class Pair(NamedTuple):
    """One text in both tokenizers' tokens."""

    student: Document
    teacher: Document


def numbers_of(vocabulary: Sequence[bytes]) -> dict[bytes, int]:
    """The token that each byte string is; of several the first."""
    found: dict[bytes, int] = {}
    for number, text in enumerate(vocabulary):
        if text:
            found.setdefault(text, number)
    return found


def guesses(
    tokens: Sequence[int],
    texts: Sequence[bytes],
    pieces: Sequence[Piece],
    numbers: Mapping[bytes, int],
) -> list[Guess]:
    """A guess for each of the student's ``tokens``, whose bytes are ``texts``.

    Nothing is known where the teacher's pieces do not write the same bytes.
    """
    if b"".join(texts) != b"".join(piece.text for piece in pieces):
        return [UNKNOWN] * len(tokens)
    found: list[Guess] = []
    for own, theirs in _spans(texts, [piece.text for piece in pieces]):
        if len(own) == len(theirs) == 1:
            found.append(_mapped(tokens[own.start], pieces[theirs.start], numbers))
        else:
            found += _shared([tokens[i] for i in own], [pieces[i].log_p for i in theirs])
    return found


def _spans(one: Sequence[bytes], two: Sequence[bytes]) -> Iterator[tuple[range, range]]:
    """Smallest runs of tokens on either side that write the same bytes."""
    sides: list[dict[int, int]] = []
    for texts in (one, two):
        # an offset that empty tokens repeat counts once, behind them
        ends, offset = {0: 0}, 0
        for number, text in enumerate(texts, start=1):
            offset += len(text)
            ends[offset] = number
        sides.append(ends)
    first, second = sides
    first[0] = second[0] = 0
    common = [offset for offset in sorted(first) if offset in second]
    for begin, end in pairwise(common):
        yield range(first[begin], first[end]), range(second[begin], second[end])


def _mapped(token: int, piece: Piece, numbers: Mapping[bytes, int]) -> Guess:
    """The likeliest tokens of a boundary that both share."""
    if math.isnan(piece.log_p):
        return UNKNOWN
    found = {token: piece.log_p}
    for text, log_p in piece.others:
        number = numbers.get(text)
        if number is not None and math.isfinite(log_p):
            found.setdefault(number, log_p)
    return Guess(list(found), list(found.values()))


def _shared(tokens: Sequence[int], log_ps: Sequence[float]) -> list[Guess]:
    total = sum(log_ps)
    if math.isnan(total):
        return [UNKNOWN] * len(tokens)
    return [Guess((token,), (total / len(tokens),)) for token in tokens]


def told_of(found: Sequence[Guess], top: int) -> Told:
    """Guesses as captured arrays with ``top`` tokens each and the rest as a bucket."""
    count = len(found)
    tokens, log_p = np.zeros((count, top), np.int64), np.full((count, top), -np.inf, np.float16)
    log_rest = np.full(count, np.nan, np.float16)
    negentropy = np.zeros(count, np.float16)
    for row, guess in enumerate(found):
        if not guess.known:
            continue
        ranked = sorted(zip(guess.log_p, guess.tokens, strict=True), reverse=True)[:top]
        for column, (value, token) in enumerate(ranked):
            tokens[row, column], log_p[row, column] = token, value
        rest = max(1 - sum(math.exp(value) for value, _ in ranked), 0.0)
        log_rest[row] = math.log(rest) if rest > 1e-7 else -np.inf
        negentropy[row] = rest * math.log(rest) if rest else 0.0
    return Told(tokens, log_p, np.zeros((count, 0), np.int64), log_rest, negentropy)


class Aligner:
    """An open teacher with a tokenizer of its own, told in the student's tokens."""

    def __init__(
        self,
        teacher: LiveTeacher,
        pairs: Sequence[Pair],
        student_bytes: Sequence[bytes],
        teacher_bytes: Sequence[bytes],
        top: int,
    ) -> None:
        self.teacher, self.top = teacher, top
        self.student_bytes = student_bytes
        # a model may have more rows than its tokenizer has tokens
        spare = len(teacher.head.weight) - len(teacher_bytes)
        self.teacher_bytes = [*teacher_bytes, *([b""] * spare)]
        self.numbers = numbers_of(student_bytes)
        self._theirs = {tuple(pair.student.tokens): pair.teacher for pair in pairs}

    def told(self, documents: Sequence[Document]) -> list[Told]:
        """What it says of each; one text at a time, for lengths differ in two tokenizers."""
        return [told_of(self._guesses(d, self._theirs[tuple(d.tokens)])[1:], self.top) for d in documents]

    def _guesses(self, own: Document, theirs: Document) -> list[Guess]:
        """One for each of the student's tokens, the first included, of which nobody says anything."""
        pieces = self._pieces(theirs)
        found = [UNKNOWN] * len(own.tokens)
        runs = [_runs(d) for d in (own, theirs)]
        if len(runs[0]) != len(runs[1]):
            return found
        for mine, other in zip(*runs, strict=True):
            tokens = own.tokens[mine]
            texts = [self.student_bytes[t] for t in tokens]
            found[mine] = guesses(*_without_end(tokens, texts, pieces[other]), self.numbers)
        return [g._replace(known=False) if i == 0 else g for i, g in enumerate(found)]

    @torch.no_grad()
    def _pieces(self, document: Document) -> list[Piece]:
        batch = collate([Row([document], len(document.tokens))]).to(self.teacher.head.weight.device)
        signal = self.teacher.unremembered(batch)
        pieces = [Piece(self.teacher_bytes[document.tokens[0]], math.nan)]
        for at, (logits,) in logit_blocks([Side(signal.hidden, signal.head)]):
            log_p = torch.log_softmax(logits.float(), -1)
            values, tokens = log_p.topk(min(self.top, log_p.shape[1]), dim=-1)
            for place, (v, t) in enumerate(
                zip(values.tolist(), tokens.tolist(), strict=True), start=at.start
            ):
                said = document.tokens[place + 1]
                others = [(self.teacher_bytes[token], value) for token, value in zip(t, v, strict=True)]
                pieces.append(Piece(self.teacher_bytes[said], float(log_p[place - at.start, said]), others))
        return pieces


def _runs(document: Document) -> list[slice]:
    """The stretches that are answers; of a text without any, all of it."""
    if not any(document.answer):
        return [slice(0, len(document.tokens))]
    edges = [i for i, (a, b) in enumerate(pairwise([False, *document.answer, False])) if a != b]
    return [slice(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def _without_end(
    tokens: Sequence[int], texts: Sequence[bytes], pieces: Sequence[Piece]
) -> tuple[Sequence[int], Sequence[bytes], Sequence[Piece]]:
    """End-of-turn tokens have names of their own in every tokenizer: both become the empty end ``\\0``."""
    if texts and pieces and texts[-1] != pieces[-1].text:
        same = b"".join(texts[:-1]) == b"".join(piece.text for piece in pieces[:-1])
        if same:
            end = pieces[-1]._replace(text=b"\0")
            return tokens, [*texts[:-1], b"\0"], [*pieces[:-1], end]
    return tokens, texts, pieces


def pairs_of(student: Sequence[Document], teacher: Sequence[Document]) -> list[Pair]:
    """The same texts in both tokenizers' tokens. Raises ModelError when their numbers differ."""
    if len(student) != len(teacher):
        raise ModelError(
            f"{len(student)} texts in the student's tokens and {len(teacher)} in the teacher's",
            expected="the same texts",
        )
    return [Pair(*both) for both in zip(student, teacher, strict=True)]
