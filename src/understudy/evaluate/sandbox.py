"""Running a model's Python where it can do no harm: no network, no files but its own, little time and memory.

A process of its own in new user, mount, network and process namespaces (`unshare`), under Landlock and a
filter of system calls: it reads the interpreter and its library, writes only in an empty folder in memory,
starts no second process, and sees no home, no keys and no other process. Where the system does not permit
this, running is refused, never done unprotected. It ignores other languages. A kernel's own faults are beyond
it: for code from an adversary, use a virtual machine.

Sources: unshare(1); landlock(7) and linux/landlock.h (access rights by ABI); setrlimit(2); seccomp(2) and
linux/filter.h; mount(2).
"""

from __future__ import annotations

import secrets
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import lru_cache
from typing import NamedTuple

import msgspec

from understudy.errors import InputError

SECONDS = 5
"""CPU seconds; the wall clock gives twice as many."""
MEMORY_BYTES = 512 * 2**20
PROCESSES = 16
FILE_BYTES = 16 * 2**20
DISK_BYTES = 64 * 2**20
"""Of all files together; they are kept in memory and are gone with the process."""
FILES = 1024
_UNSHARE = ("--user", "--map-root-user", "--mount", "--net", "--ipc", "--pid", "--fork", "--kill-child")


class Ran(NamedTuple):
    """How a program ended."""

    passed: bool
    """It came to its end without an error."""
    reason: str
    """passed, failed or out of time."""


_FAULTS = {
    97: "the kernel takes no filter of system calls",
    98: "no folder of its own could be mounted",
    99: "the kernel has no Landlock",
}
# Runs inside: -I -S, given (exit code for success, limits, readable folders, own folder, program) on stdin.
_INSIDE = r"""
import ctypes, json, os, resource, struct, sys
done, seconds, memory, processes, size, disk, files, readable, own, program = json.load(sys.stdin)
libc = ctypes.CDLL(None, use_errno=True)
abi = libc.syscall(444, None, 0, 1)
if abi < 1 or libc.prctl(38, 1, 0, 0, 0):
    os._exit(99)
rights = (1 << 13) - 1 | (1 << 13 if abi >= 2 else 0) | (1 << 14 if abi >= 3 else 0)
handled = ctypes.c_uint64(rights)
rules = libc.syscall(444, ctypes.byref(handled), 8, 0)
class Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("access", ctypes.c_uint64), ("parent", ctypes.c_int32)]
def allow(path, access):
    try:
        parent = os.open(path, os.O_PATH)
    except OSError:
        return
    if libc.syscall(445, rules, 1, ctypes.byref(Beneath(access, parent)), 0):
        os._exit(99)
    os.close(parent)
options = f"size={disk},nr_inodes={files},mode=700".encode()
if libc.mount(b"tmpfs", own.encode(), b"tmpfs", 2 | 4, options):
    os._exit(98)
for path in readable:
    allow(path, 1 | 4 | 8)
for path in ("/dev/null", "/dev/urandom"):
    allow(path, 2 | 4)
allow(own, rights)
for limit, value in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory),
                     (resource.RLIMIT_NPROC, processes), (resource.RLIMIT_FSIZE, size),
                     (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(limit, (value, value))
os.chdir(own)
if libc.syscall(446, rules, 0):
    os._exit(99)
# No second process: RLIMIT_NPROC does not hold for root. Threads may be made; clone3 hides its flags in
# memory, so it is said not to exist and the C library falls back to clone.
calls = {"x86_64": (0xC000003E, 56, (57, 58)), "aarch64": (0xC00000B7, 220, (220,))}.get(os.uname().machine)
if calls:
    arch, clone, forks = calls
    deny, absent, pass_ = (6, 0, 0, 0x50001), (6, 0, 0, 0x50026), (6, 0, 0, 0x7FFF0000)
    rest = [(0x15, 0, 1, 435), absent]
    rest += [line for one in forks if one != clone for line in ((0x15, 0, 1, one), deny)]
    rest += [(0x15, 1, 0, clone), pass_, (0x20, 0, 0, 16), (0x45, 0, 1, 0x10000), pass_, deny]
    lines = [(0x20, 0, 0, 4), (0x15, 1, 0, arch), (6, 0, 0, 0x80000000), (0x20, 0, 0, 0)]
    lines += [(0x35, 0, 1, 0x40000000), deny, *rest]
    raw = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in lines))
    class Filter(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("lines", ctypes.c_void_p)]
    if libc.prctl(22, 2, ctypes.byref(Filter(len(lines), ctypes.addressof(raw))), 0, 0):
        os._exit(97)
try:
    exec(compile(program, "answer.py", "exec"), {"__name__": "__main__"})
except BaseException:
    os._exit(1)
os._exit(done)
"""


@lru_cache(maxsize=4096)
def run(program: str, *, seconds: int = SECONDS, memory: int = MEMORY_BYTES) -> Ran:
    """Run a Python program and say whether it came to its end; its output is dropped.

    A program that exits by itself, with whatever code, has not passed: what follows was not run. One that
    looks for the right code in its own interpreter can lie; it can harm nobody. Raises InputError where the
    protection cannot be had.
    """
    unshare = protection()
    done = 100 + secrets.randbelow(100)
    with tempfile.TemporaryDirectory(prefix="understudy-") as own:
        limits = [seconds, memory, PROCESSES, FILE_BYTES, DISK_BYTES, FILES]
        told = msgspec.json.encode([done, *limits, _readable(), own, program])
        command = [unshare, *_UNSHARE, "--", sys.executable, "-I", "-S", "-B", "-c", _INSIDE]
        try:
            ended = subprocess.run(  # noqa: S603  (our own command; the program travels on stdin)
                command,
                input=told,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={"PATH": "/usr/bin:/bin", "HOME": own},
                cwd=own,
                timeout=2 * seconds,
                check=False,
                start_new_session=True,  # kill(0) reaches the process group, whatever the namespace
            )
        except subprocess.TimeoutExpired:
            return Ran(False, "out of time")
    if ended.returncode in _FAULTS:
        raise _refused(_FAULTS[ended.returncode])
    return Ran(ended.returncode == done, "passed" if ended.returncode == done else "failed")


def _readable() -> list[str]:
    """The interpreter and what it loads."""
    paths = sysconfig.get_paths()
    own = {sys.prefix, sys.base_prefix, paths["stdlib"], paths["platstdlib"]}
    return sorted({"/usr", "/lib", "/lib64", "/bin", *own} - {"/"})


@lru_cache(maxsize=1)
def protection() -> str:
    """Path of an `unshare` that works here."""
    unshare = shutil.which("unshare")
    if sys.platform != "linux" or unshare is None:
        raise _refused("there is no unshare")
    tried = subprocess.run(  # noqa: S603  (our own command)
        [unshare, *_UNSHARE, "--", "true"], capture_output=True, check=False, timeout=10
    )
    if tried.returncode:
        raise _refused(tried.stderr.decode(errors="replace").strip())
    return unshare


def _refused(reason: str) -> InputError:
    return InputError(
        f"a model's code is not run here, for its network and files cannot be cut off: {reason}",
        expected="Linux 5.13 or later with unprivileged user namespaces and Landlock",
        next_step="run the evaluation on such a host, or grade by another grader than code",
    )
