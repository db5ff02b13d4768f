"""A config with two models, and an empty store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from rollout_world import TEXT

from understudy import config as configuration
from understudy.config import Config
from understudy.traffic.store import Store, open_store


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return configuration.parse(TEXT, "understudy.toml", tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store("sqlite:///understudy.db", tmp_path) as opened:
        yield opened
