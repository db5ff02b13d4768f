"""What stands before every page: the host asked for, the session, the form's token, and headers.

Recorded traffic is confidential and hostile at once, so nothing is cached, framed, run or loaded from
elsewhere. It ignores what pages show (app).
"""

from __future__ import annotations

import ipaddress
import re

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from understudy.dashboard.sessions import Sessions

COOKIE = "understudy"
SESSION = web.RequestKey("session", str)
"""Key under which a request holds its session's id."""
OPEN_TO_ALL = ("/login", "/static/")

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src 'self' data:; media-src data:; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}
_ID = re.compile(r"[A-Za-z0-9_-]{43}")


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """On every answer, errors included; a page may have set a policy of its own."""
    del request
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)


def make_guard(sessions: Sessions, host: str) -> Middleware:
    """A middleware for a dashboard that listens on ``host``."""
    loopback = is_loopback(host)

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if loopback and not _names_loopback(request.host):
            # a page elsewhere may point its own name at 127.0.0.1 and read what we answer (DNS rebinding)
            raise web.HTTPMisdirectedRequest(text=f"not the host asked for: {request.host}")
        session = _session_of(request) or sessions.new()
        request[SESSION] = session
        if not sessions.may_read(session) and not request.path.startswith(OPEN_TO_ALL):
            return _to_login(request)
        if request.method == "POST":
            await _refuse_foreign_forms(request, sessions, session)
        answer = await handler(request)
        if _session_of(request) != session and COOKIE not in answer.cookies:
            give(answer, request, session)
        return answer

    return guard


def give(answer: web.StreamResponse, request: web.Request, session: str) -> None:
    """Set the session's cookie: out of reach for scripts, never sent from another site."""
    secure = request.secure or request.headers.get("X-Forwarded-Proto") == "https"
    answer.set_cookie(COOKIE, session, httponly=True, samesite="Strict", secure=secure, path="/")


def is_loopback(host: str) -> bool:
    """Whether an address can only be reached from this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _names_loopback(host: str) -> bool:
    name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
    return is_loopback(name)


def _session_of(request: web.Request) -> str:
    given = request.cookies.get(COOKIE, "")
    return given if _ID.fullmatch(given) else ""


def _to_login(request: web.Request) -> web.StreamResponse:
    if request.method not in ("GET", "HEAD"):
        raise web.HTTPForbidden(text="sign in first")
    raise web.HTTPSeeOther(request.app.router["login"].url_for().with_query(next=request.path_qs))


async def _refuse_foreign_forms(request: web.Request, sessions: Sessions, session: str) -> None:
    origin = request.headers.get("Origin")
    if origin is not None and origin.partition("://")[2] != request.host:
        raise web.HTTPForbidden(text=f"this form came from another site: {origin}")
    token = (await request.post()).get("token", "")
    if not isinstance(token, str) or not sessions.form_is_ours(session, token):
        raise web.HTTPForbidden(text="this form is not ours or too old: open its page again")
