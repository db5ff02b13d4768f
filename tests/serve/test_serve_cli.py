"""The commands, run as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

from understudy.child import running


def understudy(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "understudy", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_serve_says_when_it_listens_and_stops_when_told(gguf: Path, tmp_path: Path) -> None:
    arguments = ["serve", "--model", f"tiny={gguf}", "--listen", "127.0.0.1:0", "--threads", "1"]
    with running("serve", arguments, tmp_path / "log") as at:
        with urllib.request.urlopen(at["url"] + "/models") as answer:
            assert [model["id"] for model in json.load(answer)["data"]] == ["tiny"]
        taken = at["url"].removeprefix("http://").removesuffix("/v1")
        second = understudy("serve", "--model", f"tiny={gguf}", "--listen", taken, folder=tmp_path)
        assert second.returncode == 2
        assert taken in second.stderr
        assert "Traceback" not in second.stderr
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_serve_without_models_or_with_a_bad_one(tmp_path: Path) -> None:
    (tmp_path / "understudy.toml").write_text("")
    for arguments, said in (([], "no model to serve"), (["--model", "x"], "NAME=PATH")):
        done = understudy("serve", *arguments, folder=tmp_path)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False)
        assert said in done.stderr


def test_export_prints_what_it_wrote(checkpoint: Path, tmp_path: Path) -> None:
    done = understudy(
        "export", str(checkpoint), "--out", "m.gguf", "--kind", "q8_0", "--json", folder=tmp_path
    )
    report = json.loads(done.stdout)
    assert report["kind"] == "q8_0"
    assert report["bytes"] == (tmp_path / "m.gguf").stat().st_size
    bad = understudy("export", str(tmp_path), "--out", "n.gguf", folder=tmp_path)
    assert (bad.returncode, "Traceback" in bad.stderr) == (2, False)
    assert "config.json" in bad.stderr
