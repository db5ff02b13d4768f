"""Recorded traffic: a list to search and filter, and one call with everything that is known of it.

It ignores how pages are found quickly (search) and how an exchange is read (exchange).
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlencode

from understudy.dashboard import exchange, search
from understudy.dashboard.desk import Desk
from understudy.dashboard.exchange import Shown
from understudy.dashboard.search import Cursor, Filter
from understudy.traffic.record import Feedback
from understudy.traffic.rows import StoredCall

MONTH_DAYS = 30


class Row(NamedTuple):
    """One call in the list."""

    stored: StoredCall
    asked: str
    answered: str


class Traffic(NamedTuple):
    """The list."""

    now: float
    wanted: Filter
    filtered: bool
    faults: list[str]
    """What of the filter could not be read."""
    aliases: list[str]
    """To choose from: all that are configured, routed or were seen in the last month."""
    rows: list[Row]
    older: str
    """Query string of the page before this one in time; empty when there is none."""
    newer: str
    looked_back_to: float | None


class OneCall(NamedTuple):
    """One call."""

    now: float
    stored: StoredCall
    read: Shown
    feedback: list[Feedback]
    raw_request: str
    raw_response: str


class File(NamedTuple):
    """A recorded body to be saved, never shown as what it claims to be."""

    name: str
    content: bytes


def page(desk: Desk, query: Mapping[str, str]) -> Traffic:
    """The list asked for. Raises StoreError."""
    wanted, faults = read_filter(query)
    cursor = Cursor(query["after"], "newer") if query.get("after") else Cursor(query.get("before", ""))
    seen = (hour.alias for hour in desk.days(MONTH_DAYS))
    found = search.find(desk.lists, wanted, cursor)
    return Traffic(
        now=desk.now(),
        wanted=wanted,
        filtered=wanted != Filter(),
        faults=faults,
        aliases=sorted({*desk.bindings(), *seen, wanted.alias} - {""}),
        rows=[Row(stored, *exchange.preview(stored.call)) for stored in found.calls],
        older=_link(wanted, found.older),
        newer=_link(wanted, found.newer),
        looked_back_to=found.looked_back_to,
    )


def one(desk: Desk, query: Mapping[str, str]) -> OneCall | None:
    """The call with key ``query["key"]``; None when there is none."""
    stored = desk.store.call(query["key"])
    if stored is None:
        return None
    return OneCall(
        now=desk.now(),
        stored=stored,
        read=exchange.shown(stored.call),
        feedback=desk.store.feedback([stored.call.key]),
        raw_request=exchange.pretty(stored.call.request),
        raw_response=exchange.pretty(stored.call.response),
    )


def body(desk: Desk, query: Mapping[str, str]) -> File | None:
    """The request or the answer of a call, byte for byte."""
    stored = desk.store.call(query["key"])
    if stored is None:
        return None
    content = stored.call.request if query["side"] == "request" else stored.call.response
    return File(f"{stored.call.key}-{query['side']}.txt", content)


def read_filter(query: Mapping[str, str]) -> tuple[Filter, list[str]]:
    """A filter from a query string, and what in it could not be read."""
    faults: list[str] = []
    status = query.get("status", "").strip()
    if status not in ("", "ok", "failed") and not re.fullmatch("[0-9]{3}", status):
        faults.append(f"status {status!r} is none: ok, failed or a number such as 429")
        status = ""
    wanted = Filter(
        alias=query.get("alias", "").strip(),
        status=status,
        task=query.get("task", "").strip(),
        tag=query.get("tag", "").strip(),
        since=_day(query.get("from", ""), faults),
        until=_day(query.get("to", ""), faults),
        text=query.get("q", "").strip(),
    )
    return wanted, faults


def _day(text: str, faults: list[str]) -> dt.date | None:
    if not text.strip():
        return None
    try:
        day = dt.date.fromisoformat(text.strip())
    except ValueError:
        faults.append(f"date {text!r} is none: expected YYYY-MM-DD")
        return None
    return day if day < dt.date.max else None


def _link(wanted: Filter, cursor: Cursor | None) -> str:
    if cursor is None:
        return ""
    fields = {
        "q": wanted.text,
        "alias": wanted.alias,
        "status": wanted.status,
        "task": wanted.task,
        "tag": wanted.tag,
        "from": wanted.since,
        "to": wanted.until,
        "before" if cursor.direction == "older" else "after": cursor.key,
    }
    return urlencode({name: str(value) for name, value in fields.items() if value})
