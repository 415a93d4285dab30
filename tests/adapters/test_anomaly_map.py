"""The anomaly map: what is painted on a picture comes back at its place."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d
from transformers import LlavaOnevisionImageProcessor
from transformers.image_processing_utils import get_patch_output_size
from transformers.models.llava_onevision.modeling_llava_onevision import (
    get_anyres_image_grid_shape,
)

from looktwice_adapters.anomaly_map import (
    MAX_REGIONS,
    MAX_SIDE,
    find_regions,
    map_size,
    placement,
    position,
    stitch,
)

CROP, TOKENS = 56, 14
NANO = [[CROP * rows, CROP * columns] for rows in (1, 2) for columns in (1, 2)]
HUB = [[CROP * rows, CROP * columns] for rows in range(1, 7) for columns in range(1, 7)]
PROCESSOR = LlavaOnevisionImageProcessor(
    size={"height": CROP, "width": CROP}, image_mean=[0.0] * 3, image_std=[1.0] * 3
)


def brightness_map(pixels: np.ndarray, pinpoints: list[list[int]]) -> np.ndarray:
    """The map (H, W) of an expert to whom bright is anomalous, through the processor's crops."""
    height, width = pixels.shape[:2]
    crops = PROCESSOR(
        Image.fromarray(pixels), image_grid_pinpoints=pinpoints, return_tensors="pt"
    ).pixel_values[0]
    significance = avg_pool2d(crops.mean(1), CROP // TOKENS)  # (B, h, w)
    grid = get_anyres_image_grid_shape((height, width), pinpoints, CROP)
    return stitch(significance, grid, (width, height), CROP).numpy()


def painted(index: int) -> tuple[np.ndarray, np.ndarray]:
    """A black picture of random size and aspect with a white rectangle, and its box."""
    generator = np.random.default_rng(index)
    size = np.exp(generator.uniform(np.log(28), np.log(900), 2)).astype(int)  # width, height
    sides = np.ceil(size * generator.uniform(0.2, 0.4, 2)).astype(int)
    corner = generator.integers(0, size - sides + 1)
    box = np.concatenate((corner, corner + sides))
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    return pixels, box


@pytest.mark.parametrize("pinpoints", [NANO, HUB], ids=["2x2", "6x6"])
@pytest.mark.parametrize("index", range(16))
def test_painted_rectangle_comes_back_within_one_token_of_the_base_view(index, pinpoints):
    pixels, box = painted(index)
    size = (pixels.shape[1], pixels.shape[0])

    [region] = find_regions(brightness_map(pixels, pinpoints), size, at_least_one=False)

    token = np.array([*size, *size]) / TOKENS
    assert (np.abs(np.array(region.box) - box) <= token + 1).all(), (size, region.box, box)
    assert region.box[0] >= 0
    assert region.box[1] >= 0
    assert region.box[2] <= size[0]
    assert region.box[3] <= size[1]


@pytest.mark.parametrize("pinpoints", [NANO, HUB], ids=["2x2", "6x6"])
@pytest.mark.parametrize("aspect", [0.4, 0.77, 1.0, 1.3, 2.5])
def test_centre_and_size_of_a_painted_disc_equal_the_maps(aspect, pinpoints):
    width, height = round(450 * aspect**0.5), round(450 / aspect**0.5)
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    inside = (x - 0.31) ** 2 + (y - 0.64) ** 2 < 0.15**2
    pixels = np.repeat(255 * inside[..., None], 3, axis=2).astype(np.uint8)

    found = brightness_map(pixels, pinpoints)

    rows, columns = found.shape
    assert (columns, rows) == map_size((width, height))
    weights = found / found.sum()
    assert weights.sum(0) @ (np.arange(columns) + 0.5) / columns == pytest.approx(0.31, abs=3e-3)
    assert weights.sum(1) @ (np.arange(rows) + 0.5) / rows == pytest.approx(0.64, abs=3e-3)
    assert found.mean() == pytest.approx(inside.mean(), rel=0.03)


def test_placement_equals_where_the_processor_puts_the_picture():
    generator = np.random.default_rng(0)
    for width, height in generator.integers(1, 5000, (500, 2)).tolist():
        rows, columns = get_anyres_image_grid_shape((height, width), HUB, CROP)
        canvas = (columns * CROP, rows * CROP)
        picture = torch.empty(3, height, 1).expand(3, height, width)
        fitted = get_patch_output_size(picture, canvas[::-1], "channels_first")
        left, top, _, _ = PROCESSOR._get_padding_size(fitted, canvas[::-1])

        place = placement((width, height), canvas)

        assert place.left * canvas[0] == pytest.approx(left)
        assert place.top * canvas[1] == pytest.approx(top)
        assert place.width * canvas[0] == pytest.approx(fitted[1])
        assert place.height * canvas[1] == pytest.approx(fitted[0])


def test_flat_significance_gives_the_same_flat_map():
    found = stitch(torch.full((5, 14, 14), 0.37), (2, 2), (300, 200), CROP)
    torch.testing.assert_close(found, torch.full((200, 300), 0.37))


def test_a_map_of_ones_stays_within_one_at_every_size():
    for width, height in ((246, 224), (943, 453), (1490, 744)):  # of weights that round upwards
        assert stitch(torch.ones(3, 14, 14), (1, 2), (width, height), 224).max() == 1


def test_values_of_any_range_keep_it():
    shares = torch.rand(5, 14, 14, generator=torch.Generator().manual_seed(0))
    found, moved = (stitch(one, (2, 2), (448, 448), 224) for one in (shares, 6 * shares - 4))
    torch.testing.assert_close(moved, 6 * found - 4)


def test_base_view_and_grid_of_crops_count_half_each():
    significance = torch.zeros(3, 4, 4)
    significance[0] = 0.5
    significance[2] = 1.0  # the right one of two crops
    found = stitch(significance, (1, 2), (400, 200), CROP)
    assert found[100, 40] == pytest.approx(0.25)
    assert found[100, 360] == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((640, 480), (640, 480)),
        ((2048, 1024), (MAX_SIDE, 512)),
        ((8000, 3), (MAX_SIDE, 1)),
    ],
)
def test_map_has_the_pictures_aspect_and_at_most_1024_pixels_a_side(size, expected):
    assert map_size(size) == expected


