"""Figures of a detector: labels, scores, masks and maps -> AUROC, AP, F1-max, AUPRO, verdict, ECE.

scikit-learn, torchmetrics and scipy compute them, but AUPRO (Bergmann et al., 2020: mean overlap of
the defects' connected regions against the false positive rate, up to 0.3): anomalib's is private
under a wrapper for Lightning's batches, and a test holds ours to it. All are fractions in [0, 1],
None where they cannot be computed (one class only, no masks).
"""

from dataclasses import asdict, dataclass, field, fields

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import label as connected
from sklearn.metrics import (
    average_precision_score,
    precision_recall_curve,
    precision_recall_fscore_support,
    roc_auc_score,
)
from torchmetrics.functional.classification import binary_calibration_error

from looktwice_adapters.datasets import Sample, read_image

PRO_LIMIT = 0.3
CALIBRATION_BINS = 15

Labels = NDArray[np.bool_]  # (images,)
Scores = NDArray[np.float64]  # (images,)
Decisions = NDArray[np.float64]  # (images,) 1 yes or anomalous, 0 no or normal, nan neither
Masks = list[NDArray[np.bool_]]  # (H, W) each
Maps = list[NDArray[np.float32]]  # (H, W) each


@dataclass(frozen=True)
class Metrics:
    """What `looktwice evaluate --json` prints for a product."""

    image_auroc: float | None = None
    image_ap: float | None = None
    image_f1max: float | None = None
    pixel_auroc: float | None = None
    pixel_ap: float | None = None
    aupro: float | None = None
    verdict_accuracy: float | None = None
    verdict_precision: float | None = None
    verdict_recall: float | None = None
    verdict_f1: float | None = None
    answer_accuracy: float | None = None
    answer_precision: float | None = None
    answer_recall: float | None = None
    answer_f1: float | None = None
    ece: float | None = None
    shortcut_auroc: float | None = None
    shortcut_name: str | None = None
    n_normal: int = 0
    n_anomalous: int = 0
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)  # 95 % bootstrap


def image_metrics(labels: Labels, scores: Scores) -> dict[str, float | None]:
    """AUROC, average precision and the best F1 over all thresholds, of image scores."""
    if labels.all() or not labels.any():
        return {"image_auroc": None, "image_ap": None, "image_f1max": None}
    precision, recall, _ = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return {
        "image_auroc": float(roc_auc_score(labels, scores)),
        "image_ap": float(average_precision_score(labels, scores)),
        "image_f1max": float(f1.max()),
    }


def decision_metrics(labels: Labels, said: Decisions, prefix: str) -> dict[str, float | None]:
    """Accuracy, precision, recall and F1 of a yes or no for each picture, "anomalous" being yes.

    Neither yes nor no is wrong: it counts against the accuracy, and finds no defect. With one
    class only there is no precision and no F1; without anomalous pictures no recall.
    """
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, said == 1, average="binary", zero_division=0
    )
    both = labels.any() and not labels.all()
    return {
        f"{prefix}_accuracy": float(np.mean(said == labels)),
        f"{prefix}_precision": float(precision) if both else None,
        f"{prefix}_recall": float(recall) if labels.any() else None,
        f"{prefix}_f1": float(f1) if both else None,
    }


def calibration_error(labels: Labels, scores: Scores) -> float:
    """Expected calibration error of scores in [0, 1], in 15 bins of equal width."""
    error = binary_calibration_error(
        torch.from_numpy(scores), torch.from_numpy(labels).int(), n_bins=CALIBRATION_BINS
    )
    return float(error)


def pixel_metrics(masks: Masks, maps: Maps) -> dict[str, float | None]:
    """AUROC and AP over all pixels, and AUPRO, of maps with a mask (normal pictures included)."""
    if not any(mask.any() for mask in masks) or all(mask.all() for mask in masks):
        return {"pixel_auroc": None, "pixel_ap": None, "aupro": None}
    truth = np.concatenate([mask.ravel() for mask in masks])
    values = np.concatenate([anomaly_map.ravel() for anomaly_map in maps])
    return {
        "pixel_auroc": float(roc_auc_score(truth, values)),
        "pixel_ap": float(average_precision_score(truth, values)),
        "aupro": aupro(masks, maps),
    }


def aupro(masks: Masks, maps: Maps, limit: float = PRO_LIMIT) -> float:
    """Area under the per-region overlap curve up to a false positive rate, divided by that rate.

    Going down through all values, each normal pixel raises the rate and each pixel of a defect
    the mean overlap, by its share of its own region: small defects count as much as large ones.
    """
    shares, count = [], 0
    for mask in masks:
        regions, found = connected(mask, np.ones((3, 3)))
        sizes = np.maximum(np.bincount(regions.ravel()), 1)
        shares.append(np.where(mask, 1 / sizes[regions], 0).ravel())
        count += found
    values = np.concatenate([anomaly_map.ravel() for anomaly_map in maps])
    order = np.argsort(-values, kind="stable")
    normal = ~np.concatenate([mask.ravel() for mask in masks])[order]
    last = np.append(np.diff(values[order]) != 0, True)  # of equal values
    rate = np.append(0, (np.cumsum(normal) / normal.sum())[last])
    covered = np.cumsum(np.concatenate(shares)[order]) / count
    overlap = np.append(0, np.minimum(covered[last], 1))  # rounding may add up to more
    inside = rate < limit
    x = np.append(rate[inside], limit)
    y = np.append(overlap[inside], np.interp(limit, rate, overlap))
    return float(np.trapezoid(y, x) / limit)


def trivial_statistics(sample: Sample) -> dict[str, float]:
    """What could tell a picture's class without looking at its content.

    A tile's bytes per pixel are those of the file that it is cut from.
    """
    whole = read_image(sample.path)
    left, top, right, bottom = sample.box or (0, 0, whole.shape[1], whole.shape[0])
    picture = whole[top:bottom, left:right].astype(np.float32).mean(-1)
    down, across = np.gradient(picture)
    return {
        "mean brightness": float(picture.mean()),
        "contrast": float(picture.std()),
        "gradient energy": float(np.hypot(down, across).mean()),
        "bytes per pixel": sample.path.stat().st_size / (whole.shape[0] * whole.shape[1]),
    }


def shortcut(labels: Labels, statistics: list[dict[str, float]]) -> dict[str, float | str | None]:
    """The best AUROC, in either direction, of any trivial statistic, and that one's name."""
    if labels.all() or not labels.any():
        return {"shortcut_auroc": None, "shortcut_name": None}
    areas = {
        name: float(roc_auc_score(labels, [statistic[name] for statistic in statistics]))
        for name in statistics[0]
    }
    best = max(areas, key=lambda name: max(areas[name], 1 - areas[name]))
    return {"shortcut_auroc": max(areas[best], 1 - areas[best]), "shortcut_name": best}


def mean_of(all_metrics: list[Metrics]) -> Metrics:
    """Mean over products of every figure, of those that have it; counts are added up."""
    rows = [asdict(metrics) for metrics in all_metrics]
    summary: dict[str, float | None] = {}
    for name in (column.name for column in fields(Metrics)):
        values = [row[name] for row in rows if isinstance(row[name], int | float)]
        if name.startswith("n_"):
            summary[name] = sum(values)
        elif values:
            summary[name] = float(np.mean(values))
    return Metrics(**summary)  # type: ignore[arg-type]
