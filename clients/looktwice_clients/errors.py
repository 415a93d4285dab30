"""The exceptions that these clients raise themselves; the OpenAI SDK's pass through unchanged.

LookTwiceError
├── ImageError    something that should be a picture is not, or cannot be sent
├── ReplyError    the server answered, but not on LookTwice's wire
├── DatabaseError the chatbot's database is missing, unreachable or of another version
└── DemoError     `make demo` could not run to its end
"""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

MOST_SAID = 300
"""Characters of a server's own words that a message repeats; another server may send a page."""


class LookTwiceError(Exception):
    """Everything that these clients raise themselves; the text is one line for a person."""


class ImageError(LookTwiceError, ValueError):
    """Something that should be a picture is missing, too large, or no picture."""

    def __init__(self, text: str, code: str = "") -> None:
        """Say `text`; `code` names the usual reasons, for who says them in another language.

        Args:
            text: one line that begins with the picture's name.
            code: missing, empty, not_picture, svg, pdf, heic, unreadable; else "".
        """
        super().__init__(text)
        self.code = code


class ReplyError(LookTwiceError):
    """The server answered without what LookTwice's wire promises."""


class DatabaseError(LookTwiceError):
    """The chatbot's database cannot be used now, or not by this version."""


class DemoError(LookTwiceError):
    """The demo's server or pictures are not there; the text carries the server's last words."""


def one_line(error: BaseException, url: str | None = None) -> str:
    """What went wrong, in one line, with what to do where that is known.

    Args:
        error: any exception; the OpenAI SDK's are put into this project's words.
        url: the server's address, named where the server could not be reached.
    """
    if isinstance(error, LookTwiceError):
        text = str(error)
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = _sdk_error(error, url or "the server") or f"{type(error).__name__}: {error}"
    return printable(" ".join(text.split()))


def _sdk_error(error: BaseException, where: str) -> str | None:
    """The OpenAI SDK's error in this project's words; None for any other."""
    if "openai" not in sys.modules:  # a second to import, and then it is none of its errors
        return None
    import openai

    if isinstance(error, openai.APITimeoutError):
        return f"{where} did not answer in time"
    if isinstance(error, openai.APIConnectionError):
        return f"cannot reach {where}: is `looktwice serve` running there? (--url, $LOOKTWICE_URL)"
    if isinstance(error, openai.AuthenticationError):
        return f"{where} wants an API key: set LOOKTWICE_API_KEY ({_served_message(error)})"
    if isinstance(error, openai.APIStatusError) and not _message(error):
        told = f"{where} answered HTTP {error.status_code} without a reason"
        wrong = error.status_code == 404
        return f"{told}: is it LookTwice's address, ending in /v1? (--url)" if wrong else told
    return _served_message(error) if isinstance(error, openai.APIError) else None


def _served_message(error: Exception) -> str:
    """The sentence in an OpenAI error object, else the start of the SDK's own; the HTTP status."""
    status = getattr(error, "status_code", None)
    text = _message(error) or str(error)[:MOST_SAID]
    return f"{text} (HTTP {status})" if status else text


def _message(error: Exception) -> str:
    """The sentence in an OpenAI error object; empty where another server answered."""
    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, dict) else None
    return message[:MOST_SAID] if isinstance(message, str) else ""


def what_is_wrong(error: "ValidationError") -> str:
    """The first thing that a reply lacks, as "data.0.score: Field required"."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"])) or "it"
    return f"{place}: {first['msg']}"


def printable(text: str, keep: str = "") -> str:
    """`text` safe for a terminal: control characters, escapes, lone surrogates become �.

    Args:
        text: what a file name, a server or a model said.
        keep: characters to let through although they do not print, such as a newline.
    """
    return "".join(c if c.isprintable() or c in keep else "\N{REPLACEMENT CHARACTER}" for c in text)
