"""Models that see or hear: layer = branches, parameters as counted, reload = memory, answers only."""

from __future__ import annotations

import base64
import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seeing
import torch
from click.testing import CliRunner
from transformers import AutoModelForImageTextToText

from understudy.cli.compress import fidelity as fidelity_command
from understudy.cli.compress import prune as prune_command
from understudy.compress import checkpoint
from understudy.compress import plan as plans
from understudy.compress.calibrate import enter
from understudy.compress.corpus import Batch, Document, Row, batches, collate, encode_chat, pack
from understudy.compress.decoder import (
    body,
    extras_of,
    layers_of,
    outside_weights,
    parameters,
    shape_of,
    states_of,
)
from understudy.compress.distill import Corpus, Settings, heal
from understudy.compress.fidelity import fidelity, final_hidden
from understudy.compress.projector import reduced
from understudy.compress.prune import prune
from understudy.compress.teacher import LiveTeacher
from understudy.errors import InputError, ModelError
from understudy.processor import resampled

FAMILIES = list(seeing.CONFIGS)
FILLED = {"qwen2_vl", "qwen2_5_vl", "mllama"}


def kind(family: str) -> str:
    return "audio" if family in ("qwen2_audio", "voxtral") else "image"


@cache
def documents(family: str) -> list[Document]:
    processor = seeing.processor_of(family)
    return [encode_chat(processor, chat) for chat in seeing.chats(kind(family))]


def text_of(family: str) -> list[Batch]:
    return list(batches(pack(documents(family), 64), 256))


