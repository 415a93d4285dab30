import struct

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaOnevisionImageProcessor

from looktwice_adapters import datasets
from looktwice_adapters.datasets import (
    AnyRes,
    Sample,
    products,
    read_image,
    read_mask,
    read_product,
)

SIZES = [(354, 512), (512, 512), (224, 224), (200, 460), (600, 130), (333, 777), (9, 40)]


@pytest.fixture
def folder(tmp_path):
    for name in ("train/good/0", "test/good/0", "test/good/1", "test/hole/0", "test/hole/1"):
        path = tmp_path / "cup" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 20), "grey").save(path)
    truth = tmp_path / "cup" / "ground_truth" / "hole"
    truth.mkdir(parents=True)
    mask = np.zeros((20, 40), np.uint8)
    mask[5:10, 10:20] = 255
    Image.fromarray(mask).save(truth / "0_mask.png")
    return tmp_path


@pytest.mark.parametrize("size", SIZES)
def test_crops_are_those_of_the_transformers_processor(size):
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    anyres = AnyRes()
    processor = LlavaOnevisionImageProcessor(
        size={"height": 224, "width": 224},
        image_grid_pinpoints=[list(point) for point in anyres.pinpoints],
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    theirs = processor(picture, return_tensors="pt")["pixel_values"][0]
    ours = (anyres.crops(picture).float() / 255 - 0.5) / 0.5
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_mask_goes_the_way_of_its_picture():
    picture = np.zeros((300, 512, 3), np.uint8)
    picture[40:200, 100:300] = 255
    anyres = AnyRes()
    lit = anyres.crops(picture).float().mean(1) / 255  # (B, 224, 224)
    seen = torch.nn.functional.avg_pool2d(lit[:, None], 16)[:, 0]
    assert (anyres.crop_masks(picture[..., 0] > 0, 14) - seen).abs().max() < 0.35
    assert (anyres.crop_masks(picture[..., 0] > 0, 14) - seen).abs().mean() < 0.01


def test_a_mask_is_painted_where_it_is_not_black_whatever_its_mode(folder):
    file = folder / "cup" / "ground_truth" / "hole" / "0_mask.png"
    mask = np.asarray(Image.open(file))
    transparent = Image.fromarray(np.dstack([mask] * 4))
    deep = Image.fromarray((mask > 0).astype(np.uint16))
    deep.putpixel((12, 6), 65535)
    for picture in (transparent, deep):
        picture.save(file)
        assert (read_mask(read_product(folder / "cup")[3], (20, 40)) == (mask > 0)).all()


@pytest.mark.parametrize("brush", [(255, 255, 255), (0, 0, 0), (200, 0, 0)])
def test_of_a_transparent_layer_what_is_painted_counts(folder, brush):
    file = folder / "cup" / "ground_truth" / "hole" / "0_mask.png"
    mask = np.asarray(Image.open(file))
    layer = np.zeros((*mask.shape, 4), np.uint8)
    layer[..., :3] = brush  # an editor keeps its colour where nothing is shown
    layer[..., 3] = mask
    Image.fromarray(layer).save(file)
    assert (read_mask(read_product(folder / "cup")[3], (20, 40)) == (mask > 0)).all()


def test_float_masks_and_outlines_in_jpeg_are_as_large_as_they_were_drawn(folder):
    file = folder / "cup" / "ground_truth" / "hole" / "0_mask.png"
    mask = np.asarray(Image.open(file)) > 0
    file.unlink()
    Image.fromarray(mask.astype(np.float32) / 2).save(file.with_suffix(".tiff"))
    assert (read_mask(read_product(folder / "cup")[3], (20, 40)) == mask).all()
    file.with_suffix(".tiff").unlink()
    Image.fromarray(mask).convert("L").save(file.with_suffix(".jpg"), quality=60)
    assert read_mask(read_product(folder / "cup")[3], (20, 40)).sum() == pytest.approx(50, abs=5)


def test_no_defect_is_too_small_for_a_small_mask(tmp_path):
    painted = np.zeros((1000, 1000), np.uint8)
    painted[501:503, 123:126] = 255
    Image.fromarray(painted).save(tmp_path / "mask.png")
    sample = Sample(tmp_path / "0.png", "cup", "test", "hole", (tmp_path / "mask.png",))
    assert np.argwhere(read_mask(sample, (100, 100))).tolist() == [[50, 12]]
    assert np.argwhere(read_mask(sample, (2000, 2000))).min(0).tolist() == [1002, 246]


def test_what_a_mac_or_jupyter_left_is_no_part_of_a_data_set(folder):
    before = read_product(folder / "cup")
    for left in ("cup/test/good/._0.png", "cup/test/.ipynb_checkpoints/0.png"):
        (folder / left).parent.mkdir(exist_ok=True)
        (folder / left).write_bytes(b"nothing")
    (folder / "__MACOSX" / "cup" / "test" / "good").mkdir(parents=True)
    assert list(products(folder)) == ["cup"]
    assert read_product(folder / "cup") == before


def test_normal_folders_are_known_in_capitals_too(folder):
    (folder / "cup" / "test" / "good").rename(folder / "cup" / "test" / "OK")
    assert [s.kind for s in read_product(folder / "cup")].count("good") == 3


def test_a_folder_is_read_with_labels_and_masks(folder):
    assert products(folder) == {"cup": folder / "cup"}
    assert list(products(folder / "cup")) == ["cup"]
    samples = read_product(folder / "cup")
    assert [(s.split, s.kind, len(s.masks) == 1) for s in samples] == [
        ("train", "good", False),
        ("test", "good", False),
        ("test", "good", False),
        ("test", "hole", True),
        ("test", "hole", False),
    ]
    assert read_mask(samples[3], (20, 40)).sum() == 50
    assert not read_mask(samples[1], (20, 40)).any()
    assert read_mask(samples[4], (20, 40)) is None


def test_a_folder_without_test_pictures_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a data set"):
        products(tmp_path)


def test_every_colour_of_a_mask_but_black_counts(folder):
    pixels = np.zeros((20, 40), np.uint8)
    pixels[5:10, 10:20], pixels[12:14, 0:4] = 1, 2
    painted = Image.fromarray(pixels, "P")
    painted.putpalette([0, 0, 0, 0, 128, 0, 0, 0, 200])  # black, green, blue
    painted.save(folder / "cup" / "ground_truth" / "hole" / "0_mask.png")
    mask = read_mask(read_product(folder / "cup")[3], (20, 40))
    assert np.array_equal(mask, pixels > 0)


def test_a_mask_may_end_in_capitals(folder):
    truth = folder / "cup" / "ground_truth" / "hole"
    (truth / "0_mask.png").rename(truth / "0_mask.PNG")
    (truth / "1.Bmp").symlink_to("0_mask.PNG")
    assert [read_mask(sample, (20, 40)).sum() for sample in read_product(folder / "cup")[3:]] == [
        *(50, 50)
    ]


def test_products_are_found_through_links_and_a_circle_ends(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("linked")
    (root / "mug").symlink_to(folder / "cup")
    (folder / "cup" / "train" / "up").symlink_to(folder)
    assert products(root) == {"mug": root / "mug"}
    assert len(read_product(root / "mug")) == 5


def test_a_picture_too_large_and_a_broken_file_are_named(folder, monkeypatch):
    path = folder / "cup" / "test" / "good" / "0.png"
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
        with pytest.raises(ValueError, match=r"good/0\.png: Image size \(800 pixels\) exceeds"):
            read_image(path)

    def broken(_):
        raise struct.error("unpack requires a buffer of 4 bytes")

    monkeypatch.setattr(datasets, "to_rgb", broken)
    with pytest.raises(ValueError, match=r"good/0\.png: cannot be read as a picture"):
        read_image(path)
