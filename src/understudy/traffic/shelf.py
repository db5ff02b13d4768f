"""Requests and answers in the tables ``blobs`` and ``bundles``: put on the shelf in batches, read by page.

What is new stands in ``blobs`` until it fills a bundle, which is bound as one row; a text is found by its
id in either. ``digests`` finds texts that are there already, and the last answer to a conversation, for it
mostly comes back in the next turn. What no call has any more is released, and swept when no other call
turns out to share it. It ignores how a body is cut and joined (texts), how leaves are bound (bundles) and
which call a body belongs to (store). What is said here holds within a transaction of the caller's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from understudy.traffic import texts
from understudy.traffic.bundles import Leaf, bind, bundled, unbind
from understudy.traffic.texts import Cut

if TYPE_CHECKING:
    from understudy.traffic.database import Database

IN_ONE_QUERY = 500
T = TypeVar("T")


class Place(NamedTuple):
    """Where a call's bodies lie: ids of blobs, None for an empty body."""

    frame: int | None
    messages: int | None
    response: int | None


class Bodies(NamedTuple):
    """A call's request and answer."""

    request: bytes
    response: bytes


class Known(NamedTuple):
    """A text that is there already."""

    blob: int
    answer: int = 0
    """The last answer to the conversation that ends in it; 0 for none."""


