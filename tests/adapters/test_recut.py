"""Crops of one grid from those of another: what a picture shows, and where, stays."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

from looktwice_adapters.anomaly_map import stitch
from looktwice_adapters.datasets import AnyRes
from looktwice_adapters.recut import Cut

ANYRES = AnyRes()
GRIDS = [(1, 1), (1, 2), (2, 1), (2, 2)]
SIZES = [(448, 448), (300, 200), (200, 300), (130, 120), (512, 208), (201, 251)]  # width, height


def picture(size: tuple[int, int]) -> np.ndarray:
    """Soft blots: the same at any scale, but for rounding."""
    image = Image.new("RGB", size, (120, 130, 140))
    draw, (width, height) = ImageDraw.Draw(image), size
    draw.ellipse((0.1 * width, 0.2 * height, 0.5 * width, 0.6 * height), fill=(220, 40, 60))
    draw.ellipse((0.6 * width, 0.5 * height, 0.9 * width, 0.95 * height), fill=(20, 90, 200))
    return np.array(image.filter(ImageFilter.GaussianBlur(6)))


def cut(size: tuple[int, int], anyres: AnyRes = ANYRES) -> Cut:
    crops = (anyres.crops(picture(size)).float() / 255 - 0.5) / 0.5
    height, width = anyres.canvas(size[::-1])
    return Cut(crops, size, (height // anyres.side, width // anyres.side))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("grid", GRIDS)
def test_another_grids_crops_are_those_that_anyres_would_have_made(size, grid):
    canvas = (grid[0] * ANYRES.side, grid[1] * ANYRES.side)
    wanted = cut(size, AnyRes(ANYRES.side, (canvas,)))
    crops = cut(size).on(grid)
    assert crops.shape == wanted.crops.shape
    assert torch.equal(crops[0], wanted.crops[0])
    assert (crops - wanted.crops).abs().mean() < 0.02
    assert torch.equal(crops == -1, wanted.crops == -1)  # the padding is at the same place


def test_their_own_grids_crops_are_the_crops_themselves():
    own = cut((300, 200))
    assert own.on(None) is own.crops
    assert own.on(own.grid) is own.crops


def test_half_precision_makes_the_same_crops():
    own = cut((300, 200))
    half = Cut(own.crops.half(), own.size, own.grid)
    assert torch.equal(half.on((2, 2))[1:], own.on((2, 2))[1:])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_map_on_another_grid_comes_back_to_where_it_was(size, grid):
    """Stitched over the picture both ways, the smooth map is the same within a token."""
    own, side = cut(size), 14
    canvas = Cut(cut(size).on(grid), size, grid)
    darkness = torch.nn.functional.avg_pool2d(canvas.crops[:, 0], ANYRES.side // side)
    darkness = (darkness + 1) / 2
    back = own.back(darkness, grid)
    assert back.shape == (len(own.crops), side, side)
    assert torch.equal(back[0], darkness[0])
    there = stitch(darkness, grid, size, ANYRES.side)
    here = stitch(back, own.grid, size, ANYRES.side)
    assert (there - here).abs().mean() < 0.03
