"""`understudy label --web`: two answers side by side in a browser, one click or key for the better one.

For whoever sits at this machine: it listens on loopback alone. Another site open in the same browser can
neither read a pair (the Host must be ours) nor send a label (a token that only our page knows, and the Origin
where the browser tells it). Recorded text is shown as text; there is no script. It ignores which pairs are
shown and how labels are kept (label).
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path

from aiohttp import web

from understudy.errors import InputError
from understudy.evaluate.label import Labelling, Shown

TEMPLATES = Path(__file__).parent / "templates"
CHOICES = {"1": 1.0, "2": 0.0, "0": 0.5}
"""Preference for whatever stands first."""
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'",
    "Cache-Control": "no-store",
    # not no-referrer: browsers would then send our own form with Origin: null
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class LabelPage:
    """One person's labelling session; ``most`` pairs are shown."""

    def __init__(self, labelling: Labelling, most: int) -> None:
        self.done = 0
        self.finished = asyncio.Event()
        self._labelling = labelling
        self._most = most
        self._skipped: set[str] = set()
        self._token = secrets.token_urlsafe(24)

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._guard], client_max_size=2**16)
        app.add_routes([web.get("/", self._show), web.post("/", self._take)])
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """A page of another site may make the browser ask us: then Host or Origin give it away."""
        name = request.host.rpartition(":")[0] or request.host
        if name not in LOOPBACK:
            raise web.HTTPForbidden(text="only from this machine, by its loopback address")
        origin = request.headers.get("Origin")
        if origin is not None and origin != f"http://{request.host}":
            raise web.HTTPForbidden(text="only from this page")
        response = await handler(request)
        response.headers.update(HEADERS)
        return response

    def _next(self) -> Shown | None:
        if self.done >= self._most:
            return None
        pairs = self._labelling.open_pairs()
        return next((pair for pair in pairs if pair.key not in self._skipped), None)

    async def _show(self, request: web.Request) -> web.Response:
        import jinja2

        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
        )
        text = environment.get_template("label.html").render(
            pair=self._next(),
            token=self._token,
            done=self.done,
            most=self._most,
            count=self._labelling.count,
        )
        return web.Response(text=text, content_type="text/html")

    async def _take(self, request: web.Request) -> web.StreamResponse:
        form = await request.post()
        token, choice, key = (str(form.get(name, "")) for name in ("token", "choice", "key"))
        if not hmac.compare_digest(token.encode(), self._token.encode()):
            raise web.HTTPForbidden(text="this form is not from the page that is open now: reload it")
        if choice == "finish":
            self.finished.set()
            return web.Response(text="Saved. You can close this page.")
        self._save(key, choice)
        raise web.HTTPSeeOther("/", headers=HEADERS)

    def _save(self, key: str, choice: str) -> None:
        """A pair that is no longer open (a form sent twice) changes nothing."""
        pair = next((pair for pair in self._labelling.open_pairs() if pair.key == key), None)
        if pair is None:
            return
        if choice in CHOICES:
            self._labelling.save(pair, CHOICES[choice])
            self.done += 1
        elif choice == "skip":
            self._skipped.add(key)


async def serve(page: LabelPage, port: int, opened: Callable[[str], None]) -> None:
    """Serve until the person has finished; ``opened`` is told the address.

    Raises InputError for a port that is taken.
    """
    runner = web.AppRunner(page.app(), access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", port)
        try:
            await site.start()
        except OSError as error:
            raise InputError(
                f"port {port}: {error.strerror}", expected="a free port, or 0 for any"
            ) from error
        opened(f"http://127.0.0.1:{runner.addresses[0][1]}/")
        await page.finished.wait()
    finally:
        await runner.cleanup()
