"""A decoder as everything else sees it: heads, channels, layers and width, whatever its architecture.

`shape_of` and `layers_of` read a model through its family's adapter; `write_shape` spells a new shape in its
configuration. It ignores where an architecture keeps its parts (families) and how anything is scored or cut.
The test `test_compress_families.py` proves an adapter: layer = branches, parameters as counted, reload =
memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import msgspec

from understudy.compress.families import DECODERS, FAMILIES, HOSTS, Family, Mixture
from understudy.compress.shelf import shelf_of
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
    experts: int = 0
    """Routed experts in a layer, whose channels ``ffn`` counts together with the shared ones'; 0: dense."""
    cross_layers: int = 0
    """Those of the layers that read pictures by cross-attention, in place of the stream."""
    cross_heads: int = 0
    """Query heads of these; where they are fewer than ``heads``, zeros fill them up in the checkpoint."""

    @property
    def group(self) -> int:
        """Query heads that share one key-value head."""
        return self.heads // self.kv_heads

    @property
    def cross_kv_heads(self) -> int:
        """KV heads of the layers that read pictures: cross-attention loses whole groups."""
        return self.cross_heads // self.group

    def __str__(self) -> str:
        experts = f" in {self.experts} experts" if self.experts > 1 else ""
        cross = f", {self.cross_layers} of them cross-attention" if self.cross_layers else ""
        fewer = f" of {self.cross_heads} heads" if 0 < self.cross_heads < self.heads else ""
        return (
            f"{self.layers} layers{cross}{fewer}, width {self.hidden}, FFN {self.ffn}{experts}, "
            f"{self.heads} query / {self.kv_heads} KV heads of {self.head_dim}"
        )


class Mixed(NamedTuple):
    """What only a mixture of experts has."""

    expert_ffn: int
    """Channels of one routed expert."""
    active: int
    """Channels that one token passes, shared ones included."""
    least: int
    """Fewest routed experts that the router can choose among."""
    groups: int
    """Equal groups of experts that the router chooses among first."""
    shared_gate: bool
    plain: int
    """Layers that don't route."""
    plain_ffn: int
    dense_experts: int
    """As `Mixture.dense_experts`."""


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
    attention: int = 0
    """Parameters of a layer's attention where heads are fixed; 0: they follow from the heads."""
    mixed: Mixed | None = None
    heads_fill_width: bool = False
    """As `Family.heads_fill_width`."""
    layers_fixed: bool = False
    """As `Host.layers_fixed`."""
    spare_rows: int = 0
    """Rows of the embedding that the output matrix has no counterpart of."""


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

    @contextmanager
    def awake(self) -> Generator[None]:
        """The weights in memory while the block runs, where they are not there anyway (shelf)."""
        shelf = shelf_of(self.module)
        if shelf is None:
            yield
            return
        with shelf.awake(self.module):
            yield

    def linear(self, path: str) -> nn.Linear:
        return cast("nn.Linear", self.module.get_submodule(path))

    @property
    def attention_readers(self) -> list[nn.Linear]:
        """The attention branch's projections that read the stream."""
        return self.family.readers(self.module)

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
        """Whether a norm or a gate stands between the projections that write and the residual stream."""
        return bool(self.family.attention_post_norm) or self.gated

    @property
    def gated(self) -> bool:
        """Whether what the layer adds depends on what it was called with: gates, masks, absent pictures."""
        return self.family.gated

    def attention(self, hidden: Tensor, call: Mapping[str, Any]) -> Tensor:
        """The attention branch's addition to the stream; ``call`` as recorded by `calibrate`."""
        given = self.family.attention_call(call)
        if given is None:
            return hidden.new_zeros(()).expand(hidden.shape)
        normed = self.read_attention(hidden)
        out = self.module.get_submodule(self.family.attention)(hidden_states=normed, **given)[0]
        return self.family.scale_attention(self.module, self._after(self.family.attention_post_norm, out))

    def write_attention(self, mixed: Tensor) -> Tensor:
        """The end of the attention branch, from what enters `o_proj`."""
        return self._after(self.family.attention_post_norm, self.o(mixed))

    def feed_forward(self, hidden: Tensor, call: Mapping[str, Any] | None = None) -> Tensor:
        """The feed-forward branch's addition to the stream; ``call`` matters where the layer is `gated`."""
        if self.gated and self.family.attention_call(call or {}) is None:
            return hidden.new_zeros(()).expand(hidden.shape)
        normed = self.read_feed_forward(hidden)
        out = self._after(self.family.ffn_post_norm, self.module.get_submodule(self.family.ffn)(normed))
        return self.family.scale_ffn(self.module, out, call or {})

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
        for name, count in (("num_heads", heads), ("num_key_value_heads", kv_heads)):
            if hasattr(attention, name):
                setattr(attention, name, count)

    def renumber(self, index: int) -> None:
        """Tell the attention module its place, under which it keeps its keys and values."""
        cast(Any, self.module.get_submodule(self.family.attention)).layer_idx = index

    def _after(self, norm: str, out: Tensor) -> Tensor:
        return self.module.get_submodule(norm)(out) if norm else out


