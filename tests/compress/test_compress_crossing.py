"""Layers and heads of cross-attention as axes of their own: what is chosen, what loads, what stays."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seeing
import torch
from transformers import AutoModelForMultimodalLM

from understudy.compress import checkpoint
from understudy.compress import plan as plans
from understudy.compress.corpus import Batch, Document, batches, encode_chat, pack
from understudy.compress.decoder import extras_of, layers_of, outside_weights, shape_of, states_of
from understudy.compress.distill import Corpus, Settings, heal
from understudy.compress.prune import Method, prune
from understudy.compress.teacher import LiveTeacher
from understudy.errors import InputError, ModelError

Sizes = dict[str, Any]


def crossing_model(seed: int = 0) -> Any:
    """A Mllama of five layers, the second and the fourth of which read the picture."""
    config = seeing.CONFIGS["mllama"]()
    config.text_config.num_hidden_layers, config.text_config.cross_attention_layers = 5, [1, 3]
    torch.manual_seed(seed)
    model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
        model.lm_head.weight[2] *= 0.1
    return model


@cache
def documents() -> list[Document]:
    processor = seeing.processor_of("mllama")
    return [encode_chat(processor, chat) for chat in seeing.chats()]


def text_of() -> list[Batch]:
    return list(batches(pack(documents(), 64), 256))


def language_parameters(model: Any) -> int:
    return model.num_parameters() - sum(p.numel() for p in outside_weights(model))


@torch.no_grad()
def said(model: Any, text: list[Batch]) -> list[torch.Tensor]:
    return [states_of(model, batch)[batch.real] for batch in text]


def saved_again(model: Any, folder: Path) -> Any:
    processor = seeing.processor_of("mllama")
    return checkpoint.load(checkpoint.save(model, processor.tokenizer, folder, processor=processor)).model


@pytest.mark.parametrize(
    "sizes",
    [
        {"cross_heads": 3},
        {"cross_heads": 3, "ffn": 16},
        {"heads": 4, "hidden": 32, "cross_heads": 2},
        {"cross_layers": 1},
        {"cross_layers": 1, "layers": 3, "cross_heads": 3, "ffn": 16},
    ],
    ids=str,
)
def test_cross_attention_of_any_size_is_a_checkpoint_that_loads_as_it_is(sizes: Sizes, tmp_path: Path):
    model, text = crossing_model(), text_of()
    whole = shape_of(model)
    assert (whole.layers, whole.cross_layers, whole.heads, whole.cross_heads) == (5, 2, 6, 6)
    plan = plans.decide(whole, extras_of(model), **sizes)
    done = prune(model, plan, text)
    plans.check_layers(done)
    assert shape_of(model) == plan.student
    filled = language_parameters(model)
    zeros = sum(
        int((p == 0).sum()) for layer in layers_of(model) if layer.gated for p in layer.module.parameters()
    )
    assert filled - zeros == plan.parameters_after
    again = saved_again(model, tmp_path / "student")
    assert shape_of(again) == plan.student
    for a, b in zip(said(again, text), said(model, text), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    document = documents()[0]
    assert document.media is not None
    given = {"input_ids": torch.tensor([document.tokens]), **document.media.tensors()}
    with torch.no_grad():
        first = again.generate(**given, max_new_tokens=4, do_sample=False)
        other = model.generate(**given, max_new_tokens=4, do_sample=False)
    assert first.tolist() == other.tolist()


def test_a_group_that_writes_nothing_is_the_one_cross_attention_loses():
    """In one of the two layers the first, in the other the second; nothing else moves."""
    model, text = crossing_model(), text_of()
    with torch.no_grad():
        for layer, dead in ((1, range(3)), (3, range(3, 6))):
            for head in dead:
                layers_of(model)[layer].o.weight[:, head * 8 : head * 8 + 8] = 0
    before = said(model, text)
    done = prune(model, plans.decide(shape_of(model), extras_of(model), cross_heads=3), text)
    assert [(k.layer, k.heads, k.kv_heads) for k in done.layers if k.crossing] == [
        (1, [3, 4, 5], [1]),
        (3, [0, 1, 2], [0]),
    ]
    assert all(k.heads == list(range(6)) for k in done.layers if not k.crossing)
    for a, b in zip(said(model, text), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_group_chosen_is_the_one_whose_loss_after_the_refit_is_least():
    """Against each group cut by hand and `o_proj` solved by numpy in float64."""
    model, text = crossing_model(), [b for b in text_of() if any(b.media)]
    layer, seen = layers_of(model)[1], list[torch.Tensor]()
    handle = layer.o.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    said(model, text)
    handle.remove()
    x = torch.cat([s[b.real] for s, b in zip(seen, text, strict=True)]).double().numpy()
    wanted = x @ layer.o.weight.detach().double().numpy().T
    losses = [np.linalg.lstsq(x[:, at : at + 24], wanted, rcond=None)[1].sum() for at in (0, 24)]
    plan = plans.decide(shape_of(model), extras_of(model), cross_heads=3)
    assert abs(losses[0] / losses[1] - 1) > 0.05
    done = prune(model, plan, text, Method(ridge=1e-6))
    assert done.layers[1].kv_heads == [int(np.argmin(losses))]


def test_a_layer_whose_gates_are_closed_is_the_one_that_goes_and_nothing_moves():
    for closed in (1, 3):
        model, text = crossing_model(), text_of()
        gates: Any = layers_of(model)[closed].module
        with torch.no_grad():
            gates.cross_attn_attn_gate.zero_()
            gates.cross_attn_mlp_gate.zero_()
        before = said(model, text)
        done = prune(model, plans.decide(shape_of(model), extras_of(model), cross_layers=1), text)
        assert [k.layer for k in done.layers] == [i for i in range(5) if i != closed]
        assert model.config.text_config.cross_attention_layers == [1 if closed == 3 else 2]
        for a, b in zip(said(model, text), before, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_padding_of_cross_attention_stays_padding_while_it_heals(tmp_path: Path):
    teacher, text = crossing_model(), text_of()
    student = copy.deepcopy(teacher)
    prune(student, plans.decide(shape_of(student), extras_of(student), cross_heads=3), text)
    settings = Settings(tokens=400, learning_rate=3e-3, step_tokens=128, checks=1)
    heal(student, LiveTeacher(teacher), Corpus(documents(), []), settings, tmp_path)
    for layer in layers_of(student):
        if layer.gated:
            padded = (layer.q.weight[24:], layer.k.weight[8:], layer.v.weight[8:], layer.o.weight[:, 24:])
            assert not any(bool(part.any()) for part in padded)
            assert all(bool(part.any()) for part in (layer.q.weight[:24], layer.o.weight[:, :24]))


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        ("mllama", {"cross_heads": 4}, "whole KV groups of 3: 3, 6"),
        ("mllama", {"cross_layers": 3}, "1 to 2 that read pictures"),
        ("mllama", {"layers": 2}, "1 to 3 others"),
        ("llava", {"cross_heads": 3}, "a teacher that reads pictures through"),
    ],
)
def test_sizes_of_cross_attention_that_cannot_be_are_named(family: str, sizes: Sizes, message: str):
    model = crossing_model() if family == "mllama" else seeing.model_of(family)
    with pytest.raises(InputError, match=message):
        plans.decide(shape_of(model), extras_of(model), **sizes)


def test_layers_that_read_pictures_cannot_be_compared_without_one():
    model = crossing_model()
    plain = [d for d in documents() if d.media is None]
    plan = plans.decide(shape_of(model), extras_of(model), cross_layers=1)
    with pytest.raises(ModelError, match="no picture among"):
        prune(model, plan, list(batches(pack(plain, 64), 256)))