class Shelf:
    """Reads and writes bodies."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, bodies: Sequence[Bodies]) -> list[Place]:
        """Keep bodies; what is there already is not written again."""
        pieces = [texts.cut(b.request) if b.request else None for b in bodies]
        known = _known(self._database, _digests(pieces))
        batch = _Batch(known, self._next_id(), _Reader(self._database))
        places = [batch.place(cut, b.response) for cut, b in zip(pieces, bodies, strict=True)]
        self._keep(batch.leaves)
        many = self._database.many
        many("INSERT INTO digests (digest, blob, answer) VALUES (?, ?, ?)", batch.new_digests())
        many("UPDATE digests SET answer = ? WHERE digest = ?", batch.new_answers())
        many("INSERT INTO lifts (blob, lifted) VALUES (?, ?)", sorted(batch.lifts))
        links = [(leaf.parent, leaf.id) for leaf in batch.leaves if leaf.parent]
        many("INSERT INTO links (parent, blob) VALUES (?, ?)", sorted(links))
        return places

    def _keep(self, leaves: Sequence[Leaf]) -> None:
        """Bind what fills bundles, together with what was left loose before; the rest is loose."""
        bound = self._last_bound()
        sql = "SELECT id, parent, data FROM blobs WHERE id > ? ORDER BY id"
        before = [Leaf(row[0], row[1], bytes(row[2])) for row in self._database.query(sql, (bound,))]
        bundles, loose = bundled([*before, *leaves])
        if bundles:
            sql = "DELETE FROM blobs WHERE id > ? AND id <= ?"
            self._database.execute(sql, (bound, bundles[-1].last))
        sql = "INSERT INTO bundles (first, last, leaves, data) VALUES (?, ?, ?, ?)"
        self._database.many(sql, bundles)
        new = {leaf.id for leaf in leaves}
        sql = "INSERT INTO blobs (id, parent, data) VALUES (?, ?, ?)"
        self._database.many(sql, [leaf for leaf in loose if leaf.id in new])

    def get(self, places: Sequence[Place]) -> list[Bodies | None]:
        """Bodies byte for byte as they were put; None for those deleted since their place was read."""
        reader = _Reader(self._database)
        reader.load(blob for place in places for blob in place if blob)
        return [_whole(place, reader) for place in places]

    def release(self, places: Sequence[Place]) -> None:
        """The calls at these places are gone: note what they may have shared with others."""
        reader = _Reader(self._database)
        ends = {blob for place in places for blob in place if blob}
        reader.load(ends, answers=False)
        gone = [(blob,) for blob in sorted({one for end in ends for one in reader.chain(end)})]
        self._database.many("INSERT INTO released VALUES (?) ON CONFLICT (blob) DO NOTHING", gone)

    def settle(self) -> None:
        """Of what was released keep what is still in use; hide the rest, so that no new call can share it."""
        for sql in _USED_BY_CALLS:
            self._database.execute(sql)
        # each round climbs one step of every conversation that goes on from a released text
        while sum([self._database.execute(sql) for sql in _USED_BY_TEXTS]):
            pass
        for sql in _HIDE:
            self._database.execute(sql)

    def sweep(self, limit: int) -> int:
        """Delete up to ``limit`` settled blobs; returns how many."""
        sql = "SELECT blob FROM released ORDER BY blob LIMIT ?"
        gone = [row[0] for row in self._database.query(sql, (limit,))]
        for part in chunks(gone):
            self._delete(part)
        return len(gone)

    def _delete(self, gone: Sequence[int]) -> None:
        reader = _Reader(self._database)
        reader.load(gone, answers=False, parents=False)
        links = [(reader.parent(blob), blob) for blob in gone if reader.parent(blob)]
        self._database.many("DELETE FROM links WHERE parent = ? AND blob = ?", links)
        taken = frozenset(gone)
        for first, leaves in reader.bundles.items():
            left = [leaf for leaf in leaves if leaf.id not in taken]
            if len(left) == len(leaves):
                continue
            self._database.execute("DELETE FROM bundles WHERE first = ?", (first,))
            if left:
                sql = "INSERT INTO bundles (first, last, leaves, data) VALUES (?, ?, ?, ?)"
                self._database.many(sql, [bind(left)])
        for table, column in (("blobs", "id"), ("released", "blob")):
            self._database.execute(f"DELETE FROM {table} WHERE {column} IN ({marks(gone)})", gone)  # noqa: S608

    def _next_id(self) -> int:
        loose = self._database.query("SELECT COALESCE(MAX(id), 0) FROM blobs")
        return max(int(loose[0][0]), self._last_bound()) + 1

    def _last_bound(self) -> int:
        """The last id in a bundle; what has a greater one is loose."""
        last = self._database.query("SELECT last FROM bundles ORDER BY first DESC LIMIT 1")
        return int(last[0][0]) if last else 0


class _Reader:
    """Blobs as they are asked for, each bundle opened once."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._leaves: dict[int, Leaf] = {}
        self._absent: set[int] = set()
        self._lifted: dict[bytes, bytes] = {}
        self.bundles: dict[int, list[Leaf]] = {}
        """Those opened, by their first id."""

    def load(self, blobs: Iterable[int], *, parents: bool = True, answers: bool = True) -> None:
        """Fetch blobs with all that leads up to them and the answers they repeat, side by side."""
        wanted, followed = set(blobs), {0}
        while wanted:
            self._fetch(wanted)
            followed |= wanted
            found = [self._leaves[blob] for blob in wanted if blob in self._leaves]
            wanted = {leaf.parent for leaf in found if leaf.parent > 0} if parents else set()
            wanted |= {texts.named_answer(leaf.laid) for leaf in found} if answers else set()
            wanted -= followed

    def _fetch(self, blobs: set[int]) -> None:
        for part in chunks(sorted(blobs - self._leaves.keys() - self._absent)):
            sql = f"SELECT id, parent, data FROM blobs WHERE id IN ({marks(part)})"  # noqa: S608 only "?"
            loose = [Leaf(row[0], row[1], bytes(row[2])) for row in self._database.query(sql, part)]
            self._leaves |= {leaf.id: leaf for leaf in loose}
            self._open([blob for blob in part if blob not in self._leaves])
        self._absent |= blobs - self._leaves.keys()

    def _open(self, blobs: Sequence[int]) -> None:
        """Open the bundles that hold these blobs."""
        if not blobs:
            return
        wanted = ",".join(["(?)"] * len(blobs))
        sql = (
            f"SELECT DISTINCT bundles.first, bundles.data FROM (VALUES {wanted}) AS wanted "  # noqa: S608 only "?"
            "JOIN bundles ON bundles.first = "
            "(SELECT MAX(b.first) FROM bundles AS b WHERE b.first <= wanted.column1)"
        )
        for first, data in self._database.query(sql, blobs):
            self.bundles[first] = leaves = unbind(first, bytes(data)) if data else []
            self._leaves |= {leaf.id: leaf for leaf in leaves}

    def parent(self, blob: int) -> int:
        """The blob that one goes on from; 0 for none, or where it is gone."""
        leaf = self._leaves.get(blob)
        return max(0, leaf.parent) if leaf else 0  # older versions noted an answer's question as a minus

    def chain(self, blob: int) -> Iterator[int]:
        """A blob and what it goes on from, back to the beginning."""
        while blob:
            yield blob
            blob = self.parent(blob)

    def text(self, blob: int) -> bytes:
        """What a blob says. Raises KeyError where it, or what it was compressed against, is gone."""
        laid = self._leaves[blob].laid
        answer = texts.named_answer(laid)
        return texts.unpack(laid, texts.spoken_in(self._leaves[answer].laid) if answer else b"")

    def spoken(self, answer: int) -> bytes:
        """What an answer said; empty where it is gone."""
        self.load([answer])
        return texts.spoken_in(self._leaves[answer].laid) if answer in self._leaves else b""

    def lifted(self, digest: bytes) -> bytes:
        """What was lifted out under a digest. Raises KeyError where it is gone."""
        if digest not in self._lifted:
            blob = _known(self._database, [digest])[digest].blob
            self.load([blob])
            self._lifted[digest] = self.text(blob)
        return self._lifted[digest]


