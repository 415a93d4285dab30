"""An opened picture file -> its pixels upright, RGB, 8 bits a channel, as every part reads them.

Plain Pillow and numpy: the server, training and evaluation see the same pixels of a file.
"""

import sys
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.TiffImagePlugin import TiffImageFile

# Bits of the sensors that write more than eight into a channel.
DEPTHS = (8, 10, 12, 14, 16)
# How a picture is turned upright, by its EXIF orientation (1 is upright).
ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# How Pillow unpacks 16-bit colours, keeping the higher byte -> how it must to keep the lower one.
# N is this machine's order, which libtiff gives; grey with alpha is had as four bytes.
OTHER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
LOWER = {
    f"{colours};16{order}": f"{colours};16{other}"
    for colours in ("RGB", "RGBX", "RGBA")
    for order, other in OTHER.items()
} | {"LA;16B": "RGBA"}
BITS_PER_SAMPLE, PLANAR = 0x0102, 0x011C  # TIFF tags


class UnreadPictureError(ValueError):
    """A sound picture of a kind that is not read here; the message says what would be."""


def to_rgb(picture: Image.Image, bits: int | None = None) -> Image.Image:
    """The first frame upright, RGB, 8 bits a channel; transparent parts on white.

    Args:
        picture: as `Image.open` gives it, not loaded yet: what Pillow leaves away of 16-bit colours
            is read from its file.
        bits: of the sensor, where more than eight are stored; None: told by the brightest pixel.

    Raises:
        UnreadPictureError: 16-bit colours, stored in a way that is not read.
        OSError, SyntaxError and what else Pillow's readers raise: the file is broken.
    """
    lower = _lower_bytes(picture)
    picture.load()
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        values = np.asarray(picture, dtype=np.float32)
        grey = eight_bits(values, bits, fractions=picture.mode == "F")
        shown = Image.fromarray(grey).convert("RGB")
    else:
        shown = _on_white(picture if lower is None else _deep_colours(picture, lower, bits))
    shown = _upright(shown, picture)
    shown.info.clear()  # whoever reads the orientation there would turn it once more
    return shown


def eight_bits(
    values: NDArray[np.float32], bits: int | None = None, *, fractions: bool = True
) -> NDArray[np.uint8]:
    """8 bits of 16-bit, 32-bit or float values of any shape.

    The whole range of the sensor becomes 0 to 255, as in an 8-bit picture: stretching a picture's
    own range would turn the noise of an even part into contrast. Files do not tell its depth:
    unless `bits` does, it is the smallest usual one that holds the brightest value; only beyond 16
    bits and below 0 is there no sensor's range.

    Args:
        values: of any shape.
        bits: of the sensor.
        fractions: whether values of at most 1 are shares of the whole range, whatever `bits` says.
    """
    finite = values[np.isfinite(values)]
    ends = (finite.min(), finite.max()) if finite.size else (0, 0)
    values = np.nan_to_num(values, neginf=ends[0], posinf=ends[1])
    low, high = float(values.min()), float(values.max())
    if bits is not None and low >= 0 and not (fractions and high <= 1):
        full = 2.0**bits - 1
        values = values.clip(max=full)
    elif low < 0 or high >= 2 ** DEPTHS[-1]:
        values = values - low
        full = (high - low) or 1.0
    elif high <= 1:
        full = 1.0
    else:
        full = 2.0 ** next(bits for bits in DEPTHS if high < 2**bits) - 1
    scaled: NDArray[np.uint8] = (values / full * 255).round().astype(np.uint8)
    return scaled


def _lower_bytes(picture: Image.Image) -> Image.Image | None:
    """The lower bytes of 16-bit colours, in the picture's mode; None of other pictures.

    Pillow keeps the higher bytes alone, which are nearly black for a 12-bit sensor. So its reader
    is asked a second time, with the bytes' order changed.
    """
    if not isinstance(picture, ImageFile.ImageFile) or picture.mode not in ("RGB", "RGBA"):
        return None
    order = _order(picture.tile[0]) if picture.tile else ""
    tags = picture.tag_v2 if isinstance(picture, TiffImageFile) else {}
    if ";16" not in order and max(tags.get(BITS_PER_SAMPLE, (8,))) <= 8:
        return None
    if order not in LOWER or tags.get(PLANAR, 1) != 1:
        raise UnreadPictureError(
            "16-bit colours with premultiplied alpha or in separate planes are not read; "
            "store the three colours of a pixel side by side, or 8 bits a colour"
        )
    lower = Image.open(BytesIO(_content(picture)), formats=[str(picture.format)])
    assert isinstance(lower, ImageFile.ImageFile)
    lower.tile = [_ordered(tile, LOWER[order]) for tile in lower.tile]
    lower.load()
    if order == "LA;16B":
        _, grey, _, alpha = lower.split()
        return Image.merge("RGBA", (grey, grey, grey, alpha))
    return lower


def _content(picture: ImageFile.ImageFile) -> bytes:
    """The whole file of a picture that is not loaded yet."""
    assert picture.fp is not None
    place = picture.fp.tell()
    picture.fp.seek(0)
    content = picture.fp.read()
    picture.fp.seek(place)
    return content


def _order(tile: ImageFile._Tile) -> str:
    """How Pillow unpacks a part of a file."""
    return str(tile.args if isinstance(tile.args, str) else (tile.args or ("",))[0])


def _ordered(tile: ImageFile._Tile, order: str) -> ImageFile._Tile:
    """The same part, unpacked in this order."""
    args = tile.args
    return tile._replace(args=(order, *args[1:]) if isinstance(args, tuple) else order)


def _deep_colours(higher: Image.Image, lower: Image.Image, bits: int | None) -> Image.Image:
    """8 bits of 16-bit colours whose bytes stand in two pictures."""

    def values(band: str) -> NDArray[np.uint16]:
        high, low = (np.asarray(half.getchannel(band), np.uint16) for half in (higher, lower))
        return np.bitwise_or(high << 8, low, dtype=np.uint16)

    def table(bands: str, bits: int | None) -> NDArray[np.uint8]:
        brightest = max(int(values(band).max()) for band in bands)
        return eight_bits(np.arange(brightest + 1, dtype=np.float32), bits, fractions=False)

    # One table for all colours keeps their balance; a channel at a time, for the memory.
    tables = dict.fromkeys("RGB", table("RGB", bits))
    if higher.mode == "RGBA":
        tables["A"] = table("A", None)
    bands = [Image.fromarray(levels[values(band)]) for band, levels in tables.items()]
    return Image.merge(higher.mode, bands)


def _on_white(picture: Image.Image) -> Image.Image:
    """RGB; parts cut out of their background stand on white, as on an inspection table."""
    if picture.mode != "P" and not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    if picture.getchannel("A").getextrema() == (0, 0):  # a camera's unused fourth byte
        return picture.convert("RGB")
    white = Image.new("RGB", picture.size, "white")
    white.paste(picture, mask=picture)
    return white


def _upright(shown: Image.Image, file: Image.Image) -> Image.Image:
    """The picture turned as its file's EXIF orientation says; other tags do not matter."""
    try:
        turn = UPRIGHT.get(file.getexif().get(ORIENTATION, 1))
    except Exception:  # Pillow's reader reports broken EXIF by whatever went wrong in it
        turn = None
    return shown if turn is None else shown.transpose(turn)
