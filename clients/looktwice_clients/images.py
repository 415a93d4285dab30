"""A picture on its way to the server: path, bytes, Pillow image or address -> URL or data URI.

A file that every server reads (PNG, JPEG, WebP, GIF, BMP, TIFF) travels byte for byte: nothing is
lost, and its EXIF rotation stays. Other formats that Pillow reads travel as PNG. A web address
travels as it is: the server fetches it, and its allow-list decides.
"""

import base64
import binascii
import io
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import TypeAlias
from urllib.request import Request, urlopen

from PIL import ExifTags, Image, UnidentifiedImageError

from looktwice_clients.depth import deep_colours, eight_bits, lower_bytes
from looktwice_clients.errors import ImageError

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image

MAX_BYTES = 100_000_000
"""Largest file that is read and sent; base64 makes it a third larger on the wire."""

FETCH_SECONDS = 30.0
"""How long `read` waits for a web address."""

_AS_IT_IS = {
    "BMP": "image/bmp",
    "GIF": "image/gif",
    "JPEG": "image/jpeg",
    "MPO": "image/jpeg",  # a phone's JPEG with a second picture behind the first
    "PNG": "image/png",
    "TIFF": "image/tiff",
    "WEBP": "image/webp",
}
# Formats with a signature of their own; none of Pillow's that start another program (EPS).
_FORMATS = {*_AS_IT_IS, "AVIF", "JPEG2000", "PPM"}
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"}  # what its files call it
_PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}
# How a picture is turned upright, by its EXIF orientation (1 is upright).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_DATA_URI = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)


def to_wire(image: ImageSource) -> str:
    """What stands in a request for `image`: its http(s) address, or a data URI.

    Args:
        image: a path, a file's bytes, a Pillow image, an http(s) address, or a data URI.

    Raises:
        ImageError: it is missing, too large, or no picture; one line that names it.
    """
    if isinstance(image, Image.Image):
        return _data_uri("image/png", _as_png(image))
    if is_web_address(image):
        return str(image)
    content = read(image)
    kind = _kind(content, name_of(image))
    if kind in _AS_IT_IS:
        return _data_uri(_AS_IT_IS[kind], content)
    return _data_uri("image/png", _as_png(_decoded(content, name_of(image))))


def open_picture(image: ImageSource) -> Image.Image:
    """The picture itself, to be drawn on: RGB, upright (EXIF rotation honoured), first frame.

    It is as bright as the server sees it, unless that was told the camera's depth
    (`LOOKTWICE_GREY_BITS`); of a Pillow image with 16-bit colours Pillow has only the higher bytes.

    Args:
        image: as for `to_wire`; a web address is fetched.

    Raises:
        ImageError: as for `to_wire`, and where its pixels cannot be read.
    """
    name = name_of(image)
    with _readable(name):
        lower = None
        if not isinstance(image, Image.Image):
            content = read(image)
            lower = lower_bytes(_opened(content, name))
            image = _decoded(content, name)
        shown = image
        if lower is not None:
            shown = deep_colours(image, lower)
        elif image.mode in ("I", "F") or image.mode.startswith("I;16"):
            shown = eight_bits(image)
        upright = _upright(shown, image)
        if upright.mode in ("LA", "PA", "P", "RGBA", "La", "RGBa"):
            return _on_white(upright)
        return upright.convert("RGB")


def read(image: str | os.PathLike[str] | bytes) -> bytes:
    """The bytes of a picture's file, fetched or decoded where it is an address.

    Raises:
        ImageError: there is no such file, it is too large, or the address gave nothing.
    """
    if isinstance(image, bytes):
        return _checked_size(image, name_of(image))
    if isinstance(image, str) and image[:5].lower() == "data:":
        return _checked_size(_decoded_data_uri(image), name_of(image))
    if is_web_address(image):
        return _fetched(str(image))
    return _file_content(image)


def is_web_address(image: ImageSource) -> bool:
    """Whether `image` is an http or https address."""
    return isinstance(image, str) and image[:8].lower().startswith(("http://", "https://"))


def name_of(image: ImageSource) -> str:
    """What to call `image` in a message: its path or address, shortened."""
    if isinstance(image, bytes):
        return f"{len(image)} bytes"
    if isinstance(image, Image.Image):
        return f"a Pillow image of {image.width} x {image.height}"
    name = os.fspath(image)
    return name if len(name) <= 120 else f"{name[:80]}...({len(name)} characters)"


