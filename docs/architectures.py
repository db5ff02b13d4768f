"""Write docs/architectures.md: how the adapters see each kind of model; with --check, fail if out of date.

Every number and path in the page is read off the adapters and off models that transformers builds without
weights (torch's meta device), so the page cannot say what the code does not. It ignores quality and speed.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from understudy.compress.decoder import (
    extras_of,
    family_of,
    layers_of,
    outside_weights,
    parameters,
    shape_of,
)
from understudy.compress.families import FAMILIES, HOSTS, Family, Host, Mixture

PAGE = Path(__file__).with_name("architectures.md")
FOLDER = Path(__file__).parent.parent / "src" / "understudy" / "compress" / "families"
EXAMPLES = (
    ("Dense", "LlamaConfig"),
    ("Mixture of experts", "MixtralConfig"),
    ("Pictures as tokens", "LlavaConfig"),
    ("Pictures by cross-attention", "MllamaConfig"),
)
SAID = {
    "Dense": "Two branches a layer add to the stream. Plans cut channels, heads, width and layers; "
    "writers are "
    "refitted by what enters them, readers by what the teacher's would have read.",
    "Mixture of experts": "A layer's experts are one pool of channels, weighed token by token by "
    "the router. The "
    "student is dense (`compress/dense.py`), or keeps the router and loses experts (`compress/experts.py`).",
    "Pictures as tokens": "The processor writes placeholders among the tokens; the tower's "
    "features, projected, "
    "take their places in the stream. The decoder is seen as any dense one; the tower is never "
    "touched, and the "
    "projector follows when the width shrinks (`compress/projector.py`).",
    "Pictures by cross-attention": "Some layers read the projected picture in place of the text. "
    "Each is seen as "
    "two gated branches that add to the stream; its heads and channels are chosen by what enters "
    "its own writers. "
    "These layers and their heads are axes of their own (`--cross-layers`, `--cross-heads`): layers leave "
    "`cross_attention_layers` and the file; heads leave in whole KV groups and are filled up with zeros, "
    "because transformers builds both kinds of layers from one number of heads, so they are counted as gone "
    "but the file is no smaller. "
    "A chat without a picture passes such a layer by.",
}


def built(config: str) -> Any:
    """A model of transformers' own default size, without weights."""
    made = getattr(transformers, config)()
    text_only = made.get_text_config() is made
    kind = transformers.AutoModelForCausalLM if text_only else transformers.AutoModelForMultimodalLM
    with torch.device("meta"):
        return kind.from_config(made)


def drawing(model: Any) -> Iterator[str]:
    """The stream from top to bottom, each branch with its matrices (out x in)."""
    family = family_of(model)
    layers = layers_of(model)
    if family.host is not None:
        yield from _outside(model, family.host)
    yield f"tokens -> embedding {_size(family.body(model).embed_tokens.weight)}"
    yield "   |"
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for index, layer in enumerate(layers):
        kinds.setdefault((layer.family.attention, layer.gated), []).append(index)
    for places in kinds.values():
        yield f"   |  {_places(places, len(layers))}"
        yield from _layer(layers[places[0]])
    yield "   v"
    yield f"norm -> head {_size(family.head(model).weight)}"


def _outside(model: Any, host: Host) -> Iterator[str]:
    count = sum(p.numel() for p in outside_weights(model))
    what = "sound" if host.hears else "picture"
    yield f"{what} -> tower and projector, {count / 1e6:,.0f}M parameters, kept"
    for path in filter(None, (*(host.inner or ()), host.crossing)):
        yield f"           {path} {_size(model.get_submodule(path).weight)}"
    way = "read by the layers marked so" if host.crossing else "takes the places of its placeholders"
    yield f"           {way}"
    yield "   |"


def _places(places: list[int], count: int) -> str:
    if len(places) == count:
        return f"{count} layers"
    shown = ", ".join(map(str, places)) if len(places) <= 10 else f"the other {len(places)}"
    return f"{len(places)} of {count} layers: {shown}"


def _layer(layer: Any) -> Iterator[str]:
    family, readers = layer.family, layer.attention_readers
    gate = "  x tanh(gate)" if layer.gated else ""
    yield f"   +--- {family.attention_norm} -> {_names(layer, readers)}"
    if layer.gated:
        yield f"   |      picture -> {_names(layer, [layer.k, layer.v])}"
    yield f"   |<-- {family.o} {_size(layer.o.weight)}{gate}"
    yield f"   +--- {family.ffn_norm} -> {_ffn(layer)}{gate}"


