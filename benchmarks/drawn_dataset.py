"""Draw a small data set in MVTec AD's layout, to try `looktwice evaluate` without any download.

    python benchmarks/drawn_dataset.py OUT [--normal 24] [--defective 6] [--seed 0]

Each product is one drawn scene under a camera that hardly moves; its defects are made up. nano's
expert was trained on defects of this kind, so that its figures here are no measure of it.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
from numpy.random import Generator
from PIL import Image

from looktwice_adapters.scenes import (
    SCENES,
    Picture,
    PictureLibrary,
    Scene,
    texture,
)
from looktwice_adapters.synthesis import put_defect

SIZE = (320, 320)
PRODUCTS = {"part": "object", "sheet": "texture", "panel": "panel"}  # product -> kind of scene
DEFECTS = ("scratch", "stain", "hole", "missing_piece")


def camera(scene: Scene, rng: Generator) -> Scene:
    """The scene a little shifted, lighter or darker, and noisy."""
    shift = np.float32([[1, 0, rng.normal(0, 2)], [0, 1, rng.normal(0, 2)]])
    moved = cv2.warpAffine(scene.picture, shift, SIZE[::-1], borderMode=cv2.BORDER_REFLECT)
    part = cv2.warpAffine(scene.part.astype(np.uint8), shift, SIZE[::-1])
    noisy = moved * rng.normal(1, 0.03) + rng.normal(0, 3, moved.shape)
    return Scene(np.clip(noisy, 0, 255).astype(np.uint8), part > 0, scene.kind)


def save(picture: Picture, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def draw_product(folder: Path, kind: str, normal: int, defective: int, seed: int) -> None:
    """Half of the normal pictures for train, half for test; `defective` of each kind of defect."""
    library = PictureLibrary()
    scene = SCENES[kind][0](SIZE, np.random.default_rng(seed), library)
    rng = np.random.default_rng([seed, 1])
    for index in range(normal):
        split = "train" if index < normal // 2 else "test"
        save(camera(scene, rng).picture, folder / split / "good" / f"{index:03}.png")
    for defect in DEFECTS:
        for index in range(defective):
            drawn = put_defect(camera(scene, rng), texture(SIZE, rng, library), rng, (defect,), 99)
            save(drawn.picture, folder / "test" / defect / f"{index:03}.png")
            mask = drawn.mask.astype(np.uint8) * 255
            save(mask, folder / "ground_truth" / defect / f"{index:03}_mask.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--normal", type=int, default=24)
    parser.add_argument("--defective", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for number, (product, kind) in enumerate(PRODUCTS.items()):
        folder = arguments.out / product
        seed = arguments.seed * 100 + number
        draw_product(folder, kind, arguments.normal, arguments.defective, seed)
    print(f"{arguments.out}: {', '.join(PRODUCTS)}")


if __name__ == "__main__":
    main()
