"""Settings: environment variables -> the limits of a server.

The launcher writes them before any process starts, so that all processes read the same.
"""

import os
from dataclasses import dataclass
from typing import Self

from looktwice_server.errors import SettingsError

_PREFIX = "LOOKTWICE_"


@dataclass(frozen=True)
class Settings:
    """Limits, each set by an environment variable `LOOKTWICE_<NAME>`."""

    max_images: int = 16  # pictures a request
    max_request_mb: int = 256  # of one request's body; base64 makes pictures a third larger
    max_pixels: int = 50_000_000  # of one picture; a decoded pixel costs 3 bytes and more
    max_download_mb: int = 64  # of one picture from a URL
    min_side: int = 28  # pixels; fewer than two patches of the published tower show nothing
    fetch_timeout: int = 10  # seconds for one picture from a URL
    stop_seconds: int = 10  # for a stopping server beyond --shutdown-timeout, then it is killed
    crops_per_call: int = 40  # crops of all pictures that the worker inspects between two steps
    findings_cached: int = 512  # inspections that an API process remembers
    embeddings_cached_mb: int = 256  # encoder output that a worker keeps for the chat that follows

    @classmethod
    def from_environment(cls) -> Self:
        """Read the settings.

        Raises:
            SettingsError: a value is not a positive whole number.
        """
        values = {}
        for name in cls.__dataclass_fields__:
            variable = _PREFIX + name.upper()
            text = os.environ.get(variable)
            if text is None:
                continue
            if not text.isdecimal() or int(text) < 1:
                raise SettingsError(f"{variable} must be a positive whole number, got {text!r}")
            values[name] = int(text)
        return cls(**values)
