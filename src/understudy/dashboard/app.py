"""The pages as an application: which address shows what, and which form does what.

A page is a function from the desk and the query string to a value, and a template that shows it; it runs in a
thread, for stores block. It ignores who may come in (guard) and where it listens (server).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlencode

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from understudy.dashboard import calls, evaluations, models, orders, own, rollouts, today
from understudy.dashboard.calendar import Calendar
from understudy.dashboard.desk import Desk
from understudy.dashboard.guard import SESSION, add_headers, give, make_guard
from understudy.dashboard.orders import Moves
from understudy.dashboard.plan import Plans
from understudy.dashboard.sessions import Sessions
from understudy.dashboard.templates import render
from understudy.errors import StoreError, UserError
from understudy.evaluate.report import script_hash

LARGEST_FORM = 64 * 1024
NAVIGATION = (
    ("/", "Today"),
    ("/traffic", "Traffic"),
    ("/models", "Models"),
    ("/plan", "Plan"),
    ("/evaluations", "Evaluations"),
    ("/rollouts", "Rollouts"),
    ("/own", "Own models"),
)
EMBEDDED_POLICY = (
    "sandbox allow-scripts; default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    f"script-src 'sha256-{script_hash()}'; frame-ancestors 'none'"
)
"""For the certificate's own page, which holds its style: shown apart from us (an origin of its own, without
our cookie), and whoever wrote the file, only the script that filters its tables runs."""

Read = Callable[[Desk, Mapping[str, str]], object]


class Dashboard:
    """Handlers over one desk."""

    def __init__(
        self, desk: Desk, sessions: Sessions, moves: Moves | None, calendar: Calendar | None
    ) -> None:
        self._desk = desk
        self._sessions = sessions
        self._moves = moves
        self._calendar = calendar

    def routes(self) -> list[web.RouteDef]:
        """Every address there is."""
        return [
            web.get("/", self._page("today.html", today.page)),
            web.get("/traffic", self._page("traffic.html", calls.page)),
            web.get("/traffic/{key:[0-9A-Za-z-]{1,64}}", self._page("call.html", calls.one)),
            web.get("/traffic/{key:[0-9A-Za-z-]{1,64}}/{side:request|response}", self._body),
            web.get("/models", self._page("models.html", models.page)),
            web.get("/plan", self._page("plan.html", Plans().page)),
            web.get("/evaluations", self._page("evaluations.html", evaluations.page)),
            web.get("/evaluations/{name}", self._page("evaluation.html", evaluations.one)),
            web.get("/evaluations/{name}/certificate", self._certificate),
            web.get("/rollouts", self._page("rollouts.html", self._rollouts)),
            web.post("/rollouts", self._move),
            web.get("/own", self._page("own.html", own.page)),
            web.get("/login", self._login_form, name="login"),
            web.post("/login", self._login),
            web.post("/logout", self._logout),
        ]

    def _page(self, template: str, read: Read) -> Handler:
        async def handler(request: web.Request) -> web.Response:
            page = await asyncio.to_thread(read, self._desk, {**request.query, **request.match_info})
            if page is None:
                raise web.HTTPNotFound(text="there is no such thing, or not any more")
            return self.show(request, template, page=page)

        return handler

    def show(self, request: web.Request, template: str, status: int = 200, **values: object) -> web.Response:
        """A page within the frame that all share."""
        session = request.get(SESSION, "")
        signed_in = self._sessions.needed and self._sessions.may_read(session)
        open_pages = self._sessions.may_read(session)
        text = render(
            template,
            navigation=NAVIGATION if open_pages else (),
            here="/" + request.path.strip("/").partition("/")[0],
            token=self._sessions.form_token(session),
            signed_in=signed_in,
            **values,
        )
        return web.Response(text=text, content_type="text/html", charset="utf-8", status=status)

    async def _body(self, request: web.Request) -> web.Response:
        file = await asyncio.to_thread(calls.body, self._desk, request.match_info)
        if file is None:
            raise web.HTTPNotFound(text="there is no such call")
        headers = {"Content-Disposition": f'attachment; filename="{file.name}"'}
        return web.Response(body=file.content, content_type="application/octet-stream", headers=headers)

    async def _certificate(self, request: web.Request) -> web.Response:
        text = await asyncio.to_thread(evaluations.certificate_page, self._desk, request.match_info["name"])
        if text is None:
            raise web.HTTPNotFound(text="this evaluation has no page of its own")
        headers = {"Content-Security-Policy": EMBEDDED_POLICY}
        return web.Response(text=text, content_type="text/html", charset="utf-8", headers=headers)

    def _rollouts(self, desk: Desk, query: Mapping[str, str]) -> rollouts.Rollouts:
        return rollouts.page(desk, query, self._calendar)

    async def _move(self, request: web.Request) -> web.Response:
        if self._moves is None:
            raise web.HTTPForbidden(text="this dashboard was started to read only")
        form = {name: value for name, value in (await request.post()).items() if isinstance(value, str)}
        order = orders.order_of(form, f"dashboard ({request.remote})")
        if form.get("confirmed") != "yes":
            asked = await asyncio.to_thread(orders.ask, self._desk, order, self._moves)
            return self.show(request, "confirm.html", page=asked)
        await asyncio.to_thread(orders.carry_out, self._desk, order, self._moves)
        raise web.HTTPSeeOther(f"/rollouts?{urlencode({'moved': order.alias})}")

    async def _login_form(self, request: web.Request) -> web.Response:
        if self._sessions.may_read(request[SESSION]):
            raise web.HTTPSeeOther("/")
        return self.show(request, "login.html", next=request.query.get("next", "/"), wrong="")

    async def _login(self, request: web.Request) -> web.Response:
        form = await request.post()
        onward, address = _own_path(str(form.get("next", "/"))), request.remote or ""
        if self._sessions.must_wait(address):
            return self.show(request, "login.html", 429, next=onward, wrong="Too many tries; wait a minute.")
        session = self._sessions.sign_in(str(form.get("key", "")))
        if session is None:
            self._sessions.failed(address)
            return self.show(request, "login.html", 403, next=onward, wrong="That is not the admin key.")
        answer = web.Response(status=303, headers={"Location": onward})
        give(answer, request, session)
        return answer

    async def _logout(self, request: web.Request) -> web.Response:
        self._sessions.sign_out(request[SESSION])
        raise web.HTTPSeeOther("/login")


class Problem(NamedTuple):
    """Something to be said in place of a page."""

    title: str
    text: str


def make_app(
    desk: Desk, sessions: Sessions, host: str, moves: Moves | None, calendar: Calendar | None
) -> web.Application:
    """The application for a dashboard that listens on ``host``."""
    dashboard = Dashboard(desk, sessions, moves, calendar)
    app = web.Application(
        middlewares=[_explaining(dashboard), make_guard(sessions, host)], client_max_size=LARGEST_FORM
    )
    app.add_routes(dashboard.routes())
    app.router.add_static("/static/", Path(__file__).parent / "static")
    app.on_response_prepare.append(add_headers)
    return app


def _explaining(dashboard: Dashboard) -> Middleware:
    """Refusals and the user's errors as pages; a bug stays a 500 with its traceback in the log."""

    @web.middleware
    async def explaining(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            problem = Problem(HTTPStatus(error.status).phrase, _said(error, request))
            return dashboard.show(request, "problem.html", error.status, problem=problem)
        except UserError as error:
            status = 503 if isinstance(error, StoreError) else 422
            problem = Problem("That did not work", str(error))
            return dashboard.show(request, "problem.html", status, problem=problem)

    return explaining


def _said(error: web.HTTPException, request: web.Request) -> str:
    """Our words where there are any; aiohttp's own say no more than the title."""
    text = error.text or ""
    if text != f"{error.status}: {error.reason}":
        return text
    if error.status == HTTPStatus.NOT_FOUND:
        return f"there is no page at {request.path[:200]}"
    return f"{request.method} {request.path[:200]} is nothing that can be done here"


def _own_path(path: str) -> str:
    """A path of ours to go to after signing in; anything else leads to the first page."""
    ours = path.startswith("/") and not path.startswith(("//", "/\\")) and path.isprintable()
    return path if ours else "/"
