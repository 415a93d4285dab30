"""Bootstrap: a product's test pictures -> draws of its figures, from which come the intervals.

Pictures are drawn with replacement, each class on its own, so that every draw has both; tiles of
one file together: they are no more independent than pixels of one picture, whose figures are drawn
by picture too. Their curves are sampled at a few hundred thresholds, so that a thousand draws take
a moment.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import label as connected
from tqdm import tqdm

from looktwice_adapters.metrics import PRO_LIMIT, Labels, Maps, Masks

DRAWS = 1000
LEVEL = 0.95
STEPS = 200  # thresholds at even steps of the normal pixels' ranks, and of the defects'

Draws = dict[str, NDArray[np.float64]]  # name of a figure -> (draws,), nan where it has none
Interval = tuple[float, float]


def draw(
    labels: Labels,
    figures: Callable[[NDArray[np.int64]], Mapping[str, float | None]],
    draws: int = DRAWS,
    seed: int | Sequence[int] = 0,
    files: Sequence[object] | None = None,
) -> Draws:
    """Compute `figures` of pictures drawn with replacement, class by class.

    Args:
        labels: (pictures,) whether anomalous.
        figures: indices of pictures -> figures.
        draws: how many times.
        seed: of the drawing.
        files: (pictures,) where each comes from, where several are tiles of one.
    """
    rng = np.random.default_rng(seed)
    classes: list[dict[object, list[int]]] = [{}, {}]
    for index, anomalous in enumerate(labels):
        file = index if files is None else files[index]
        classes[bool(anomalous)].setdefault(file, []).append(index)
    groups = [list(members.values()) for members in classes]
    rows = [
        figures(np.array([index for members in groups for index in _drawn(members, rng)]))
        for _ in tqdm(range(draws), "bootstrap", unit="draw", leave=False, delay=2, disable=None)
    ]
    names = rows[0] if rows else ()
    return {name: np.array([row[name] for row in rows], np.float64) for name in names}


def _drawn(members: Sequence[list[int]], rng: np.random.Generator) -> list[int]:
    """The pictures of as many files as there are, with replacement."""
    return [i for file in rng.integers(len(members), size=len(members)) for i in members[file]]


def mean_draws(products: Sequence[Draws]) -> Draws:
    """Draws of the mean over products, draw by draw.

    Args:
        products: draws of the figures that each product has, as many of each.

    Returns:
        The mean of the products that have the figure; nan where the draw of one of them is.
    """
    names = dict.fromkeys(name for draws in products for name in draws)
    return {
        name: np.mean([draws[name] for draws in products if name in draws], axis=0)
        for name in names
    }


def intervals(draws: Draws, level: float = LEVEL) -> dict[str, Interval]:
    """The central interval of every figure that all draws have (percentile bootstrap)."""
    tails = [(1 - level) / 2, (1 + level) / 2]
    found = {}
    for name in draws:
        if _complete(draws, name):
            low, high = np.quantile(draws[name], tails)
            found[name] = (float(low), float(high))
    return found


def _complete(draws: Draws, name: str) -> bool:
    return name in draws and len(draws[name]) > 0 and bool(np.isfinite(draws[name]).all())


@dataclass(frozen=True)
class PixelCurves:
    """How many pixels of each picture, and what share of each defect, lie above T thresholds."""

    normal: NDArray[np.float64]  # (pictures, T) counts
    defect: NDArray[np.float64]  # (pictures, T) counts
    sizes: NDArray[np.float64]  # (pictures, 2) pixels without and with defect
    overlaps: NDArray[np.float64]  # (regions, T) shares
    pictures: NDArray[np.int64]  # (regions,) the picture of each region

    @classmethod
    def of(cls, masks: Masks, maps: Maps) -> "PixelCurves":
        """Count once; at least one mask must cover something."""
        ranks = np.linspace(0, 1, STEPS + 1)
        values = [
            np.concatenate([m[mask == wanted] for mask, m in zip(masks, maps, strict=True)])
            for wanted in (False, True)
        ]
        thresholds = np.unique(np.concatenate([np.quantile(v, ranks) for v in values]))[::-1]
        counts, sizes, overlaps, pictures = [], [], [], []
        for index, (mask, m) in enumerate(zip(masks, maps, strict=True)):
            counts.append([_above(m[~mask], thresholds), _above(m[mask], thresholds)])
            sizes.append([(~mask).sum(), mask.sum()])
            regions, number = connected(mask, np.ones((3, 3)))
            for region in range(1, number + 1):
                inside = m[regions == region]
                overlaps.append(_above(inside, thresholds) / len(inside))
                pictures.append(index)
        normal, defect = np.moveaxis(np.array(counts, np.float64), 1, 0)
        return cls(
            normal, defect, np.array(sizes, np.float64), np.array(overlaps), np.array(pictures)
        )

    def figures(self, drawn: NDArray[np.int64]) -> dict[str, float]:
        """Pixel AUROC, AP and AUPRO of the pictures with these indices; nan with one class only."""
        times = np.bincount(drawn, minlength=len(self.sizes)).astype(np.float64)
        normals, defects = times @ self.sizes
        if not normals or not defects:
            return dict.fromkeys(("pixel_auroc", "pixel_ap", "aupro"), float("nan"))
        false = np.concatenate([[0], times @ self.normal])
        true = np.concatenate([[0], times @ self.defect])
        rate, recall = false / normals, true / defects
        precision = true[1:] / np.maximum(true[1:] + false[1:], 1)
        weights = times[self.pictures]
        overlap = np.concatenate([[0], weights @ self.overlaps / weights.sum()])
        inside = rate < PRO_LIMIT
        x = np.append(rate[inside], PRO_LIMIT)
        y = np.append(overlap[inside], np.interp(PRO_LIMIT, rate, overlap))
        return {
            "pixel_auroc": float(np.trapezoid(recall, rate)),
            "pixel_ap": float((np.diff(recall) * precision).sum()),
            "aupro": float(np.trapezoid(y, x) / PRO_LIMIT),
        }


def _above(values: NDArray[np.float32], thresholds: NDArray[np.float64]) -> NDArray[np.int64]:
    """How many values are at or above each threshold (T,)."""
    return len(values) - np.searchsorted(np.sort(values), thresholds, side="left")
