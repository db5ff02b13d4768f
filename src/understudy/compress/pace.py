"""What a token costs in seconds, as a function of the shape: fitted to a few shapes measured on the engine.

Generation reads all weights once a token and pays something for each layer, so the cost is taken to be linear
in both. Measured are random models of a shape, which take as long as trained ones. It ignores how the engine
is asked (the caller's `Speed`) and prompts.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import torch

from understudy.compress.decoder import Extras, Shape, extras_of, parameters, shape_of, spell_shape
from understudy.compress.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Speed = Callable[[Path], float]
"""Tokens a second with a checkpoint folder on the serving engine."""


class Pace(NamedTuple):
    """Seconds a token: ``layer`` for each layer, ``weight`` for each parameter that is read."""

    layer: float
    weight: float
    extras: Extras

    def seconds(self, shape: Shape) -> float:
        return self.layer * shape.layers + self.weight * _read(shape, self.extras)


def _read(shape: Shape, extras: Extras) -> int:
    """Parameters read for one token: an embedding that is not the head as well is looked up."""
    return parameters(shape, extras) - (0 if extras.tied else shape.vocab * shape.hidden)


class Track:
    """A teacher's shapes on the engine."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, speed: Speed) -> None:
        self.model, self.tokenizer, self.speed = model, tokenizer, speed
        self.shape, self.extras = shape_of(model), extras_of(model)

    def measure(self, shape: Shape) -> float:
        """Tokens a second of a random model of this shape."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "model"
            hollow(self.model, shape).save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            return self.speed(folder)

    def pace(self, progress: Progress = silent) -> Pace:
        """Fitted to the teacher's shape, half of its layers and a quarter of its channels."""
        shapes = [
            self.shape,
            msgspec.structs.replace(self.shape, layers=max(1, self.shape.layers // 2)),
            msgspec.structs.replace(self.shape, ffn=max(1, self.shape.ffn // 4)),
        ]
        seconds: list[float] = []
        for number, shape in enumerate(shapes):
            progress("speed", number, len(shapes), str(shape))
            seconds.append(1 / self.measure(shape))
        progress("speed", len(shapes), len(shapes))
        return self._fitted(shapes, seconds)

    def _fitted(self, shapes: list[Shape], seconds: list[float]) -> Pace:
        read = [float(_read(shape, self.extras)) for shape in shapes]
        table = torch.tensor([[s.layers, r] for s, r in zip(shapes, read, strict=True)], dtype=torch.float64)
        wanted = torch.tensor(seconds, dtype=torch.float64)
        layer, weight = torch.linalg.lstsq(table, wanted[:, None]).solution[:, 0].tolist()
        if layer < 0 or weight < 0:  # within the noise of the clock: weights alone
            layer, weight = 0.0, float(wanted @ table[:, 1] / table[:, 1].square().sum())
        return Pace(layer, weight, self.extras)


def hollow(model: PreTrainedModel, shape: Shape) -> PreTrainedModel:
    """A random half-precision model of a shape, otherwise configured as ``model``."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model.config)
    spell_shape(config, shape, list(range(shape.layers)))
    config.dtype = torch.float16
    return AutoModelForCausalLM.from_config(config, dtype=torch.float16)
