"""Shards as errands: what a second beginning leaves, what is refused, and a node killed in the middle."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from understudy import cluster
from understudy.cli.main import main
from understudy.compress import checkpoint
from understudy.compress.align import pairs_of
from understudy.compress.capture import Live, capture, planned
from understudy.compress.spread import Errand, Source, capture_on, make_there, tell_of
from understudy.compress.targets import Origin, origin_of
from understudy.compress.teacher import LiveTeacher
from understudy.errors import AddressError, InputError, MissingExtraError, ModelError, UserError

BENCH = Path(__file__).parents[2] / "bench" / "ray_capture.py"
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="the extra `ray` is not installed")


class Hands(cluster.Cluster):
    """Does errands as a worker is handed them, pickled there and back: some twice, last ones first."""

    def __init__(self, twice: int = 0) -> None:
        self.twice = twice

    def each(self, errand: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        for number, item in enumerate(reversed(list(items))):
            for _ in range(1 + (number < self.twice)):
                found = pickle.loads(pickle.dumps(errand(pickle.loads(pickle.dumps(item)))))
            yield found


@pytest.fixture
def source(folder: Path, tokenizer) -> Source:
    digest = checkpoint.load(folder).digest
    return Source(str(folder), origin_of(digest, tokenizer, 48, 64))


def plainly(source: Source, documents, folder: Path) -> None:
    tell = Live(LiveTeacher(checkpoint.load(source.teacher).model), source.origin).told
    capture(tell, documents, folder, source.origin, shard_tokens=150, precision="fp32")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_errands_leave_what_the_plain_loop_leaves(source, documents, tmp_path: Path):
    """Whatever their order, twice begun or not; what a dead worker left half-written goes."""
    plainly(source, documents, tmp_path / "plain")
    shards = planned(documents, tmp_path / "spread", source.origin, shard_tokens=150)
    assert len(shards) > 3
    shards[0].path.with_suffix(".dead.partial").write_bytes(b"half")
    told: list[tuple[int, int, str]] = []
    done = capture_on(
        Hands(twice=2), source, shards, {}, "fp32", lambda step, *rest: told.append((*rest, "")[:3])
    )
    assert content(tmp_path / "spread") == content(tmp_path / "plain")
    assert (done.made, done.kept, done.tokens) == (len(shards), 0, sum(s.targets for s in shards))
    assert [now for now, *_ in told] == sorted(now for now, *_ in told)
    assert told[-1] == (done.tokens, done.tokens, "1 worker")


def test_only_what_is_missing_is_an_errand(source, documents, tmp_path: Path):
    plainly(source, documents, tmp_path / "out")
    sound = content(tmp_path / "out")
    shards = planned(documents, tmp_path / "out", source.origin, shard_tokens=150)
    shards[1].path.unlink()
    shards[2].path.write_bytes(b"torn")
    done = capture_on(Hands(), source, shards, {}, "fp32")
    assert (done.made, done.kept) == (2, len(shards) - 2)
    assert content(tmp_path / "out") == sound


def test_a_teacher_with_other_tokens_is_told_alike(source, documents, tmp_path: Path):
    """The pairs of a shard travel with it."""
    vocabulary = [bytes([65 + i]) for i in range(48)]
    longest = max(len(d.tokens) for d in documents)
    origin = msgspec.structs.replace(source.origin, row_tokens=longest, samples=0)
    other = Source(source.teacher, origin, (vocabulary, vocabulary))
    pairs = pairs_of(documents, documents)
    tell = tell_of(other, LiveTeacher(checkpoint.load(source.teacher).model), pairs)
    capture(tell, documents, tmp_path / "plain", origin, shard_tokens=150, precision="fp32")
    shards = planned(documents, tmp_path / "spread", origin, shard_tokens=150)
    capture_on(Hands(), other, shards, {tuple(p.student.tokens): p for p in pairs}, "fp32")
    assert content(tmp_path / "spread") == content(tmp_path / "plain")


def test_a_node_with_another_teacher_makes_nothing(source, documents, tmp_path: Path):
    origin = msgspec.structs.replace(source.origin, teacher="0" * 64)
    shard = planned(documents, tmp_path, origin)[0]
    with pytest.raises(ModelError, match=r"not 000000000000[\s\S]*same weights on every node"):
        make_there(Errand(Source(source.teacher, origin), shard, [], "fp32"))
    assert not shard.path.exists()


def test_a_folder_that_is_not_shared_is_named(source, documents, tmp_path: Path):
    class Elsewhere(Hands):
        def each(self, errand, items):
            for done in super().each(errand, items):
                done.shard.path.unlink()
                yield done

    shards = planned(documents, tmp_path, source.origin)
    with pytest.raises(ModelError, match=r"is not here[\s\S]*disk that all nodes"):
        capture_on(Elsewhere(), source, shards, {}, "fp32")


@needs_ray
@pytest.mark.parametrize("address", ["head", "head:x", "ray://head:1", ":1", "h:70000"])
def test_addresses_that_are_none(address: str):
    with pytest.raises(InputError, match="expected: HOST:PORT"), cluster.connect(address):
        pass


@needs_ray
def test_an_address_where_nobody_listens():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, never listening
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(AddressError, match=f"no Ray cluster answers at {address}"):
            cluster.connect(address).__enter__()


def test_without_ray_the_command_says_what_to_install(
    folder: Path, chats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Before a teacher is loaded, and with exit code 2."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match="pip install 'understudy\\[ray\\]'") as missing:
        cluster.connect("local").__enter__()
    assert isinstance(missing.value, UserError)
    assert missing.value.exit_code == 2
    texts = tmp_path / "texts.txt"
    texts.write_text("the cat sat on a mat")
    given = ["capture", str(folder), "--out", str(tmp_path / "out"), "--data", str(texts), "--ray", "local"]
    ran = CliRunner().invoke(main, given)
    assert isinstance(ran.exception, MissingExtraError)
    assert not (tmp_path / "out").exists()


def test_an_errand_survives_the_journey(source, documents, tmp_path: Path):
    shard = planned(documents, tmp_path, source.origin)[0]
    errand = Errand(source, shard, [], "fp32")
    assert pickle.loads(pickle.dumps(errand)) == errand
    assert isinstance(errand.source.origin, Origin)


@needs_ray
@pytest.mark.e2e
def test_a_node_dies_and_the_shards_are_the_plain_loops():
    """A small instance of the bench: it exits with 1 when a file is missing, doubled or different."""
    environment = os.environ | {"PYTHONWARNINGS": "default"}
    ran = subprocess.run(
        [sys.executable, BENCH, "--targets", "9000", "--killed-only"],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr[-4000:]
    assert ran.stdout.count("all, byte by byte") == 2
