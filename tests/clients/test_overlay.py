import base64
import io
from itertools import pairwise

import pytest
from PIL import Image, ImageChops

from looktwice_clients import ImageError, Inspection, draw_overlay
from looktwice_clients.colour_map import INFERNO
from looktwice_clients.overlay import OverlayStyle, blend

STYLE = OverlayStyle()
GREY = (120, 130, 140)


def inspection(
    size: tuple[int, int], anomaly_map: Image.Image | None, boxes: list[list[int]] = ()
) -> Inspection:
    buffer = io.BytesIO()
    if anomaly_map is not None:
        anomaly_map.save(buffer, "PNG")
    png = {"png": base64.b64encode(buffer.getvalue()).decode()}
    regions = [{"box": box, "score": 0.94, "area": 0.1, "position": "center"} for box in boxes]
    return Inspection.model_validate(
        {
            "id": "insp_1",
            "score": 0.94 if boxes else 0.2,
            "verdict": "anomalous" if boxes else "normal",
            "regions": regions,
            "width": size[0],
            "height": size[1],
            "map": png if anomaly_map is not None else None,
        }
    )


def luminance(colour: tuple[int, int, int]) -> float:
    """CIE L* of an sRGB colour."""
    linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    y = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return 116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y


def test_the_colour_map_rises_evenly_from_black_to_light_yellow() -> None:
    colours = [tuple(INFERNO[i : i + 3]) for i in range(0, 768, 3)]
    assert len(colours) == 256
    lightness = [luminance(colour) for colour in colours]
    assert lightness[0] < 1
    assert lightness[-1] > 97
    steps = [later - earlier for earlier, later in pairwise(lightness)]
    assert max(steps) < 1.2  # 98 / 255 = 0.38 on average; 8 bit colours are not finer
    assert lightness == sorted(lightness)


def test_a_normal_part_does_not_glow() -> None:
    part = Image.new("RGB", (640, 480), GREY)
    calm = Image.new("L", (640, 480), round(255 * STYLE.blend_from))
    drawn = draw_overlay(part, inspection(part.size, calm))
    assert drawn.crop((0, 0, 640, 480)).tobytes() == part.tobytes()


def test_the_blend_grows_with_the_score_and_keeps_the_part_visible() -> None:
    scores = Image.new("L", (256, 1))
    scores.putdata(range(256))
    dark = blend(Image.new("RGB", (256, 1), "black"), scores, STYLE)
    light = blend(Image.new("RGB", (256, 1), "white"), scores, STYLE)
    # What is left of the part's own contrast is 1 - opacity.
    left = [light.getpixel((v, 0))[1] - dark.getpixel((v, 0))[1] for v in range(256)]
    assert left == sorted(left, reverse=True)
    assert left[0] == 255
    assert left[255] == pytest.approx(255 * (1 - STYLE.opacity), abs=2)
    assert 255 * 0.5 < left[128] < 255


@pytest.mark.parametrize(
    ("size", "drawn"),
    [
        ((100, 75), (640, 480)),
        ((640, 480), (640, 480)),
        ((1000, 2000), (1000, 2000)),
        ((8000, 6000), (2048, 1536)),
    ],
)
def test_the_part_is_drawn_large_enough_and_not_too_large(
    size: tuple[int, int], drawn: tuple[int, int]
) -> None:
    picture = draw_overlay(Image.new("RGB", size, GREY), inspection(size, None))
    assert picture.width == drawn[0]
    assert drawn[1] < picture.height < 1.2 * drawn[1]
    assert picture.getpixel((drawn[0] // 2, drawn[1] // 2)) == GREY


@pytest.mark.parametrize("size", [(1, 1), (28, 28), (5000, 40), (40, 5000), (3, 900)])
def test_odd_sizes_are_drawn_with_their_regions_and_legend(size: tuple[int, int]) -> None:
    box = [0, 0, max(1, size[0] // 2), max(1, size[1] // 2)]
    drawn = draw_overlay(
        Image.new("RGB", size, GREY), inspection(size, Image.new("L", size), [box])
    )
    assert drawn.width >= 24 * 12
    assert max(drawn.size) <= STYLE.longest + 500


def test_the_box_lies_around_its_region_and_leaves_the_region_free() -> None:
    part = Image.new("RGB", (640, 480), GREY)
    drawn = draw_overlay(part, inspection(part.size, None, [[200, 160, 400, 320]]))
    inside = drawn.crop((200, 160, 400, 320))
    assert inside.tobytes() == Image.new("RGB", inside.size, GREY).tobytes()
    around = {drawn.getpixel((x, 240)) for x in range(190, 200)}
    assert around == {GREY, (0, 0, 0), (255, 255, 255)}


def test_several_regions_carry_their_rank_before_the_score() -> None:
    part, box, other = Image.new("RGB", (640, 480), GREY), [200, 160, 400, 320], [500, 0, 600, 90]

    def inked(boxes: list[list[int]]) -> int:
        above = draw_overlay(part, inspection(part.size, None, boxes)).crop((190, 130, 400, 150))
        return above.convert("L").histogram()[0]

    assert inked([box, other]) > 1.2 * inked([box]) > 0


def test_the_map_lands_on_the_pixels_that_it_speaks_of() -> None:
    size = (800, 600)
    anomaly_map = Image.new("L", (400, 300), 0)
    anomaly_map.paste(255, (100, 75, 200, 150))  # in the part's pixels: 200, 150, 400, 300
    drawn = draw_overlay(Image.new("RGB", size, GREY), inspection(size, anomaly_map))
    part = Image.new("RGB", size, GREY)
    coloured = ImageChops.difference(drawn.crop((0, 0, *size)), part).getbbox()
    assert coloured == pytest.approx((200, 150, 400, 300), abs=4)


def test_the_legend_marks_one_half() -> None:
    size = (640, 480)
    drawn = draw_overlay(Image.new("RGB", size, GREY), inspection(size, Image.new("L", size)))
    unit = 14
    row = 480 + 3 * unit + unit // 2
    bar = [drawn.getpixel((x, row)) for x in range(unit, unit + 40 * unit)]
    assert bar[0] == (150, 150, 150)
    assert luminance(bar[-1]) > luminance(bar[0])
    assert bar[round(0.5 * (len(bar) - 1))] == (240, 240, 240)


def test_another_pictures_inspection_is_refused() -> None:
    with pytest.raises(ImageError, match="aspect is 640 : 480, but 480 x 640 was inspected"):
        draw_overlay(Image.new("RGB", (640, 480)), inspection((480, 640), None))
    # A smaller copy of the same picture is not another picture.
    draw_overlay(Image.new("RGB", (333, 250)), inspection((4000, 3000), None))