def family_of(model: PreTrainedModel) -> Family:
    """The adapter for a model. Raises ModelError for an architecture that none fits."""
    model_type = str(model.config.model_type)
    family = _family(model_type, str(getattr(getattr(model.config, "text_config", None), "model_type", "")))
    if family is not None:
        family.refuse(model)
        return family
    raise ModelError(
        f"no adapter for the model type {model_type!r}",
        expected="one of: " + ", ".join(f.model_type for f in (*FAMILIES, *HOSTS)),
        next_step="add a Family as a file of compress/families: model_type, the norms around attention and "
        "feed-forward, gain offset, embedding scale; its tests say whether it is right",
    )


@cache
def _family(model_type: str, text_type: str) -> Family | None:
    """The adapter of a text model, or of the decoder inside a host."""
    host = next((h for h in HOSTS if h.model_type == model_type), None)
    wanted, among = (text_type, DECODERS) if host else (model_type, FAMILIES)
    found = next((f for f in among if f.model_type == wanted), None)
    return dataclasses.replace(found, host=host) if found and host else found


def body(model: PreTrainedModel) -> Any:
    """The decoder without its head: embedding, layers, final norm."""
    return family_of(model).body(model)


def states_of(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Hidden states behind the last layer and its norm, (rows, length, width)."""
    import torch

    host = family_of(model).host
    if host is not None and any(batch.media):
        if len(_alike(batch)) > 1:
            return _apart(model, batch)
        return host.states(model, batch)
    sight = None
    if batch.sight is not None:
        hidden_by = torch.finfo(model.dtype).min
        sight = torch.zeros(batch.sight.shape, dtype=model.dtype).masked_fill_(~batch.sight, hidden_by)
    positions = host.positions(batch.positions) if host else batch.positions
    out = body(model)(input_ids=batch.tokens, position_ids=positions, attention_mask=sight, use_cache=False)
    return cast("Tensor", out.last_hidden_state)


def _apart(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Rows by how much they show, each kind by itself, in the order they stand in."""
    import torch

    groups = list(_alike(batch).values())
    parts = [states_of(model, batch.rows(rows)) for rows in groups]
    return torch.cat(parts)[torch.tensor([row for rows in groups for row in rows]).argsort()]


def _alike(batch: Batch) -> dict[int, list[int]]:
    """Rows by their number of pictures: cross-attention would see one that another row lacks."""
    groups: dict[int, list[int]] = {}
    for row, media in enumerate(batch.media):
        groups.setdefault(len(media) if media else 0, []).append(row)
    return groups


def may_share(model: PreTrainedModel, length: int) -> bool:
    """Whether rows of this length may share beginnings: what a batch may see must not be cut by a window."""
    window = getattr(family_of(model).config(model), "sliding_window", None)
    return not window or window >= length


def layers_of(model: PreTrainedModel) -> list[Layer]:
    family = family_of(model)
    return [Layer(module, family.of_layer(module)) for module in family.body(model).layers]


def head_weight(model: PreTrainedModel) -> Tensor:
    """The output matrix, (vocab, width); the embedding itself when tied."""
    return family_of(model).head(model).weight


def vocabulary_weights(model: PreTrainedModel) -> list[nn.Parameter]:
    """The embedding, and the output matrix where it is another."""
    embedding, head = cast("nn.Parameter", body(model).embed_tokens.weight), head_weight(model)
    return [embedding] if head is embedding else [embedding, cast("nn.Parameter", head)]


def outside_weights(model: PreTrainedModel) -> list[nn.Parameter]:
    """What is not the language model: towers and projectors, kept as they are; empty for a text model."""
    inside = {id(p) for p in body(model).parameters()} | {id(family_of(model).head(model).weight)}
    return [p for p in model.parameters() if id(p) not in inside]


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
    family_of(model).write_layers(model)


def softcap_of(model: PreTrainedModel) -> float:
    """c where logits are c·tanh(logits/c); 0 for none."""
    return float(getattr(family_of(model).config(model), "final_logit_softcapping", None) or 0.0)


def mixture_of(model: PreTrainedModel) -> Mixture | None:
    """The adapter of a model that routes in at least one layer; None for a dense one."""
    family = family_of(model)
    return family if isinstance(family, Mixture) and _sparse_layers(model, family) else None


def _sparse_layers(model: PreTrainedModel, family: Mixture) -> list[nn.Module]:
    return [layer for layer in family.body(model).layers if family.sparse(layer)]


def shape_of(model: PreTrainedModel) -> Shape:
    """The shape as the weights have it, which the configuration must agree with."""
    family, layers = family_of(model), layers_of(model)
    heads, kv_heads, head_dim = family.heads(model)
    mixture = mixture_of(model)
    pool = mixture.pool(_sparse_layers(model, mixture)[0]) if mixture else []
    crossing = sum(layer.gated for layer in layers)
    noted = getattr(family.config(model), CROSS_HEADS, None) or heads
    return Shape(
        layers=len(layers),
        hidden=layers[0].o.out_features,
        ffn=sum(len(expert.gate) for expert in pool) or layers[0].down.in_features,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=int(head_weight(model).shape[0]),
        experts=len(pool) - bool(mixture.shared) if mixture else 0,
        cross_layers=crossing,
        cross_heads=noted if crossing else 0,
    )


def extras_of(model: PreTrainedModel) -> Extras:
    family, layer = family_of(model), next(layer for layer in layers_of(model) if not layer.gated)
    attention = layer.module.get_submodule(family.attention)
    mixture = mixture_of(model)
    fixed = family.heads_fixed
    return Extras(
        tied=head_weight(model) is body(model).embed_tokens.weight,
        q_bias=not fixed and bias_of(layer.q) is not None,
        kv_bias=not fixed and bias_of(layer.k) is not None,
        o_bias=not fixed and bias_of(layer.o) is not None,
        ffn_bias=not isinstance(family, Mixture) and bias_of(layer.down) is not None,
        qk_norms=hasattr(attention, "q_norm"),
        norms=len(family.norms),
        heads_divide_width=family.heads_divide_width,
        attention=sum(p.numel() for p in attention.parameters()) if fixed else 0,
        mixed=_mixed(model, mixture) if mixture else None,
        heads_fill_width=family.heads_fill_width,
        layers_fixed=bool(family.host and family.host.layers_fixed),
        spare_rows=int(body(model).embed_tokens.weight.shape[0] - head_weight(model).shape[0]),
    )


def _mixed(model: PreTrainedModel, mixture: Mixture) -> Mixed:
    config, layers = mixture.config(model), layers_of(model)
    pool = mixture.pool(_sparse_layers(model, mixture)[0])
    plain = [layer for layer in layers if not mixture.sparse(layer.module)]
    top, groups = int(config.num_experts_per_tok), int(getattr(config, "n_group", None) or 1)
    in_group = math.ceil(top / int(getattr(config, "topk_group", None) or 1))
    shared = len(pool[-1].gate) if mixture.shared else 0
    return Mixed(
        expert_ffn=len(pool[0].gate),
        active=top * len(pool[0].gate) + shared,
        least=groups * max(in_group, min(2, top)),
        groups=groups,
        shared_gate=bool(mixture.shared_gate),
        plain=len(plain),
        plain_ffn=plain[0].down.in_features if plain else 0,
        dense_experts=mixture.dense_experts,
    )


def layer_parameters(shape: Shape, extras: Extras) -> int:
    """Parameters of one decoder layer of this shape; of a mixture one that routes."""
    count = _attention_parameters(shape, extras) + 3 * shape.hidden * shape.ffn
    count += extras.ffn_bias * (2 * shape.ffn + shape.hidden) + extras.norms * shape.hidden
    routers = shape.experts + bool(shape.experts and extras.mixed and extras.mixed.shared_gate)
    return count + routers * shape.hidden


def _attention_parameters(shape: Shape, extras: Extras) -> int:
    if extras.attention:
        return extras.attention
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    count = 2 * shape.hidden * q + 2 * shape.hidden * kv + extras.qk_norms * 2 * shape.head_dim
    return count + extras.q_bias * q + 2 * extras.kv_bias * kv + extras.o_bias * shape.hidden


def parameters(shape: Shape, extras: Extras) -> int:
    """Parameters of a language model of this shape, tied embeddings counted once; what stands around it
    (`outside_weights`) is not among them."""
    embeddings = (shape.vocab * (1 if extras.tied else 2) + extras.spare_rows) * shape.hidden
    plain = extras.mixed.plain if extras.mixed and shape.experts else 0
    routing = (shape.layers - plain) * layer_parameters(shape, extras)
    if extras.mixed and plain:
        one = msgspec.structs.replace(shape, experts=0, ffn=extras.mixed.plain_ffn)
        routing += plain * layer_parameters(one, extras)
    return embeddings + shape.hidden + routing + shape.cross_layers * _crossing_parameters(shape, extras)


def _crossing_parameters(shape: Shape, extras: Extras) -> int:
    """What a layer that reads pictures has more than another: norms of query and key heads and two gates;
    heads that are zeros are taken off."""
    own = msgspec.structs.replace(shape, heads=shape.cross_heads, kv_heads=shape.cross_kv_heads)
    fewer = _attention_parameters(own, extras) - _attention_parameters(shape, extras)
    return 2 * (shape.head_dim + 1) + fewer


def write_shape(model: PreTrainedModel, shape: Shape, kept_layers: list[int]) -> None:
    """Spell a shape in the model's configuration, `head_dim` always written out where heads are an axis."""
    family = family_of(model)
    spell_shape(family.config(model), shape, kept_layers, heads=not family.heads_fixed)
    if family.host is not None:
        family.host.write_width(model, shape.hidden)


def spell_shape(config: Any, shape: Shape, kept_layers: list[int], *, heads: bool = True) -> None:
    """Spell a shape in a decoder's configuration."""
    config.num_hidden_layers = shape.layers
    config.hidden_size = shape.hidden
    config.intermediate_size = shape.ffn
    if heads:
        config.num_attention_heads = shape.heads
        config.num_key_value_heads = shape.kv_heads
        config.head_dim = shape.head_dim
    if getattr(config, "layer_types", None) and len(config.layer_types) != len(kept_layers):
        config.layer_types = [config.layer_types[i] for i in kept_layers]
        if hasattr(config, "max_window_layers"):  # Qwen's: layers below it attend to everything
            config.max_window_layers = sum(index < config.max_window_layers for index in kept_layers)


def write_ffn_sizes(model: PreTrainedModel, sizes: list[int]) -> None:
    """Note how many channels of each layer are no padding."""
    family_of(model).config(model).ffn_per_layer = sizes


CROSS_HEADS = "cross_attention_heads"
"""Where a configuration notes how many query heads of the layers that read pictures are not zeros."""


def write_cross_heads(model: PreTrainedModel, heads: int) -> None:
    """Note how many heads of the layers that read pictures are no padding."""
    setattr(family_of(model).config(model), CROSS_HEADS, heads)
