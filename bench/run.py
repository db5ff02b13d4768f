"""Run every bench and write bench/RESULTS.md.

Each bench is a script that prints Markdown on standard output and progress on standard error. One that fails
is named in the results with what it printed, never left out in silence. `python bench/run.py gateway`
runs one; the others keep their last results.
"""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
BENCHES = (
    "gateway",
    "recording",
    "catalog",
    "evaluate",
    "agreement",
    "rollout",
    "shadow",
    "dashboard",
    "pruning",
    "distillation",
    "mixtures",
    "ray_capture",
    "ray_asking",
    "vision",
    "serving",
)
RESULTS = HERE / "RESULTS.md"


def machine() -> str:
    """One line about the machine; figures mean little without it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    today = datetime.datetime.now(datetime.UTC).date()
    name = model or platform.processor()
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}, {today}"


def run(name: str) -> str:
    """The Markdown of one bench, or a line that says how it failed."""
    print(f"bench/{name}.py …", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, HERE / f"{name}.py"], stdout=subprocess.PIPE, text=True)
    if done.returncode == 0:
        return f"{done.stdout.strip()}\n\nMeasured on: {machine()}."
    return f"bench/{name}.py exited with {done.returncode}; what it printed:\n\n{done.stdout.strip()}"


def sections() -> dict[str, str]:
    """Results written so far, by bench."""
    if not RESULTS.exists():
        return {}
    parts = RESULTS.read_text().split("\n## ")[1:]
    return {part.partition("\n")[0].strip(): part.partition("\n")[2].strip() for part in parts}


def write(results: dict[str, str]) -> None:
    head = "# Results\n\nWritten by `make bench`. Compare within one run: ratios carry over.\n"
    body = [f"\n## {name}\n\n{results[name]}\n" for name in BENCHES if name in results]
    RESULTS.write_text(head + "".join(body))


if __name__ == "__main__":
    results = sections()
    for bench in sys.argv[1:] or BENCHES:
        results[bench] = run(bench)
        write(results)
    print(RESULTS.read_text())
