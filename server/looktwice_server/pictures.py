"""Pictures: a data URI or URL of a request -> an upright RGB picture that can be judged.

Registered as vLLM's media connector, so that every way into the server reads pictures here.
"""

import asyncio
import base64
import binascii
import ipaddress
import socket
import warnings
from io import BytesIO
from urllib.parse import urlsplit

import aiohttp
import numpy as np
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import DefaultResolver
from PIL import Image, ImageOps, UnidentifiedImageError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector

from looktwice_server.errors import PictureError
from looktwice_server.plugin import MEDIA_CONNECTOR
from looktwice_server.settings import Settings

# What Pillow reads safely and cameras write; PostScript, PDF and the like stay closed.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "MPO", "JPEG2000", "AVIF")


def decode(data: bytes, settings: Settings) -> Image.Image:
    """Read a picture's file: first frame, upright, 8 bits a channel, RGB.

    Raises:
        PictureError: it cannot be read, or is too large or too small to be judged.
    """
    if not data:
        raise PictureError("the picture is empty: 0 bytes were sent")
    try:
        with warnings.catch_warnings():
            # Its size is compared with our own limit below, before a pixel is decoded.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(BytesIO(data), formats=FORMATS)
            _check_size(picture.size, settings)
            picture.load()
            return _to_rgb(ImageOps.exif_transpose(picture))
    except Image.DecompressionBombError as error:
        raise PictureError(
            f"the picture has more pixels than this server takes ({settings.max_pixels:,}); "
            "send a smaller one"
        ) from error
    except UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise PictureError(f"not a picture in a format that is read here: {known}") from error
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as error:
        # Pillow reports broken files by any of these, depending on the format.
        raise PictureError(f"the picture is broken and cannot be decoded: {error}") from error


def _check_size(size: tuple[int, int], settings: Settings) -> None:
    """Refuse a picture too large to decode or too small to judge."""
    width, height = size
    if width * height > settings.max_pixels:
        raise PictureError(
            f"the picture has {width} x {height} pixels, more than this server takes "
            f"({settings.max_pixels:,}); send a smaller one"
        )
    if min(size) < settings.min_side:
        raise PictureError(
            f"need at least {settings.min_side} px a side to judge a picture, "
            f"got {width} x {height}"
        )


def _to_rgb(picture: Image.Image) -> Image.Image:
    """RGB with 8 bits a channel; 16-bit and float greys are scaled by their own range."""
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        values = np.asarray(picture, dtype=np.float32)
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        values = np.nan_to_num((values - low) / (high - low or 1.0))
        return Image.fromarray((values * 255).round().astype(np.uint8)).convert("RGB")
    if picture.mode == "P" or picture.has_transparency_data:
        # Parts cut out of their background stand on white, as on an inspection table.
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def decode_data_uri(uri: str, settings: Settings) -> Image.Image:
    """Read a picture from `data:image/...;base64,...`.

    Raises:
        PictureError: the URI or the picture in it cannot be read.
    """
    head, comma, body = uri.partition(",")
    if not comma or not head.endswith(";base64"):
        raise PictureError(f"a data URI must look like data:image/png;base64,..., got {uri[:40]!r}")
    try:
        return decode(base64.b64decode(body, validate=True), settings)
    except binascii.Error as error:
        raise PictureError(f"the data URI is not valid base64: {error}") from error


class PublicResolver(AbstractResolver):
    """Resolves host names, and refuses addresses inside the plant's own network.

    The check stands where the connection takes its address from: a name that answers differently
    the second time cannot get around it.
    """

    def __init__(self, allowed: frozenset[str]) -> None:
        """Take the hosts (cameras, say) whose private addresses are allowed."""
        self._resolver = DefaultResolver()
        self._allowed = allowed

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """The host's addresses.

        Raises:
            PictureError: one of them is private and the host is not on the allow-list.
        """
        found = await self._resolver.resolve(host, port, family)
        if host not in self._allowed:
            for address in found:
                refuse_private(address["host"], host)
        return found

    async def close(self) -> None:
        """Close the resolver underneath."""
        await self._resolver.close()


def refuse_private(address: str, host: str) -> None:
    """Raise PictureError for an address that is not a public one."""
    if not ipaddress.ip_address(address).is_global:
        raise PictureError(
            f"pictures are not fetched from private addresses ({host}); an administrator can "
            f"allow the host with --allowed-media-domains {host}"
        )


async def fetch(url: str, allowed: frozenset[str], settings: Settings) -> bytes:
    """Download a picture; redirects are not followed.

    Args:
        url: http or https.
        allowed: if not empty, the only hosts that may be asked; they may be private ones.
        settings: size limit and timeout.

    Raises:
        PictureError: the URL may not be asked, or did not answer with a picture in time.
    """
    host = urlsplit(url).hostname or ""
    if allowed and host not in allowed:
        raise PictureError(f"pictures are fetched from {', '.join(sorted(allowed))} only")
    if host not in allowed and _is_address(host):
        refuse_private(host, host)  # a literal address is never resolved
    limit = settings.max_download_mb * 2**20
    timeout = aiohttp.ClientTimeout(total=settings.fetch_timeout)
    connector = aiohttp.TCPConnector(resolver=PublicResolver(allowed))
    try:
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
            session.get(url, allow_redirects=False) as answer,
        ):
            if answer.status != 200:
                raise PictureError(
                    f"{url} answered {answer.status}; redirects are not followed"
                    if 300 <= answer.status < 400
                    else f"{url} answered {answer.status}"
                )
            data = bytearray()
            async for chunk in answer.content.iter_chunked(2**16):
                data += chunk
                if len(data) > limit:
                    raise PictureError(f"{url} is larger than {settings.max_download_mb} MB")
            return bytes(data)
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        if isinstance(error.__cause__, PictureError):
            raise error.__cause__ from error
        reason = str(error) or f"no answer within {settings.fetch_timeout} s"
        raise PictureError(f"cannot fetch {url}: {reason}") from error


def _is_address(host: str) -> bool:
    """Whether the host is an IP address rather than a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


@MEDIA_CONNECTOR_REGISTRY.register(MEDIA_CONNECTOR)
class PictureConnector(MediaConnector):
    """Reads the pictures of requests for vLLM, by the rules of this module."""

    async def fetch_image_async(
        self, image_url: str, *, image_mode: str | None = "RGB"
    ) -> Image.Image:
        """The picture behind a data URI or an http(s) URL.

        Raises:
            PictureError: it cannot be had.
        """
        settings = Settings.from_environment()
        scheme = image_url.partition(":")[0].lower()
        if scheme == "data":
            return await asyncio.to_thread(decode_data_uri, image_url, settings)
        if scheme not in ("http", "https"):
            raise PictureError(
                f"a picture comes as a data URI or an http(s) URL, not as {image_url[:40]!r}"
            )
        data = await fetch(image_url, frozenset(self.allowed_media_domains), settings)
        return await asyncio.to_thread(decode, data, settings)

    def fetch_image(self, image_url: str, *, image_mode: str | None = "RGB") -> Image.Image:
        """The same from code that does not run in an event loop."""
        return asyncio.run(self.fetch_image_async(image_url, image_mode=image_mode))
