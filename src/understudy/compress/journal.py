"""What a pruning has done so far, on disk: after a kill it goes on at the layer it was in.

Each finished layer is a file of its own; the streams before the next layer and what was chosen are noted
together, last, so that a note always finds what it speaks of. Notes are skipped while writing one would cost
more than a twentieth of the time. It ignores how layers are pruned.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

from understudy.compress import plan as plans
from understudy.compress.plan import LayerPlan, Plan
from understudy.compress.shelf import Place, read_layer, shelf_of, write_layer
from understudy.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from understudy.compress.calibrate import Stream
    from understudy.compress.decoder import Layer

Stage = Literal["layers", "width", "padded"]
SHARE = 20
"""A note may take one part in so many of the time."""


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """note.json: how far it is."""

    stage: Stage
    kept: list[int]
    """The teacher's layers that stay."""
    following: int = 0
    """The layer that comes next: of the teacher's while layers are cut, of the student's while narrowed."""
    done: list[LayerPlan] = []
    width: list[int] = []
    streams: str = ""
    """File of the streams in front of it; empty: they are the model's own beginning."""


class Resumed(NamedTuple):
    """Where to go on."""

    note: Note
    streams: list[list[Tensor]]


class Journal:
    """A folder of notes for one pruning; ``identity`` is of everything its result follows from."""

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder, identity
        self._last, self._cost = time.monotonic(), 0.0
        claim = folder / "identity"
        if not claim.exists() or claim.read_text() != identity:
            self.forget()

    def plan(self, decide: Callable[[], Plan]) -> Plan:
        """The plan an earlier call decided on, or a new one."""
        path = self.folder / "plan.json"
        if path.exists():
            return plans.load(path)
        plan = decide()
        with self._writing():
            plans.save(plan, path)
        return plan

    def read(self) -> Resumed | None:
        """The latest note; None at the very beginning."""
        import torch

        path = self.folder / "note.json"
        if not path.exists():
            return None
        note = msgspec.json.decode(path.read_bytes(), type=Note)
        streams = torch.load(self.folder / note.streams, weights_only=True) if note.streams else []
        return Resumed(note, streams)

    def restore(self, stage: Stage, layers: Sequence[Layer], places: Sequence[int]) -> None:
        """Give the layers at these places the weights they had when they were finished."""
        for place in places:
            read_layer(layers[place].module, self._layer(stage, place))

    def finish(self, stage: Stage, place: int, layer: Layer) -> None:
        """Keep a layer's weights; the shelf it stands on reads them from here."""
        with self._writing():
            write_layer(layer.module, self._layer(stage, place))
        if shelf := shelf_of(layer.module):
            names = [name for name, _ in layer.module.named_parameters()]
            shelf.place = Place(dict.fromkeys(names, self._layer(stage, place)), "")

    def note(self, note: Note, streams: Sequence[Stream], *, always: bool = False) -> None:
        """Say how far it is, with the streams in front of what comes next, unless that costs too much."""
        if not always and time.monotonic() - self._last < SHARE * self._cost:
            return
        started = time.monotonic()
        with self._writing():
            self._write(note, streams)
        self._last = time.monotonic()
        self._cost = self._last - started

    def _write(self, note: Note, streams: Sequence[Stream]) -> None:
        import torch

        name = f"streams-{note.stage}-{note.following}" if streams else ""
        if streams:
            torch.save([stream.hidden for stream in streams], self.folder / name)
        part = self.folder / "note.json.part"
        part.write_bytes(msgspec.json.encode(msgspec.structs.replace(note, streams=name)))
        part.replace(self.folder / "note.json")
        for old in self.folder.glob("streams-*"):
            if old.name != name:
                old.unlink()

    def _layer(self, stage: Stage, place: int) -> Path:
        return self.folder / f"{stage}-{place:05d}.safetensors"

    @contextmanager
    def _writing(self) -> Generator[None]:
        """The folder is there, and is gone when it cannot be written to."""
        from safetensors import SafetensorError

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "identity").write_text(self.identity)
            yield
        except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk as RuntimeError
            self.forget()
            raise ModelError(
                f"cannot write to {self.folder}: {error}",
                expected="room for the student's weights and the texts' hidden states",
                next_step="free disk space or choose another --out",
            ) from error

    def forget(self) -> None:
        """Remove the folder: the student is saved."""
        shutil.rmtree(self.folder, ignore_errors=True)
