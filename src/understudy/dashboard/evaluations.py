"""Certificates that drills and evaluations left beside the config: verdict, evidence, differences.

A certificate is shown as it claims to be; `understudy verify` is what checks it. It ignores how numbers came
about (evaluate).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import msgspec

from understudy.dashboard.desk import Desk
from understudy.evaluate.certificate import CERTIFICATE, PAGE, Certificate
from understudy.evaluate.report import EPlot, e_plot

MOST_BYTES = 64 << 20
"""A certificate larger than this is not one."""
MOST_KEPT = 16


class Entry(NamedTuple):
    """One certificate found."""

    name: str
    """In addresses; made from the folder's path, which stays out of them."""
    folder: str
    """Relative to the config's folder."""
    path: Path
    written_at: float
    certificate: Certificate | None
    fault: str
    """Why it cannot be read; empty when it can."""
    has_page: bool


class Evaluations(NamedTuple):
    """The list."""

    now: float
    entries: list[Entry]
    """Newest first; behind them what cannot be read."""


class Evaluation(NamedTuple):
    """One certificate."""

    now: float
    entry: Entry
    certificate: Certificate
    plots: list[EPlot]
    """Of the candidates, in their order."""
    sha256: str


def page(desk: Desk, query: Mapping[str, str]) -> Evaluations:
    """Every certificate within two folders of the config, or in the drill's."""
    del query
    entries = [_entry(desk, path) for path in _found(desk)]
    return Evaluations(
        desk.now(), sorted(entries, key=lambda e: (e.certificate is None, -e.written_at, e.folder))
    )


def one(desk: Desk, query: Mapping[str, str]) -> Evaluation | None:
    """The certificate called ``query["name"]``; None when there is none that can be read."""
    entry = named(desk, query["name"])
    if entry is None or entry.certificate is None:
        return None
    plots = [e_plot(candidate.proof) for candidate in entry.certificate.candidates]
    digest = hashlib.sha256(entry.path.read_bytes()).hexdigest()
    return Evaluation(desk.now(), entry, entry.certificate, plots, digest)


def certificate_page(desk: Desk, name: str) -> str | None:
    """The self-contained page beside a certificate; None when there is none."""
    entry = named(desk, name)
    if entry is None or not entry.has_page:
        return None
    return entry.path.with_name(PAGE).read_text(errors="replace")


def named(desk: Desk, name: str) -> Entry | None:
    """The certificate of this name; None where there is none."""
    path = next((path for path in _found(desk) if _name(path) == name), None)
    return _entry(desk, path) if path else None


def read_in(folder: Path) -> Certificate | None:
    """The certificate in a folder; None where there is none that can be read."""
    path = folder / CERTIFICATE
    try:
        if path.stat().st_size > MOST_BYTES:
            return None
        return msgspec.json.decode(path.read_bytes(), type=Certificate)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _found(desk: Desk) -> Iterator[Path]:
    """Certificates; only these paths are ever opened, whatever an address asks for."""
    root = Path(desk.config.root)
    patterns = (CERTIFICATE, f"*/{CERTIFICATE}", f"*/*/{CERTIFICATE}")
    seen: dict[Path, Path] = {}
    for folder in (desk.config.path(desk.config.drill.out), root):
        for pattern in patterns:
            for path in folder.glob(pattern):
                seen.setdefault(path.resolve(), path)
    return iter(seen.values())


def _name(path: Path) -> str:
    return hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]


@lru_cache(maxsize=MOST_KEPT)
def _decoded(path: Path, written_ns: int, size: int) -> Certificate:
    """Read once for each time it is written: a page lists all, and one may have megabytes."""
    del written_ns, size
    return msgspec.json.decode(path.read_bytes(), type=Certificate)


def _entry(desk: Desk, path: Path) -> Entry:
    certificate, fault, written = None, "", 0.0
    try:
        stat = path.stat()
        written = stat.st_mtime
        if stat.st_size > MOST_BYTES:
            fault = "too large to be one"
        else:
            certificate = _decoded(path, stat.st_mtime_ns, stat.st_size)
    except OSError as error:
        fault = error.strerror or type(error).__name__
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        fault = f"not a certificate of this version: {error}"
    root = Path(desk.config.root).resolve()
    folder = path.resolve().parent
    shown = str(folder.relative_to(root)) if folder.is_relative_to(root) else folder.name
    has_page = path.with_name(PAGE).is_file()
    return Entry(_name(path), shown, path, written, certificate, fault, has_page)