def _ffn(layer: Any) -> str:
    family = layer.family
    if isinstance(family, Mixture):
        pool = family.pool(layer.module)
        each = f"{len(pool[0].gate):,} channels"
        return f"router -> {len(pool)} experts of {each}, seen as {sum(len(e.gate) for e in pool):,}"
    return (
        f"{family.gate}, {family.up} {_size(layer.gate.weight)} -> {family.down} {_size(layer.down.weight)}"
    )


def _names(layer: Any, linears: list[Any]) -> str:
    names = {id(module): name for name, module in layer.module.named_modules()}
    return ", ".join(f"{names[id(linear)].rpartition('.')[2]} {_size(linear.weight)}" for linear in linears)


def _size(weight: Any) -> str:
    return " x ".join(f"{n:,}" for n in weight.shape)


def example(title: str, config: str) -> str:
    model = built(config)
    shape, extras = shape_of(model), extras_of(model)
    lines = "\n".join(drawing(model))
    count = parameters(shape, extras)
    return (
        f"## {title}\n\n{SAID[title]}\n\n`{config}()` as transformers builds it: {shape}; {count / 1e9:.2f} "
        f"billion parameters of language.\n\n```\n{lines}\n```\n"
    )


def tables() -> str:
    rows = ["| text model | `model_type` | other than Llama | file |", "| --- | --- | --- | --- |"]
    rows += [f"| {f.name} | `{f.model_type}` | {_quirks(f)} | {_file(f)} |" for f in FAMILIES]
    rows += ["", "| sees or hears | `model_type` | decoder at | follows the width | file |"]
    rows += ["| --- | --- | --- | --- | --- |"]
    for host in HOSTS:
        follows = [*host.writers, *host.columns, *filter(None, (host.crossing,)), *(host.inner or ())[:1]]
        named = ", ".join(f"`{path.removeprefix('model.')}`" for path in follows)
        rows.append(f"| {host.name} | `{host.model_type}` | `{host.decoder}` | {named} | {_file(host)} |")
    return "\n".join(rows)


def _quirks(family: Family) -> str:
    """Fields that differ from their defaults."""
    fields = [f for f in dataclasses.fields(family) if f.name not in ("name", "model_type", "host")]
    said = [f"{f.name} = {getattr(family, f.name)!r}" for f in fields if getattr(family, f.name) != f.default]
    plain = (Family, Mixture)
    methods = [] if type(family) in plain else sorted(n for n in vars(type(family)) if not n.startswith("_"))
    return "; ".join(f"`{text}`" for text in (*said, *(f"{name}()" for name in methods))) or "nothing"


def _file(adapter: Family | Host) -> str:
    """The file an adapter stands in."""
    files = [path for path in sorted(FOLDER.glob("*.py")) if path.stem not in ("family", "host", "mixture")]
    for mark in (f'model_type="{adapter.model_type}"', f'"{adapter.model_type}"'):
        for path in files:
            if mark in path.read_text():
                return f"`{path.name}`"
    raise LookupError(adapter.model_type)


def page() -> str:
    """The whole page."""
    longest = max(len(path.read_text().splitlines()) for path in FOLDER.glob("*.py"))
    head = (
        "# How architectures are seen\n\nGenerated by `python docs/architectures.py` from the "
        "adapters and from "
        "models built without weights; do not edit.\n\nEverything but `compress/families/` speaks of heads, "
        "channels, layers and width. An adapter says where one architecture keeps them.\n\n"
    )
    adding = (
        "## Adding a family\n\nOne file beside those in `src/understudy/compress/families/` (the longest has "
        f"{longest} lines) and its line in `__init__.py`; one entry under `CONFIGS` in "
        "`tests/compress/conftest.py`, "
        "or in `tests/compress/seeing.py` for a model that sees or hears. The tests then prove it: "
        "a layer is the "
        "sum of its branches, parameters are as counted, a pruned checkpoint loads as it is and "
        "says the same. "
        "`tests/compress/test_compress_architectures.py` holds the length, the entry and this page.\n"
    )
    parts = [example(*one) for one in EXAMPLES]
    return head + "\n".join([*parts, "## All families\n\n" + tables() + "\n", adding])


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    text = page()
    if "--check" in sys.argv and (not PAGE.exists() or PAGE.read_text() != text):
        sys.exit("docs/architectures.md is out of date; next: python docs/architectures.py")
    PAGE.write_text(text)
