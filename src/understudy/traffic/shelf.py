"""Requests and answers in the tables ``blobs`` and ``digests``: put on the shelf in batches, read by page.

The blob of an answer has as its parent, with a minus, the last message it answers: so the next turn finds it.
What no call has any more is released, and swept when no other call turns out to share it. It ignores how a
body is cut and joined (texts) and which call it belongs to (store). What is said here holds within a
transaction of the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from understudy.traffic import texts
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


class Shelf:
    """Reads and writes bodies."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, bodies: Sequence[Bodies]) -> list[Place]:
        """Keep bodies; what is there already is not written again."""
        pieces = [texts.cut(b.request) if b.request else None for b in bodies]
        batch = _Batch(self._known(_digests(pieces)), self._next_id(), self._answers_to)
        places = [batch.place(cut, b.response) for cut, b in zip(pieces, bodies, strict=True)]
        self._database.many("INSERT INTO blobs (id, parent, data) VALUES (?, ?, ?)", batch.blobs)
        self._database.many("INSERT INTO digests (digest, blob) VALUES (?, ?)", batch.digests)
        self._database.many("INSERT INTO lifts (blob, lifted) VALUES (?, ?)", sorted(batch.lifts))
        return places

    def get(self, places: Sequence[Place]) -> list[Bodies | None]:
        """Bodies byte for byte as they were put; None for those deleted since their place was read."""
        nodes = self._load(places)
        return [self._whole(place, nodes) for place in places]

    def release(self, places: Sequence[Place]) -> None:
        """The calls at these places are gone: delete their answers, and note what they may have shared."""
        for answers in chunks([place.response for place in places if place.response]):
            self._release_answers(answers)
        for ends in chunks([blob for place in places for blob in place[:2] if blob]):
            sql = (
                f"WITH RECURSIVE chain (id) AS (SELECT id FROM blobs WHERE id IN ({marks(ends)}) UNION "  # noqa: S608
                "SELECT blobs.parent FROM blobs JOIN chain ON blobs.id = chain.id WHERE blobs.parent > 0) "
                "INSERT INTO released SELECT id FROM chain WHERE true ON CONFLICT (blob) DO NOTHING"
            )
            self._database.execute(sql, ends)

    def _release_answers(self, answers: Sequence[int]) -> None:
        """An answer that a later turn is compressed against stays as long as that turn."""
        sql = f"SELECT DISTINCT lifted FROM lifts WHERE lifted IN ({marks(answers)})"  # noqa: S608 only "?"
        needed = [(row[0],) for row in self._database.query(sql, answers)]
        self._database.many("INSERT INTO released VALUES (?) ON CONFLICT (blob) DO NOTHING", needed)
        for gone in chunks(sorted(set(answers) - {row[0] for row in needed})):
            self._database.execute(f"DELETE FROM blobs WHERE id IN ({marks(gone)})", gone)  # noqa: S608

    def settle(self) -> None:
        """Of what was released keep what is still in use; hide the rest, so that no new call can share it."""
        for sql in _SETTLE:
            self._database.execute(sql)

    def sweep(self, limit: int) -> int:
        """Delete up to ``limit`` settled blobs; returns how many."""
        gone = [row[0] for row in self._database.query("SELECT blob FROM released LIMIT ?", (limit,))]
        for part in chunks(gone):
            for table, column in (("blobs", "id"), ("released", "blob")):
                self._database.execute(f"DELETE FROM {table} WHERE {column} IN ({marks(part)})", part)  # noqa: S608
        return len(gone)

    def _whole(self, place: Place, nodes: dict[int, _Blob]) -> Bodies | None:
        try:
            return self._bodies(place, nodes)
        except KeyError:
            return None

    def _bodies(self, place: Place, nodes: dict[int, _Blob]) -> Bodies:
        chain: list[bytes] = []
        at = place.messages or 0
        while at:
            chain.append(nodes[at].data)
            at = nodes[at].parent
        request = b"" if place.frame is None else self._request(nodes[place.frame].data, chain[::-1])
        return Bodies(request, nodes[place.response].data if place.response else b"")

    def _answers_to(self, head: int) -> Iterator[tuple[int, bytes]]:
        """Blobs of the first few answers to a conversation that ends in ``head``, with what they said."""
        sql = "SELECT id, data FROM blobs WHERE parent = ? ORDER BY id LIMIT 4"
        for blob, stored in self._database.query(sql, (-head,)):
            yield blob, texts.spoken_in(bytes(stored))

    def _request(self, frame: bytes, chain: list[bytes]) -> bytes:
        return texts.join(frame, chain, self._lifted)

    def _lifted(self, digest: bytes) -> bytes:
        blob = self._known([digest])[digest]
        return self._load([Place(blob, None, None)])[blob].data

    def _load(self, places: Iterable[Place]) -> dict[int, _Blob]:
        """All blobs of these places; a chain is followed one parent per round, all calls side by side."""
        rows: dict[int, tuple[int, bytes]] = {}
        asked: set[int] = set()
        wanted = {blob for place in places for blob in place if blob}
        while wanted:
            found: dict[int, tuple[int, bytes]] = {}
            for ids in chunks(sorted(wanted)):
                sql = f"SELECT id, parent, data FROM blobs WHERE id IN ({marks(ids)})"  # noqa: S608 only "?"
                found |= {row[0]: (row[1], bytes(row[2])) for row in self._database.query(sql, ids)}
            rows |= found
            asked |= wanted
            named = {blob for parent, data in found.values() for blob in (parent, texts.named_answer(data))}
            wanted = {blob for blob in named if blob > 0} - asked
        return {blob: _unpacked(rows, blob) for blob in rows if _is_whole(rows, blob)}

    def _known(self, digests: Sequence[bytes]) -> dict[bytes, int]:
        known: dict[bytes, int] = {}
        for part in chunks(digests):
            sql = f"SELECT digest, blob FROM digests WHERE digest IN ({marks(part)})"  # noqa: S608 only "?"
            known |= {bytes(row[0]): row[1] for row in self._database.query(sql, part)}
        return known

    def _next_id(self) -> int:
        return int(self._database.query("SELECT COALESCE(MAX(id), 0) + 1 FROM blobs")[0][0])


