"""Who asks: a browser's cookie, and the login where the page has a key.

The cookie holds 32 hexadecimal digits that nobody can guess; the history belongs to it. The login
is a second cookie, signed with the key, so that it outlives the chatbot's restart and ends when
the key changes.
"""

import asyncio
import hmac
import re
from html import escape

from itsdangerous import BadSignature, URLSafeTimedSerializer
from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection, Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from looktwice_clients.chatbot.tables import new_id
from looktwice_clients.chatbot.wording import Wording, preferred, wording
from looktwice_clients.errors import printable

OWNER = "looktwice_owner"
LOGIN = "looktwice_login"
OPEN_PATHS = ("/login", "/health")
"""What anybody may see where there is a key."""

LONGEST_NAME = 100
YEAR = 365 * 24 * 3600
SHIFT = 12 * 3600
"""Seconds that a login lasts."""

WRONG_KEY_SECONDS = 1.0
"""How long a wrong key waits for its answer."""

_OWNER_FORM = re.compile(r"[0-9a-f]{32}")


class Door:
    """ASGI middleware: gives every browser its cookie, and lets in only who has the key."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        """Guard `app`; without a key everybody may enter."""
        self._app = app
        self._key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through with `scope["owner"]` and `scope["operator"]`, or answer it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        operator = logged_in(connection, self._key)
        if operator is None and scope["path"] not in OPEN_PATHS:
            await _turned_away(connection)(scope, receive, send)
            return
        owner = connection.cookies.get(OWNER, "")
        known = _OWNER_FORM.fullmatch(owner) is not None
        scope["owner"] = owner if known else new_id()
        scope["operator"] = operator or ""

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start" and not known and operator is not None:
                reply = Response()
                reply.set_cookie(OWNER, scope["owner"], YEAR, httponly=True, samesite="lax")
                MutableHeaders(scope=message).append("set-cookie", reply.headers["set-cookie"])
            await send(message)

        await self._app(scope, receive, sending)


def logged_in(connection: HTTPConnection, key: str | None) -> str | None:
    """The operator's name, "" where no key is set; None for who must log in first."""
    if key is None:
        return ""
    try:
        return str(_signer(key).loads(connection.cookies.get(LOGIN, ""), max_age=SHIFT))
    except BadSignature:
        return None


def _turned_away(connection: HTTPConnection) -> Response:
    if "text/html" in connection.headers.get("accept", ""):
        return RedirectResponse("/login", 303)
    return PlainTextResponse("log in first", 401)


async def login(request: Request, key: str | None) -> Response:
    """The login page; the right key with a name leads to the page itself."""
    words = wording(preferred(request.headers.get("accept-language", "")))
    if key is None:
        return RedirectResponse("/", 303)
    if request.method == "GET":
        return HTMLResponse(login_page(words))
    async with request.form(max_files=0, max_fields=2) as form:
        name, given = str(form.get("name", "")), str(form.get("key", ""))
    if not hmac.compare_digest(given.encode(), key.encode()):
        await asyncio.sleep(WRONG_KEY_SECONDS)
        return HTMLResponse(login_page(words, words("login.wrong")), 403)
    response = RedirectResponse("/", 303)
    ticket = _signer(key).dumps(printable(name.strip())[:LONGEST_NAME])
    secure = request.url.scheme == "https"
    response.set_cookie(LOGIN, ticket, SHIFT, httponly=True, samesite="lax", secure=secure)
    return response


def logout() -> Response:
    """Forget the login, not whose history it is."""
    response = RedirectResponse("/login", 303)
    response.delete_cookie(LOGIN)
    return response


def _signer(key: str) -> URLSafeTimedSerializer:
    return URLSafeTimedSerializer(key, salt="looktwice login")


def login_page(words: Wording, problem: str = "") -> str:
    """The form that asks for name and key, as a page of its own."""
    alert = f'<p role="alert">{escape(problem)}</p>' if problem else ""
    return f"""<!doctype html>
<html lang="{words.language}">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(words("title"))}</title>
<style>
:root {{ color-scheme: light dark; font-family: system-ui, sans-serif }}
main {{ max-width: 22rem; margin: 10vh auto; padding: 0 1rem }}
label, input, button {{ display: block; width: 100%; box-sizing: border-box; font-size: 1rem }}
input, button {{ margin: .25rem 0 1rem; padding: .6rem }}
[role=alert] {{ border-left: .3rem solid; padding-left: .6rem; font-weight: 600 }}
</style></head>
<body><main><h1>{escape(words("title"))}</h1><h2>{escape(words("login.heading"))}</h2>{alert}
<form method="post" action="/login">
<label for="name">{escape(words("login.name"))}</label>
<input id="name" name="name" autocomplete="name" maxlength="{LONGEST_NAME}" required autofocus>
<label for="key">{escape(words("login.key"))}</label>
<input id="key" name="key" type="password" autocomplete="current-password" required>
<button>{escape(words("login.submit"))}</button>
</form></main></body></html>"""
