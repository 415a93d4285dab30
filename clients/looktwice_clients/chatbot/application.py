"""The chatbot's web application: the page in each language, the login, the history's files."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import gradio as gr
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, RedirectResponse, Response
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from looktwice_clients.chatbot import operators, page
from looktwice_clients.chatbot.history import History
from looktwice_clients.chatbot.station import Station
from looktwice_clients.chatbot.uploads import UploadsOnly, remove_old
from looktwice_clients.chatbot.wording import LANGUAGES, preferred, wording
from looktwice_clients.errors import DatabaseError
from looktwice_clients.images import MAX_BYTES
from looktwice_clients.inspector import AsyncInspector

log = logging.getLogger(__name__)

MOVE_SECONDS = 3.0
"""How often rows that wait for the database are tried again."""

CLEAN_SECONDS = 3600.0
"""How often old pictures are removed from the disk."""

HEADERS = {
    # Gradio's own scripts and styles are inline; nothing may come from, or go to, another host.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' "
    "'unsafe-eval'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "media-src 'self' blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "frame-ancestors 'none'; form-action 'self'; base-uri 'self'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def create(inspector: AsyncInspector, history: History, key: str | None = None) -> FastAPI:
    """The application, to be run by any ASGI server.

    Args:
        inspector: the LookTwice server.
        history: where inspections and feedback are kept; closed at the end.
        key: what operators must know to log in; None lets everybody in.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(_move_waiting(history)), asyncio.create_task(_clean())]
        yield
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await inspector.close()
        history.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    _add_routes(app, history, key)
    for language in LANGUAGES:
        blocks = page.build(Station(inspector, history, wording(language)))
        blocks.queue(default_concurrency_limit=None, api_open=False)
        gr.mount_gradio_app(
            app,
            blocks,
            f"/{language}",
            footer_links=[],
            run_history=False,
            show_error=False,
            max_file_size=MAX_BYTES,
            ssr_mode=False,
            enable_monitoring=False,
            theme=page.theme(),
            css_paths=page.CSS,
        )
    app.add_middleware(UploadsOnly)
    app.add_middleware(operators.Door, key=key)
    app.add_middleware(Headers)
    return app


def _add_routes(app: FastAPI, history: History, key: str | None) -> None:
    @app.get("/")
    async def start(request: Request) -> Response:
        return RedirectResponse(f"/{preferred(request.headers.get('accept-language', ''))}/")

    @app.get("/health")
    @app.get("/favicon.ico")
    async def empty() -> Response:
        return Response(status_code=204)

    @app.api_route("/login", methods=["GET", "POST"])
    async def login(request: Request) -> Response:
        return await operators.login(request, key)

    @app.get("/logout")
    async def logout() -> Response:
        return operators.logout()

    @app.get("/history.csv")
    async def export(request: Request) -> Response:
        async def csv() -> Response:
            lines = await asyncio.to_thread(history.as_csv, request.scope["owner"])
            name = {"content-disposition": 'attachment; filename="looktwice-history.csv"'}
            # With the mark that tells spreadsheets the encoding.
            return Response("\ufeff" + lines, media_type="text/csv", headers=name)

        return await _or_unavailable(request, csv)

    @app.get("/history/{inspection_id}.jpg")
    async def overlay(request: Request, inspection_id: str) -> Response:
        async def jpeg() -> Response:
            found = await asyncio.to_thread(history.overlay, request.scope["owner"], inspection_id)
            if found is None:
                return PlainTextResponse("no such picture", 404)
            kept = {"cache-control": "private, max-age=86400, immutable"}
            return Response(found, media_type="image/jpeg", headers=kept)

        return await _or_unavailable(request, jpeg)


async def _or_unavailable(request: Request, answer: Callable[[], Awaitable[Response]]) -> Response:
    """The answer, or the sentence that the database is away."""
    try:
        return await answer()
    except DatabaseError as error:
        log.warning("the history cannot be read: %s", error)
        words = wording(preferred(request.headers.get("accept-language", "")))
        return PlainTextResponse(words("history.away"), 503)


async def _move_waiting(history: History) -> None:
    """Move what waits for the database, as soon as that is back."""
    while True:
        await asyncio.sleep(MOVE_SECONDS)
        try:
            if moved := await asyncio.to_thread(history.move_waiting):
                log.warning("the database is back: %d entries moved", moved)
        except Exception:
            log.exception("what waits for the database could not be read")


async def _clean() -> None:
    """Remove old pictures from the disk."""
    while True:
        await asyncio.sleep(CLEAN_SECONDS)
        try:
            await asyncio.to_thread(remove_old)
        except Exception:
            log.exception("old pictures could not be removed")


class Headers:
    """ASGI middleware: tells the browser that nothing comes from, or goes to, another host."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap `app`."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Add `HEADERS` to every response."""

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self._app(scope, receive, sending)
