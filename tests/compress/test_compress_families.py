"""Each family's adapter: the layer is its branches, the count is right, the checkpoint comes back."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from understudy.compress import checkpoint
from understudy.compress import plan as plans
from understudy.compress.calibrate import enter
from understudy.compress.decoder import extras_of, family_of, layers_of, parameters, shape_of
from understudy.compress.families import DENSE
from understudy.compress.fidelity import final_hidden
from understudy.compress.prune import prune
from understudy.errors import ModelError

FAMILIES = [family.model_type for family in DENSE]
SHAPES = [
    {"ffn": 16},
    {"heads": 4},
    {"heads": 3, "kv_heads": 1},
    {"heads": 2, "kv_heads": 1, "ffn": 8},
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_is_its_two_branches(family, make, text):
    model = make(family)
    stream = enter(model, text)
    for index, layer in enumerate(layers_of(model)):
        stream.advance(layer.attention, index)
        stream.advance(lambda hidden, _call, layer=layer: layer.feed_forward(hidden), index)
    with torch.no_grad():
        for hidden, batch in zip(stream.hidden, text, strict=True):
            wanted = final_hidden(model, batch)
            torch.testing.assert_close(model.model.norm(hidden)[batch.predicts], wanted)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_as_counted(family, tied, make):
    model = make(family, tie_word_embeddings=tied)
    assert parameters(shape_of(model), extras_of(model)) == model.num_parameters()


def test_parameters_of_a_llama_with_every_bias(make):
    model = make("llama", attention_bias=True, mlp_bias=True)
    assert parameters(shape_of(model), extras_of(model)) == model.num_parameters()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", SHAPES)
def test_a_pruned_checkpoint_comes_back_with_the_same_logits(
    family, sizes, make, text, tokenizer, tmp_path: Path, logits
):
    model = make(family)
    plan = plans.decide(shape_of(model), extras_of(model), **sizes)
    prune(model, plan, text)
    assert model.num_parameters() == plan.parameters_after
    again = checkpoint.load(checkpoint.save(model, tokenizer, tmp_path / "student")).model
    assert shape_of(again) == plan.student
    assert again.config.head_dim == 8
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


def test_grouped_heads_stay_in_their_groups(make, text):
    model = make()
    plan = plans.decide(shape_of(model), extras_of(model), heads=2)
    for kept in prune(model, plan, text).layers:
        assert [head // 3 for head in kept.heads] == kept.kv_heads == [0, 1]


def test_an_unknown_family_says_what_an_adapter_needs():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16))
    with pytest.raises(ModelError) as caught:
        family_of(model)
    assert "'gpt2'" in str(caught.value)
    assert "compress/families" in caught.value.next_step


def test_a_shape_says_its_group(make):
    shape = shape_of(make())
    assert (shape.heads, shape.kv_heads, shape.group) == (6, 2, 3)
    assert msgspec.json.decode(msgspec.json.encode(shape), type=type(shape)) == shape
