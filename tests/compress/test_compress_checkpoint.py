"""Loading what is whole, naming what is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from understudy.compress import checkpoint
from understudy.errors import InputError, ModelError


def test_a_saved_folder_loads_with_plain_transformers(folder: Path, make, logits):
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(model), logits(make()), rtol=0, atol=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def test_licence_and_card_come_along(folder: Path, tmp_path: Path):
    (folder / "LICENSE.txt").write_text("ours")
    loaded = checkpoint.load(folder)
    out = checkpoint.save(
        loaded.model, loaded.tokenizer, tmp_path / "out", card="# card", licence_from=loaded.folder
    )
    assert (out / "LICENSE.txt").read_text() == "ours"
    assert (out / "README.md").read_text() == "# card"


def test_saving_replaces_what_was_there(folder: Path, make, tokenizer, tmp_path: Path):
    (folder / "old").write_text("")
    checkpoint.save(make(), tokenizer, folder)
    assert not (folder / "old").exists()
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_the_digest_follows_the_weights(folder: Path, make, tokenizer, tmp_path: Path):
    same = checkpoint.save(make(), tokenizer, tmp_path / "same")
    other = checkpoint.save(make(seed=1), tokenizer, tmp_path / "other")
    assert checkpoint.digest_of(folder) == checkpoint.digest_of(same) != checkpoint.digest_of(other)


def test_an_absent_path(tmp_path: Path):
    with pytest.raises(ModelError, match="no model at"):
        checkpoint.load(tmp_path / "nothing.gguf")


def test_an_absent_package():
    with pytest.raises(InputError, match="no_such_package"):
        checkpoint.load("package:no_such_package/model.gguf")


def test_no_gguf(tmp_path: Path):
    (tmp_path / "model.gguf").write_bytes(b"not a model")
    with pytest.raises(ModelError, match="not a GGUF file"):
        checkpoint.load(tmp_path / "model.gguf")


def test_a_truncated_gguf(tmp_path: Path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + (9).to_bytes(8, "little"))
    with pytest.raises(ModelError, match=r"cannot load model\.gguf"):
        checkpoint.load(tmp_path / "model.gguf")


def test_truncated_weights(folder: Path):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot load"):
        checkpoint.load(folder)


def test_a_folder_without_a_model(tmp_path: Path):
    with pytest.raises(ModelError, match="cannot load"):
        checkpoint.load(tmp_path)


def test_weights_that_are_not_finite(make, tokenizer, tmp_path: Path):
    model = make()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    checkpoint.save(model, tokenizer, tmp_path / "bad")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight holds values that are not finite"):
        checkpoint.load(tmp_path / "bad")


def test_an_error_while_saving_leaves_the_old_checkpoint(folder: Path, make, tokenizer):
    before = checkpoint.digest_of(folder)

    def run_full() -> None:
        with checkpoint.whole_folder(folder) as partial:
            (partial / "half").write_text("")
            raise OSError(28, "No space left on device")

    with pytest.raises(ModelError, match="cannot write"):
        run_full()
    assert checkpoint.digest_of(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_hub_id_is_read_from_the_cache_with_its_licence(
    folder: Path, tmp_path: Path, monkeypatch, make, logits
):
    """The hub's cache as it lies on disk: a commit, and a name for it."""
    from huggingface_hub import constants

    (folder / "LICENSE").write_text("theirs")
    repository = tmp_path / "cache" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abcd" * 5)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / ("0123abcd" * 5))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    loaded = checkpoint.load("owner/name")
    assert loaded.digest == "hub:" + "0123abcd" * 5
    torch.testing.assert_close(logits(loaded.model), logits(make()), rtol=0, atol=0)
    out = checkpoint.save(loaded.model, loaded.tokenizer, tmp_path / "out", licence_from=loaded.folder)
    assert (out / "LICENSE").read_text() == "theirs"
    with pytest.raises(ModelError, match="cannot load owner/another"):
        checkpoint.load("owner/another")
