"""A narrower decoder's projector: what leads pictures and sound into the stream, cut and refitted to it.

Three cases. Outputs that are added to the stream keep the rows of the kept dimensions, which is exact. A
layer between two projections that is as wide as the stream only by its configuration loses channels, chosen
and made up for as a feed-forward block's are. What cross-attention alone reads may be any space: the best
one of fewer dimensions has a closed form. The tower is never touched. It ignores the stream itself (width).

Source of the closed form: reduced-rank regression (Izenman 1975, J. Multivariate Analysis 5).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from understudy.compress.calibrate import Gram, enter, inputs_of
from understudy.compress.corpus import Batch
from understudy.compress.decoder import bias_of, family_of, layers_of, set_linear
from understudy.compress.importance import refit, top
from understudy.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from understudy.compress.families import Host

Change = Callable[["PreTrainedModel"], None]


@torch.no_grad()
def narrowed(model: PreTrainedModel, keep: list[int], batches: Sequence[Batch], ridge: float) -> Change:
    """What is to become of the projector when the stream keeps these dimensions, measured on the wide model.

    Raises ModelError when a projector has to be refitted and no text of the calibration has a picture.
    """
    host = family_of(model).host
    if host is None:
        return _nothing
    seeing = [batch for batch in batches if any(batch.media)]
    if (host.inner or host.crossing) and not seeing:
        raise ModelError(
            "no picture among the calibration texts, so the projector cannot be refitted",
            expected="chats with pictures (or sound), or a student of the teacher's width",
        )
    inner = _inner(model, host, len(keep), seeing, ridge) if host.inner else None
    space = _space(model, host, len(keep), seeing) if host.crossing else None

    def change(model: PreTrainedModel) -> None:
        if inner is not None:
            inner.apply(model, host)
        if space is not None:
            space.apply(model, host)
        _keep_rows(model, host, keep)

    return change


def _nothing(model: PreTrainedModel) -> None:
    """A model without eyes or ears has no projector."""


def _keep_rows(model: PreTrainedModel, host: Host, keep: list[int]) -> None:
    for linear in _writers(model, host):
        bias = bias_of(linear)
        set_linear(linear, linear.weight[keep], None if bias is None else bias[keep])
    for path in host.columns:
        place, _, name = path.rpartition(".")
        holder = cast(Any, model.get_submodule(place))
        setattr(holder, name, nn.Parameter(getattr(holder, name)[:, keep].detach().clone()))


def _writers(model: PreTrainedModel, host: Host) -> list[nn.Linear]:
    """Host.writers; a star stands for every item of a list."""
    found: list[nn.Linear] = []
    for path in host.writers:
        head, star, rest = path.partition(".*.")
        places = cast(Any, model.get_submodule(head)) if star else [model]
        found += [cast("nn.Linear", place.get_submodule(rest or path)) for place in places]
    return found


def _linear(model: PreTrainedModel, path: str) -> nn.Linear:
    return cast("nn.Linear", model.get_submodule(path))


class _Inner(NamedTuple):
    """Channels kept between two projections, and what then reads them, (width, kept)."""

    channels: list[int]
    weight: Tensor

    def apply(self, model: PreTrainedModel, host: Host) -> None:
        first, second = (_linear(model, path) for path in cast("tuple[str, str]", host.inner))
        bias = bias_of(first)
        set_linear(first, first.weight[self.channels], None if bias is None else bias[self.channels])
        set_linear(second, self.weight, bias_of(second))


def _inner(model: PreTrainedModel, host: Host, count: int, batches: Sequence[Batch], ridge: float) -> _Inner:
    second = _linear(model, cast("tuple[str, str]", host.inner)[1])
    gram = Gram.zeros(second.in_features, second.out_features)
    with inputs_of(second) as seen:
        enter(model, batches)
    for x in seen:
        gram.add(x.reshape(-1, x.shape[-1]).float(), None)
    power = gram.second.diagonal().sqrt() * second.weight.norm(dim=0)
    channels = top(power, count)
    return _Inner(channels, refit(second.weight, gram, channels, ridge=ridge))


class _Space(NamedTuple):
    """A space of fewer dimensions for what cross-attention reads."""

    into: Tensor
    """(kept, wide): from the wide space."""
    out: Tensor
    """(wide, kept): back, as well as its readers need it."""

    def apply(self, model: PreTrainedModel, host: Host) -> None:
        linear = _linear(model, host.crossing)
        bias = bias_of(linear)
        weight = (self.into @ linear.weight.double()).to(linear.weight.dtype)
        turned = None if bias is None else (self.into @ bias.double()).to(bias.dtype)
        set_linear(linear, weight, turned)
        for reader in _crossing_readers(model):
            set_linear(reader, (reader.weight.double() @ self.out).to(reader.weight.dtype), bias_of(reader))


def _crossing_readers(model: PreTrainedModel) -> list[nn.Linear]:
    return [linear for layer in layers_of(model) if layer.gated for linear in (layer.k, layer.v)]


def _space(model: PreTrainedModel, host: Host, count: int, batches: Sequence[Batch]) -> _Space:
    linear = _linear(model, host.crossing)
    second = torch.zeros(linear.out_features, linear.out_features, dtype=torch.float64)
    with inputs_of(linear) as seen:
        enter(model, batches)
    for z in seen:
        c = linear(z).reshape(-1, linear.out_features).double()
        second += c.T @ c
    readers = torch.cat([reader.weight for reader in _crossing_readers(model)]).double()
    return reduced(second, readers.T @ readers, count)


def reduced(second: Tensor, reading: Tensor, count: int) -> _Space:
    """The space of ``count`` dimensions that lets readers K see most: min E‖Kc − K·out·into·c‖².

    ``second`` Σ c cᵀ and ``reading`` KᵀK, both (n, n), float64. With S = Σ^½ and the first eigenvectors U of
    S·KᵀK·S: into = UᵀS⁻¹, out = S·U. What was hardly ever seen (an eigenvalue below 10⁻¹⁰ of the largest) is
    left out of S⁻¹.
    """
    values, vectors = torch.linalg.eigh(second)
    floor = values[-1].clamp(min=torch.finfo(torch.float64).tiny) * 1e-10
    root = values.clamp(min=0).sqrt()
    inverse = torch.where(values > floor, root.clamp(min=floor.sqrt()).reciprocal(), torch.zeros_like(root))
    half, back = (vectors * root) @ vectors.T, (vectors * inverse) @ vectors.T
    _, most = torch.linalg.eigh(half @ reading @ half)
    chosen = most[:, -count:]
    return _Space(chosen.T @ back, half @ chosen)
