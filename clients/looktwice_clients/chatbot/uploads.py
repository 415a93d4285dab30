"""Which files an event of the page may name: those that were uploaded, and no others.

Gradio checks this itself, but not where its page is mounted in another application (`has_launched`
stays false there): a forged event could have any file of the machine inspected, or any address
fetched.
"""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from gradio.utils import get_upload_folder
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from looktwice_clients.chatbot.wording import LANGUAGES

MAX_EVENT_BYTES = 1_000_000
"""Events carry words and names of files; pictures are uploaded on a route of their own."""

KEPT_SECONDS = 24 * 3600
"""How long an uploaded picture and its overlay stay on the disk; the history keeps the overlay."""

_NO_EVENTS = {"/login", *(f"/{language}/gradio_api/upload" for language in LANGUAGES)}


def remove_old() -> None:
    """Remove uploads and overlays that are older than `KEPT_SECONDS`.

    Gradio's own cleaner ends for good where a picture comes while it looks through its list.
    """
    for path in Path(get_upload_folder()).rglob("*"):
        with suppress(OSError):  # gone, or a folder that is not empty
            if path.stat().st_mtime < time.time() - KEPT_SECONDS:
                path.rmdir() if path.is_dir() else path.unlink()


class UploadsOnly:
    """ASGI middleware: refuses events that name a file which was not uploaded."""

    def __init__(self, app: ASGIApp) -> None:
        """Guard `app`."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with 400, 403 or 413."""
        if not _is_event(scope):
            await self._app(scope, receive, send)
            return
        body = bytearray()
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MAX_EVENT_BYTES:
                await PlainTextResponse("too large", 413)(scope, receive, send)
                return
        try:
            named = named_files(json.loads(body or b"null"))
        except (ValueError, RecursionError):
            await PlainTextResponse("no JSON", 400)(scope, receive, send)
            return
        if not all(map(_uploaded, named)):
            await PlainTextResponse("upload the file first", 403)(scope, receive, send)
            return
        await self._app(scope, _again(bytes(body), receive), send)


def _is_event(scope: Scope) -> bool:
    """Whatever is sent to the application, but for files and the login's form."""
    sent = scope["type"] == "http" and scope["method"] not in ("GET", "HEAD")
    return sent and scope["path"] not in _NO_EVENTS


def named_files(value: Any) -> list[object]:
    """Every `path` in an event, however deep."""
    if isinstance(value, list):
        return [path for one in value for path in named_files(one)]
    if isinstance(value, dict):
        own = [value["path"]] if "path" in value else []
        return own + [path for one in value.values() for path in named_files(one)]
    return []


def _uploaded(path: object) -> bool:
    if not isinstance(path, str):
        return path is None
    try:
        return Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve())
    except ValueError:  # no file can have this name
        return False


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read already, then what comes after it."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def first_the_body() -> Message:
        return waiting.pop() if waiting else await receive()

    return first_the_body
