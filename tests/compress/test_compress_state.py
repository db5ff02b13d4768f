"""Saved tensors: the format is safetensors' own, and a file that is not whole is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from understudy.compress.processes import Alone
from understudy.compress.state import Tensors, write_tensors
from understudy.errors import ModelError


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a": torch.randn(3, 5),
        "turned": torch.randn(4, 6).T,
        "step": torch.tensor(7.0),
        "small": torch.randn(9).bfloat16(),
        "nothing": torch.zeros(0, 4),
    }


def equal(found, wanted) -> None:
    assert list(found) == list(wanted) or set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_the_library_reads_what_we_write_and_we_what_it_writes(tensors, tmp_path: Path):
    write_tensors(tmp_path / "ours", tensors, Alone())
    equal(load_file(tmp_path / "ours"), tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    equal(Tensors(tmp_path / "theirs"), tensors)
    assert len(Tensors(tmp_path / "ours")) == 5


@pytest.mark.parametrize("left", [0, 5, 40, -1])
def test_a_file_cut_short_is_named(tensors, tmp_path: Path, left: int):
    path = tmp_path / "best.safetensors"
    write_tensors(path, tensors, Alone())
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ModelError, match=r"best\.safetensors"):
        Tensors(path)
    with pytest.raises(ModelError, match="absent"):
        Tensors(tmp_path / "absent")


def test_a_disk_that_takes_nothing_leaves_what_was_there(tensors, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ModelError, match="cannot write"):
        write_tensors(tmp_path / "file" / "best.safetensors", tensors, Alone())
