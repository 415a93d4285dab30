"""Settings: environment variables -> the limits of a server.

The launcher writes them before any process starts, so that all processes read the same.
"""

import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Self

from looktwice_server.errors import SettingsError

_PREFIX = "LOOKTWICE_"
MOST_PIXELS = 178_956_970  # of one picture: Pillow opens no larger one


def _data_home() -> Path:
    """Where this user's programs keep their data (XDG base directories)."""
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(home) / "looktwice" / "references"


@dataclass(frozen=True)
class Settings:
    """Limits and places, each set by an environment variable `LOOKTWICE_<NAME>`."""

    references: Path = field(default_factory=_data_home)  # folder, shared by all processes
    max_images: int = 16  # pictures a request
    max_request_mb: int = 256  # of one request's body; base64 makes pictures a third larger
    max_pixels: int = 50_000_000  # of one picture; a decoded pixel costs 3 bytes and more
    max_download_mb: int = 64  # of one picture from a URL
    min_side: int = 28  # pixels; fewer than two patches of the published tower show nothing
    grey_bits: int | None = None  # of the cameras' deep pixels; None: told by the brightest pixel
    fetch_timeout: int = 10  # seconds for one picture from a URL
    stop_seconds: int = 10  # for a stopping server beyond --shutdown-timeout, then it is killed
    crops_per_call: int = 40  # crops of all pictures that the worker inspects between two steps
    findings_cached_mb: int = 256  # inspections, with their maps, that an API process remembers
    embeddings_cached_mb: int = 256  # encoder output that a worker keeps for the chat that follows
    max_references: int = 1000  # names in the store
    max_reference_images: int = 256  # pictures of one reference, its calibration and defects apart
    reference_patches: int = 4096  # of one reference's memory bank; more is thinned
    reference_tokens_mb: int = 3072  # memory for the pictures of one reference while it is made
    nameless_references_mb: int = 1024  # on disk, of versions without a name: chats' own references
    references_cached_mb: int = 512  # memory banks that a worker keeps

    @classmethod
    def from_environment(cls) -> Self:
        """Read the settings.

        Raises:
            SettingsError: a value is not a positive whole number, or pictures may be larger or
                deeper than what can be opened.
        """
        values: dict[str, Any] = {}
        for name in cls.__dataclass_fields__:
            variable = _PREFIX + name.upper()
            text = os.environ.get(variable)
            if text is None or (name == "references" and not text):
                continue
            if name == "references":
                values[name] = Path(text).expanduser().absolute()
                continue
            if not text.isdecimal() or int(text) < 1:
                raise SettingsError(f"{variable} must be a positive whole number, got {text!r}")
            values[name] = int(text)
        if values.get("max_pixels", 0) > MOST_PIXELS:
            raise SettingsError(f"{_PREFIX}MAX_PIXELS must be at most {MOST_PIXELS}")
        if not 8 <= values.get("grey_bits", 8) <= 16:  # else every picture would be black
            raise SettingsError(f"{_PREFIX}GREY_BITS must be the sensor's 8 to 16 bits")
        return cls(**values)


@cache
def served() -> Settings:
    """The settings of the server that this process belongs to, read once.

    Raises:
        SettingsError: a value is not a positive whole number.
    """
    return Settings.from_environment()
