"""Pictures of more than 8 bits a channel -> 8 bits, as bright as the server sees them, where it was
not told the camera's depth (`LOOKTWICE_GREY_BITS`).

`looktwice_adapters.picture_file` is the same in numpy, which the clients do without;
tests/clients/test_depth.py holds the two to each other.
"""

import sys
from collections.abc import Callable
from typing import Any

from PIL import Image, ImageFile, ImageMath

# Bits of the sensors that write more than eight into a channel.
DEPTHS = (8, 10, 12, 14, 16)
# How Pillow unpacks 16-bit colours, keeping the higher byte -> how it must to keep the lower one.
# N is this machine's order, which libtiff gives; grey with alpha is had as four bytes.
OTHER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
LOWER = {
    f"{colours};16{order}": f"{colours};16{other}"
    for colours in ("RGB", "RGBX", "RGBA")
    for order, other in OTHER.items()
} | {"LA;16B": "RGBA"}
_LARGEST = 3.4e38  # about the largest float of 32 bits


def eight_bits(grey: Image.Image, brightest: float | None = None) -> Image.Image:
    """Grey of 16-bit, 32-bit or float values -> mode L.

    The whole range of the sensor becomes 0 to 255: the smallest usual depth that holds the
    brightest value. Only beyond 16 bits and below 0 is the picture's own range taken.

    Args:
        grey: of mode I, F or I;16.
        brightest: of all channels, where `grey` is one of several; else its own.
    """
    values = _finite(grey) if grey.mode == "F" else grey.convert("F")
    low, high = _ends(values)
    high = high if brightest is None else brightest
    if low < 0 or high >= 2 ** DEPTHS[-1]:
        full = (high - low) or 1.0
    else:
        low = 0.0
        full = 1.0 if high <= 1 else 2.0 ** next(bits for bits in DEPTHS if high < 2**bits) - 1
    scale = 255 / full
    # Pillow cuts off what is behind the point.
    return values.point(lambda value: value * scale + (0.5 - low * scale)).convert("L")


def lower_bytes(picture: Image.Image) -> Image.Image | None:
    """The lower bytes of 16-bit colours, in the picture's mode; None of other pictures.

    Pillow keeps the higher bytes alone, which are nearly black for a 12-bit sensor.

    Args:
        picture: as `Image.open` gives it, not loaded yet; it is loaded with its bytes exchanged.
    """
    if not isinstance(picture, ImageFile.ImageFile) or picture.mode not in ("RGB", "RGBA"):
        return None
    order = _order(picture.tile[0]) if picture.tile else ""
    if order not in LOWER:
        return None
    picture.tile = [_ordered(tile, LOWER[order]) for tile in picture.tile]
    picture.load()
    if order == "LA;16B":
        _, grey, _, alpha = picture.split()
        return Image.merge("RGBA", (grey, grey, grey, alpha))
    return picture


def deep_colours(higher: Image.Image, lower: Image.Image) -> Image.Image:
    """8 bits of 16-bit colours whose bytes stand in two pictures."""
    pairs = zip(lower.split(), higher.split(), strict=True)
    deep = [
        Image.frombytes("I;16", higher.size, Image.merge("LA", pair).tobytes()) for pair in pairs
    ]
    # One scale for all colours keeps their balance.
    brightest = max(_ends(channel.convert("F"))[1] for channel in deep[:3])
    shown = [eight_bits(channel, brightest) for channel in deep[:3]]
    return Image.merge(higher.mode, shown + [eight_bits(alpha) for alpha in deep[3:]])


def _finite(values: Image.Image) -> Image.Image:
    """Infinite values become the highest and the lowest of the others; what is no number, 0."""
    finite = _where(lambda of: of["v"] - of["v"] == 0, values)
    if finite.getextrema() == (255, 255):
        return values
    low = _ends(Image.composite(values, Image.new("F", values.size, _LARGEST), finite))[0]
    high = _ends(Image.composite(values, Image.new("F", values.size, -_LARGEST), finite))[1]
    if low > high:  # none is finite
        low = high = 0.0
    within = ImageMath.lambda_eval(lambda of: of["min"](of["max"](of["v"], low), high), v=values)
    number = _where(lambda of: of["v"] == of["v"], values)  # what is no number is not
    return Image.composite(within, Image.new("F", values.size), number)


def _where(test: Callable[[dict[str, Any]], Any], values: Image.Image) -> Image.Image:
    """White where a test of `v` holds, black elsewhere."""
    holds: Image.Image = ImageMath.lambda_eval(test, v=values)
    return holds.point(lambda value: value * 255).convert("L")


def _ends(values: Image.Image) -> tuple[float, float]:
    low, high = values.getextrema()
    assert isinstance(low, float)
    assert isinstance(high, float)
    return low, high


def _order(tile: ImageFile._Tile) -> str:
    """How Pillow unpacks a part of a file."""
    return str(tile.args if isinstance(tile.args, str) else (tile.args or ("",))[0])


def _ordered(tile: ImageFile._Tile, order: str) -> ImageFile._Tile:
    """The same part, unpacked in this order."""
    args = tile.args
    return tile._replace(args=(order, *args[1:]) if isinstance(args, tuple) else order)
