"""Errors that a caller sees, each with the HTTP status it deserves.

RequestError (400)
├── PictureError (400)          what was sent is no picture that can be judged
├── UnknownModel (404)          another model's name
├── UnknownReference (404)      no reference of that name
├── ReferenceOutdated (409)     the reference was made with another expert, or its file is broken
├── BodyTooLarge (413)          more bytes than the server takes
├── UnsupportedMediaType (415)  the body is not said to be JSON
├── ExpertUnavailable (503)     the worker could not inspect now
├── ReferenceUnavailable (503)  the references' folder cannot be read now
└── StoreFull (507)             the references' disk or list is full
SettingsError                 the server cannot start like this
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from types import MappingProxyType

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# OpenAI's clients would send all pictures again, to no end.
NO_RETRY: Mapping[str, str] = MappingProxyType({"x-should-retry": "false"})


class RequestError(Exception):
    """The request cannot be served; the message says what to do."""

    status = HTTPStatus.BAD_REQUEST
    headers: Mapping[str, str] = MappingProxyType({})

    def __init__(self, message: str, *, param: str | None = None) -> None:
        """Take the sentence for the caller and the request's key that it is about."""
        super().__init__(message)
        self.param = param


@contextmanager
def naming(key: str, index: int) -> Iterator[None]:
    """Let an error about one of a request's pictures name it; one about its reference does not."""
    try:
        yield
    except RequestError as error:
        if error.param != "reference":
            error.args = (f"{key}[{index}]: {error}",)
            error.param = key
        raise


class PictureError(RequestError):
    """The picture is broken, of a kind that is not read, too large or too small."""


class UnknownModel(RequestError):  # noqa: N818  # the OpenAI style names the thing
    """Another model is served here."""

    status = HTTPStatus.NOT_FOUND


class UnknownReference(RequestError):  # noqa: N818
    """No reference of that name."""

    status = HTTPStatus.NOT_FOUND


class ReferenceOutdated(RequestError):  # noqa: N818
    """The reference cannot be used as it is on disk; adding it again helps."""

    status = HTTPStatus.CONFLICT
    headers: Mapping[str, str] = NO_RETRY


class StoreFull(RequestError):  # noqa: N818
    """There is no room for another reference."""

    status = HTTPStatus.INSUFFICIENT_STORAGE
    headers = NO_RETRY


class BodyTooLarge(RequestError):  # noqa: N818
    """The request has more bytes than this server takes."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class UnsupportedMediaType(RequestError):  # noqa: N818
    """The body is not said to be JSON."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE


class ExpertUnavailable(RequestError):  # noqa: N818
    """The worker could not inspect the picture, for a reason of its own (out of memory)."""

    status = HTTPStatus.SERVICE_UNAVAILABLE


class ReferenceUnavailable(RequestError):  # noqa: N818
    """The reference cannot be read now; it is neither unknown nor broken."""

    status = HTTPStatus.SERVICE_UNAVAILABLE


class SettingsError(Exception):
    """The server cannot start with these settings; the message says which to change."""


def error_response(
    status: HTTPStatus,
    message: str,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """OpenAI's error object."""
    kind = status.phrase.replace(" ", "") + "Error"
    body = {"message": message, "type": kind, "param": param, "code": status.value}
    return JSONResponse({"error": body}, status_code=status, headers=headers)


async def request_error_response(_request: Request, error: Exception) -> JSONResponse:
    """The answer to a RequestError."""
    assert isinstance(error, RequestError)
    return error_response(error.status, str(error), error.param, error.headers)


async def http_error_response(request: Request, error: Exception) -> JSONResponse:
    """The answer to a path or method that is not served."""
    assert isinstance(error, HTTPException)
    served = (
        "this server answers POST /v1/chat/completions, POST /v1/inspections, "
        "GET /v1/references and GET /v1/models"
    )
    message = f"{request.method} {request.url.path[:100]} is not served; {served}"
    if error.status_code not in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
        message = error.detail
    return error_response(HTTPStatus(error.status_code), message, headers=error.headers)


class KeyRefused:
    """ASGI middleware that puts vLLM's refusal of an API key into OpenAI's shape."""

    def __init__(self, app: ASGIApp) -> None:
        """Stand around the whole app; only its key check answers 401."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on but a 401."""
        refused = False

        async def send_unless_refused(message: Message) -> None:
            nonlocal refused
            refused = refused or message.get("status") == HTTPStatus.UNAUTHORIZED
            if not refused:
                await send(message)

        await self._app(scope, receive, send_unless_refused)
        if refused:
            answer = error_response(
                HTTPStatus.UNAUTHORIZED,
                "this server wants its API key in the header Authorization: Bearer KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await answer(scope, receive, send)
