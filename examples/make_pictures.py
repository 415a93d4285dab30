"""Draw the examples: nothing in, good.png, scratched.png and plates/ beside this file out.

A sheet of brushed metal, lit from the upper left, as a camera above a line sees it; the second one
has a scratch. `plates` are perforated: six good ones and one punched with a square tool, which
looks as regular as round holes do; only the good ones tell. Drawn with Pillow from a fixed seed, so
that every run gives the same pixels.
"""

import math
import random
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIZE = 512
SEED = 7
SCRATCH = [(338, 208), (366, 240), (384, 262), (414, 318)]
"""From the middle of the sheet's right half downwards."""


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


def good_part(seed: int = SEED) -> Image.Image:
    """The sheet as it should be; RGB."""
    grey = ImageChops.multiply(brushed_metal(seed), light()).filter(ImageFilter.GaussianBlur(0.6))
    sensor = noise(seed + 20, SIZE, SIZE).point(lambda value: 124 + value // 32)
    grey = ImageChops.add(grey, sensor, offset=-128)
    # Slightly cold, as steel under white light.
    return Image.merge(
        "RGB", (grey.point(lambda v: v * 0.97), grey.point(lambda v: v * 0.99), grey)
    )


def scratched_part(seed: int = SEED) -> Image.Image:
    """The same sheet with a scratch: a dark groove with a bright burr beside it."""
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


def plate(seed: int, *, square: bool = False) -> Image.Image:
    """A perforated plate, a little shifted each time."""
    rng, side = random.Random(seed), 320
    picture = noise(seed, side, side).point(lambda value: 138 + value // 10).convert("RGB")
    draw = ImageDraw.Draw(picture)
    shift_x, shift_y = rng.uniform(-4, 4), rng.uniform(-4, 4)
    for x in range(50, side, 73):
        for y in range(50, side, 73):
            left, top = x + shift_x, y + shift_y
            punch = draw.rectangle if square else draw.ellipse
            punch((left - 16, top - 16, left + 16, top + 16), fill=(35, 38, 42))
    return picture.filter(ImageFilter.GaussianBlur(1))


if __name__ == "__main__":
    here = Path(__file__).parent
    (here / "plates" / "good").mkdir(parents=True, exist_ok=True)
    for number in range(6):
        plate(number).save(here / "plates" / "good" / f"{number}.jpg", quality=88)
    plate(6, square=True).save(here / "plates" / "square_holes.jpg", quality=88)
    good_part().save(here / "good.png", optimize=True)
    scratched_part().save(here / "scratched.png", optimize=True)
