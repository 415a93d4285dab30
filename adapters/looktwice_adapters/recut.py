"""Recut: a picture's AnyRes crops -> the crops of another grid, and their map back.

AnyRes (LLaVA-OneVision) chooses the grid of crops by a picture's size and aspect, and with it the
scale at which they show the part. Patches can be compared where that scale is one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from looktwice_adapters.anomaly_map import Placement, placement, sample

Grid = tuple[int, int]  # rows and columns of crops


@dataclass(frozen=True)
class Cut:
    """A picture as AnyRes cut it."""

    crops: Tensor  # (1 + rows * columns, 3, S, S) in [-1, 1], the base view first
    size: tuple[int, int]  # (width, height) of the picture in pixels
    grid: Grid

    def on(self, grid: Grid | None) -> Tensor:
        """The crops on another grid, (1 + rows * columns, 3, S, S); None is their own.

        Made of the crops, not of the picture, which the worker does not have, by their 256 levels,
        which half precision keeps.
        """
        if grid is None or grid == self.grid:
            return self.crops
        side = self.crops.shape[-1]
        rows, columns = self._place(self.grid, side)
        picture = _joined(self.crops[1:], self.grid)[:, rows, columns].float()
        levels = ((picture / 2 + 0.5) * 255).round()
        rows, columns = self._place(grid, side)
        shape = [rows.stop - rows.start, columns.stop - columns.start]
        fitted = interpolate(levels[None], shape, mode="bicubic", antialias=True)[0]
        canvas = levels.new_zeros(3, side * grid[0], side * grid[1])
        canvas[:, rows, columns] = fitted.round().clamp(0, 255)
        return torch.cat((self.crops[:1].float(), (_tiles(canvas, grid) / 255 - 0.5) / 0.5))

    def back(self, anomaly_map: Tensor, grid: Grid | None) -> Tensor:
        """The map of the crops on another grid, as the map of these crops (B, h, w).

        Args:
            anomaly_map: (1 + rows * columns, h, w), the base view first, which stays.
            grid: of that map; None is their own.
        """
        if grid is None or grid == self.grid:
            return anomaly_map
        h, w = anomaly_map.shape[1:]
        here, there = (
            placement(self.size, (w * columns, h * rows)) for rows, columns in (self.grid, grid)
        )
        across, down = there.width / here.width, there.height / here.height
        # This canvas in fractions of the other one.
        place = Placement(
            there.left - here.left * across, there.top - here.top * down, across, down
        )
        rows, columns = self.grid
        canvas = sample(_joined(anomaly_map[1:, None], grid)[0], place, (w * columns, h * rows))
        return torch.cat((anomaly_map[:1], _tiles(canvas[None], self.grid)[:, 0]))

    def _place(self, grid: Grid, side: int) -> tuple[slice, slice]:
        """Rows and columns of pixels that the picture takes on the canvas of a grid."""
        height, width = side * grid[0], side * grid[1]
        place = placement(self.size, (width, height))
        top, left = round(place.top * height), round(place.left * width)
        return (
            slice(top, top + round(place.height * height)),
            slice(left, left + round(place.width * width)),
        )


def _joined(crops: Tensor, grid: Grid) -> Tensor:
    """Crops (rows * columns, C, h, w) as one canvas (C, rows * h, columns * w)."""
    return crops.unflatten(0, grid).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


def _tiles(canvas: Tensor, grid: Grid) -> Tensor:
    """A canvas (C, rows * h, columns * w) as its crops (rows * columns, C, h, w)."""
    parts = canvas.unflatten(2, (grid[1], -1)).unflatten(1, (grid[0], -1))
    return parts.permute(1, 3, 0, 2, 4).flatten(0, 1)
