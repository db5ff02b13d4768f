"""A child process of ours: started, waited for until it says it is ready, stopped with whatever it started.

`understudy serve` and `understudy up` print one JSON line with ``--json`` once they listen; that line is the
handshake. A child whose parent is killed is told to stop by its standard input, a pipe that only the parent
holds open. It ignores what the child does afterwards; its output goes to a log file.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from understudy.errors import UserError

STOP_GRACE_S = 15.0
LOOK_S = 0.5
"""How often it is looked whether a child that is kept running still runs."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""Before it is started again."""
STEADY_S = 60.0
"""One that has run for so long is not taken to end at once again."""

_log = logging.getLogger("understudy.child")


@contextmanager
def running(
    name: str, arguments: Sequence[str], log: Path, *, wait_s: float = 120.0
) -> Generator[dict[str, Any], None, None]:
    """Run ``understudy ARGUMENTS --json`` beside the block; yields the JSON line it printed when ready
    and its ``pid``.

    Raises UserError with the end of its log if it ends or stays silent for ``wait_s`` seconds.
    """
    process = _begin(arguments, log)
    try:
        yield _handshake(name, process, log, time.monotonic() + wait_s)
    finally:
        _stop(process)


@contextmanager
def kept_running(
    name: str, arguments: Sequence[str], log: Path, *, wait_s: float = 120.0
) -> Generator[None, None, None]:
    """The same for a child that nobody waits for again: it is started anew whenever it ends.

    One that ends soon is given ever longer pauses (`pause_after`). The first start raises as `running` does.
    """
    kept = _Kept(name, arguments, log)
    try:
        _handshake(name, kept.process, log, time.monotonic() + wait_s)
        kept.watch()
        yield
    finally:
        kept.stop()


def pause_after(lived_s: float, pause_s: float) -> float:
    """Seconds to wait before a child is started again that ended after so long, the last pause being
    ``pause_s`` (0: none yet)."""
    return FIRST_PAUSE_S if lived_s >= STEADY_S or not pause_s else min(2 * pause_s, LONGEST_PAUSE_S)


class _Kept:
    """A child and the thread that starts it again."""

    def __init__(self, name: str, arguments: Sequence[str], log: Path) -> None:
        self._name, self._arguments, self._log = name, arguments, log
        self._stopping = threading.Event()
        self._watching = threading.Thread(target=self._keep, name=f"{name}-watch", daemon=True)
        self.process = _begin(arguments, log)

    def watch(self) -> None:
        self._watching.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._watching.is_alive():
            self._watching.join()
        _stop(self.process)

    def _keep(self) -> None:
        pause, begun = 0.0, time.monotonic()
        while not self._stopping.wait(LOOK_S):
            code = self.process.poll()
            if code is None:
                continue
            pause = pause_after(time.monotonic() - begun, pause)
            _log.warning(
                "`understudy %s` ended with code %s; starting it again in %g s; see %s",
                *(self._name, code, pause, self._log),
            )
            if self._stopping.wait(pause):
                return
            _stop(self.process)  # closes its pipes
            self.process, begun = _begin(self._arguments, self._log), time.monotonic()


def _begin(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "understudy.cli.child", *arguments, "--json"]
    with log.open("ab") as sink:
        # a process group of its own: Ctrl-C is ours to pass on, once, when the block is left
        return subprocess.Popen(  # noqa: S603 - our own program
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink, start_new_session=True
        )


def _handshake(name: str, process: subprocess.Popen[bytes], log: Path, deadline: float) -> dict[str, Any]:
    output = cast(IO[bytes], process.stdout)
    os.set_blocking(output.fileno(), False)
    seen = b""
    while time.monotonic() < deadline:
        seen += output.read() or b""
        for line in seen.splitlines(keepends=True):
            if line.startswith(b"{") and line.endswith(b"\n"):
                return {**json.loads(line), "pid": process.pid}
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise UserError(
        f"`understudy {name}` did not come up:\n{_tail(log)}",
        expected="a line of JSON when it listens",
        next_step=f"less {log}",
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def end_with_parent() -> None:
    """In a child of `running`: SIGTERM to ourselves when the parent is gone, SIGKILL if that is not enough.

    A pipe, not PR_SET_PDEATHSIG: that one fires when the parent's *thread* ends, and on Linux alone.
    """
    threading.Thread(target=_end_at_eof, args=(sys.stdin.fileno(),), daemon=True, name="parent").start()


def _end_at_eof(pipe: int) -> None:
    while os.read(pipe, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_GRACE_S)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def peak_memory(pid: int) -> int | None:
    """Peak resident bytes of a running process; None where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    kib = next((line.split()[1] for line in lines if line.startswith("VmHWM:")), None)
    return int(kib) * 1024 if kib else None


def call(command: Sequence[str], *, folder: Path, environment: Mapping[str, str]) -> None:
    """Run the user's own command to its end, its output on our terminal.

    Raises UserError when it cannot be started or exits non-zero. A Ctrl-C reaches it as it reaches us.
    """
    words = [sys.executable if command[0] == "python" else command[0], *command[1:]]
    try:
        done = subprocess.run(words, cwd=folder, env={**os.environ, **environment})  # noqa: S603 - the user's own command
    except OSError as error:
        raise UserError(
            f"cannot run {command[0]!r}: {error.strerror}",
            expected="a command in [drill].workload",
            next_step=f"try it by hand in {folder}",
        ) from error
    if done.returncode != 0:
        raise UserError(
            f"the workload `{' '.join(command)}` exited with {done.returncode}",
            expected="exit code 0",
            next_step=f"try it by hand in {folder}; finished requests are kept",
        )


def _tail(log: Path, lines: int = 12) -> str:
    return "\n".join("  " + line for line in log.read_text(errors="replace").splitlines()[-lines:])
