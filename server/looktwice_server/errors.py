"""Errors that a caller sees, each with the HTTP status it deserves.

RequestError (400)
├── PictureError (400)        what was sent is no picture that can be judged
├── UnknownReference (404)    no reference of that name
└── ExpertUnavailable (503)   the worker could not inspect now
SettingsError                 the server cannot start like this
"""

from http import HTTPStatus

from fastapi import Request
from fastapi.responses import JSONResponse


class RequestError(Exception):
    """The request cannot be served; the message says what to do."""

    status = HTTPStatus.BAD_REQUEST

    def __init__(self, message: str, *, param: str | None = None) -> None:
        """Take the sentence for the caller and the request's key that it is about."""
        super().__init__(message)
        self.param = param


class PictureError(RequestError):
    """The picture is broken, of a kind that is not read, too large or too small."""


class UnknownReference(RequestError):  # noqa: N818  # the OpenAI style names the thing
    """No reference of that name."""

    status = HTTPStatus.NOT_FOUND


class ExpertUnavailable(RequestError):  # noqa: N818
    """The worker could not inspect the picture, for a reason of its own (out of memory)."""

    status = HTTPStatus.SERVICE_UNAVAILABLE


class SettingsError(Exception):
    """The server cannot start with these settings; the message says which to change."""


async def request_error_response(_request: Request, error: Exception) -> JSONResponse:
    """OpenAI's error object for a RequestError."""
    assert isinstance(error, RequestError)
    body = {
        "message": str(error),
        "type": error.status.phrase.replace(" ", "") + "Error",
        "param": error.param,
        "code": error.status.value,
    }
    return JSONResponse({"error": body}, status_code=error.status)
