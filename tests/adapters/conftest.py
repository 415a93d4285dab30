"""A tiny data set in MVTec AD's layout that any test may draw."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def cups(tmp_path):
    """`cup`: grey noise; the defective ones have a bright square, with a mask."""
    root = tmp_path / "cup"
    rng = np.random.default_rng(0)
    for folder, count in (("train/good", 6), ("test/good", 5), ("test/hole", 5)):
        (root / folder).mkdir(parents=True)
        for index in range(count):
            picture = rng.integers(90, 130, (64, 80, 3), np.uint8)
            if folder == "test/hole":
                picture[20:40, 30:50] = 250
            Image.fromarray(picture).save(root / folder / f"{index}.png")
    truth = root / "ground_truth" / "hole"
    truth.mkdir(parents=True)
    mask = np.zeros((64, 80), np.uint8)
    mask[20:40, 30:50] = 255
    for index in range(5):
        Image.fromarray(mask).save(truth / f"{index}_mask.png")
    return root
