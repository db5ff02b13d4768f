"""Sends events to a webhook, as plain JSON or in the form Slack's incoming webhooks take.

It ignores which events there are (events) and retries: whoever runs `watch` from cron runs it again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from understudy.errors import EndpointError

if TYPE_CHECKING:
    from understudy.catalog.events import Event

TIMEOUT_S = 20.0
MOST_BLOCKS = 45
"""Slack takes 50 blocks; beyond this many events the rest is counted."""
_MARK = {"retired": "🔴", "critical": "🔴", "high": "🟠", "medium": "🟡", "low": "⚪", "announced": "⚪"}


def payload(events: Sequence[Event], at: float) -> dict[str, Any]:
    """The plain form: ``at`` (Unix seconds) and the events as they are."""
    return {"source": "understudy watch", "at": at, "events": msgspec.to_builtins(events)}


def slack_payload(events: Sequence[Event]) -> dict[str, Any]:
    """Slack's form (docs.slack.dev, incoming webhooks): ``text`` for notices, ``blocks`` for the channel."""
    count = f"{len(events)} event{'s' * (len(events) != 1)}"
    blocks: list[dict[str, Any]] = [
        {"type": "header", "text": {"type": "plain_text", "text": f"Understudy watch: {count}"}}
    ]
    blocks += [
        _section(f"{_MARK[e.severity]} *{e.kind}* {_escaped(e.text)}{_hangs_on(e)}")
        for e in events[:MOST_BLOCKS]
    ]
    if len(events) > MOST_BLOCKS:
        blocks.append(_section(f"… and {len(events) - MOST_BLOCKS} more"))
    first = f": {events[0].text}" if events else ""
    return {"text": _escaped(f"Understudy watch: {count}{first}"), "blocks": blocks}


def send(url: str, body: dict[str, Any]) -> None:
    """POST ``body`` to ``url``. Raises EndpointError when it is not taken; the URL's path stays out of the
    message, since for most services it is the secret."""
    asyncio.run(_post(url, msgspec.json.encode(body)))


async def _post(url: str, body: bytes) -> None:
    import aiohttp

    place = f"{urlsplit(url).scheme}://{urlsplit(url).netloc.rpartition('@')[2]}"
    try:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.post(url, data=body, headers={"content-type": "application/json"}) as response,
        ):
            status = response.status
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise EndpointError(
            f"cannot reach the webhook at {place}: {type(error).__name__}",
            expected="a URL that takes a POST",
            next_step="understudy watch --json shows the events meanwhile",
        ) from error
    if status >= 300:
        raise EndpointError(
            f"the webhook at {place} answered {status}",
            expected="a status of 2xx",
            next_step="check the URL; understudy watch --json shows the events meanwhile",
        )


def _section(text: str) -> dict[str, Any]:
    return {"type": "section", "text": {"type": "mrkdwn", "text": text[:3000]}}


def _hangs_on(event: Event) -> str:
    names = ", ".join(f"{b.name} ({b.level})" for b in event.bindings)
    money = "" if event.usd_per_month is None else f" · ${event.usd_per_month:,.2f}/month"
    return f"\n{_escaped(names)}{money}" if names or money else ""


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
