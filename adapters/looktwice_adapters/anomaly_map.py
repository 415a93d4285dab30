"""Anomaly map: significance maps of an image's crops -> one map in its own coordinates, regions.

AnyRes (LLaVA-OneVision) squashes the whole picture into the base view, and fits it with its aspect
kept, padded, into a grid of crops. Both are undone here, so that a value stands where its pixel is.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import grid_sample

from looktwice_adapters.facts import THRESHOLD

MAX_SIDE = 1024  # pixels of the longer side of a map; more shows nothing that the tokens know
PEAK_SHARE = 0.8  # of the peak: how far the one region of a map below the threshold reaches
MAX_REGIONS = 50
_ROWS, _COLUMNS = ("top", "", "bottom"), ("left", "", "right")

Position = Literal[
    "top left", "top", "top right", "left", "center", "right",
    "bottom left", "bottom", "bottom right",
]  # fmt: skip


@dataclass(frozen=True)
class Region:
    """A connected part of the anomaly map."""

    box: tuple[int, int, int, int]  # x0, y0, x1, y1 in the image's pixels, half open
    score: float  # the map's peak in it, [0, 1]
    area: float  # fraction of the image
    position: Position  # of the peak


class Placement(NamedTuple):
    """Where the picture lies on the canvas of its crops, as fractions of the canvas."""

    left: float
    top: float
    width: float
    height: float


WHOLE = Placement(0.0, 0.0, 1.0, 1.0)


def placement(size: tuple[int, int], canvas: tuple[int, int]) -> Placement:
    """Where AnyRes puts a picture of `size` (width, height) on a `canvas` of crops, in pixels."""
    (width, height), (canvas_width, canvas_height) = size, canvas
    scale_x, scale_y = canvas_width / width, canvas_height / height
    if scale_x < scale_y:
        fitted = (canvas_width, min(math.ceil(height * scale_x), canvas_height))
    else:
        fitted = (min(math.ceil(width * scale_y), canvas_width), canvas_height)
    left, top = (canvas_width - fitted[0]) // 2, (canvas_height - fitted[1]) // 2
    return Placement(
        left / canvas_width,
        top / canvas_height,
        fitted[0] / canvas_width,
        fitted[1] / canvas_height,
    )


def sample(canvas_map: Tensor, place: Placement, size: tuple[int, int]) -> Tensor:
    """The part of `canvas_map` (h, w) under the picture, at `size` (width, height): (H, W)."""
    width, height = size
    columns, rows = (torch.arange(side, device=canvas_map.device) for side in size)
    x = place.left + place.width * (columns + 0.5) / width
    y = place.top + place.height * (rows + 0.5) / height
    points = torch.stack(torch.meshgrid(2 * x - 1, 2 * y - 1, indexing="xy"), dim=-1)
    return grid_sample(
        canvas_map.float()[None, None], points[None], padding_mode="border", align_corners=False
    )[0, 0]


def map_size(size: tuple[int, int]) -> tuple[int, int]:
    """Width and height of the map of a picture of `size`: its aspect, the longer side <= 1024."""
    scale = min(1.0, MAX_SIDE / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def stitch(
    significance: Tensor, grid: tuple[int, int], size: tuple[int, int], crop_size: int
) -> Tensor:
    """One map in the picture's own coordinates: the mean of base view and grid of crops.

    Args:
        significance: (1 + rows * columns, h, w), the base view first, of any range.
        grid: (rows, columns) of the crops.
        size: (width, height) of the picture in pixels.
        crop_size: side of a crop in pixels.

    Returns:
        (H, W) in the range of `significance`, of `map_size(size)`.
    """
    rows, columns = grid
    target = map_size(size)
    crops = significance[1:].unflatten(0, (rows, columns)).transpose(1, 2)  # (rows, h, columns, w)
    canvas = crops.flatten(2, 3).flatten(0, 1)
    place = placement(size, (columns * crop_size, rows * crop_size))
    mean = (sample(significance[0], WHOLE, target) + sample(canvas, place, target)) / 2
    # The weights of four equal values can add up to a rounding above one.
    return mean.clamp(significance.min(), significance.max())


def position(x: float, y: float) -> Position:
    """The place in words of a point given as fractions of width and height."""
    row, column = _ROWS[min(int(3 * y), 2)], _COLUMNS[min(int(3 * x), 2)]
    return cast(Position, " ".join(word for word in (row, column) if word) or "center")


def find_regions(
    anomaly_map: NDArray[np.float32], size: tuple[int, int], *, at_least_one: bool
) -> list[Region]:
    """Connected parts of a calibrated map at 0.5 and above, highest peak first, 50 at most.

    Args:
        anomaly_map: (H, W) in [0, 1].
        size: (width, height) of the picture, in whose pixels the boxes are.
        at_least_one: where nothing reaches 0.5, return what surrounds the peak.
    """
    threshold = THRESHOLD
    if anomaly_map.max() < threshold:
        if not at_least_one:
            return []
        threshold = PEAK_SHARE * float(anomaly_map.max())
    labels, count = ndimage.label(anomaly_map >= threshold, structure=np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:] / labels.size
    regions = [
        _region(
            np.where(labels[part] == label, anomaly_map[part], 0),
            part,
            float(area),
            labels.shape,
            size,
        )
        for label, (area, part) in enumerate(
            zip(areas, ndimage.find_objects(labels), strict=True), 1
        )
    ]
    regions.sort(key=lambda region: region.score, reverse=True)
    only_peak = anomaly_map.max() < THRESHOLD
    return regions[: 1 if only_peak else MAX_REGIONS]


def _region(
    values: NDArray[np.float32],
    bounds: tuple[slice, slice],
    area: float,
    shape: tuple[int, int],
    size: tuple[int, int],
) -> Region:
    """Describe one connected part in the picture's pixels, by its values in a map of `shape`."""
    height, width = shape
    rows, columns = bounds
    scale_x, scale_y = size[0] / width, size[1] / height
    box = (
        math.floor(columns.start * scale_x),
        math.floor(rows.start * scale_y),
        min(math.ceil(columns.stop * scale_x), size[0]),
        min(math.ceil(rows.stop * scale_y), size[1]),
    )
    y, x = np.unravel_index(values.argmax(), values.shape)
    return Region(
        box=box,
        score=float(values[y, x]),
        area=area,
        position=position((columns.start + x + 0.5) / width, (rows.start + y + 0.5) / height),
    )
