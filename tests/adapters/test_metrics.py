import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from looktwice_adapters.losses import dice_loss, focal_loss
from looktwice_adapters.metrics import (
    Metrics,
    aupro,
    image_metrics,
    mean_of,
    pixel_metrics,
    shortcut_auroc,
    trivial_statistics,
    verdict_metrics,
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
    assert aupro(masks, maps) == pytest.approx(walked, abs=0.01)


def test_the_verdict_is_taken_at_a_half():
    figures = verdict_metrics(np.array([True, True, False, False]), np.array([0.9, 0.4, 0.6, 0.1]))
    assert figures["verdict_accuracy"] == 0.5
    assert figures["verdict_f1"] == 0.5
    assert figures["ece"] == pytest.approx((0.1 + 0.6 + 0.6 + 0.1) / 4, abs=1e-6)


def test_one_class_only_gives_none():
    assert image_metrics(np.array([True, True]), np.array([0.1, 0.2]))["image_auroc"] is None


def test_a_brightness_shortcut_is_found(tmp_path):
    paths = []
    for index in range(6):
        paths.append(tmp_path / f"{index}.png")
        grain = np.random.default_rng(index).integers(0, 40, (30, 30), np.uint8)
        Image.fromarray(grain + (120 if index < 3 else 0)).save(paths[-1])
    labels = np.array([False] * 3 + [True] * 3)
    assert shortcut_auroc(labels, [trivial_statistics(path) for path in paths]) == 1.0


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


def test_evaluate_prints_json_of_a_folder(tmp_path):
    from click.testing import CliRunner

    from looktwice_adapters.evaluate.command import evaluate

    result = CliRunner().invoke(evaluate, [str(tmp_path), "--model", str(tmp_path), "--json"])
    assert result.exit_code == 1
    assert "holds no config.json" in result.output
    assert json.dumps({}) == "{}"
