"""Few-shot detection in process: made-up plates, nano's tower, everything but the server."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from looktwice_adapters import few_shot
from looktwice_adapters.detector import Detector
from looktwice_adapters.few_shot import (
    Reference,
    build,
    common_grid,
    evidence,
    image_evidence,
    normal_scores,
    turns,
)
from looktwice_adapters.threshold import NORMAL, NormalScores, Threshold
from tests.punched_plates import plate

NANO = Path(__file__).parents[2] / "models" / "nano"


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector.from_folder(NANO)


@pytest.fixture(scope="module")
def looked(detector):
    def look(picture):
        return detector.look(np.array(picture))

    return look


@pytest.fixture(scope="module")
def plates(looked):
    return [looked(plate(seed)) for seed in range(4)]


@pytest.fixture(scope="module")
def built(plates):
    return build(plates)


def test_what_only_the_reference_reveals_is_found_with_it(detector, built, looked):
    square = plate(101, square=True)
    assert detector.judge(np.array(square)).score < 0.5
    judged = built.reference.judge(looked(square))
    assert judged.verdict == "anomalous"
    assert judged.score > 0.5
    assert float(judged.anomaly_map.max()) > 0.5


def test_a_good_part_stays_below_the_threshold_and_its_map_too(detector, built):
    judged = detector.judge(np.array(plate(100)), built.reference)
    assert judged.verdict != "anomalous"
    assert judged.score < 0.5
    assert np.mean(judged.anomaly_map >= 0.5) < 0.01


def test_the_map_peaks_where_the_scratch_is(detector, built):
    picture = np.array(plate(102, scratched=True))
    found = detector.judge(picture, built.reference).anomaly_map
    y, x = np.unravel_index(found.argmax(), found.shape)
    assert 190 <= x <= 272
    assert 60 <= y <= 128


def test_a_file_gives_back_the_reference_bit_for_bit(built, looked, tmp_path):
    path = tmp_path / "plates.safetensors"
    path.write_bytes(built.reference.encode({"made": "here"}))
    again = Reference.read(path)
    picture = looked(plate(100))
    assert again.threshold == built.reference.threshold
    assert again.judge(picture).score == built.reference.judge(picture).score
    assert built.reference.encode({"made": "here"}) == path.read_bytes()


def test_what_scores_of_good_pictures_look_like_is_told_by_products(plates, looked):
    products = [plates[:3], [looked(plate(seed).rotate(90)) for seed in (50, 51, 52, 53)]]

    def score(alone, other):
        return image_evidence(evidence(build([alone]).reference.bank, other))

    scores = [
        [[score(alone, other) for other in one if other is not alone] for alone in one]
        for one in products
    ]
    means = [np.mean([value for each in product for value in each]) for product in scores]
    deviations = [np.std(each, ddof=1) for product in scores for each in product]
    told = normal_scores(products)
    assert told.products == 2
    assert told.mean == pytest.approx(np.mean(means), abs=1e-5)
    assert told.between == pytest.approx(np.std(means, ddof=1), abs=1e-5)
    assert told.deviation == pytest.approx(np.sort(deviations)[3], abs=1e-5)


def test_a_prior_moves_the_threshold_of_few_pictures(plates):
    high, low = (build(plates[:1], prior=NormalScores(mean=mean)).reference for mean in (0, -2))
    assert high.threshold.value == pytest.approx(low.threshold.value + 2)


def test_most_of_the_references_say_how_pictures_are_cut():
    assert common_grid([(1, 1), (2, 2), (2, 2), (1, 2)]) == (2, 2)
    assert common_grid([(1, 1), (1, 1), (2, 2)]) == (1, 1)
    assert common_grid([(1, 1), (2, 2)]) == (2, 2)


def test_small_and_large_pictures_of_a_part_are_told_apart_by_their_defects_alone(detector):
    """References and pictures of three sizes, which AnyRes alone would cut into 1, 4 and 4."""
    sizes = (200, 320, 448)
    references = [np.array(plate(seed).resize((size, size))) for seed, size in enumerate(sizes * 2)]
    looked, grid = detector.look_alike(references)
    assert grid == (2, 2)
    reference = build(looked, grid=grid).reference
    good, bad = (
        [
            detector.judge(
                np.array(plate(90 + size, square=square).resize((size, size))), reference
            )
            for size in sizes
        ]
        for square in (False, True)
    )
    assert {one.verdict for one in bad} == {"anomalous"}
    assert "anomalous" not in {one.verdict for one in good}
    assert [one.anomaly_map.shape for one in bad] == [(size, size) for size in sizes]


def test_leave_one_out_score_is_that_of_a_bank_of_the_others(plates, built):
    others = build(plates[1:]).reference
    score = image_evidence(evidence(others.bank, plates[0]))
    assert any(abs(score - own) < 1e-5 for own in built.reference.threshold.scores)


def test_one_reference_promises_nothing_and_still_decides(plates, looked):
    one = build(plates[:1]).reference
    assert one.threshold.promised_rate == 1.0
    assert one.judge(looked(plate(100))).verdict == "normal"
    noise = np.random.default_rng(0).integers(0, 255, (320, 320, 3), np.uint8)
    assert one.judge(looked(noise)).verdict == "anomalous"


def test_a_picture_of_another_product_among_the_references_is_warned_about(plates, looked):
    noise = np.random.default_rng(0).integers(0, 255, (320, 320, 3), np.uint8)
    warnings = build([*plates, looked(noise)]).warnings
    assert warnings[0].startswith("images[4] looks unlike the others")
    assert not any("unlike" in warning for warning in build(plates).warnings)


def test_known_defects_below_the_threshold_are_said(plates):
    assert (
        "1 of 1 known defects are below the threshold" in build(plates, defects=plates[:1]).warnings
    )


def stripes(seed: int) -> np.ndarray:
    """A part whose texture has a direction."""
    rng = np.random.default_rng(seed)
    waves = 128 + 60 * np.sin(np.arange(224) / 3 + rng.uniform(0, 6))
    return (waves + rng.normal(0, 4, (224, 224)))[..., None].repeat(3, 2).clip(0, 255).astype("u1")


def test_turns_are_the_quarter_turns_and_the_mirror_of_each_crop():
    crops = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    left, half, right, mirrored = turns(crops)
    assert torch.equal(left, crops.transpose(2, 3).flip(2))  # the right edge comes to the top
    assert torch.equal(half, crops.flip(2, 3))
    assert torch.equal(right, crops.transpose(2, 3).flip(3))
    assert torch.equal(mirrored, crops.flip(3))


def test_turned_copies_make_a_turned_part_normal_and_leave_with_their_image(detector):
    pictures = [stripes(seed) for seed in range(3)]
    seen = [detector.look(picture) for picture in pictures]
    copies = []
    for picture in pictures:
        looks = [detector._look(crops).tokens for crops in turns(detector.cut(picture).crops)]
        copies.append([torch.cat(level) for level in zip(*looks, strict=True)])
    alone, more = build(seen).reference, build(seen, copies=copies, patches=99999).reference
    turned = np.rot90(stripes(9)).copy()
    assert detector.judge(turned, alone).verdict == "anomalous"
    assert detector.judge(turned, more).verdict == "normal"
    others = build(seen[1:], copies=copies[1:], patches=99999).reference
    without = image_evidence(evidence(others.bank, seen[0]))
    assert min(abs(without - score) for score in more.threshold.scores) < 1e-4
    assert len(more.bank) == 5 * len(alone.bank)


def test_a_picture_given_twice_counts_once(plates):
    twice = build([plates[0], *plates], patches=64)
    assert twice.warnings[0] == "images[1] is the same picture as images[0] and was left out"
    assert twice.reference.threshold == build(plates, patches=64).reference.threshold
    assert twice.images == len(plates)
    assert build([plates[0]] * 5).reference.threshold.promised_rate == 1.0


def test_a_bank_without_a_patch_of_the_other_picture_still_judges(plates):
    thin = build(plates[:2], patches=1).reference
    assert len(thin.bank) == 1
    assert all(math.isfinite(score) for score in thin.threshold.scores)


def test_pictures_without_anything_suspicious_are_not_taken_for_one(plates):
    clean = [one._replace(suspicion=torch.full_like(one.suspicion, -6)) for one in plates]
    built = build(clean)
    assert len(built.reference.threshold.scores) == len(plates)
    assert not any("same picture" in warning for warning in built.warnings)


def test_a_reference_is_no_calibration_picture_beside(plates, looked):
    good = looked(plate(200))
    built = build(plates, calibration=[*plates, good, good])
    assert [warning.partition(" and ")[0] for warning in built.warnings[:5]] == [
        *(f"calibration_images[{n}] is the same picture as images[{n}]" for n in range(4)),
        "calibration_images[5] is the same picture as calibration_images[4]",
    ]
    assert built.reference.threshold == build(plates, calibration=[good]).reference.threshold


@pytest.mark.parametrize(
    ("rate", "says"), [(0.05, "5% needs 19"), (0.03, "3% needs 33"), (0.001, "0.1% needs 999")]
)
def test_the_number_of_pictures_that_a_rate_needs_is_said(plates, rate, says):
    assert any(warning.endswith(says) for warning in build(plates, rate=rate).warnings)


@pytest.mark.parametrize(
    ("count", "rate", "says"),
    [
        (
            18,
            0.05,
            "18 good pictures promise a false-alarm rate of 5.26% at best (guaranteed: 10.5%)",
        ),
        (300, 0.001, "300 good pictures promise a false-alarm rate of 0.332% at best"),
        (
            0,
            0.05,
            "a single good picture cannot promise a false-alarm rate; 5%",
        ),
    ],
)
def test_a_warning_of_too_few_pictures_does_not_contradict_itself(count, rate, says):
    [warning] = few_shot._warnings([], Threshold.fit(range(count), rate, prior=NORMAL))
    assert warning.startswith(says)


def test_a_reference_of_no_image_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        build([])


@pytest.mark.parametrize("size", [(320, 320), (520, 300), (210, 470), (90, 640)])
def test_a_painted_square_comes_back_at_its_place_in_any_aspect(detector, size):
    """And what was not painted on stays below the threshold: the scale is fixed."""
    width, height = size
    rng = np.random.default_rng(width)

    def surface():
        return rng.normal(120, 10, (height, width, 1)).repeat(3, 2).clip(0, 255).astype(np.uint8)

    reference = build([detector.look(surface()) for _ in range(3)]).reference
    painted, side = surface(), max(28, min(size) // 4)
    x, y = int(0.55 * (width - side)), int(0.3 * (height - side))
    painted[y : y + side, x : x + side] = (200, 30, 30)
    found = detector.judge(painted, reference)
    assert found.anomaly_map.shape == (height, width)
    rows, columns = np.nonzero(found.anomaly_map >= 0.5)
    assert abs(columns.mean() - (x + side / 2)) <= width / 14  # a token of the base view
    assert abs(rows.mean() - (y + side / 2)) <= height / 14
    assert found.score > 0.5
    good = detector.judge(surface(), reference)
    assert good.score < 0.5
    assert np.mean(good.anomaly_map >= 0.5) < 0.02
