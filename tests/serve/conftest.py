"""Tiny real models with tiny real tokenizers, made anew for each run."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from serve_tokenizers import SHAPE, byte_level_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from understudy.config import Serve
from understudy.serve.export import export_gguf
from understudy.serve.server import RunningServe, start

Maker = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny models gain nothing from more, and waiting threads burn the processor."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """``make_checkpoint("Llama", tokenizer=None, **config)`` -> a checkpoint folder with random weights."""

    def make(family: str, tokenizer: PreTrainedTokenizerFast | None = None, **config: Any) -> Path:
        transformers.utils.logging.disable_progress_bar()
        folder = tmp_path_factory.mktemp("checkpoint")
        tokenizer = tokenizer or byte_level_tokenizer()
        torch.manual_seed(0)
        kind = getattr(transformers, f"{family}Config")
        model = AutoModelForCausalLM.from_config(kind(vocab_size=len(tokenizer), **(SHAPE | config)))
        for name, weight in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):  # created as ones and zeros, which hide mistakes
                weight.data += torch.randn_like(weight) * 0.2
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def checkpoint(make_checkpoint: Maker) -> Path:
    """A Llama with the shape of a pruned one, tied embeddings and a chat template."""
    return make_checkpoint("Llama", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def gguf(checkpoint: Path) -> Path:
    """`checkpoint` in F16."""
    return export_gguf(checkpoint, checkpoint / "tiny-f16.gguf", "f16").path


@pytest.fixture(scope="session")
def reference(checkpoint: Path) -> Any:
    """`checkpoint` in transformers, the oracle."""
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


@pytest.fixture
def cut(gguf: Path, tmp_path: Path) -> None:
    """A file whose copying broke off."""
    (tmp_path / "cut.gguf").write_bytes(gguf.read_bytes()[:-1000])


@pytest.fixture
def copy_later(gguf: Path, tmp_path: Path) -> Callable[[], None]:
    """Brings the file of the model `later`."""
    return lambda: shutil.copyfile(gguf, tmp_path / "later.gguf") and None


@pytest.fixture
async def server(checkpoint: Path, gguf: Path, cut: None, tmp_path: Path) -> AsyncIterator[RunningServe]:
    """A server with the tiny model as GGUF and as a folder, a file cut off and one not there yet."""
    models = {"tiny": str(gguf), "folder": str(checkpoint), "cut": "cut.gguf", "later": "later.gguf"}
    settings = Serve(listen="127.0.0.1:0", threads=1, slots=2, context=128, models=models)
    running = await start(settings, tmp_path)
    yield running
    await running.stop()