_SETTLE = (
    # what a released blob names is released with it, where all who name it are known
    "INSERT INTO released SELECT DISTINCT lifted FROM lifts WHERE blob IN (SELECT blob FROM released) AND "
    "lifted > (SELECT COALESCE(MAX(lifted), 0) FROM lifts WHERE blob = 0) ON CONFLICT (blob) DO NOTHING",
    # in use: of a call, or followed by a blob that was not released; and then so is all that leads up to it
    "WITH RECURSIVE used (blob) AS ("
    "SELECT frame FROM calls WHERE frame IN (SELECT blob FROM released) UNION "
    "SELECT messages FROM calls WHERE messages IN (SELECT blob FROM released) UNION "
    "SELECT response FROM calls WHERE response IN (SELECT blob FROM released) UNION "
    "SELECT parent FROM blobs WHERE parent > 0 AND parent IN (SELECT blob FROM released) "
    "AND id NOT IN (SELECT blob FROM released) UNION "
    "SELECT blobs.parent FROM blobs JOIN used ON blobs.id = used.blob WHERE blobs.parent > 0) "
    "DELETE FROM released WHERE blob IN (SELECT blob FROM used)",
    "DELETE FROM released WHERE blob IN (SELECT lifted FROM lifts "
    "WHERE lifted IN (SELECT blob FROM released) AND blob NOT IN (SELECT blob FROM released))",
    "DELETE FROM lifts WHERE blob IN (SELECT blob FROM released)",
    "DELETE FROM digests WHERE blob IN (SELECT blob FROM released)",
)


class _Blob(NamedTuple):
    parent: int
    data: bytes


def _is_whole(rows: dict[int, tuple[int, bytes]], blob: int) -> bool:
    """Whether what a blob is compressed against is still there."""
    answer = texts.named_answer(rows[blob][1])
    return not answer or answer in rows


def _unpacked(rows: dict[int, tuple[int, bytes]], blob: int) -> _Blob:
    parent, stored = rows[blob]
    answer = texts.named_answer(stored)
    return _Blob(parent, texts.unpack(stored, texts.spoken_in(rows[answer][1]) if answer else b""))


class _Batch:
    """Rows to write: ids are given out here, under the writer's lock, so that chains need no second trip."""

    def __init__(
        self, known: dict[bytes, int], next_id: int, answers_to: Callable[[int], Iterable[tuple[int, bytes]]]
    ) -> None:
        self.blobs: list[tuple[int, int, bytes]] = []
        self.digests: list[tuple[bytes, int]] = []
        self.lifts: set[tuple[int, int]] = set()
        self._known = known
        self._next_id = next_id
        self._answers_to = answers_to
        self._answered: dict[int, list[tuple[int, bytes]]] = {}
        """Last message of a conversation to the answers it got in this batch."""

    def place(self, cut: Cut | None, response: bytes) -> Place:
        if cut is None:
            return Place(None, None, self._answer(response, 0))
        for digest, value in cut.lifted.items():
            self._once(digest, value)
        frame, head = self._once(texts.digest_of(cut.frame), cut.frame), self._chain(cut)
        return Place(frame, head, self._answer(response, head or 0))

    def _answer(self, response: bytes, head: int) -> int | None:
        if not response:
            return None
        stored = texts.pack_answer(response)
        blob = self._add(stored, -head)
        if head:
            self._answered.setdefault(head, []).append((blob, stored))
        return blob

    def _chain(self, cut: Cut) -> int | None:
        if not cut.messages:
            return None
        length = len(cut.prefixes)
        while length and cut.prefixes[length - 1] not in self._known:
            length -= 1
        head = self._known[cut.prefixes[length - 1]] if length else 0
        after = self._repeated(head, cut.messages[length]) if 0 < length < len(cut.messages) else None
        for node in texts.new_nodes(cut, length):
            head, after = self._once(node.digest, node.data, head, after), None
        return head

    def _repeated(self, head: int, message: bytes) -> tuple[int, bytes] | None:
        """The answer to ``head`` that the message after it repeats, with what it said."""
        if not texts.is_answer(message):
            return None
        here = ((blob, texts.spoken_in(stored)) for blob, stored in self._answered.get(head, ())[:4])
        for candidates in (here, self._answers_to(head)):
            if found := next((one for one in candidates if texts.repeats(message, one[1])), None):
                return found
        return None

    def _once(
        self, digest: bytes, data: bytes, parent: int = 0, after: tuple[int, bytes] | None = None
    ) -> int:
        if digest not in self._known:
            stored = texts.pack_after(data, *after) if after else texts.pack(data)
            self._known[digest] = self._add(stored, parent)
            self.digests.append((digest, self._known[digest]))
            named = [*(self._known.get(lifted) for lifted in texts.lifted_in(data)), after and after[0]]
            self.lifts.update((self._known[digest], blob) for blob in named if blob)
        return self._known[digest]

    def _add(self, stored: bytes, parent: int) -> int:
        blob = self._next_id
        self._next_id += 1
        self.blobs.append((blob, parent, stored))
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
