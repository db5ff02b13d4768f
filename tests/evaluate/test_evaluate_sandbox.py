"""A model's code: graded by what it does, and kept from everything else."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from understudy.errors import InputError
from understudy.evaluate import sandbox
from understudy.evaluate.grade import Reply, grade
from understudy.evaluate.sandbox import run
from understudy.evaluate.similarity import character_ngrams, similarity


def _permitted() -> bool:
    try:
        return run("pass").passed
    except InputError:
        return False


needs_sandbox = pytest.mark.skipif(not _permitted(), reason="no user namespaces or no Landlock here")

ADD = "def add(a, b):\n    return a + b\n"
TESTS = "assert add(2, 3) == 5\nassert add(-1, 1) == 0"


@needs_sandbox
@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (f"Sure:\n```python\n{ADD}```\nThat is it.", 1.0),
        (ADD, 1.0),
        ("```python\ndef add(a, b):\n    return a - b\n```", 0.0),
        ("```\nimport sys; sys.exit(0)\n```", 0.0),
        ("```\nimport os; os._exit(0)\n```", 0.0),
        ("I cannot write code.", 0.0),
    ],
)
def test_code_is_graded_by_what_it_does(answer: str, score: float) -> None:
    assert grade("code", Reply(answer), TESTS) == score


@needs_sandbox
def test_no_network_not_even_this_machine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not run(f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)").passed
        server.settimeout(0.05)
        with pytest.raises(TimeoutError):
            server.accept()


@needs_sandbox
def test_no_files_but_its_own(tmp_path: Path) -> None:
    secret = tmp_path / "key"
    secret.write_text("secret")
    assert run("open('mine', 'w').write('x'); assert open('mine').read() == 'x'").passed
    assert not run(f"open({str(secret)!r}).read()").passed
    assert not run(f"import os; os.unlink({str(secret)!r})").passed
    assert not run(f"open({str(tmp_path / 'new')!r}, 'w')").passed
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
    assert not run("import os; os.listdir('/proc')").passed


@needs_sandbox
def test_no_secrets_in_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENDOR_KEY", "secret")
    assert run("import os; assert 'VENDOR_KEY' not in os.environ").passed


@needs_sandbox
def test_limits_of_memory_and_time() -> None:
    assert not run("x = bytearray(10 ** 9)").passed
    assert run("x = bytearray(10 ** 7)").passed
    assert not run("while True: pass", seconds=1).passed
    assert run("import time; time.sleep(30)", seconds=1).reason == "out of time"


@needs_sandbox
def test_no_process_outlives_it(tmp_path: Path) -> None:
    mark = 41_417
    run(
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep({mark})'])"
    )
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert f"sleep({mark})" not in listed


@pytest.mark.parametrize(
    "program",
    [
        "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",  # 0 in there: its whole process group
        "import os, signal; os.killpg(0, signal.SIGKILL)",
        "import os, signal; os.kill(-1, signal.SIGKILL)",
    ],
)
def test_it_cannot_kill_those_who_wait_for_it(program: str) -> None:
    """In a process of our own, that it would take with it."""
    child = f"from understudy.evaluate.sandbox import run; print(run({program!r}).passed)"
    done = subprocess.run(
        [sys.executable, "-c", child], capture_output=True, text=True, start_new_session=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, "False")


def test_no_second_process_however_it_is_asked_for() -> None:
    """Root's processes are not counted, so they are not made at all; threads are."""
    for call in ("os.fork()", "os.posix_spawn('/bin/true', ['true'], {})", "os.forkpty()"):
        assert not run(f"import os; {call}").passed
    assert not run("import subprocess; subprocess.run(['/bin/true'])").passed
    assert run("import threading; t = threading.Thread(target=int); t.start(); t.join()").passed


def test_no_more_disk_than_it_was_given(tmp_path: Path) -> None:
    fill = "for i in range({}): open(str(i), 'wb').write(bytes({}))"
    assert run(fill.format(4, 2**20)).passed
    assert not run(fill.format(10, 10 * 2**20)).passed
    assert not run(fill.format(5000, 0)).passed


@pytest.mark.parametrize("how", ["os.symlink({0!r}, 'l')", "os.link({0!r}, 'l')", "os.rename({0!r}, 'l')"])
def test_no_link_leads_out(tmp_path: Path, how: str) -> None:
    secret = tmp_path / "key"
    secret.write_text("secret")
    assert not run(f"import os; {how.format(str(secret))}; open('l').read()").passed
    assert not run(f"import os; {how.format(str(secret))}; open('l', 'w').write('x')").passed
    assert secret.read_text() == "secret"


def test_without_protection_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    sandbox.protection.cache_clear()
    with pytest.raises(InputError, match="not run here"):
        run("print('never')")
    monkeypatch.undo()
    sandbox.protection.cache_clear()


def test_similarity_of_texts() -> None:
    one = "The meeting is moved to Thursday afternoon."
    assert similarity(one, one) == pytest.approx(1.0)
    near = similarity(one, "The meeting moved to thursday afternoon")
    far = similarity(one, "Bananas are rich in potassium.")
    assert near > 0.8 > 0.3 > far
    assert grade("similarity", Reply(one), "The meeting moved to thursday afternoon") == near
    assert (similarity("", ""), similarity("", "x")) == (1.0, 0.0)
    assert sum(x * x for x in character_ngrams("abc")) == pytest.approx(3 + 2 + 1)


def test_another_embedding_can_be_put_in() -> None:
    """Angle between (1, 0) and (1, 1) is 45°."""
    vectors = {"a": [1.0, 0.0], "b": [1.0, 1.0]}
    assert similarity("a", "b", embed=vectors.__getitem__) == pytest.approx(0.5**0.5)
