"""Pictures: a data URI or URL of a request -> an upright RGB picture that can be judged.

Registered as vLLM's media connector, so that every way into the server reads pictures here.
"""

import asyncio
import base64
import ipaddress
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from io import BytesIO
from typing import TypeVar

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import DefaultResolver
from PIL import Image, UnidentifiedImageError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from yarl import URL

from looktwice_adapters.picture_file import UnreadPictureError, to_rgb
from looktwice_server.decoded import DecodedPictures
from looktwice_server.errors import PictureError
from looktwice_server.plugin import MEDIA_CONNECTOR
from looktwice_server.settings import Settings, served

# What Pillow reads safely and cameras write; PostScript, PDF and the like stay closed. A phone's
# MPO is a JPEG with a second picture behind the first.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
# The only IPv6 addresses that the public network routes (RFC 4291), and those that lead to an IPv4
# address inside (RFC 6052). Python calls nearly all others global too: a site's own (fec0::/10,
# RFC 3879; 64:ff9b:1::/48, RFC 8215), and IPv4 ones in spellings long deprecated (::10.0.0.1).
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
NAT64 = ipaddress.ip_network("64:ff9b::/96")
# For protocols' own use (RFC 6890), a cloud's metadata among it; Python calls most of it global.
PROTOCOLS = ipaddress.ip_network("192.0.0.0/24")
SHOWN = 100  # characters of a URL that an error repeats
# A picture of the largest size takes half a GB while it is decoded: never many at once.
DECODERS = ThreadPoolExecutor(2, "decode")

T = TypeVar("T")


def decode(data: bytes, settings: Settings, others: DecodedPictures | None = None) -> Image.Image:
    """Read a picture's file: first frame, upright, 8 bits a channel, RGB.

    Args:
        data: the file.
        settings: limits.
        others: of the same request.

    Raises:
        PictureError: it cannot be read, or is too large or too small to be judged.
    """
    if not data:
        raise PictureError("the picture is empty: 0 bytes were sent")
    try:
        picture = Image.open(BytesIO(data), formats=_readable())
        _check_size(picture.size, settings)  # before a pixel is decoded
        if others is not None:
            others.add(picture.size)
        return to_rgb(picture, settings.grey_bits)
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise PictureError(
            f"the picture has more pixels than this server takes ({settings.max_pixels:,}); "
            "send a smaller one"
        ) from error
    except UnidentifiedImageError as error:
        known = ", ".join(_readable())
        raise PictureError(f"not a picture in a format that is read here: {known}") from error
    except UnreadPictureError as error:
        raise PictureError(str(error)) from error
    except Exception as error:
        # Pillow's readers report broken files by whatever went wrong in them.
        reason = str(error) or type(error).__name__
        raise PictureError(f"the picture is broken and cannot be decoded: {reason}") from error


