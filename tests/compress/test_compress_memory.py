"""What is freed is no longer resident."""

from __future__ import annotations

import subprocess
import sys

import pytest

HOLES = """
import contextlib, sys
import torch
from understudy.compress.memory import large_blocks_returned
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 >> 20
def filled(count):
    return [torch.ones(5 << 18) for _ in range(count)]
with large_blocks_returned() if sys.argv[1] == "returned" else contextlib.nullcontext():
    del filled(1)[:]  # raises glibc's threshold
    before = resident()
    kept = filled(80)[::2]
    print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
@pytest.mark.parametrize(("way", "least", "most"), [("returned", 180, 240), ("as it is", 320, 480)])
def test_holes_between_tensors_are_given_back(way: str, least: int, most: int):
    """80 tensors of 5 MiB, every second one freed."""
    done = subprocess.run([sys.executable, "-c", HOLES, way], capture_output=True, text=True, check=True)
    assert least <= int(done.stdout) <= most
