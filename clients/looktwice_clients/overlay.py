"""The overlay picture: a part, its anomaly map and its regions -> one picture to look at.

The map keeps its fixed scale and is blended in only where it is high, so that a normal part stays
as it is. Below the part stand the verdict and a legend from 0 to 1, blended on grey the same way.
"""

import io
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from looktwice_clients.colour_map import INFERNO
from looktwice_clients.errors import ImageError
from looktwice_clients.images import ImageSource, is_web_address, open_picture
from looktwice_clients.schemas import Inspection, Region

Box = tuple[float, float, float, float]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class OverlayStyle:
    """Sizes, and how the map is blended in."""

    shortest: int = 640
    """A smaller picture is enlarged until its longer side has so many pixels."""
    longest: int = 2048
    """A larger picture is reduced until its longer side has so many pixels."""
    blend_from: float = 0.42
    """Scores up to here leave the part as it is."""
    blend_full: float = 0.65
    """Scores from here have the full opacity."""
    opacity: float = 0.7
    labels: int = 12
    """How many regions carry their rank by score, and the score; all carry a box."""


_BACKGROUND = (18, 18, 22)
_INK = (240, 240, 240)
_LEGEND_GROUND = (150, 150, 150)
_TEXT_PX = 12


def draw_overlay(
    image: ImageSource, inspection: Inspection, style: OverlayStyle | None = None
) -> Image.Image:
    """The part with its anomaly map, region boxes and their scores, and a legend; RGB.

    Args:
        image: the inspected picture, as for `open_picture`, at any size of the same aspect.
        inspection: its result; without a map only boxes and verdict are drawn.
        style: sizes and blending.

    Raises:
        ImageError: the picture cannot be read, or its aspect is not the inspection's.
        ReplyError: the inspection's map is not a PNG.
    """
    style = style or OverlayStyle()
    part = _scaled(open_picture(image), style)
    _check_aspect(part.size, (inspection.width, inspection.height))
    if inspection.map is not None:
        significance = inspection.map.image().resize(part.size, Image.Resampling.BICUBIC)
        part = blend(part, significance, style)
    unit = _text_height(part.size)
    _draw_regions(part, inspection, unit, style)
    return _framed(part, inspection, unit, style)


def overlay_jpeg(
    image: ImageSource, inspection: Inspection, style: OverlayStyle | None = None
) -> bytes:
    """The overlay as a JPEG file, to be sent on or embedded.

    A web address is not fetched a second time: its map and regions are drawn on plain grey.

    Args:
        image: as for `draw_overlay`.
        inspection: as for `draw_overlay`.
        style: as for `draw_overlay`.

    Raises:
        ImageError: as for `draw_overlay`.
        ReplyError: as for `draw_overlay`.
    """
    if is_web_address(image):
        longest = (style or OverlayStyle()).longest
        scale = min(1.0, longest / max(inspection.width, inspection.height))
        size = (max(1, round(inspection.width * scale)), max(1, round(inspection.height * scale)))
        image = Image.new("RGB", size, _LEGEND_GROUND)
    buffer = io.BytesIO()
    draw_overlay(image, inspection, style).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def blend(picture: Image.Image, anomaly_map: Image.Image, style: OverlayStyle) -> Image.Image:
    """`picture` with the colours of `anomaly_map` (mode "L", same size) where that is high."""
    colours = anomaly_map.copy()
    colours.putpalette(INFERNO)
    opacity = anomaly_map.point([round(255 * _opacity(v / 255, style)) for v in range(256)])
    return Image.composite(colours.convert("RGB"), picture, opacity)


def _opacity(score: float, style: OverlayStyle) -> float:
    rise = (score - style.blend_from) / (style.blend_full - style.blend_from)
    return style.opacity * min(1.0, max(0.0, rise))


def _scaled(picture: Image.Image, style: OverlayStyle) -> Image.Image:
    longer = max(picture.size)
    factor = min(style.longest, max(style.shortest, longer)) / longer
    if factor == 1.0:
        return picture
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)


def _check_aspect(part: tuple[int, int], inspected: tuple[int, int]) -> None:
    width, height = inspected
    # A pixel of rounding may be much on a short side, so that only a whole pixel counts.
    off = abs(part[0] * height - part[1] * width) / max(width, height)
    if off > 1 + 0.01 * min(part):
        raise ImageError(
            f"the picture's aspect is {part[0]} : {part[1]}, but {width} x {height} was inspected"
        )


def _text_height(size: tuple[int, int]) -> int:
    """Height of the text in pixels: a 40th of the picture's side, measured by its area."""
    return max(_TEXT_PX, round((size[0] * size[1]) ** 0.5 / 40))


