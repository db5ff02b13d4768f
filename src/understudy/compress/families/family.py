"""What an adapter says of an architecture: where a decoder keeps its projections and norms, and its quirks.

An adapter is one file beside this one with a `Family`. One for a new architecture needs the `model_type`, the
norms around both residual branches, whether norm gains are stored as an offset from one, and whether the
embedding is scaled by the width (`embedding_scale`); a module that keeps its parts elsewhere names their
paths, and an architecture that prepares a layer otherwise overrides a method. It ignores how anything is
scored or cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from understudy.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from understudy.compress.families.host import Host


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where one architecture keeps what all dense decoders have; paths are below a decoder layer."""

    name: str
    model_type: str
    """`config.model_type` in transformers."""
    attention: str = "self_attn"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    ffn: str = "mlp"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    attention_norm: str = "input_layernorm"
    """Norm before the attention branch."""
    attention_post_norm: str = ""
    """Norm on the attention branch's output; empty when the branch ends with `o_proj`."""
    ffn_norm: str = "post_attention_layernorm"
    ffn_post_norm: str = ""
    gain_offset: float = 0.0
    """The norm multiplies by `gain_offset + weight`."""
    heads_divide_width: bool = False
    """transformers refuses a configuration whose width is no multiple of its query heads."""
    heads_fixed: bool = False
    """Heads share more than the stream, a norm or a latent, and cannot be cut one by one."""
    heads_fill_width: bool = False
    """transformers derives the head dimension, width / query heads: both shrink together or not at all."""
    gated: bool = False
    """A layer of this kind adds nothing by itself: a gate weighs it; without a picture it is passed by."""
    host: Host | None = None
    """The model around the decoder, where it sees or hears; set by `decoder.family_of`."""

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms of the full width in one layer."""
        every = (self.attention_norm, self.attention_post_norm, self.ffn_norm, self.ffn_post_norm)
        return tuple(norm for norm in every if norm)

    def config(self, model: PreTrainedModel) -> Any:
        """The part of the configuration that describes the decoder."""
        return cast(Any, model.config).text_config if self.host else model.config

    def body(self, model: PreTrainedModel) -> Any:
        """The decoder without its head: `embed_tokens`, `layers`, `norm`."""
        return model.get_submodule(self.host.decoder) if self.host else cast(Any, model).model

    def of_layer(self, layer: nn.Module) -> Family:
        """The adapter of one layer, where a decoder mixes kinds of layers."""
        del layer
        return self

    def attention_call(self, call: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """What the attention module takes of what its layer is called with; None: the layer is passed by."""
        return call

    def scale_attention(self, layer: nn.Module, out: Tensor) -> Tensor:
        """What the attention branch adds to the stream, from what `o_proj` or the norm behind it gives."""
        del layer
        return out

    def scale_ffn(self, layer: nn.Module, out: Tensor, call: Mapping[str, Any]) -> Tensor:
        """The same for the feed-forward branch."""
        del layer, call
        return out

    def head(self, model: PreTrainedModel) -> nn.Linear:
        """The output projection."""
        return cast("nn.Linear", cast(Any, model).lm_head)

    def embedding_scale(self, width: int) -> float:
        """What the embedding is multiplied by in a model of this width."""
        return 1.0

    def rescale_embedding(self, embedding: Any, width: int) -> None:
        """Give a loaded embedding the scale that a model of this width will be loaded with."""

    def readers(self, layer: nn.Module) -> list[nn.Linear]:
        """The attention branch's projections that read the stream."""
        return [cast("nn.Linear", layer.get_submodule(path)) for path in (self.q, self.k, self.v)]

    def heads(self, model: PreTrainedModel) -> tuple[int, int, int]:
        """Query heads, KV heads and their dimension, as the weights have them."""
        config, layer = self.config(model), self.body(model).layers[0]
        size = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        wide, narrow = layer.get_submodule(self.o).in_features, layer.get_submodule(self.k).out_features
        return wide // size, narrow // size, size

    def write_layers(self, model: PreTrainedModel) -> None:
        """Say which layers are of which kind, after some were dropped, where a decoder mixes them."""

    def refuse(self, model: PreTrainedModel) -> None:
        """Raise ModelError for a variant of the architecture that cannot be pruned here."""
        if getattr(self.config(model), "use_bidirectional_attention", False):
            raise ModelError("the model attends in both directions", expected="a causal decoder")
