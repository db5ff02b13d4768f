"""What an adapter says of a model that sees or hears: where it keeps its decoder, and how pictures get there.

The decoder inside is described by a `Family`, as any text model is; a `Host` adds what stands around it: the
tower, which is never touched, and the projector, whose output has the decoder's width and follows when that
shrinks. Pictures reach the decoder in one of two ways: as tokens in front of the text's (LLaVA, Qwen-VL,
Gemma 3, Idefics3, SmolVLM; audio likewise), or through layers of their own that read them (Mllama). It
ignores how images and sound become tensors: that is the model's own processor (media).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from understudy.compress.corpus import Batch


@dataclass(frozen=True, kw_only=True)
class Host:
    """Where one architecture keeps its decoder and its projector; paths are below the whole model."""

    name: str
    model_type: str
    """`config.model_type` of the whole model in transformers."""
    hears: bool = False
    """Its tower is for sound."""
    decoder: str = "model.language_model"
    writers: tuple[str, ...] = ()
    """Projections whose outputs are added to the stream: they lose rows when the width shrinks."""
    columns: tuple[str, ...] = ()
    """Parameters (tower's width, decoder's width) that do the same, stored the other way round."""
    inner: tuple[str, str] | None = None
    """Two projections with an activation between them, as wide there as the stream though it is not the
    stream: transformers derives that size from the width, so channels must go there too."""
    crossing: str = ""
    """The projection whose output only cross-attention reads; its dimensions are free to be chosen anew."""
    width_keys: tuple[str, ...] = ()
    """Places in the configuration, outside the decoder's part, that name the decoder's width."""
    layers_fixed: bool = False
    """Pictures enter at layers that the configuration counts, so none can be left out."""

    def states(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Hidden states behind the decoder's last norm, (rows, length, width); each row is one document."""
        from understudy.compress.media import stacked

        given = stacked(batch.media, batch.tokens.shape[1])
        inner = cast(Any, model).model
        out = inner(
            input_ids=batch.tokens, attention_mask=batch.real.long(), use_cache=False, **self.forward(given)
        )
        return cast("Tensor", out.last_hidden_state)

    def forward(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the model's own forward takes of what its processor made."""
        return given

    def positions(self, positions: Tensor) -> Tensor:
        """Positions of packed text, (rows, length), as the decoder takes them."""
        return positions

    def write_width(self, model: PreTrainedModel, width: int) -> None:
        """Spell the decoder's width wherever the configuration, or the model, repeats it."""
        for key in self.width_keys:
            *path, name = key.split(".")
            place = cast(Any, model.config)
            for part in path:
                place = getattr(place, part)
            setattr(place, name, width)
        inner = cast(Any, model).model
        if hasattr(inner, "hidden_size"):
            inner.hidden_size = width
