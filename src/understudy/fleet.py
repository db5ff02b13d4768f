"""An endpoint asked by the workers of a Ray cluster: for those who ask, `Fleet` is one like any other.

Each worker holds a client of its own and many calls in flight. Where a worker or its node dies, the calls it
had under way are made anew by others, and only these: what was answered is with the caller, who alone writes
it down. So every answer is there once, though the vendor may have been asked for some of the last ones twice.
Credentials travel to the workers over the cluster's own connections. It ignores what is asked and at what
pace (compress/answers, evaluate/replay), and how clusters are started.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self

from understudy.cluster import Cluster, Crew, connect
from understudy.endpoint import Endpoint, HttpEndpoint
from understudy.errors import EndpointError, UserError
from understudy.protocol import Answer

Route = Literal["chat", "complete"]
Question = tuple[Route, dict[str, Any]]
Reach = Callable[[HttpEndpoint], AbstractAsyncContextManager[Endpoint]]
"""How a client comes to its endpoint, for as long as the context is open."""


class _Asker:
    """Lives in a worker: one client, opened at its first question and open until the worker ends."""

    def __init__(self, client: HttpEndpoint) -> None:
        self._client = client
        self._open = False

    async def do(self, question: Question) -> Answer | EndpointError:
        """A refusal is an answer too: raised here, Ray would wrap it."""
        if not self._open:
            self._open = True
            await self._client.__aenter__()
        route, request = question
        try:
            return await (self._client.chat if route == "chat" else self._client.complete)(request)
        except EndpointError as error:
            return error


class Fleet:
    """``client``'s endpoint, asked from every core of ``cluster``; use as ``async with``.

    Raises what the client raises, and AddressError when the cluster is lost.
    """

    def __init__(self, client: HttpEndpoint, *, cluster: Cluster) -> None:
        self.name = client.name
        self._client = client
        self._cluster = cluster
        self._crew: Crew | None = None

    async def __aenter__(self) -> Self:
        self._crew = self._cluster.crew(_Asker, self._client)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._crew is not None:
            self._crew.dismiss()

    async def chat(self, request: Mapping[str, Any]) -> Answer:
        return await self._ask("chat", request)

    async def complete(self, request: Mapping[str, Any]) -> Answer:
        return await self._ask("complete", request)

    async def _ask(self, route: Route, request: Mapping[str, Any]) -> Answer:
        assert self._crew is not None, "use `async with Fleet(…)`"
        found: Answer | UserError = await self._crew.do((route, dict(request)))
        if isinstance(found, UserError):
            raise found
        return found


def itself(client: HttpEndpoint) -> AbstractAsyncContextManager[Endpoint]:
    """From this machine."""
    return client


@contextmanager
def reaching(address: str) -> Generator[Reach]:
    """From the cluster at ``address``; empty: from this machine. Raises what `cluster.connect` raises."""
    if not address:
        yield itself
        return
    with connect(address) as cluster:
        yield partial(Fleet, cluster=cluster)
