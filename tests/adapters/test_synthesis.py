import cv2
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from looktwice_adapters.scenes import SCENES, PictureLibrary, Scene, draw_scene
from looktwice_adapters.synthesis import (
    DEFECTS,
    foreground,
    intensity_label,
    paste_patch,
    photograph,
    put_defect,
)
from looktwice_adapters.train.contact_sheet import contact_sheet, draw_defective
from looktwice_adapters.train.features import draw_pair

LIBRARY = PictureLibrary()


@pytest.mark.parametrize("kind", DEFECTS)
def test_a_defect_is_visible_inside_its_mask_and_nowhere_else(kind):
    rng = np.random.default_rng(1)
    for _ in range(40):
        scene = draw_scene(rng, LIBRARY, (96, 128))
        try:
            made = put_defect(scene, scene.picture[::-1, ::-1].copy(), rng, (kind,))
        except ValueError:
            continue
        change = np.abs(made.picture.astype(float) - scene.picture).mean(-1)
        assert made.kind == kind
        assert change[made.mask].mean() > 9
        assert change[~made.mask].mean() < 0.2 * change[made.mask].mean()
        return
    pytest.fail("no scene could show it")


def test_defects_land_on_the_part():
    rng = np.random.default_rng(0)
    picture = np.full((128, 128, 3), 128, np.uint8)
    part = np.zeros((128, 128), bool)
    part[80:120, 80:120] = True
    for _ in range(10):
        made = put_defect(Scene(picture, part, "object"), picture, rng, ("stain",))
        rows, columns = np.nonzero(made.mask)
        assert rows.mean() > 64
        assert columns.mean() > 64


def test_one_seed_gives_one_picture():
    first, second = (
        draw_defective("crack", np.random.default_rng(5), LIBRARY, 96) for _ in range(2)
    )
    assert np.array_equal(first.picture, second.picture)
    assert np.array_equal(first.mask, second.mask)


@pytest.mark.parametrize("name", SCENES)
def test_every_kind_of_scene_fills_its_size_and_has_a_part(name):
    scene = SCENES[name][0]((100, 140), np.random.default_rng(3), LIBRARY)
    assert scene.picture.shape == (100, 140, 3)
    assert scene.picture.dtype == np.uint8
    assert scene.part.shape == (100, 140)
    assert scene.part.any()


def test_a_blank_part_without_pixels_is_refused():
    picture = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(ValueError, match="no visible defect in 2 tries on a part of 0 px"):
        put_defect(
            Scene(picture, np.zeros((64, 64), bool), "object"),
            picture,
            np.random.default_rng(0),
            ("removed",),
            tries=2,
        )


def test_the_camera_changes_tones_but_keeps_the_content():
    y, x = np.mgrid[:96, :96]
    picture = np.repeat(
        ((np.hypot(x - 48, y - 48) < 20) * 120 + 60).astype(np.uint8)[..., None], 3, -1
    )
    for seed in range(10):
        taken = photograph(picture, np.random.default_rng(seed))
        assert taken.shape == picture.shape
        assert np.corrcoef(taken.mean(-1).ravel(), picture.mean(-1).ravel())[0, 1] > 0.8


def test_the_contact_sheet_has_a_row_for_every_defect():
    sheet = contact_sheet(LIBRARY, seed=0, columns=2, side=48)
    assert sheet.shape == (48 * len(DEFECTS), 96, 3)


