"""The check of a certificate: build it again from its evidence and compare every field, file and the page.

It ignores who wrote the evidence: a certificate forged with its evidence is told only by its SHA-256.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, cast

import msgspec

from understudy.errors import EvidenceError, InputError
from understudy.evaluate.certificate import FORMAT, Certificate, encode
from understudy.evaluate.certify import build
from understudy.evaluate.evidence import sha256_of
from understudy.evaluate.report import digest_on, render
from understudy.protocol import Json


def verify(path: Path) -> str:
    """Check a certificate against its evidence and return its SHA-256.

    Raises EvidenceError listing every number, record and file that differs, and InputError when ``path`` is
    no certificate.
    """
    claimed, raw = _claimed(path)
    changed = _changed_files(claimed, path.parent)
    try:
        built = encode(build(path.parent))
    except EvidenceError as error:
        raise EvidenceError(str(path), [*changed, *error.differences]) from error
    differences = [*changed, *_differences(claimed, msgspec.json.decode(built))]
    differences += _page_differences(path, raw, built)
    if differences:
        raise EvidenceError(str(path), differences)
    return _sha256(raw)


def _claimed(path: Path) -> tuple[Json, bytes]:
    try:
        raw = path.read_bytes()
        claimed = msgspec.json.decode(raw, type=dict[str, Any])
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}", expected="a certificate.json") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON: {error}", expected="a certificate.json") from error
    if claimed.get("format") != FORMAT:
        raise InputError(
            f"{path}: format {claimed.get('format')!r}",
            expected=FORMAT,
            next_step="verify an older one with the version of Understudy that it names",
        )
    return claimed, raw


def _changed_files(claimed: Json, folder: Path) -> list[str]:
    """Evidence files that are not as the certificate names them."""
    changed: list[str] = []
    for entry in cast(list[Json], claimed.get("evidence") or []):
        file = folder / str(entry.get("file"))
        if not file.is_file():
            changed.append(f"{entry.get('file')}: missing")
        elif sha256_of(file) != entry.get("sha256"):
            changed.append(f"{entry.get('file')}: its SHA-256 differs")
    return changed


def _differences(claimed: object, built: object, where: str = "") -> list[str]:
    if isinstance(claimed, dict) and isinstance(built, dict):
        left, right = cast(Json, claimed), cast(Json, built)
        keys = [*left, *(key for key in right if key not in left)]
        return [d for key in keys for d in _field(left, right, key, f"{where}.{key}" if where else key)]
    if isinstance(claimed, list) and isinstance(built, list):
        left_list, right_list = cast(list[Any], claimed), cast(list[Any], built)
        if len(left_list) != len(right_list):
            return [f"{where}: {len(left_list)} entries there, {len(right_list)} from the evidence"]
        pairs = enumerate(zip(left_list, right_list, strict=True))
        return [d for i, (one, other) in pairs for d in _differences(one, other, f"{where}[{i}]")]
    # 1 and 1.0 are the same number, 1 and true are not
    same = claimed == built and isinstance(claimed, bool) == isinstance(built, bool)
    return [] if same else [f"{where}: {_short(claimed)} there, {_short(built)} from the evidence"]


def _field(left: Json, right: Json, key: str, where: str) -> list[str]:
    if key not in right:
        return [f"{where}: not in the evidence"]
    if key not in left:
        return [f"{where}: missing from the certificate"]
    return _differences(left[key], right[key], where)


def _short(value: object) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 80 else text[:77] + "…"


def _page_differences(path: Path, raw: bytes, built: bytes) -> list[str]:
    """The page beside the certificate must be what the evidence renders; no page is no difference."""
    page = path.with_suffix(".html")
    if not page.exists():
        return []
    text = page.read_text(encoding="utf-8", errors="replace")
    if text == render(msgspec.json.decode(built, type=Certificate), built):
        return []
    if digest_on(text) != _sha256(raw):
        return [f"{page.name}: names another certificate than {path.name}"]
    return [f"{page.name}: is not the page of this certificate"]


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()
