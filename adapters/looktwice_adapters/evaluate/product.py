"""One product's test pictures and a detector -> its metrics."""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from looktwice_adapters.datasets import Sample, read_image, read_mask, read_product
from looktwice_adapters.evaluate.detector import Detector
from looktwice_adapters.metrics import (
    Maps,
    Masks,
    Metrics,
    image_metrics,
    pixel_metrics,
    shortcut_auroc,
    trivial_statistics,
    verdict_metrics,
)

LONGEST = 256  # pixels a side at which maps and masks are compared; the map has 28 tokens


def test_samples(folder: Path, name: str, limit: int | None, seed: int) -> list[Sample]:
    """The product's test pictures, or `limit` of them drawn by seed."""
    samples = [sample for sample in read_product(folder, name) if sample.split == "test"]
    if limit is None or limit >= len(samples):
        return samples
    chosen = np.random.default_rng(seed).choice(len(samples), limit, replace=False)
    return [samples[index] for index in sorted(chosen)]


def evaluate_product(detector: Detector, samples: list[Sample]) -> Metrics:
    """Judge the samples one by one, with a progress bar, and compute every figure.

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("no test pictures")
    scores: list[float] = []
    masks: Masks = []
    maps: Maps = []
    for sample in _with_progress(samples):
        picture = read_image(sample.path)
        judgement = detector.judge(picture)
        scores.append(judgement.score)
        size = _comparable(picture.shape[0], picture.shape[1])
        mask = read_mask(sample, size)
        if mask is not None:
            masks.append(mask)
            maps.append(np.asarray(cv2.resize(judgement.anomaly_map, size[::-1]), np.float32))
    labels = np.array([sample.anomalous for sample in samples])
    figures = (
        image_metrics(labels, np.array(scores))
        | verdict_metrics(labels, np.array(scores))
        | pixel_metrics(masks, maps)
    )
    return Metrics(
        **figures,
        shortcut_auroc=shortcut_auroc(labels, [trivial_statistics(s.path) for s in samples]),
        n_normal=int((~labels).sum()),
        n_anomalous=int(labels.sum()),
    )


def _comparable(height: int, width: int) -> tuple[int, int]:
    factor = min(1.0, LONGEST / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def _with_progress(samples: list[Sample]) -> Iterator[Sample]:
    yield from tqdm(samples, desc=samples[0].product, unit="image", leave=False)
