"""Draw the demo's two pictures: nothing in, good.png and scratched.png beside this file out.

A brushed metal plate with four holes on a dark bench, lit from the upper left; the second one has a
scratch. Drawn with Pillow from a fixed seed, so that every run gives the same pixels.
"""

import math
import random
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIZE = 512
SEED = 7
PLATE = (56, 72, 456, 440)
HOLES = [(110, 126), (402, 126), (110, 386), (402, 386)]
HOLE_RADIUS = 22
SCRATCH = [(338, 208), (366, 240), (384, 262), (414, 318)]
"""From the middle of the plate's right half downwards."""


def noise(seed: int, width: int, height: int) -> Image.Image:
    """Uniform grey noise of a fixed seed."""
    return Image.frombytes("L", (width, height), random.Random(seed).randbytes(width * height))


def brushed_metal(seed: int) -> Image.Image:
    """Grey with fine horizontal streaks of several lengths, as a brush leaves them."""
    metal = Image.new("L", (SIZE, SIZE), 128)
    for octave, length in enumerate((8, 40, 160)):
        streaks = noise(seed + octave, SIZE // length + 2, SIZE)
        streaks = streaks.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        metal = Image.blend(metal, streaks, 0.16)
    return metal.point(lambda value: 168 + (value - 128) * 0.55)


def light() -> Image.Image:
    """Soft light from the upper left: 255 is full light."""
    falling = Image.linear_gradient("L").resize((SIZE * 2, SIZE * 2)).rotate(35)
    middle = falling.crop((SIZE // 2, SIZE // 2, SIZE * 3 // 2, SIZE * 3 // 2))
    return middle.point(lambda value: 255 - value * 0.32)


def bench(seed: int) -> Image.Image:
    """The dark, slightly mottled ground under the plate."""
    mottled = noise(seed + 10, SIZE // 4, SIZE // 4).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    fine = noise(seed + 11, SIZE, SIZE)
    return Image.blend(mottled, fine, 0.4).point(lambda value: 34 + value * 0.09)


def plate_mask() -> Image.Image:
    """The plate's outline without its holes, anti-aliased."""
    scale = 4
    mask = Image.new("L", (SIZE * scale, SIZE * scale), 0)
    draw = ImageDraw.Draw(mask)
    draw.rounded_rectangle([scale * edge for edge in PLATE], 26 * scale, fill=255)
    for x, y in HOLES:
        draw.circle((x * scale, y * scale), HOLE_RADIUS * scale, fill=0)
    return mask.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def good_part(seed: int = SEED) -> Image.Image:
    """The plate as it should be; RGB."""
    mask = plate_mask()
    shadow = ImageChops.offset(mask, 7, 10).filter(ImageFilter.GaussianBlur(9))
    ground = Image.composite(Image.new("L", mask.size, 12), bench(seed), shadow)
    metal = ImageChops.multiply(brushed_metal(seed), light())
    lit, dark = bevel(mask)
    metal = Image.composite(Image.new("L", mask.size, 236), metal, lit)
    metal = Image.composite(Image.new("L", mask.size, 70), metal, dark)
    grey = Image.composite(metal, ground, mask).filter(ImageFilter.GaussianBlur(0.6))
    sensor = noise(seed + 20, SIZE, SIZE).point(lambda value: 124 + value // 32)
    grey = ImageChops.add(grey, sensor, offset=-128)
    # Slightly cold, as steel under white light.
    return Image.merge(
        "RGB", (grey.point(lambda v: v * 0.97), grey.point(lambda v: v * 0.99), grey)
    )


def bevel(mask: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Where the plate's edges catch the light, and where they turn from it."""
    soft = mask.filter(ImageFilter.GaussianBlur(1.5))
    towards = ImageChops.subtract(soft, ImageChops.offset(soft, 2, 2))
    away = ImageChops.subtract(soft, ImageChops.offset(soft, -2, -2))
    return towards.point(lambda v: v * 0.8), away.point(lambda v: v * 0.8)


def scratched_part(seed: int = SEED) -> Image.Image:
    """The same plate with a scratch: a dark groove with a bright burr beside it."""
    part = good_part(seed)
    for offset, value, width in ((0, 30, 4.2), (3, 245, 1.8)):
        groove = scratch_mask(offset, width)
        part = Image.composite(Image.new("RGB", part.size, (value,) * 3), part, groove)
    return part


def scratch_mask(offset: int, width: float) -> Image.Image:
    """A curved stroke along `SCRATCH`, thick in the middle and thin at its ends, anti-aliased."""
    scale, steps = 4, 600
    mask = Image.new("L", (SIZE * scale, SIZE * scale), 0)
    draw = ImageDraw.Draw(mask)
    for step in range(steps + 1):
        t = step / steps
        x, y = bezier(t)
        wobble = 1.2 * math.sin(9 * t) + 0.5 * math.sin(41 * t)
        radius = scale * width / 2 * (0.25 + 0.75 * math.sin(math.pi * t))
        draw.circle(((x + offset + wobble) * scale, y * scale), radius, fill=235)
    return mask.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def bezier(t: float) -> tuple[float, float]:
    """A point of the cubic curve through `SCRATCH`'s control points; t from 0 to 1."""
    weights = [(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3]
    x = sum(weight * point[0] for weight, point in zip(weights, SCRATCH, strict=True))
    y = sum(weight * point[1] for weight, point in zip(weights, SCRATCH, strict=True))
    return x, y


if __name__ == "__main__":
    here = Path(__file__).parent
    good_part().save(here / "good.png", optimize=True)
    scratched_part().save(here / "scratched.png", optimize=True)