def _known(database: Database, digests: Sequence[bytes]) -> dict[bytes, Known]:
    known: dict[bytes, Known] = {}
    for part in chunks(digests):
        sql = f"SELECT digest, blob, answer FROM digests WHERE digest IN ({marks(part)})"  # noqa: S608 only "?"
        known |= {bytes(row[0]): Known(row[1], row[2]) for row in database.query(sql, part)}
    return known


def _whole(place: Place, reader: _Reader) -> Bodies | None:
    try:
        return _bodies(place, reader)
    except KeyError:
        return None


def _bodies(place: Place, reader: _Reader) -> Bodies:
    request = b""
    if place.frame is not None:
        nodes = [reader.text(blob) for blob in reader.chain(place.messages or 0)]
        request = texts.join(reader.text(place.frame), nodes[::-1], reader.lifted)
    return Bodies(request, reader.text(place.response) if place.response else b"")


_USED_BY_CALLS = (
    # what a released blob names is released with it, where all who name it are known
    "INSERT INTO released SELECT DISTINCT lifted FROM lifts WHERE blob IN (SELECT blob FROM released) AND "
    "lifted > (SELECT COALESCE(MAX(lifted), 0) FROM lifts WHERE blob = 0) ON CONFLICT (blob) DO NOTHING",
    "DELETE FROM released WHERE blob IN ("
    "SELECT frame FROM calls WHERE frame IN (SELECT blob FROM released) UNION "
    "SELECT messages FROM calls WHERE messages IN (SELECT blob FROM released) UNION "
    "SELECT response FROM calls WHERE response IN (SELECT blob FROM released))",
)
_USED_BY_TEXTS = (
    # a blob that is in use goes on from its parent, and names what was lifted out of it
    "DELETE FROM released WHERE blob IN (SELECT parent FROM links "
    "WHERE parent IN (SELECT blob FROM released) AND blob NOT IN (SELECT blob FROM released))",
    "DELETE FROM released WHERE blob IN (SELECT lifted FROM lifts "
    "WHERE lifted IN (SELECT blob FROM released) AND blob NOT IN (SELECT blob FROM released))",
)
_HIDE = (
    "DELETE FROM lifts WHERE blob IN (SELECT blob FROM released)",
    "DELETE FROM digests WHERE blob IN (SELECT blob FROM released)",
    "UPDATE digests SET answer = 0 WHERE answer IN (SELECT blob FROM released)",
)


