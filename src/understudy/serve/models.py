"""The models a server offers: name -> file, loaded at first use and shared from then on.

A file may appear after the start (a student that is still being distilled): it is listed once it exists. It
ignores memory pressure: a loaded model stays.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import NamedTuple

from understudy.config import Serve, resolve_path
from understudy.errors import ModelError, UserError
from understudy.serve.engine import Engine
from understudy.serve.request import RequestError


class ModelFile(NamedTuple):
    """A model on disk."""

    name: str
    path: Path
    created: int
    """Unix seconds of its last change."""


class Models:
    """Engines by model name."""

    def __init__(self, settings: Serve, root: Path) -> None:
        self._settings = settings
        self._paths = {name: resolve_path(value, root) for name, value in settings.models.items()}
        self._engines: dict[str, Engine] = {}
        self._loading: dict[str, asyncio.Lock] = {name: asyncio.Lock() for name in self._paths}

    def files(self) -> list[ModelFile]:
        """Models whose files exist now."""
        found = [(name, path) for name, path in self._paths.items() if path.exists()]
        return [ModelFile(name, path, int(path.stat().st_mtime)) for name, path in found]

    async def engine(self, name: str) -> Engine:
        """The engine of a model. Raises RequestError: 404 for an unknown name, 500 if it cannot be loaded."""
        path = self._paths.get(name)
        if path is None or not path.exists():
            raise _unknown(name, [file.name for file in self.files()], path)
        async with self._loading[name]:
            if name not in self._engines:
                try:
                    self._engines[name] = await open_engine(path, self._settings)
                except UserError as error:
                    raise RequestError(
                        f"the model {name!r} cannot be loaded: {error}",
                        status=500,
                        kind="server_error",
                        code="model_not_loadable",
                    ) from error
        return self._engines[name]

    async def close(self) -> None:
        for engine in self._engines.values():
            await engine.close()
        self._engines.clear()


def _unknown(name: str, known: list[str], path: Path | None) -> RequestError:
    reason = f"its file {path} is not there yet" if path else "no such model"
    listed = ", ".join(known) or "none"
    return RequestError(
        f"{name!r}: {reason}; models here: {listed}", status=404, param="model", code="model_not_found"
    )


async def open_engine(path: Path, settings: Serve) -> Engine:
    """The engine for a GGUF file or a checkpoint folder. Raises ModelError for anything else."""
    if await asyncio.to_thread(path.is_dir):
        from understudy.serve.checkpoint_engine import CheckpointEngine

        return await CheckpointEngine.open(path, settings)
    if path.suffix == ".safetensors":
        raise ModelError(f"{path} is a weights file", expected="its checkpoint folder, or a GGUF file")
    from understudy.serve.llamacpp import LlamaCppEngine

    return await LlamaCppEngine.open(path, settings)
