"""The command line's manners: light start, exit codes, tracebacks only for bugs."""

import json
import subprocess
import sys
from pathlib import Path

UNDERSTUDY = [sys.executable, "-m", "understudy"]


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*UNDERSTUDY, *arguments], capture_output=True, text=True, cwd=cwd)


def test_help_imports_no_heavy_package() -> None:
    code = "import sys; from click.testing import CliRunner; from understudy.cli.main import main;"
    code += "CliRunner().invoke(main, ['--help']);"
    code += (
        "print([m for m in ('torch','transformers','aiohttp','numpy','rich','msgspec') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_missing_config_exits_2_with_one_clear_message(tmp_path: Path) -> None:
    done = run("up", cwd=tmp_path)
    assert done.returncode == 2
    assert "understudy.toml" in done.stderr
    assert "understudy init" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_command_exits_2() -> None:
    done = run("drll")
    assert done.returncode == 2
    assert "drll" in done.stderr


def test_init_writes_once_and_says_what_next(tmp_path: Path) -> None:
    assert run("init", cwd=tmp_path).returncode == 0
    again = run("init", cwd=tmp_path)
    assert again.returncode == 2
    assert "--force" in again.stderr


def test_version_speaks_json() -> None:
    assert json.loads(run("version", "--json").stdout)["understudy"]
