"""A model larger than memory: its checkpoint opened with embeddings and norms alone, and saved again.

Layers stand on shelves and are awake one at a time. It ignores mixtures of experts, GGUF files and names of
tensors that transformers would have to convert: those are loaded whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from understudy.compress.decoder import family_of, layers_of, mixture_of
from understudy.compress.shelf import Place, Shelf, set_parameter, shelf_of
from understudy.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

SHARD_BYTES = 256 << 20
"""A file of a saved checkpoint holds about so much: it is put together in memory."""


def files_of(folder: Path) -> dict[str, Path]:
    """The safetensors file of each tensor in a checkpoint folder; empty when it has none."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = cast(dict[str, str], json.loads(index.read_text())["weight_map"])
        return {name: folder / file for name, file in names.items()}
    single = folder / "model.safetensors"
    if not single.exists():
        return {}
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def open_streamed(folder: Path) -> PreTrainedModel | None:
    """The model of a checkpoint folder, its layers on shelves; None when it has to be loaded whole.

    Raises ModelError for weights that are not finite; what the loaders raise for files cut short passes.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    files = files_of(folder)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model = cast("PreTrainedModel", model).eval()
    family = family_of(model)
    tied = {"lm_head.weight"} if family.config(model).tie_word_embeddings else set[str]()
    names = {name for name, _ in model.named_parameters()} - tied
    if mixture_of(model) is not None or names - set(files):
        return None
    dtype, prefixes = _require_finite(files, names), _prefixes(model)
    for name in names:
        if not name.startswith(tuple(prefixes)):
            owner, _, last = name.rpartition(".")
            set_parameter(model.get_submodule(owner), last, Place(files, "").read(name).float())
    for module, prefix in zip(family.body(model).layers, prefixes, strict=True):
        module.shelf = Shelf(Place(files, prefix), dtype)
    if tied:
        family.head(model).weight = family.body(model).embed_tokens.weight
    model.generation_config = _generation(model, folder)
    return model


def _generation(model: PreTrainedModel, folder: Path) -> Any:
    from transformers import GenerationConfig

    there = (folder / "generation_config.json").exists()
    return GenerationConfig.from_pretrained(folder) if there else model.generation_config


def _prefixes(model: PreTrainedModel) -> list[str]:
    """What stands before the names of each layer's tensors."""
    places = {id(layer.module): place for place, layer in enumerate(layers_of(model))}
    named = [(places[id(module)], name) for name, module in model.named_modules() if id(module) in places]
    return [f"{name}." for _, name in sorted(named)]


def _require_finite(files: dict[str, Path], names: set[str]) -> torch.dtype:
    """The dtype of the weights, fp32 where they have several; reads each tensor once."""
    import torch

    kinds: set[torch.dtype] = set()
    for name in sorted(names):
        weight = Place(files, "").read(name)
        kinds.add(weight.dtype)
        if not bool(weight.isfinite().all()):
            raise ModelError(f"{name} holds values that are not finite", expected="finite weights")
    return kinds.pop() if len(kinds) == 1 else torch.float32


def is_streamed(model: PreTrainedModel) -> bool:
    return any(shelf_of(layer.module) for layer in layers_of(model))


def save_streamed(model: PreTrainedModel, folder: Path) -> None:
    """What `save_pretrained` writes, one shard of weights in memory at a time, in the teacher's dtype."""
    from safetensors.torch import save_file

    model.config.save_pretrained(str(folder))
    model.generation_config.save_pretrained(str(folder))
    weight_map: dict[str, int] = {}
    total = count = 0
    for count, part in enumerate(_shards(model), start=1):
        save_file(part, folder / f"{count}.part", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, count)
        total += sum(weight.nbytes for weight in part.values())
    names = {n: f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)}
    if count == 1:
        names = {1: "model.safetensors"}
    for number, name in names.items():
        (folder / f"{number}.part").rename(folder / name)
    if count > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: names[number] for name, number in weight_map.items()},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _shards(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """All weights by their names in a checkpoint, in parts of about `SHARD_BYTES`."""
    layers, prefixes = layers_of(model), _prefixes(model)
    dtype = cast(Shelf, shelf_of(layers[0].module)).dtype
    outside = [(name, p) for name, p in model.named_parameters() if not name.startswith(tuple(prefixes))]
    part = {name: parameter.detach().to(dtype).contiguous() for name, parameter in outside}
    for layer, prefix in zip(layers, prefixes, strict=True):
        if sum(weight.nbytes for weight in part.values()) >= SHARD_BYTES:
            yield part
            part = {}
        with layer.awake():
            named = layer.module.named_parameters()
            part |= {prefix + name: weight.detach().to(dtype).contiguous() for name, weight in named}
    yield part