def test_a_poisson_patch_lands_on_the_part_and_leaves_the_rest_alone():
    rng = np.random.default_rng(0)
    picture = rng.integers(90, 110, (128, 128, 3)).astype(np.uint8)
    part = np.zeros((128, 128), bool)
    part[64:120, 64:120] = True
    source = rng.integers(0, 256, (128, 128, 3)).astype(np.uint8)
    for _ in range(20):
        pasted = paste_patch(picture, part, source, np.ones_like(part), rng)
        changed = (pasted != picture).any(-1)
        assert changed.any()
        rows, columns = np.nonzero(changed)
        box = part[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert box.mean() >= 0.2
        assert changed[:40].sum() == 0


def test_a_patch_of_plain_background_is_not_pasted():
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (96, 96, 3)).astype(np.uint8)
    plain = np.full_like(picture, 200)
    shown = foreground(plain)
    assert not shown.any()
    same = paste_patch(picture, np.ones((96, 96), bool), plain, shown, rng)
    assert np.array_equal(same, picture)
    plain[30:60, 30:60] = 20
    assert foreground(plain)[40:50, 40:50].all()
    assert foreground(picture).all()


def test_the_soft_label_grows_with_the_change_and_ends_with_the_mask():
    before = np.full((60, 60, 3), 100, np.uint8)
    after = before.copy()
    after[:, 10:20], after[:, 30:40], after[:, 50:] = 108, 124, 200
    mask = np.zeros((60, 60), bool)
    mask[:, :45] = True
    label = intensity_label(before, after, mask)
    assert label[30, 35] == pytest.approx(0.5, abs=1e-6)  # 24 grey levels
    assert 0 < label[30, 15] < 0.25
    assert (label[:, 45:] == 0).all()
    made = put_defect(
        Scene(before, np.ones((60, 60), bool), "texture"),
        before,
        np.random.default_rng(0),
        ("hole",),
    )
    assert made.label.max() > 0.5
    assert (made.label[~made.mask] == 0).all()


def test_no_trivial_statistic_tells_defective_pictures_from_normal_ones():
    rng = np.random.default_rng(0)
    pairs = [list(draw_pair(rng, LIBRARY, [], tuple(DEFECTS))) for _ in range(60)]
    pictures = [picture for pair in pairs for picture, _ in pair]
    labels = [0, 1] * len(pairs)
    for name, statistic in {
        "brightness": lambda picture: picture.mean(),
        "contrast": lambda picture: picture.std(),
        "gradient": lambda picture: np.abs(np.diff(picture.astype(float), axis=0)).mean(),
        "bytes": lambda picture: len(cv2.imencode(".jpg", picture)[1]) / picture.size,
    }.items():
        told = roc_auc_score(labels, [statistic(picture) for picture in pictures])
        assert 0.35 < told < 0.65, name


def board():
    y, x = np.mgrid[:64, :64]
    grey = (((x // 8 + y // 8) % 2) * 100 + 80).astype(np.uint8)
    return np.stack((grey, grey // 2, grey), -1)


@pytest.mark.parametrize("name", ["brightness", "colour"])
def test_the_camera_varies(name):
    shots = [photograph(board(), np.random.default_rng(seed)).astype(float) for seed in range(60)]
    measured = {
        "brightness": [shot.mean() for shot in shots],
        "colour": [shot[..., 0].mean() / shot[..., 1].mean() for shot in shots],
    }[name]
    assert np.std(measured) > 0.08 * np.mean(measured)


def no_scaling(image, size, real=cv2.resize, **options):
    return image if "fx" in options else real(image, size, **options)


@pytest.mark.parametrize(
    ("share", "without"),
    [
        (0.35, {"GaussianBlur": lambda image, *_: image}),
        (0.2, {"resize": no_scaling}),
        (0.6, {"imencode": lambda _, image, __: (True, image), "imdecode": lambda image, _: image}),
    ],
    ids=["blur", "scale", "jpeg"],
)
def test_the_camera_blurs_scales_and_compresses_its_share_of_pictures(monkeypatch, share, without):
    seeds = range(100)
    shots = [photograph(board(), np.random.default_rng(seed)) for seed in seeds]
    for name, same in without.items():
        monkeypatch.setattr(cv2, name, same)
    spared = [photograph(board(), np.random.default_rng(seed)) for seed in seeds]
    changed = [(shot != other).any() for shot, other in zip(shots, spared, strict=True)]
    assert abs(np.mean(changed) - share) < 0.15
    assert np.mean(changed) > 0.05
