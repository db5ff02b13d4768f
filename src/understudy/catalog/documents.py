"""Files of facts, as they are read: YAML, and the shipped ones compiled to a form that is read at once.

YAML is what people edit; parsing it is most of what loading a catalog costs. So the shipped files are also
kept, model by model, as lines of JSON (``compiled.jsonl``), which count only while the YAML is byte for byte
what they were made of. After an edit by hand:

    python -m understudy.catalog.documents

It ignores what the facts mean (facts).
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import yaml

from understudy.errors import InputError

Document = dict[str, Any]
"""sources: name to what, licence and day; models: id to field to source to value."""
COMPILED = "compiled.jsonl"
# the C loader is several times faster; both refuse to construct Python objects
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Header(msgspec.Struct):
    """The first line of the compiled file."""

    made_of: str
    """SHA-256 (hex) of the YAML files' names and contents."""
    sources: dict[str, dict[str, Any]]
    """Name of the file to its sources."""


def document_of(path: Path) -> Document:
    """A YAML file of facts. Raises InputError naming what is wrong with it."""
    try:
        document = yaml.load(path.read_bytes(), Loader=_LOADER)  # noqa: S506 a safe loader
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", expected="a YAML file of facts") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: {error}", expected="a YAML file of facts") from error
    if not isinstance(document, dict):
        raise InputError(f"{path} holds no facts", expected="models: with an entry for each model")
    return cast(Document, document)


def shipped_documents(paths: Sequence[Path]) -> list[tuple[str, Document]]:
    """Name and content of YAML files in one folder, in the order given; out of its compiled file where that
    is up to date."""
    documents = _compiled(paths) if paths else {}
    return [(path.stem, documents.get(path.stem) or document_of(path)) for path in paths]


def compile_documents(folder: Path) -> None:
    """Write the compiled file of a folder of YAML files."""
    paths = sorted(folder.glob("*.yaml"))
    documents = {path.stem: document_of(path) for path in paths}
    header = _Header(_hash(paths), {stem: document["sources"] for stem, document in documents.items()})
    lines: list[Any] = [header]
    lines += [(stem, m, fields) for stem, d in documents.items() for m, fields in d["models"].items()]
    encoder = msgspec.json.Encoder(enc_hook=_plain)
    (folder / COMPILED).write_bytes(encoder.encode_lines(lines))


def _compiled(paths: Sequence[Path]) -> dict[str, Document]:
    """Documents by name; none where the compiled file is missing or of other YAML."""
    path = paths[0].parent / COMPILED
    if not path.exists():
        return {}
    first, _, rest = path.read_bytes().partition(b"\n")
    header = msgspec.json.decode(first, type=_Header)
    if header.made_of != _hash(paths):
        return {}
    documents: dict[str, Document] = {
        s: {"sources": told, "models": {}} for s, told in header.sources.items()
    }
    for stem, model, fields in msgspec.json.Decoder(tuple[str, str, dict[str, Any]]).decode_lines(rest):
        documents[stem]["models"][model] = fields
    return documents


def _hash(paths: Iterable[Path]) -> str:
    found = hashlib.sha256()
    for path in sorted(paths):
        content = path.read_bytes()
        found.update(f"{path.name} {len(content)}\n".encode() + content)
    return found.hexdigest()


def _plain(value: object) -> object:
    if isinstance(value, dt.date):
        return value.isoformat()
    raise NotImplementedError(type(value).__name__)


if __name__ == "__main__":
    compile_documents(Path(__file__).parent / "data")
