"""The page of architectures is what the code says; an adapter is one short file with an entry here."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import seeing

from understudy.compress.families import DECODERS, FAMILIES, HOSTS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "docs" / "architectures.py"
    spec = importlib.util.spec_from_file_location("architectures", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["architectures"] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_adapters_say(script: ModuleType):
    assert script.PAGE.read_text() == script.page(), "next: python docs/architectures.py"


def test_an_adapter_is_one_file_of_under_150_lines(script: ModuleType):
    for path in script.FOLDER.glob("*.py"):
        assert len(path.read_text().splitlines()) < 150, path.name


def test_every_family_has_its_entry_in_the_tests():
    text = (ROOT / "tests" / "compress" / "conftest.py").read_text()
    missing = [f.model_type for f in FAMILIES if f'"{f.model_type}":' not in text]
    assert not missing
    assert {host.model_type for host in HOSTS} == set(seeing.CONFIGS)
    inside = {seeing.CONFIGS[host.model_type]().text_config.model_type for host in HOSTS}
    assert inside <= {family.model_type for family in DECODERS}
