"""Lessons: made-up pairs of pictures -> what a checkpoint's two frozen towers see of them, on disk.

For AnomalyGPT's decoder the tokens of the expert's tower with the defect's mask; for its prompt
learner the language model's image tokens, and at which of the 3x3 places the defects are. A file
depends on the seed and its number alone.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from tqdm import tqdm
from transformers import LlavaOnevisionForConditionalGeneration

from looktwice_adapters.anomaly_map import MAX_REGIONS, position
from looktwice_adapters.detector import Detector
from looktwice_adapters.scenes import PictureLibrary
from looktwice_adapters.synthesis import DEFECTS
from looktwice_adapters.train.draft import draft_of
from looktwice_adapters.train.features import draw_pair, kept
from looktwice_adapters.train.looks import packed

PAIRS = 8  # a file


@dataclass(frozen=True)
class Lesson:
    """One picture."""

    stages: list[Tensor]  # (B, N, C_l) float16 of the kept crops, the base view first
    cover: Tensor  # (B, grid, grid), share of each token that a defect covers
    image: Tensor  # (T, D) bfloat16, the image tokens in the language model's input
    places: tuple[str, ...]  # of the defects, the largest first; none: the picture is normal

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Lesson":
        """The same on a device."""
        stages, cover, image = (
            [stage.to(device, non_blocking=non_blocking) for stage in self.stages],
            self.cover.to(device, non_blocking=non_blocking),
            self.image.to(device, non_blocking=non_blocking),
        )
        return Lesson(stages, cover, image, self.places)


def places(mask: NDArray[np.bool_]) -> tuple[str, ...]:
    """Where the connected parts of a mask (H, W) are, the largest first."""
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    numbers = range(1, count + 1)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    centres = ndimage.center_of_mass(mask, labels, numbers)
    height, width = mask.shape
    named = [position((x + 0.5) / width, (y + 0.5) / height) for y, x in centres]
    return tuple(named[i] for i in np.argsort(-areas, kind="stable")[:MAX_REGIONS])


@dataclass(frozen=True)
class Towers:
    """A checkpoint's frozen towers: the expert's, and the language model's with its projector."""

    detector: Detector
    model: LlavaOnevisionForConditionalGeneration

    @torch.no_grad()
    def lesson(
        self, picture: NDArray[np.uint8], mask: NDArray[np.bool_], rng: np.random.Generator
    ) -> Lesson:
        """What both see of a picture (H, W, 3) with a mask (H, W)."""
        anyres, tower = self.detector.anyres, self.detector.expert.own_tower
        crops = (anyres.crops(picture).float() / 255 - 0.5) / 0.5
        cover = anyres.crop_masks(mask, tower.config.grid)
        chosen = kept(cover, rng) if len(crops) > 1 else [0]
        return Lesson(
            [stage.half() for stage in tower.stages(crops[chosen])],
            cover[chosen],
            self._image_tokens(crops, (picture.shape[1], picture.shape[0])).bfloat16(),
            places(mask),
        )

    def _image_tokens(self, crops: Tensor, size: tuple[int, int]) -> Tensor:
        """AnyRes features (T, D) of a picture of `size` (width, height), as the server packs."""
        parts, config = self.model.model, self.model.config
        states = parts.vision_tower(crops, output_hidden_states=True).hidden_states
        tokens = states[config.vision_feature_layer]  # before the tower's last norm
        side = config.vision_config.image_size // config.vision_config.patch_size
        features = parts.multi_modal_projector(tokens)
        return packed(features, size, parts.image_newline, side, config.image_grid_pinpoints)


def make_lessons(
    towers: Towers, library: PictureLibrary, folder: Path, pairs: int, seed: int
) -> list[Lesson]:
    """The lessons of `pairs` pairs, consecutive: normal, then defective; files there are read."""
    lessons: list[Lesson] = []
    for number in tqdm(range(-(-pairs // PAIRS)), desc="lessons", unit=f"{PAIRS} pairs"):
        path = folder / f"lessons-{seed}-{number:04d}.pt"
        if not path.exists():
            rng = np.random.default_rng([seed, number])
            drawn = [
                towers.lesson(picture, np.asarray(mask, np.bool_), rng)
                for _ in range(PAIRS)
                for picture, mask in draw_pair(rng, library, [], tuple(DEFECTS))
            ]
            with draft_of(path) as draft:
                torch.save([vars(lesson) for lesson in drawn], draft)
        lessons += [Lesson(**values) for values in torch.load(path, weights_only=True)]
    return lessons[: 2 * pairs]