class _Batch:
    """Leaves to write: ids are given out here, under the writer's lock, so that no second trip is needed."""

    def __init__(self, known: dict[bytes, Known], next_id: int, reader: _Reader) -> None:
        self.leaves: list[Leaf] = []
        self.lifts: set[tuple[int, int]] = set()
        self._known = known
        self._old = dict(known)
        self._next_id = next_id
        self._reader = reader
        self._said: dict[int, bytes] = {}
        """Answers of this batch as they were laid."""

    def new_digests(self) -> list[tuple[bytes, int, int]]:
        return [
            (digest, one.blob, one.answer) for digest, one in self._known.items() if digest not in self._old
        ]

    def new_answers(self) -> list[tuple[int, bytes]]:
        """Of conversations known before, the answers they got in this batch."""
        old = self._old.items()
        return [(self._known[d].answer, d) for d, one in old if one.answer != self._known[d].answer]

    def place(self, cut: Cut | None, response: bytes) -> Place:
        if cut is None:
            return Place(None, None, self._answer(response))
        for digest, value in cut.lifted.items():
            self._once(digest, value)
        frame, head = self._once(texts.digest_of(cut.frame), cut.frame), self._chain(cut)
        answer = self._answer(response)
        if head and answer:
            self._known[cut.prefixes[-1]] = Known(head, answer)
        return Place(frame, head, answer)

    def _answer(self, response: bytes) -> int | None:
        if not response:
            return None
        laid = texts.lay_answer(response)
        blob = self._add(laid, 0)
        self._said[blob] = laid
        return blob

    def _chain(self, cut: Cut) -> int | None:
        if not cut.messages:
            return None
        length = len(cut.prefixes)
        while length and cut.prefixes[length - 1] not in self._known:
            length -= 1
        before = self._known[cut.prefixes[length - 1]] if length else Known(0)
        follows = 0 < length < len(cut.messages)
        after = self._repeated(before.answer, cut.messages[length]) if follows else None
        head = before.blob
        for node in texts.new_nodes(cut, length):
            head, after = self._once(node.digest, node.data, head, after), None
        return head

    def _repeated(self, answer: int, message: bytes) -> tuple[int, bytes] | None:
        """The answer that a message repeats, with what it said; None when it says something else."""
        if not answer or not texts.is_answer(message):
            return None
        laid = self._said.get(answer)
        spoken = texts.spoken_in(laid) if laid else self._reader.spoken(answer)
        return (answer, spoken) if texts.repeats(message, spoken) else None

    def _once(
        self, digest: bytes, data: bytes, parent: int = 0, after: tuple[int, bytes] | None = None
    ) -> int:
        if digest not in self._known:
            blob = self._add(texts.lay_after(data, *after) if after else texts.lay(data), parent)
            self._known[digest] = Known(blob)
            named = [self._known[lifted].blob for lifted in texts.lifted_in(data) if lifted in self._known]
            self.lifts.update((blob, one) for one in [*named, *([after[0]] if after else [])])
        return self._known[digest].blob

    def _add(self, laid: bytes, parent: int) -> int:
        blob = self._next_id
        self._next_id += 1
        self.leaves.append(Leaf(blob, parent, laid))
        return blob


def _digests(pieces: Iterable[Cut | None]) -> list[bytes]:
    wanted: dict[bytes, None] = {}
    for cut in pieces:
        if cut is not None:
            wanted |= dict.fromkeys([*cut.prefixes, *cut.lifted, texts.digest_of(cut.frame)])
    return list(wanted)


def chunks(values: Sequence[T]) -> Iterable[Sequence[T]]:
    """``values`` in parts that one query takes."""
    return (values[start : start + IN_ONE_QUERY] for start in range(0, len(values), IN_ONE_QUERY))


def marks(values: Sequence[object]) -> str:
    """Placeholders for an IN list."""
    return ",".join("?" * len(values))