def language_parameters(model: Any) -> int:
    return model.num_parameters() - sum(p.numel() for p in outside_weights(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_is_its_two_branches_and_a_picture_enters_where_the_model_lets_it(family):
    model, text = seeing.model_of(family), text_of(family)
    stream = enter(model, text)
    for index, layer in enumerate(layers_of(model)):
        stream.arrive(index)
        stream.advance(layer.attention, index)
        stream.advance(layer.feed_forward, index)
    with torch.no_grad():
        for hidden, batch in zip(stream.hidden, text, strict=True):
            found = body(model).norm(hidden)[batch.predicts]
            torch.testing.assert_close(found, final_hidden(model, batch), rtol=1e-4, atol=1e-4)
        rows = pack(documents(family), 64)
        for row, states in zip(rows, states_of(model, collate(rows)), strict=True):
            if row.media is not None:
                torch.testing.assert_close(states[: row.tokens], alone(model, row), rtol=1e-4, atol=1e-4)


def alone(model: Any, row: Row) -> torch.Tensor:
    """What transformers makes of one chat by itself."""
    ids = torch.tensor([row.documents[0].tokens])
    given = row.media.tensors()
    return model.model(input_ids=ids, attention_mask=torch.ones_like(ids), **given).last_hidden_state[0]


@pytest.mark.parametrize("family", list(seeing.CONFIGS))
def test_parameters_of_the_language_model_as_counted(family):
    model = seeing.model_of(family)
    assert parameters(shape_of(model), extras_of(model)) == language_parameters(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_the_assistant_wrote_is_learnt(family):
    processor, found = seeing.processor_of(family), documents(family)
    words = processor.tokenizer.convert_ids_to_tokens
    answers = [[w.lstrip("Ġ") for w, a in zip(words(d.tokens), d.answer, strict=True) if a] for d in found]
    assert answers[0] == ["it", "is", "red", "</s>"]
    assert answers[3] == ["it", "is", "red", "</s>", "yes", "</s>"]
    assert answers[-1] == ["no", "it", "is", "blue", "</s>"] * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_checkpoint_loads_as_it_is_with_its_processor(family, tmp_path: Path):
    processor = seeing.processor_of(family)
    teacher = seeing.saved(family, tmp_path / "teacher")
    loaded = checkpoint.load(teacher)
    model, text = loaded.model, text_of(family)
    sizes = {"ffn": 16, "heads": 4, "hidden": 32 if family in FILLED else 40}
    plan = plans.decide(shape_of(model), extras_of(model), **sizes)
    prune(model, plan, text)
    assert language_parameters(model) == plan.parameters_after
    out = checkpoint.save(
        model, loaded.tokenizer, tmp_path / "student", licence_from=teacher, processor=loaded.processor
    )
    again = checkpoint.load(out)
    assert shape_of(again.model) == plan.student
    document = encode_chat(again.reader, seeing.chats(kind(family))[0])
    assert document.tokens == encode_chat(processor, seeing.chats(kind(family))[0]).tokens
    batch = text[-1]
    with torch.no_grad():
        torch.testing.assert_close(states_of(again.model, batch), states_of(model, batch), rtol=0, atol=0)


def test_a_processors_files_come_along_byte_for_byte(tmp_path: Path):
    teacher = seeing.saved("gemma3", tmp_path / "teacher")
    loaded = checkpoint.load(teacher)
    out = checkpoint.save(
        loaded.model, loaded.tokenizer, tmp_path / "out", licence_from=teacher, processor=loaded.processor
    )
    for name in ("processor_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (teacher / name).read_bytes()


@pytest.mark.parametrize("family", ["mllama", "llava"])
def test_channels_leave_tower_and_projector_untouched_and_each_layer_chooses_its_own(family):
    model, text = seeing.model_of(family), text_of(family)
    before = [p.clone() for p in outside_weights(model)]
    plan = plans.decide(shape_of(model), extras_of(model), ffn=12)
    done = prune(model, plan, text)
    assert all(torch.equal(a, b) for a, b in zip(before, outside_weights(model), strict=True))
    assert len({tuple(layer.channels) for layer in done.layers}) == len(done.layers)


def test_cross_attention_heads_are_chosen_by_what_enters_their_own_writer():
    """A head that the picture's layer does not use is lost there and kept in the others."""
    model, text = seeing.model_of("mllama"), text_of("mllama")
    cross = layers_of(model)[1]
    assert cross.gated
    with torch.no_grad():
        cross.o.weight[:, 3 * 8 : 4 * 8] = 0  # the fourth of six heads of 8 writes nothing
    plan = plans.decide(shape_of(model), extras_of(model), heads=4, hidden=32)
    done = prune(model, plan, text)
    assert 3 not in done.layers[1].heads
    assert (cross.q.out_features, cross.k.out_features, cross.o.in_features) == (32, 16, 32)


def test_a_layer_that_reads_pictures_cannot_be_measured_on_text_alone():
    model = seeing.model_of("mllama")
    plain = [d for d in documents("mllama") if d.media is None]
    plan = plans.decide(shape_of(model), extras_of(model), ffn=16)
    with pytest.raises(ModelError, match="reads pictures"):
        prune(model, plan, list(batches(pack(plain, 64), 256)))


@pytest.mark.parametrize(("family", "sizes"), [("qwen3_vl", {"layers": 1}), ("qwen2_vl", {"heads": 4})])
def test_sizes_that_transformers_could_not_load_are_refused(family, sizes):
    model = seeing.model_of(family)
    with pytest.raises(InputError):
        plans.decide(shape_of(model), extras_of(model), **sizes)


def test_the_space_that_cross_attention_reads_is_the_best_of_its_size():
    """Against float64: the error is the sum of the eigenvalues left out, and no slicing does better."""
    torch.manual_seed(0)
    c = torch.randn(400, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    readers = torch.randn(9, 12, dtype=torch.float64)
    second = c.T @ c
    space = reduced(second, readers.T @ readers, 5)
    error = ((c - c @ space.into.T @ space.out.T) @ readers.T).square().sum()
    values = torch.linalg.eigvalsh(readers @ second @ readers.T)
    torch.testing.assert_close(error, values[:-5].sum(), rtol=1e-6, atol=1e-6)
    whole = reduced(second, readers.T @ readers, 12)
    torch.testing.assert_close(
        whole.out @ whole.into, torch.eye(12, dtype=torch.float64), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("family", ["llava", "mllama"])
def test_a_refitted_projector_loses_less_than_a_sliced_one(family):
    teacher, text = seeing.model_of(family), text_of(family)
    losses: list[float] = []
    for keep_first in (False, True):
        model = copy.deepcopy(teacher)
        sizes = {"hidden": 32 if family == "mllama" else 40, "heads": 4}
        plan = plans.decide(shape_of(model), extras_of(model), **sizes)
        prune(model, plan, text)
        if keep_first:
            seeing.reset_projector(model, teacher)
        losses.append(fidelity(teacher, model, [b for b in text if any(b.media)]).kl)
    assert losses[0] < losses[1]


def test_a_student_heals_on_pictures_with_its_tower_frozen(tmp_path: Path):
    teacher = seeing.model_of("idefics3")
    found, text = documents("idefics3"), text_of("idefics3")
    student = copy.deepcopy(teacher)
    prune(student, plans.decide(shape_of(student), extras_of(student), ffn=12), text)
    tower = [p.clone() for p in outside_weights(student)]
    before = fidelity(teacher, student, text).answer_kl
    settings = Settings(tokens=3_000, learning_rate=3e-3, step_tokens=256, adapt_ce=0.0, checks=2)
    heal(student, LiveTeacher(teacher), Corpus(found, []), settings, tmp_path)
    assert fidelity(teacher, student, text).answer_kl < 0.8 * before
    assert all(torch.equal(a, b) for a, b in zip(tower, outside_weights(student), strict=True))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}, "lies elsewhere"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,!!"}}, "not base64"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}}, "cannot be read"),
        ({"type": "image_url", "image_url": {"url": "/nowhere/a.png"}}, "cannot read"),
        ({"type": "input_audio", "input_audio": {"data": "", "format": "mp3"}}, "mp3"),
        ({"type": "video_url"}, "video_url"),
    ],
)
def test_a_part_that_cannot_be_read_is_named(part, message):
    chat = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "no"}]
    with pytest.raises(InputError, match=message):
        encode_chat(seeing.processor_of("llava"), chat)


def test_sound_at_another_rate_is_the_same_wave():
    seconds = np.arange(8000) / 8000
    wave = np.sin(2 * np.pi * 440 * seconds).astype(np.float32)
    wanted = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    np.testing.assert_allclose(resampled(wave, 8000, 16000), wanted, atol=1e-4)


def test_the_commands_take_chats_with_pictures_beside_their_file(tmp_path: Path):
    teacher = seeing.saved("idefics3", tmp_path / "teacher")
    lines: list[str] = []
    for number, chat in enumerate([*seeing.chats(), *seeing.chats()]):
        for part in chat[0]["content"] if isinstance(chat[0]["content"], list) else []:
            if part["type"] == "image_url" and number % 2:
                raw = base64.b64decode(part["image_url"]["url"].partition(",")[2])
                (tmp_path / f"{number}.png").write_bytes(raw)
                part["image_url"] = {"url": f"{number}.png"}
        lines.append(json.dumps({"messages": chat}))
    texts, out = tmp_path / "chats.jsonl", tmp_path / "student"
    texts.write_text("\n".join(lines))
    sizes = ["--ffn", "16", "--hidden", "40", "--heads", "4"]
    made = CliRunner().invoke(
        prune_command, [str(teacher), "--out", str(out), *sizes, "--calibration", str(texts), "--json"]
    )
    assert made.exit_code == 0, made.output
    measured = CliRunner().invoke(fidelity_command, [str(teacher), str(out), "--text", str(texts), "--json"])
    assert measured.exit_code == 0, measured.output
    assert json.loads(measured.stdout)["answer_tokens"] > 100
    model = AutoModelForImageTextToText.from_pretrained(out)
    assert model.config.text_config.hidden_size == 40