def _draw_regions(
    part: Image.Image, inspection: Inspection, unit: int, style: OverlayStyle
) -> None:
    draw = ImageDraw.Draw(part)
    font = ImageFont.load_default(unit)
    across, down = part.width / inspection.width, part.height / inspection.height
    by_score = sorted(inspection.regions, key=lambda region: -region.score)
    boxes = [_on_part(region, across, down) for region in by_score]
    for box in reversed(boxes):
        _draw_box(draw, box, part.size, unit)
    taken: list[Box] = []
    labelled = list(zip(by_score, boxes, strict=True))[: style.labels]
    for number, (region, box) in enumerate(labelled, 1):
        text = f"{region.score:.2f}" if len(boxes) == 1 else f"{number}:  {region.score:.2f}"
        tag = _tag(draw, text, box, font, part.size)
        if not any(_overlap(tag, other) for other in taken):
            _draw_tag(draw, text, tag, font)
            taken.append(tag)


def _on_part(region: Region, across: float, down: float) -> Box:
    x0, y0, x1, y1 = region.box
    return x0 * across, y0 * down, max(x0 + 1, x1) * across - 1, max(y0 + 1, y1) * down - 1


def _draw_box(draw: ImageDraw.ImageDraw, box: Box, size: tuple[int, int], unit: int) -> None:
    """White between two black lines, to be seen on any part; around the region where it fits."""
    line = max(1, round(unit / 10))
    frame = 3 * line
    x0, y0 = max(0, round(box[0]) - frame), max(0, round(box[1]) - frame)
    x1, y1 = min(size[0] - 1, round(box[2]) + frame), min(size[1] - 1, round(box[3]) + frame)
    for colour in ("black", "white", "black"):
        if x1 >= x0 and y1 >= y0:
            draw.rectangle((x0, y0, x1, y1), outline=colour, width=line)
        x0, y0, x1, y1 = x0 + line, y0 + line, x1 - line, y1 - line


def _tag(draw: ImageDraw.ImageDraw, text: str, box: Box, font: Font, size: tuple[int, int]) -> Box:
    """Where a region's label stands: above its box, else below, else inside; never outside."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    pad = (bottom - top) / 2
    width, height = right - left + 2 * pad, bottom - top + 2 * pad
    x = max(0.0, min(box[0], size[0] - width))
    above, below = box[1] - height - pad, box[3] + pad
    y = above if above >= 0 else below
    if y + height > size[1]:
        y = max(0.0, min(box[1], size[1] - height))
    return x, y, x + width, y + height


def _draw_tag(draw: ImageDraw.ImageDraw, text: str, tag: Box, font: Font) -> None:
    draw.rectangle(tag, fill="black")
    middle = ((tag[0] + tag[2]) / 2, (tag[1] + tag[3]) / 2)
    draw.text(middle, text, fill="white", font=font, anchor="mm")


def _overlap(one: Box, other: Box) -> bool:
    apart = one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]
    return not apart


def _framed(
    part: Image.Image, inspection: Inspection, unit: int, style: OverlayStyle
) -> Image.Image:
    """The part above its verdict and, where there is a map, the legend."""
    footer = 3 * unit if inspection.map is None else 7 * unit
    width = max(part.width, 24 * unit)
    canvas = Image.new("RGB", (width, part.height + footer), _BACKGROUND)
    canvas.paste(part, ((width - part.width) // 2, 0))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(round(1.25 * unit))
    headline = f"{inspection.verdict}   score {inspection.score:.2f}"
    if inspection.regions:
        headline += f"   regions {len(inspection.regions)}"
    draw.text((unit, part.height + 1.5 * unit), headline, fill=_INK, font=font, anchor="lm")
    if inspection.map is not None:
        _draw_legend(canvas, part.height + 3 * unit, unit, style)
    return canvas


def _draw_legend(canvas: Image.Image, top: int, unit: int, style: OverlayStyle) -> None:
    """A bar of the map's colours as blended on grey, with 0, 0.5 and 1 under it."""
    width = min(canvas.width - 2 * unit, 40 * unit)
    scores = Image.linear_gradient("L").rotate(90).resize((width, round(1.5 * unit)))
    bar = blend(Image.new("RGB", scores.size, _LEGEND_GROUND), scores, style)
    canvas.paste(bar, (unit, top))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(unit)
    line = max(1, unit // 8)
    below = top + bar.height
    for score, text, anchor in ((0.0, "0", "la"), (0.5, "0.5", "ma"), (1.0, "1", "ra")):
        x = unit + round(score * (width - 1))
        start = top if score == 0.5 else below
        draw.line((x, start, x, below + unit // 3), fill=_INK, width=line)
        draw.text((x, below + unit // 2), text, fill=_INK, font=font, anchor=anchor)