def test_the_nine_positions_are_the_thirds_of_the_picture():
    thirds = (0.1, 0.5, 0.9)
    assert [position(x, y) for y in thirds for x in thirds] == [
        "top left", "top", "top right", "left", "center", "right",
        "bottom left", "bottom", "bottom right",
    ]  # fmt: skip
    assert position(1.0, 1.0) == "bottom right"


def flat_map(value: float = 0.0) -> np.ndarray:
    return np.full((30, 60), value, np.float32)


def test_regions_are_the_connected_parts_at_half_and_above_highest_peak_first():
    found = flat_map(0.1)
    found[0:3, 0:6] = 0.5  # exactly the threshold
    found[20:25, 40:50] = 0.6
    found[22, 45] = 0.9
    found[25, 50] = 0.55  # touches by its corner

    high, low = find_regions(found, (600, 300), at_least_one=False)

    assert high.box == (400, 200, 510, 260)
    assert high.score == pytest.approx(0.9)
    assert high.area == pytest.approx(51 / 1800)
    assert high.position == "bottom right"
    assert low.box == (0, 0, 60, 30)
    assert low.score == pytest.approx(0.5)
    assert low.position == "top left"


def test_a_map_below_the_threshold_has_one_region_around_its_peak_where_asked():
    found = flat_map(0.01)
    found[15, 30] = 0.4
    found[15, 31] = 0.35
    found[3, 3] = 0.39
    assert find_regions(found, (60, 30), at_least_one=False) == []
    [region] = find_regions(found, (60, 30), at_least_one=True)
    assert region.box == (30, 15, 32, 16)
    assert region.position == "center"
    [everything] = find_regions(flat_map(), (60, 30), at_least_one=True)
    assert everything.box == (0, 0, 60, 30)


def test_more_regions_than_50_are_cut_to_the_highest():
    found = flat_map()
    found[::3, ::3] = np.linspace(0.5, 1, 200, dtype=np.float32).reshape(10, 20)
    regions = find_regions(found, (60, 30), at_least_one=False)
    assert len(regions) == MAX_REGIONS
    assert regions[-1].score == pytest.approx(np.sort(found, axis=None)[-MAX_REGIONS])
