from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from looktwice_adapters.datasets import Sample
from looktwice_adapters.losses import dice_loss, focal_loss
from looktwice_adapters.metrics import (
    Metrics,
    aupro,
    calibration_error,
    decision_metrics,
    image_metrics,
    mean_of,
    pixel_metrics,
    shortcut,
    trivial_statistics,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "anomalygpt_outputs.npz"
LABELS = np.array([False] * 50 + [True] * 50)


def masks_and_noise(seed=0):
    rng = np.random.default_rng(seed)
    masks = []
    for _ in range(6):
        mask = np.zeros((40, 50), bool)
        for _ in range(2):
            y, x = rng.integers(0, 30, 2)
            mask[y : y + 8, x : x + 6] = True
        masks.append(mask)
    return masks, [rng.random((40, 50)).astype(np.float32) for _ in masks]


def test_a_perfect_detector_gets_one_everywhere():
    masks, _ = masks_and_noise()
    assert set(image_metrics(LABELS, LABELS.astype(float)).values()) == {1.0}
    pixels = pixel_metrics(masks, [mask.astype(np.float32) for mask in masks])
    assert list(pixels.values()) == pytest.approx([1.0, 1.0, 1.0])


def test_a_constant_detector_gets_a_half():
    assert image_metrics(LABELS, np.full(100, 0.3))["image_auroc"] == 0.5
    masks, noise = masks_and_noise()
    assert pixel_metrics(masks, [0 * n for n in noise])["pixel_auroc"] == 0.5


def test_a_random_detector_gets_about_a_half():
    scores = np.random.default_rng(0).random(100)
    assert image_metrics(LABELS, scores)["image_auroc"] == pytest.approx(0.5, abs=0.12)
    masks, noise = masks_and_noise()
    assert pixel_metrics(masks, noise)["pixel_auroc"] == pytest.approx(0.5, abs=0.03)
    assert aupro(masks, noise) == pytest.approx(0.15, abs=0.03)  # the diagonal up to 0.3


def test_aupro_equals_a_walk_over_all_thresholds():
    from scipy.ndimage import label

    masks, noise = masks_and_noise(1)
    maps = [n + 0.3 * mask for n, mask in zip(noise, masks, strict=True)]
    thresholds = np.unique(np.concatenate([m.ravel() for m in maps]))[::-1]
    regions = []
    for mask, m in zip(masks, maps, strict=True):
        numbered, count = label(mask, np.ones((3, 3)))
        regions += [m[numbered == number] for number in range(1, count + 1)]
    normal = np.concatenate([m[~mask] for mask, m in zip(masks, maps, strict=True)])
    rate = np.array([(normal >= t).mean() for t in thresholds])
    overlap = np.array([np.mean([(r >= t).mean() for r in regions]) for t in thresholds])
    inside = rate <= 0.3
    walked = np.trapezoid(overlap[inside], rate[inside]) / 0.3
    assert aupro(masks, maps) == pytest.approx(walked, abs=0.001)


def test_aupro_is_anomalibs():
    anomalib = pytest.importorskip("anomalib.metrics.aupro")
    masks, noise = masks_and_noise(2)
    maps = [n + 0.3 * mask for n, mask in zip(noise, masks, strict=True)]
    theirs = anomalib._AUPRO(fpr_limit=0.3)
    theirs.update(torch.tensor(np.stack(maps)), torch.tensor(np.stack(masks)).float())
    assert aupro(masks, maps) == pytest.approx(theirs.compute().item(), abs=1e-4)


def test_image_figures_of_four_pictures_by_hand():
    # Of the four pairs of an anomalous and a normal one, three are in order.
    figures = image_metrics(np.array([True, False, True, False]), np.array([0.9, 0.6, 0.4, 0.1]))
    assert figures["image_auroc"] == 0.75
    assert figures["image_ap"] == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert figures["image_f1max"] == pytest.approx(0.8)  # from 0.4 up: precision 2/3, recall 1


def test_a_wrong_and_a_missing_decision_both_cost_accuracy_by_hand():
    labels = np.array([True, True, True, False, False])
    said = np.array([1, 0, np.nan, 1, 0])
    assert decision_metrics(labels, said, "answer") == pytest.approx(
        {
            "answer_accuracy": 2 / 5,
            "answer_precision": 1 / 2,
            "answer_recall": 1 / 3,
            "answer_f1": 2 / 5,
        }
    )


def test_decisions_on_one_class_have_no_precision():
    figures = decision_metrics(np.array([True, True]), np.array([1.0, 0.0]), "verdict")
    assert (figures["verdict_recall"], figures["verdict_accuracy"]) == (0.5, 0.5)
    assert figures["verdict_precision"] is figures["verdict_f1"] is None


def test_the_calibration_error_by_hand():
    labels, scores = np.array([True, True, False, False]), np.array([0.9, 0.4, 0.6, 0.1])
    expected = (0.1 + 0.6 + 0.6 + 0.1) / 4
    assert calibration_error(labels, scores) == pytest.approx(expected, abs=1e-6)


def test_pixel_figures_of_two_tiny_maps_by_hand():
    masks = [np.array([[True, False], [False, False]]), np.zeros((2, 2), bool)]
    maps = [
        np.array([[0.6, 0.9], [0.1, 0.1]], np.float32),
        np.array([[0.2, 0.2], [0.2, 0.2]], np.float32),
    ]
    figures = pixel_metrics(masks, maps)
    assert figures["pixel_auroc"] == pytest.approx(6 / 7)  # one of 7 normal pixels is above
    assert figures["pixel_ap"] == pytest.approx(1 / 2)
    # The one defect is covered as soon as one in seven normal pixels is let through.
    assert figures["aupro"] == pytest.approx((0.3 - 1 / 7) / 0.3)


def test_one_class_only_gives_none():
    assert image_metrics(np.array([True, True]), np.array([0.1, 0.2]))["image_auroc"] is None


def test_a_brightness_shortcut_is_found_and_named(tmp_path):
    samples = []
    for index in range(6):
        path = tmp_path / f"{index}.png"
        grain = np.random.default_rng(index).integers(0, 40, (30, 30), np.uint8)
        Image.fromarray(grain + (120 if index < 3 else 0)).save(path)
        samples.append(Sample(path, "cup", "test", "good"))
    labels = np.array([False] * 3 + [True] * 3)
    found = shortcut(labels, [trivial_statistics(sample) for sample in samples])
    assert found == {"shortcut_auroc": 1.0, "shortcut_name": "mean brightness"}


def test_the_mean_leaves_out_what_is_missing_and_adds_counts_up():
    mean = mean_of(
        [
            Metrics(image_auroc=0.8, n_normal=3),
            Metrics(image_auroc=0.6, n_normal=4),
            Metrics(n_normal=1),
        ]
    )
    assert mean.image_auroc == pytest.approx(0.7)
    assert mean.pixel_auroc is None
    assert mean.n_normal == 8


def test_losses_are_the_published_ones():
    golden = np.load(GOLDEN)
    mask, text = torch.tensor(golden["mask"]), torch.tensor(golden["text"])
    for index, stage in enumerate(torch.tensor(golden["stages"])):
        tokens = torch.nn.functional.normalize(stage, dim=-1)
        logits = (100 * tokens @ text.mT).transpose(1, 2).unflatten(2, (16, 16))
        full = torch.nn.functional.interpolate(logits, 224, mode="bilinear", align_corners=True)
        probability = full.softmax(1)
        assert focal_loss(probability, mask).item() == pytest.approx(
            golden["focal"][index], rel=1e-5
        )
        dice = dice_loss(probability[:, 1], mask.float()).item()
        assert dice == pytest.approx(golden["dice"][index], rel=1e-5)
