"""A product made on the fly: steel plates with rows of round holes, and some punched wrongly.

Square holes in every place look as regular as round ones: only a reference tells them apart.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE = 320


def plate(seed: int, *, square: bool = False, scratched: bool = False) -> Image.Image:
    """A plate as a camera sees it, a little different each time."""
    rng = np.random.default_rng(seed)
    base = 150 + rng.normal(0, 6, (SIDE, SIDE)) + rng.normal(0, 4, (SIDE, 1))
    picture = Image.fromarray(base.clip(0, 255).astype(np.uint8)).convert("RGB")
    draw = ImageDraw.Draw(picture)
    shift = rng.uniform(-4, 4, 2)
    for row in range(4):
        for column in range(4):
            x, y = 50 + 73 * column + shift[0], 50 + 73 * row + shift[1]
            box = (x - 16, y - 16, x + 16, y + 16)
            (draw.rectangle if square else draw.ellipse)(box, fill=(35, 38, 42))
    if scratched:
        draw.line((200, 70, 262, 118), fill=(228, 226, 220), width=5)
    return picture.filter(ImageFilter.GaussianBlur(1))
