"""Pictures drawn for the parity tests: a smooth texture with a few marks, by seed."""

import numpy as np
from PIL import Image


def draw(width: int, height: int, seed: int) -> Image.Image:
    """A picture of the given size; seeds differ in colour, texture and marks."""
    generator = np.random.default_rng(seed)
    grains = generator.integers(0, 256, (max(2, height // 40), max(2, width // 40), 3))
    texture = Image.fromarray(grains.astype(np.uint8)).resize((width, height), Image.BICUBIC)
    contrast = generator.uniform(0.1, 1.0)
    pixels = generator.uniform(0, 255, 3) * (1 - contrast) + np.asarray(texture) * contrast
    for _ in range(seed % 4):
        corner = generator.integers(0, (max(1, width - 8), max(1, height - 8)))
        end = corner + generator.integers(4, (width // 4 + 5, height // 4 + 5))
        pixels[corner[1] : end[1], corner[0] : end[0]] = generator.uniform(0, 255, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
