"""What is recorded of one call, and what is said of it afterwards.

These structs are the payload of a segment's frames and the input of the indexer. They ignore framing
(segments) and tables (store).
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator
from typing import Literal

import msgspec

from understudy.protocol import Usage

Route = Literal["chat.completions", "completions", "embeddings", "responses", "messages"]
Billed = Literal["yes", "no", "unknown"]
"""Whether the vendor charges for an attempt, as far as can be known."""


class Attempt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One try at an upstream."""

    target: str
    """ENDPOINT/MODEL."""
    status: int
    """HTTP status; 0 when no status line came back."""
    billed: Billed
    started: float
    """Unix seconds."""
    ended: float
    error: str = ""
    form: str = ""
    """The vendor's form that the request was translated into; empty where it was sent as it came."""


class Call(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="call"):
    """One call of an application, with the bytes that went in and out."""

    key: str
    """Our own UUIDv7 (hex); never a provider's id."""
    at: float
    """Unix seconds at which the request was complete."""
    route: Route
    alias: str
    """The model name the application asked for."""
    target: str
    """ENDPOINT/MODEL that answered, or the last one tried."""
    status: int
    """Status the client got; 499 when the client went away first."""
    stream: bool = False
    request: bytes = b""
    """The request body as received; empty under `record = "metadata"`."""
    response: bytes = b""
    """The answer's body as relayed: JSON, or the server-sent events byte for byte."""
    attempts: list[Attempt] = []
    answered_by: str = ""
    """The model id named in the answer: shows a swap behind a name."""
    fingerprint: str = ""
    """The answer's ``system_fingerprint``; the store sums it by target (`fingerprints`), not call by call."""
    usage: Usage | None = None
    usage_estimated: bool = False
    """True when the stream was cut before the vendor said."""
    ttft_s: float = 0.0
    total_s: float = 0.0
    finish_reason: str = ""
    task_id: str = ""
    """Header x-task-id."""
    tags: dict[str, str] = {}
    """Header x-tags: a=b,c=d."""
    caller: str = ""
    """Id of the Understudy key used."""

    @property
    def tpot_s(self) -> float | None:
        """Seconds for each token after the first; None where the answer did not come token by token."""
        tokens = self.usage.completion_tokens if self.usage else 0
        if not self.stream or tokens < 2 or not self.ttft_s:
            return None
        return (self.total_s - self.ttft_s) / (tokens - 1)


class Feedback(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="feedback"):
    """What somebody said of a recorded call."""

    key: str
    """UUIDv7 of this feedback."""
    call: str
    """Key of the call."""
    at: float
    metric: str = "expected"
    """Name of what is said; ``expected`` carries the right answer, others a number."""
    value: float | None = None
    """In [0, 1] for grades and successes."""
    expected: str = ""
    """The right answer, where known."""
    comment: str = ""


Record = Call | Feedback


class _Noise:
    """Random bytes for keys, drawn from the system many keys at a time: one by one the call costs more than
    all the rest of a key. A forked child draws its own."""

    KEYS = 64
    BYTES = 10

    def __init__(self) -> None:
        self._left: Iterator[tuple[bytes]] = iter(())
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._left = iter(())

    def draw(self) -> int:
        """80 bits that nobody else was given; to step an iterator is one step for all threads."""
        for (noise,) in self._left:
            return int.from_bytes(noise)
        self._left = struct.iter_unpack(f"{self.BYTES}s", os.urandom(self.KEYS * self.BYTES))
        return self.draw()


_noise = _Noise()


def new_key() -> str:
    """A UUIDv7 (RFC 9562 §5.7) in 32 hex digits: sortable by time, ours alone."""
    stamp = time.time_ns() // 1_000_000
    noise = _noise.draw()
    top = (stamp << 80) | (0x7 << 76) | ((noise >> 68) & 0xFFF) << 64
    return f"{top | (0b10 << 62) | (noise & ((1 << 62) - 1)):032x}"


def time_of(key: str) -> float:
    """When a key was made, in Unix seconds: it begins with the milliseconds."""
    return int(key[:12], 16) / 1000.0
