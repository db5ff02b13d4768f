"""People's labels: which pairs are still to be shown, in which order, and where they are kept.

Pairs come in an order drawn from the committed seed, so those labelled are a random sample of all and
prediction-powered inference holds. It ignores the screen (cli).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from understudy.errors import InputError
from understudy.evaluate.certificate import QUESTION, Question
from understudy.evaluate.evidence import Lines, ProofHeader, file_name, read_exchanges, read_lines
from understudy.evaluate.item import Call
from understudy.evaluate.judge import LABELS, Label, incumbent_first, pairs_of, read_labels
from understudy.evaluate.sequential import shuffled


class Shown(NamedTuple):
    """One pair as a person sees it."""

    key: str
    prompt: str
    first: str
    second: str
    incumbent_first: bool


class Labelling:
    """The labels of one candidate in an evidence folder; InputError for a candidate it does not hold."""

    def __init__(self, evidence: Path, candidate: str | None) -> None:
        self.path = evidence / LABELS
        names = _candidates(evidence)
        self._candidate = candidate or names[0]
        if self._candidate not in names:
            raise InputError(
                f"no candidate {candidate!r} in {evidence}", expected="one of: " + ", ".join(names)
            )
        self._proof: Lines[ProofHeader, Call] = read_lines(
            evidence / file_name(self._candidate), ProofHeader, Call
        )
        items = read_exchanges(evidence).records
        seed = self._proof.header.seed
        self._pairs = {i.key: (i, c) for i, c in pairs_of(items, self._proof.records, seed)}
        self._labelled = {x.key for x in read_labels(evidence) if x.candidate == self._candidate}

    @property
    def count(self) -> int:
        """Pairs labelled so far."""
        return len(self._labelled)

    def open_pairs(self) -> Iterator[Shown]:
        """Pairs without a label, in the drawn order."""
        seed = self._proof.header.seed
        for key in shuffled(
            self._pairs, seed + 1
        ):  # not the order of the proof, whose stopping looked at scores
            item, call = self._pairs[key]
            if key not in self._labelled:
                ours = incumbent_first(key, "label", seed)
                texts = (item.reply.text, call.reply.text)
                yield Shown(key, item.prompt, texts[not ours], texts[ours], ours)

    def save(self, shown: Shown, for_first: float) -> None:
        """Append a label; ``for_first`` is 1, ½ or 0."""
        preference = 1.0 - for_first if shown.incumbent_first else for_first
        line = msgspec.json.encode(Label(key=shown.key, candidate=self._candidate, preference=preference))
        with self.path.open("ab") as file:
            file.write(line + b"\n")
        self._labelled.add(shown.key)


def _candidates(evidence: Path) -> list[str]:
    path = evidence / QUESTION
    if not path.is_file():
        raise InputError(
            f"{path} is missing",
            expected="the folder of a finished evaluation",
            next_step="understudy evaluate run --out FOLDER",
        )
    return msgspec.json.decode(path.read_bytes(), type=Question).candidates
