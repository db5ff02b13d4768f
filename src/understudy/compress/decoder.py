"""A decoder as everything else sees it: heads, channels, layers and width, whatever its architecture.

`shape_of` and `layers_of` read a model through its family's adapter; `write_shape` spells a new shape in its
configuration. It ignores where an architecture keeps its parts (families) and how anything is scored or cut.
The test `test_compress_families.py` proves an adapter: layer = branches, parameters as counted, reload =
memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import msgspec

from understudy.compress.families import FAMILIES, Family
from understudy.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from understudy.compress.corpus import Batch


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """The size of a decoder on every axis that can be pruned, and of those that cannot."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def group(self) -> int:
        """Query heads that share one key-value head."""
        return self.heads // self.kv_heads

    def __str__(self) -> str:
        return (
            f"{self.layers} layers, width {self.hidden}, FFN {self.ffn}, "
            f"{self.heads} query / {self.kv_heads} KV heads of {self.head_dim}"
        )


class Extras(NamedTuple):
    """What adds parameters beside the projections' matrices, and what restricts shapes."""

    tied: bool
    q_bias: bool
    kv_bias: bool
    o_bias: bool
    ffn_bias: bool
    qk_norms: bool
    norms: int
    """Norms of the full width in one layer."""
    heads_divide_width: bool
    """As `Family.heads_divide_width`."""


def bias_of(linear: nn.Linear) -> nn.Parameter | None:
    """torch declares every bias to be there."""
    return cast("nn.Parameter | None", linear.bias)