def _readable() -> list[str]:
    """The formats that this build of Pillow reads, of those that we take."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


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


def decode_data_uri(
    uri: str, settings: Settings, others: DecodedPictures | None = None
) -> Image.Image:
    """Read a picture from `data:image/...;base64,...`.

    Raises:
        PictureError: the URI or the picture in it cannot be read.
    """
    head, comma, body = uri.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise PictureError(f"a data URI must look like data:image/png;base64,..., got {uri[:40]!r}")
    try:
        # Line breaks are allowed: MIME encoders put them in.
        data = base64.b64decode("".join(body.split()), validate=True)
    except ValueError as error:
        raise PictureError(f"the data URI is not valid base64: {error}") from error
    return decode(data, settings, others)


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
    if not _is_public(ipaddress.ip_address(address)):
        raise PictureError(
            f"pictures are not fetched from private addresses ({host}); an administrator can "
            f"allow the host with --allowed-media-domains {host}"
        )


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether packets to the address leave the plant's network."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return _is_public(inner)
        return address in GLOBAL_UNICAST and address.is_global
    return address.is_global and not address.is_multicast and address not in PROTOCOLS


async def fetch(url: str, allowed: frozenset[str], settings: Settings) -> bytes:
    """Download a picture; redirects are not followed.

    Args:
        url: http or https.
        allowed: if not empty, the only hosts that may be asked; they may be private ones.
        settings: size limit and timeout.

    Raises:
        PictureError: the URL may not be asked, or did not answer with a picture in time.
    """
    shown = url[:SHOWN]
    address = _parsed(url)
    host = address.raw_host or ""
    if allowed and host not in allowed:
        raise PictureError(f"pictures are fetched from {', '.join(sorted(allowed))} only")
    if host not in allowed and _is_address(address.host or ""):
        refuse_private(address.host or "", host)  # a literal address is never resolved
    timeout = aiohttp.ClientTimeout(total=settings.fetch_timeout)
    connector = aiohttp.TCPConnector(resolver=PublicResolver(allowed))
    try:
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
            session.get(address, allow_redirects=False) as answer,
        ):
            if 300 <= answer.status < 400:
                raise PictureError(
                    f"{shown} answered {answer.status}, and redirects are not followed; "
                    "send the address that it leads to"
                )
            if answer.status != 200:
                raise PictureError(f"{shown} answered {answer.status} instead of a picture")
            return await _read(answer, shown, settings)
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        if isinstance(error.__cause__, PictureError):
            raise error.__cause__ from error
        late = f"no answer within {settings.fetch_timeout} s"
        reason = late if isinstance(error, TimeoutError) else _reason(error)
        raise PictureError(f"cannot fetch {shown}: {reason}") from error


async def _read(answer: aiohttp.ClientResponse, url: str, settings: Settings) -> bytes:
    """The answer's body, as long as it is no larger than the limit."""
    data = bytearray()
    async for chunk in answer.content.iter_chunked(2**16):
        data += chunk
        if len(data) > settings.max_download_mb * 2**20:
            raise PictureError(f"{url} is larger than {settings.max_download_mb} MB")
    return bytes(data)


def _reason(error: Exception) -> str:
    """What aiohttp says, in words that do not depend on the machine's name service."""
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "the host's name is not known"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "the host does not take the connection"
    if isinstance(error, aiohttp.InvalidURL):
        return "this is not a valid URL"
    return str(error)


def _parsed(url: str) -> URL:
    """The URL as the client that fetches it reads it: full-width digits are digits to it.

    Raises:
        PictureError: it names no host.
    """
    try:
        parsed = URL(url)
    except ValueError:
        parsed = URL()
    if not parsed.raw_host:
        raise PictureError(f"{url[:SHOWN]} is not a valid URL")
    return parsed


def _is_address(host: str) -> bool:
    """Whether the host is an IP address rather than a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


async def _decoded(
    read: Callable[[T, Settings, DecodedPictures | None], Image.Image], data: T, settings: Settings
) -> Image.Image:
    """What `read` makes of a request's data, in another thread, when it is the request's turn."""
    others = DecodedPictures.current()
    if others is not None:
        await others.wait()
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(DECODERS, read, data, settings, others)


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
        settings = served()
        scheme = image_url.partition(":")[0].lower()
        if scheme == "data":
            return await _decoded(decode_data_uri, image_url, settings)
        if scheme not in ("http", "https"):
            raise PictureError(
                f"a picture comes as a data URI or an http(s) URL, not as {image_url[:40]!r}"
            )
        allowed = frozenset(map(str.lower, self.allowed_media_domains))
        others = DecodedPictures.current()
        with nullcontext() if others is None else others.fetching():
            data = await fetch(image_url, allowed, settings)
        return await _decoded(decode, data, settings)

    def fetch_image(self, image_url: str, *, image_mode: str | None = "RGB") -> Image.Image:
        """The same from code that does not run in an event loop."""
        return asyncio.run(self.fetch_image_async(image_url, image_mode=image_mode))