def _data_uri(mime: str, content: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"


def _decoded_data_uri(uri: str) -> bytes:
    head = _DATA_URI.match(uri)
    if head is None:
        raise ImageError(f"{name_of(uri)}: a data URI must be data:image/...;base64,...")
    try:
        # MIME encoders break it into lines; the server takes that, too.
        return base64.b64decode("".join(uri[head.end() :].split()), validate=True)
    except binascii.Error as error:
        raise ImageError(f"{name_of(uri)}: not base64 ({error})") from None


def _file_content(path: str | os.PathLike[str]) -> bytes:
    name = name_of(path)
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        if isinstance(path, str) and _ADDRESS.match(path):
            raise ImageError(
                f"{name}: only http://, https:// and data: addresses; give a file as its path"
            ) from None
        code = "missing" if isinstance(error, FileNotFoundError) else ""
        raise ImageError(f"{name}: {getattr(error, 'strerror', None) or error}", code) from None
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(
            f"{name}: is {'a folder' if stat.S_ISDIR(status.st_mode) else 'not a file'}"
        )
    _check_size(status.st_size, name)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ImageError(f"{name}: {error.strerror}") from None


def _fetched(url: str) -> bytes:
    try:
        request = Request(url, headers={"User-Agent": "looktwice"})
        with urlopen(request, timeout=FETCH_SECONDS) as response:
            content: bytes = response.read(MAX_BYTES + 1)
    except (OSError, HTTPException, ValueError) as error:
        raise ImageError(f"{name_of(url)}: {getattr(error, 'reason', error)}") from None
    return _checked_size(content, name_of(url))


def _checked_size(content: bytes, name: str) -> bytes:
    _check_size(len(content), name)
    return content


def _check_size(size: int, name: str) -> None:
    if size == 0:
        raise ImageError(f"{name}: is empty", "empty")
    if size > MAX_BYTES:
        most = MAX_BYTES // 1_000_000
        raise ImageError(f"{name}: {-(-size // 1_000_000)} MB is too large, at most {most} MB")


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Whatever Pillow raises on a picture that is broken, empty or closed is an `ImageError`."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:  # its readers raise all kinds
        said = f"{name}: cannot be read as a picture ({error})"
        raise ImageError(said, "unreadable") from None


def _opened(content: bytes, name: str) -> Image.Image:
    """The picture with its header read, its pixels not yet."""
    Image.init()
    formats = sorted(_FORMATS & Image.OPEN.keys())  # MPO comes as JPEG; AVIF is not in every build
    with _readable(name), warnings.catch_warnings():
        # How many pixels are too many is the server's to say; Pillow's error limit stays.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(content), formats=formats)
        except UnidentifiedImageError:
            raise _no_picture(content, name) from None


def _kind(content: bytes, name: str) -> str:
    with _opened(content, name) as picture:
        return picture.format or ""


def _no_picture(content: bytes, name: str) -> ImageError:
    said = f"{name}: not a picture"
    if b"<svg" in content[:1024]:
        return ImageError(f"{said} (SVG is a drawing: export it as PNG)", "svg")
    if content.startswith(b"%PDF"):
        return ImageError(f"{said} (PDF is a document: export the page as PNG)", "pdf")
    if content[4:8] == b"ftyp" and content[8:12] in _HEIC:
        return ImageError(f"{said} that is read here (HEIC: export it as JPEG)", "heic")
    return ImageError(said, "not_picture")


def _decoded(content: bytes, name: str) -> Image.Image:
    picture = _opened(content, name)
    with _readable(name):
        picture.load()
    return picture


def _as_png(picture: Image.Image) -> bytes:
    """Lossless PNG, upright; modes that PNG has no word for become RGB, RGBA or 16 bit grey."""
    with _readable(name_of(picture)):
        picture = _upright(picture, picture)
        if picture.mode == "F" or (picture.mode == "I" and not _fits_16_bits(picture)):
            raise ImageError(
                f"{name_of(picture)}: mode {picture.mode} has no scale; make it 8 or 16 bit"
            )
        if picture.mode == "I":
            picture = picture.convert("I;16")
        elif picture.mode in ("La", "PA"):
            picture = picture.convert("LA")
        elif picture.mode == "RGBa":
            picture = picture.convert("RGBA")
        elif picture.mode not in _PNG_MODES and not picture.mode.startswith("I;16"):
            picture = picture.convert("RGB")
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        return buffer.getvalue()


def _upright(picture: Image.Image, file: Image.Image) -> Image.Image:
    """The picture turned as its file's EXIF orientation says, as the server turns it.

    Pillow's own `exif_transpose` writes the EXIF again, and raises where any other tag is odd.
    """
    file.load()  # a PNG's EXIF may stand behind its pixels
    try:
        turn = _UPRIGHT.get(file.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow's reader reports broken EXIF by whatever went wrong in it
        turn = None
    upright = picture.copy() if turn is None else picture.transpose(turn)
    upright.info.pop("exif", None)  # whoever reads the orientation there would turn it once more
    return upright


def _fits_16_bits(picture: Image.Image) -> bool:
    low, high = picture.getextrema()
    return isinstance(low, int) and isinstance(high, int) and low >= 0 and high <= 65535


def _on_white(picture: Image.Image) -> Image.Image:
    opaque = picture.convert("RGBA")
    if opaque.getchannel("A").getextrema() == (0, 0):  # a camera's unused fourth byte
        return opaque.convert("RGB")
    white = Image.new("RGBA", opaque.size, "white")
    return Image.alpha_composite(white, opaque).convert("RGB")
