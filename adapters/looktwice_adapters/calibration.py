"""Calibration of an expert: raw scores and maps with their labels -> scales and biases.

Platt's scaling (logistic regression on the logit) with both classes weighted alike, so that the
threshold 0.5 is fair to each, however many of either the data holds. The map's scale is fitted on
pixels; its bias puts 0.5 where few pixels of normal parts reach: a good part must not glow.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from looktwice_adapters.expert import Calibration

SMALLEST_SCALE = 0.05
GLOW = 0.85  # share of normal pictures whose calibrated map stays below 0.5 everywhere


def logits(probabilities: Tensor) -> NDArray[np.float64]:
    """Logits of probabilities in [0, 1], finite: the same clamp as Calibration's."""
    return np.asarray(torch.logit(probabilities.double(), 1e-7).numpy(), np.float64)


def platt(values: NDArray[np.float64], labels: NDArray[np.bool_]) -> tuple[float, float]:
    """Scale and bias of sigmoid(scale * value + bias), classes weighted alike, scale positive."""
    fitted = LogisticRegression(class_weight="balanced", C=10.0, max_iter=1000)
    fitted.fit(values[:, None], labels)
    scale = max(float(fitted.coef_[0, 0]), SMALLEST_SCALE)
    return scale, float(fitted.intercept_[0])


def balanced_threshold(values: NDArray[np.float64], labels: NDArray[np.bool_]) -> float:
    """The value with the best mean of both classes' accuracies, the middle of ties."""
    candidates = np.unique(values)
    middles = (candidates[1:] + candidates[:-1]) / 2
    if not len(middles):
        return float(candidates[0])
    found = np.array([(values[labels] >= m).mean() + (values[~labels] < m).mean() for m in middles])
    return float(np.median(middles[found >= found.max() - 1e-9]))


def calibrate(
    scores: Tensor, labels: NDArray[np.bool_], peaks: Tensor, pixels: Tensor, covered: Tensor
) -> Calibration:
    """Fit all four numbers.

    Args:
        scores: (images,) raw scores in [0, 1].
        labels: (images,) whether anomalous.
        peaks: (images,) highest value of each picture's stitched map, before calibration.
        pixels: (pixels,) values of stitched maps, of normal and of masked pictures.
        covered: (pixels,) whether the mask covers them.

    Returns:
        Score: Platt's. Map: scale by the pixels; bias such that GLOW of the normal pictures have
        no region, or, where that is lower, the threshold that tells both classes' peaks best apart.
    """
    score_scale, score_bias = platt(logits(scores), labels)
    map_scale, _ = platt(logits(pixels), covered.numpy().astype(np.bool_))
    tops = logits(peaks)
    quiet = float(np.quantile(tops[~labels], GLOW))
    cut = min(quiet, balanced_threshold(tops, labels))
    return Calibration(score_scale, score_bias, map_scale, -map_scale * cut)
