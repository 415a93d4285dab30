import numpy as np
import pytest

from looktwice_adapters.scenes import SCENES, PictureLibrary, Scene, draw_scene
from looktwice_adapters.synthesis import DEFECTS, photograph, put_defect
from looktwice_adapters.train.contact_sheet import contact_sheet, draw_defective

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
