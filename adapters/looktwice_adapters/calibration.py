"""Calibration of an expert: raw scores and maps with their labels -> scales and biases.

Platt's scaling (logistic regression) on the head's logit and the map's peak, both classes of every
set weighted alike, so that the threshold 0.5 is fair to each. Departs from the paper, which scores
with the head alone. The map's scale is fitted on pixels; its bias lets the map reach 0.5 in as
many pictures as are judged anomalous, so that verdict and regions go together.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from looktwice_adapters.expert import Calibration

SMALLEST_SCALE = 0.05
ROUNDING = 1e-9  # of sums of weights


def logits(probabilities: Tensor) -> NDArray[np.float64]:
    """Logits of probabilities in [0, 1], finite: the same clamp as Calibration's."""
    return np.asarray(torch.logit(probabilities.double(), 1e-7).numpy(), np.float64)


def balanced_weights(labels: NDArray[np.bool_], sets: NDArray[np.str_]) -> NDArray[np.float64]:
    """Weights such that every set counts alike, and in it both classes."""
    weights = np.zeros(len(labels))
    for name in np.unique(sets):
        for label in (False, True):
            chosen = (sets == name) & (labels == label)
            weights[chosen] = 1 / max(int(chosen.sum()), 1)
    return weights * len(labels) / weights.sum()


def platt(
    values: NDArray[np.float64], labels: NDArray[np.bool_], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """Scales, none negative, and bias of sigmoid(values @ scales + bias).

    Args:
        values: (n, features); a feature that speaks against its meaning is left out.
        labels: (n,)
        weights: (n,)
    """
    scales = np.zeros(values.shape[1])
    used = np.ones(values.shape[1], np.bool_)
    while True:
        fitted = LogisticRegression(C=10.0, max_iter=1000)
        fitted.fit(values[:, used], labels, sample_weight=weights)
        found = fitted.coef_[0]
        if (found >= SMALLEST_SCALE).all() or used.sum() == 1:
            break
        used[np.flatnonzero(used)[found.argmin()]] = False
    scales[used] = np.maximum(found, SMALLEST_SCALE)
    return scales, float(fitted.intercept_[0])


def calibrate(
    scores: Tensor,
    significant: Tensor,
    labels: NDArray[np.bool_],
    sets: NDArray[np.str_],
    peaks: Tensor,
    pixels: Tensor,
    covered: Tensor,
) -> Calibration:
    """Fit all five numbers.

    Args:
        scores: (images,) raw scores in [0, 1].
        significant: (images,) the maps' `detail_logit`.
        labels: (images,) whether anomalous.
        sets: (images,) the name of each picture's data set.
        peaks: (images,) highest value of each picture's stitched map, before calibration.
        pixels: (pixels,) values of stitched maps, of normal and of masked pictures.
        covered: (pixels,) whether the mask covers them; of one class alone (no masks), the map
            keeps its scale.

    Returns:
        The map's bias is such that, sets and classes weighted alike, its peak reaches 0.5 in as
        many pictures as the score does.
    """
    weights = balanced_weights(labels, sets)
    values = np.stack((logits(scores), significant.double().numpy()), axis=1)
    (score_scale, peak_scale), score_bias = platt(values, labels, weights)
    truth = covered.numpy().astype(np.bool_)
    map_scale = Calibration().map_scale
    if 0 < truth.sum() < len(truth):
        of_pixels = balanced_weights(truth, np.full(len(truth), "pixels"))
        (map_scale,), _ = platt(logits(pixels)[:, None], truth, of_pixels)
    judged = score_scale * values[:, 0] + peak_scale * values[:, 1] + score_bias
    share = float(np.average(judged >= 0, weights=weights))
    order = np.argsort(logits(peaks))
    below = np.cumsum(weights[order]) / weights.sum()
    first = min(int(np.searchsorted(below, 1 - share + ROUNDING)), len(order) - 1)
    cut = float(logits(peaks)[order][first])
    return Calibration(
        float(score_scale), score_bias, float(map_scale), float(-map_scale * cut), float(peak_scale)
    )
