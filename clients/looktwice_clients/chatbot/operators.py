"""Who asks: a browser's cookie, and the login where the page has a key.

The cookie holds 32 hexadecimal digits that nobody can guess; the history belongs to it. The login
is a second cookie, signed with the key, so that it outlives the chatbot's restart and ends when
the key changes. Both are renewed while they are used.
"""

import asyncio
import hmac
import re
from html import escape
from time import time

from itsdangerous import BadSignature, URLSafeTimedSerializer
from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection, Request
from starlette.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from looktwice_clients.chatbot.tables import new_id
from looktwice_clients.chatbot.wording import LANGUAGES, Wording, preferred, wording
from looktwice_clients.errors import printable

OWNER = "looktwice_owner"
LOGIN = "looktwice_login"
OPEN_PATHS = ("/login", "/health")
"""What anybody may see where there is a key."""

LONGEST_NAME = 100
YEAR = 365 * 24 * 3600
SHIFT = 12 * 3600
"""Seconds that a login lasts after it was last used."""

RENEWAL = 600
"""Seconds after which a login in use is renewed."""

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
        operator, age = _ticket(connection, self._key)
        if operator is None and scope["path"] not in OPEN_PATHS:
            await _turned_away(connection)(scope, receive, send)
            return
        owner = connection.cookies.get(OWNER, "")
        known = _OWNER_FORM.fullmatch(owner) is not None
        scope["owner"] = owner if known else new_id()
        scope["operator"] = operator or ""

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start" and operator is not None:
                headers = MutableHeaders(scope=message)
                if not known or headers.get("content-type", "").startswith("text/html"):
                    set_cookie(headers, connection, OWNER, scope["owner"], YEAR)
                if age > RENEWAL and self._key and LOGIN not in headers.get("set-cookie", ""):
                    set_cookie(headers, connection, LOGIN, _sign(self._key, operator), SHIFT)
            await send(message)

        await self._app(scope, receive, sending)


def set_cookie(
    headers: MutableHeaders, connection: HTTPConnection, name: str, value: str, seconds: int
) -> None:
    """Add a cookie that no script reads, and that an https page sends over https alone."""
    reply = Response()
    secure = connection.url.scheme == "https"
    reply.set_cookie(name, value, seconds, httponly=True, samesite="lax", secure=secure)
    headers.append("set-cookie", reply.headers["set-cookie"])


def logged_in(connection: HTTPConnection, key: str | None) -> str | None:
    """The operator's name, "" where no key is set; None for who must log in first."""
    return _ticket(connection, key)[0]


def _ticket(connection: HTTPConnection, key: str | None) -> tuple[str | None, float]:
    """As `logged_in`, and the seconds since the login or its last renewal."""
    if key is None:
        return "", 0
    cookie = connection.cookies.get(LOGIN, "")
    try:
        name, signed = _signer(key).loads(cookie, max_age=SHIFT, return_timestamp=True)
    except BadSignature:
        return None, 0
    return str(name), time() - signed.timestamp()


def _turned_away(connection: HTTPConnection) -> Response:
    if "text/html" in connection.headers.get("accept", ""):
        return RedirectResponse("/login", 303)
    _, language, *below = connection.scope["path"].split("/")
    if below[:1] == ["gradio_api"] and language in LANGUAGES:  # an open page, which reads JSON
        return JSONResponse({"detail": wording(language)("login.ended")}, 401)
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
    ticket = _sign(key, printable(name.strip())[:LONGEST_NAME])
    set_cookie(response.headers, request, LOGIN, ticket, SHIFT)
    return response


def logout() -> Response:
    """Forget the login, not whose history it is."""
    response = RedirectResponse("/login", 303)
    response.delete_cookie(LOGIN)
    return response


def _sign(key: str, name: str) -> str:
    return str(_signer(key).dumps(name))


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
