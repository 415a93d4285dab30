"""Where the server is, the key to it, how long to wait: option, else environment, else default.

And where what these clients serve themselves, chatbot and MCP, can listen.
"""

import os
import socket

from looktwice_clients.errors import LookTwiceError

DEFAULT_URL = "http://127.0.0.1:8000/v1"

TIMEOUT = 600.0
"""Seconds that a request may take, waiting in the server's queue included."""

NO_KEY = "none"
"""Sent where no key is set: the OpenAI SDK insists on one, a server without keys ignores it."""


def server_url(url: str | None = None) -> str:
    """The API's base address, such as http://127.0.0.1:8000/v1, without a slash at its end.

    Args:
        url: as the user gave it; else $LOOKTWICE_URL; else `DEFAULT_URL`. A bare
            http://host:port gets its /v1.
    """
    chosen = (url or os.environ.get("LOOKTWICE_URL") or DEFAULT_URL).strip().rstrip("/")
    if "://" not in chosen:
        chosen = f"http://{chosen}"
    return f"{chosen}/v1" if chosen.count("/") == 2 else chosen


def server_key(api_key: str | None = None) -> str:
    """The API key: as given, else $LOOKTWICE_API_KEY, else $OPENAI_API_KEY, else `NO_KEY`.

    Raises:
        LookTwiceError: it cannot be sent.
    """
    environ = os.environ
    chosen = api_key or environ.get("LOOKTWICE_API_KEY") or environ.get("OPENAI_API_KEY")
    key = (chosen or NO_KEY).strip()  # a file's last line end comes along
    if not (key.isascii() and key.isprintable()):
        raise LookTwiceError("the API key has characters that no key has; set LOOKTWICE_API_KEY")
    return key


def host_and_port(host: str, port: int) -> str:
    """As they stand in an address: IPv6 in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def free_port(host: str, port: int) -> int:
    """The port of this machine, or a free one for 0.

    Raises:
        LookTwiceError: it cannot be listened on, which is told before anything else starts.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            bound: int = probe.getsockname()[1]
            return bound
    except OSError as error:
        where = host_and_port(host, port)
        raise LookTwiceError(f"cannot listen on {where}: {error.strerror}") from None