def set_linear(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Give a projection other weights, of whatever shape."""
    from torch import nn

    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=linear.weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=linear.bias.requires_grad)
    linear.out_features, linear.in_features = linear.weight.shape


class Layer:
    """One decoder layer as two residual branches: h + attention(h), then h + feed_forward(h)."""

    def __init__(self, module: nn.Module, family: Family) -> None:
        self.module = module
        self.family = family

    def linear(self, path: str) -> nn.Linear:
        return cast("nn.Linear", self.module.get_submodule(path))

    @property
    def q(self) -> nn.Linear:
        return self.linear(self.family.q)

    @property
    def k(self) -> nn.Linear:
        return self.linear(self.family.k)

    @property
    def v(self) -> nn.Linear:
        return self.linear(self.family.v)

    @property
    def o(self) -> nn.Linear:
        return self.linear(self.family.o)

    @property
    def gate(self) -> nn.Linear:
        return self.linear(self.family.gate)

    @property
    def up(self) -> nn.Linear:
        return self.linear(self.family.up)

    @property
    def down(self) -> nn.Linear:
        return self.linear(self.family.down)

    @property
    def writes_through_norm(self) -> bool:
        """Whether a norm stands between the projections that write and the residual stream."""
        return bool(self.family.attention_post_norm)

    def attention(self, hidden: Tensor, call: Mapping[str, Any]) -> Tensor:
        """The attention branch's addition to the stream; ``call`` as recorded by `calibrate`."""
        normed = self.read_attention(hidden)
        out = self.module.get_submodule(self.family.attention)(hidden_states=normed, **call)[0]
        return self._after(self.family.attention_post_norm, out)

    def write_attention(self, mixed: Tensor) -> Tensor:
        """The end of the attention branch, from what enters `o_proj`."""
        return self._after(self.family.attention_post_norm, self.o(mixed))

    def feed_forward(self, hidden: Tensor) -> Tensor:
        """The feed-forward branch's addition to the stream."""
        normed = self.read_feed_forward(hidden)
        return self._after(self.family.ffn_post_norm, self.module.get_submodule(self.family.ffn)(normed))

    def read_attention(self, hidden: Tensor) -> Tensor:
        """What q, k and v read of the stream."""
        return self.module.get_submodule(self.family.attention_norm)(hidden)

    def read_feed_forward(self, hidden: Tensor) -> Tensor:
        """What gate and up read of the stream."""
        return self.module.get_submodule(self.family.ffn_norm)(hidden)

    def write_feed_forward(self, channels: Tensor) -> Tensor:
        """The end of the feed-forward branch, from what enters `down_proj`."""
        return self._after(self.family.ffn_post_norm, self.down(channels))

    def norm(self, path: str) -> nn.Module:
        return self.module.get_submodule(path)

    def regroup(self, heads: int, kv_heads: int) -> None:
        """Tell the attention module its new grouping; the number of heads it reads off its weights."""
        attention = cast(Any, self.module.get_submodule(self.family.attention))
        attention.num_key_value_groups = heads // kv_heads

    def renumber(self, index: int) -> None:
        """Tell the attention module its place, under which it keeps its keys and values."""
        cast(Any, self.module.get_submodule(self.family.attention)).layer_idx = index

    def _after(self, norm: str, out: Tensor) -> Tensor:
        return self.module.get_submodule(norm)(out) if norm else out


def family_of(model: PreTrainedModel) -> Family:
    """The adapter for a model. Raises ModelError for an architecture that none fits."""
    model_type = str(model.config.model_type)
    for family in FAMILIES:
        if family.model_type == model_type:
            family.refuse(model)
            return family
    raise ModelError(
        f"no adapter for the model type {model_type!r}",
        expected="one of: " + ", ".join(f.model_type for f in FAMILIES),
        next_step="add a Family as a file of compress/families: model_type, the norms around attention and "
        "feed-forward, gain offset, embedding scale; its tests say whether it is right",
    )


def body(model: PreTrainedModel) -> Any:
    """The decoder without its head: embedding, layers, final norm."""
    return family_of(model).body(model)


def states_of(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Hidden states behind the last layer and its norm, (rows, length, width)."""
    import torch

    sight = None
    if batch.sight is not None:
        hidden_by = torch.finfo(model.dtype).min
        sight = torch.zeros(batch.sight.shape, dtype=model.dtype).masked_fill_(~batch.sight, hidden_by)
    out = body(model)(
        input_ids=batch.tokens, position_ids=batch.positions, attention_mask=sight, use_cache=False
    )
    return cast("Tensor", out.last_hidden_state)


def may_share(model: PreTrainedModel, length: int) -> bool:
    """Whether rows of this length may share beginnings: what a batch may see must not be cut by a window."""
    window = getattr(family_of(model).config(model), "sliding_window", None)
    return not window or window >= length


def layers_of(model: PreTrainedModel) -> list[Layer]:
    family = family_of(model)
    return [Layer(module, family) for module in family.body(model).layers]


def head_weight(model: PreTrainedModel) -> Tensor:
    """The output matrix, (vocab, width); the embedding itself when tied."""
    return family_of(model).head(model).weight


def vocabulary_weights(model: PreTrainedModel) -> list[nn.Parameter]:
    """The embedding, and the output matrix where it is another."""
    embedding, head = cast("nn.Parameter", body(model).embed_tokens.weight), head_weight(model)
    return [embedding] if head is embedding else [embedding, cast("nn.Parameter", head)]


def narrow_embedding(model: PreTrainedModel, keep: list[int]) -> float:
    """Keep dimensions of the embedding (and of the output matrix when tied); the factor its rows grew by, for
    families that multiply by √width: what reads tied rows at the end must divide by it."""
    from torch import nn

    family, embedding = family_of(model), body(model).embed_tokens
    tied = head_weight(model) is embedding.weight
    factor = family.embedding_scale(embedding.embedding_dim) / family.embedding_scale(len(keep))
    embedding.weight = nn.Parameter((embedding.weight[:, keep] * factor).detach().clone())
    embedding.embedding_dim = len(keep)
    family.rescale_embedding(embedding, len(keep))
    if tied:
        head = family.head(model)
        head.weight, head.in_features = embedding.weight, len(keep)
    return factor


def keep_layers(model: PreTrainedModel, kept: list[int]) -> None:
    """Drop all but these decoder layers; the configuration follows with `write_shape`."""
    from torch import nn

    decoder, layers = body(model), layers_of(model)
    decoder.layers = nn.ModuleList([layers[index].module for index in kept])
    for place, layer in enumerate(layers_of(model)):
        layer.renumber(place)


def softcap_of(model: PreTrainedModel) -> float:
    """c where logits are c·tanh(logits/c); 0 for none."""
    return float(getattr(family_of(model).config(model), "final_logit_softcapping", None) or 0.0)


def shape_of(model: PreTrainedModel) -> Shape:
    """The shape as the weights have it, which the configuration must agree with."""
    config, layers = family_of(model).config(model), layers_of(model)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    first = layers[0]
    return Shape(
        layers=len(layers),
        hidden=first.down.out_features,
        ffn=first.down.in_features,
        heads=first.o.in_features // head_dim,
        kv_heads=first.k.out_features // head_dim,
        head_dim=head_dim,
        vocab=int(head_weight(model).shape[0]),
    )


def extras_of(model: PreTrainedModel) -> Extras:
    layer = layers_of(model)[0]
    family = layer.family
    return Extras(
        tied=bool(family.config(model).tie_word_embeddings),
        q_bias=bias_of(layer.q) is not None,
        kv_bias=bias_of(layer.k) is not None,
        o_bias=bias_of(layer.o) is not None,
        ffn_bias=bias_of(layer.down) is not None,
        qk_norms=hasattr(layer.module.get_submodule(family.attention), "q_norm"),
        norms=len(family.norms),
        heads_divide_width=family.heads_divide_width,
    )


def layer_parameters(shape: Shape, extras: Extras) -> int:
    """Parameters of one decoder layer of this shape."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    count = 2 * shape.hidden * q + 2 * shape.hidden * kv + 3 * shape.hidden * shape.ffn
    count += extras.q_bias * q + 2 * extras.kv_bias * kv + extras.o_bias * shape.hidden
    count += extras.ffn_bias * (2 * shape.ffn + shape.hidden)
    return count + extras.norms * shape.hidden + extras.qk_norms * 2 * shape.head_dim


def parameters(shape: Shape, extras: Extras) -> int:
    """Parameters of a model of this shape, tied embeddings counted once."""
    embeddings = shape.vocab * shape.hidden * (1 if extras.tied else 2)
    return embeddings + shape.hidden + shape.layers * layer_parameters(shape, extras)


def write_shape(model: PreTrainedModel, shape: Shape, kept_layers: list[int]) -> None:
    """Spell a shape in the model's configuration, `head_dim` always written out."""
    config = family_of(model).config(model)
    config.num_hidden_layers = shape.layers
    config.hidden_size = shape.hidden
    config.intermediate_size = shape.ffn
    config.num_attention_heads = shape.heads
    config.num_key_value_heads = shape.kv_heads
    config.head_dim = shape.head_dim
    if getattr(config, "layer_types", None) and len(config.layer_types) != len(kept_layers):
        config.layer_types = [config.layer_types[i] for i in kept_layers]


def write_ffn_sizes(model: PreTrainedModel, sizes: list[int]) -> None:
    """Note how many channels of each layer are no padding."""
    family_of(model).config(model).ffn_per_layer = sizes
