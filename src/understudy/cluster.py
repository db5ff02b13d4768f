"""Errands done by the workers of a Ray cluster, each of which may die at any time.

An errand is a plain function that a worker imports, with one argument; where a worker or its node dies Ray
does it again elsewhere, so an errand must leave the same behind however often it is begun. Every node needs
Understudy installed, and a folder that errands write to must be the same on all of them. It ignores what
errands do (compress/spread) and how clusters are started. A `Crew` does many small things at once instead, in
workers that stay (fleet).

Source: docs.ray.io/en/latest/ray-core/fault-tolerance.html
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from itertools import islice
from typing import Any, Protocol, TypeVar, cast

from understudy.errors import AddressError, InputError, MissingExtraError

LOCAL, FOUND = "local", "auto"
"""A cluster of this machine alone, for as long as the command runs; the one that this machine is part of."""
AGAIN = 8
"""Times an errand is begun anew after its worker died: more often, and the errand itself kills workers."""
ASKED_AGAIN = 100
"""Times a call is handed over anew: each try until the cluster has noticed a death counts, a second apart."""
IN_FLIGHT = 1000
"""Things that one of a crew does at once."""
CONNECT_S = 5.0
WAIT_S = 1.0
"""After so long without a result the cluster is asked for its size again: nodes come and go."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Remote(Protocol):
    def remote(self, item: Any, /) -> object: ...


class _Ray(Protocol):
    """What is used of the package `ray`, which is an extra and need not be there."""

    def init(self, **options: Any) -> object: ...
    def shutdown(self) -> None: ...
    def remote(self, **options: Any) -> Callable[[Any], _Remote]: ...
    def kill(self, actor: object) -> None: ...
    def wait(
        self, refs: list[object], *, num_returns: int, timeout: float
    ) -> tuple[list[object], list[object]]: ...
    def get(self, ref: object) -> Any: ...
    def cancel(self, ref: object, *, force: bool) -> None: ...
    def nodes(self) -> list[dict[str, Any]]: ...
    def cluster_resources(self) -> dict[str, float]: ...


class Cluster:
    """A cluster that answered."""

    def __init__(self, ray: _Ray, address: str) -> None:
        self._ray, self.address = ray, address

    @property
    def slots(self) -> int:
        """Errands that may run at once: one a processor core."""
        return int(self._ray.cluster_resources().get("CPU", 0))

    def each(self, errand: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Results in the order in which they come, each item's once.

        Only twice as many items as can run are handed over at a time, so their content need not fit into the
        cluster's memory. What an errand raises is raised here, and the others are called off, as they are on
        Ctrl-C. Raises AddressError when the cluster is lost or an errand keeps killing its workers.
        """
        task = self._ray.remote(num_cpus=1, max_retries=AGAIN)(errand)
        left, running = iter(items), list[object]()
        try:
            while True:
                room = max(2 * self.slots - len(running), 0 if running else 1)
                running += [task.remote(item) for item in islice(left, room)]
                if not running:
                    return
                done, running = self._ray.wait(running, num_returns=1, timeout=WAIT_S)
                for ref in done:
                    yield self._result(ref)
        finally:
            for ref in running:
                self._ray.cancel(ref, force=True)

    def crew(self, kind: type[Any], item: Any) -> Crew:
        """Workers that stay, one a core, each with a ``kind`` made of ``item``; its coroutine `do` is theirs.

        They ask the scheduler for no core: one whose node died must find a place on a node that is full.
        Raises AddressError for a cluster without a core.
        """
        at = import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
        # a byte of memory: Ray places one that asks for nothing at random, whatever node it is to be on
        options = {"num_cpus": 0, "memory": 1, "max_restarts": -1, "max_task_retries": ASKED_AGAIN}
        members: list[Any] = []
        for node in self._ray.nodes():
            for _ in range(int(node["Resources"].get("CPU", 0)) if node["Alive"] else 0):
                make = self._ray.remote(
                    scheduling_strategy=at(node["NodeID"], soft=True), max_concurrency=IN_FLIGHT, **options
                )
                members.append(make(kind).remote(item))
        if not members:
            raise AddressError(f"no node of the cluster {self.address} has a core", expected="at least one")
        return Crew(members, self._fault, self._ray.kill)

    def _result(self, ref: object) -> Any:
        try:
            return self._ray.get(ref)
        except Exception as error:
            raise self._fault(error) from error

    def _fault(self, error: Exception) -> BaseException:
        """What an errand raised, or why it was not done."""
        faults = import_module("ray.exceptions")
        if isinstance(error, faults.RayTaskError):
            return cast(Any, error).cause
        if not isinstance(error, faults.RayError):
            return error
        return AddressError(
            f"the Ray cluster {self.address} could not do an errand: {_first_line(error)}",
            expected="workers that live: it was begun again each time one died",
            next_step="look into the cluster's logs, then the same command again: what is done is kept",
        )


class Crew:
    """Workers that stay until they are dismissed; what one had under way when it died is begun anew."""

    def __init__(
        self,
        members: list[Any],
        fault: Callable[[Exception], BaseException],
        dismiss: Callable[[object], None],
    ) -> None:
        self._members, self._fault, self._dismiss = members, fault, dismiss
        self._busy = [0] * len(members)

    async def do(self, item: Any) -> Any:
        """By the member with the least to do. Raises what it raises, or AddressError."""
        place = self._busy.index(min(self._busy))
        self._busy[place] += 1
        try:
            return await self._members[place].do.remote(item)
        except Exception as error:
            raise self._fault(error) from error
        finally:
            self._busy[place] -= 1

    def dismiss(self) -> None:
        for member in self._members:
            self._dismiss(member)


@contextmanager
def connect(address: str) -> Generator[Cluster]:
    """A running cluster by HOST:PORT, the one this machine is part of (`FOUND`), or one of its own (`LOCAL`).

    Raises MissingExtraError without the package ray, InputError for what is no address and AddressError where
    no cluster answers.
    """
    ray = _package()
    options = _options(address)
    try:
        ray.init(log_to_driver=False, logging_level="error", **options)
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        raise _unanswered(address, _first_line(error)) from error
    with redirect_stdout(sys.stderr):  # Ray prints what it has to say about a node that died, to the last
        try:
            yield Cluster(ray, address)
        finally:
            ray.shutdown()


def _package() -> _Ray:
    try:
        return cast(_Ray, import_module("ray"))
    except ModuleNotFoundError as error:
        raise MissingExtraError("ray", "ray") from error


def _options(address: str) -> dict[str, Any]:
    """Of `ray.init`; nobody listens at an address that does not answer, which Ray would wait for."""
    if address == LOCAL:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would tell its makers that it was started
        return {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    if address != FOUND:
        host, port = _split(address)
        try:
            socket.create_connection((host, port), CONNECT_S).close()
        except OSError as error:
            raise _unanswered(address, error.strerror or str(error)) from error
    return {"address": address}


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdigit() and 0 < int(port) < 1 << 16:
        return host.strip("[]"), int(port)
    raise InputError(
        f"Ray address {address!r}",
        expected=f"HOST:PORT of a cluster's head, {FOUND} (the cluster of this machine) or {LOCAL}",
    )


def _unanswered(address: str, why: str) -> AddressError:
    return AddressError(
        f"no Ray cluster answers at {address}: {why}",
        expected="a running cluster of this Ray version, of which this machine is a node",
        next_step="ray start --head, or --ray local; Ray itself: pip install 'understudy[ray]'",
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
