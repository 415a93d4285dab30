"""Looks: pictures -> what the LLM's image tower sees of them, kept for the assistant's training.

A look holds the final tokens of a picture's AnyRes crops. Which of them are suspicious is drawn
later, with the facts: a map with a lump of significance at the place that the facts name first.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import LlavaOnevisionForConditionalGeneration
from transformers.models.llava_onevision.modeling_llava_onevision import (
    LlavaOnevisionModel,
    get_anyres_image_grid_shape,
)

from looktwice_adapters.anomaly_map import placement
from looktwice_adapters.anomaly_prompt import append_prompt
from looktwice_adapters.answers import PLACES, Facts

_CENTRES = {
    name: ((column + 0.5) / 3, (row + 0.5) / 3)
    for name, (row, column) in zip(PLACES, np.ndindex(3, 3), strict=True)
}


@dataclass(frozen=True)
class Look:
    """One picture as the LLM's tower sees it."""

    tokens: Tensor  # (1 + rows * columns, N, C) bfloat16, the base view first
    size: tuple[int, int]  # width, height
    grid: tuple[int, int]  # rows, columns of crops


@dataclass(frozen=True)
class Layout:
    """Where a picture's embeddings stand: indices into [tokens | selected | global | newline]."""

    image: Tensor  # (T,) before the phrase
    suspicious: Tensor  # (T',) behind it


def random_picture(pictures: Sequence[np.ndarray], rng: random.Random) -> Image.Image:
    """A random part of a random picture, at a random size."""
    picture = rng.choice(pictures)
    height, width = picture.shape[:2]
    w, h = (max(32, round(side * rng.uniform(0.4, 1))) for side in (width, height))
    x, y = rng.randint(0, max(0, width - w)), rng.randint(0, max(0, height - h))
    image = Image.fromarray(picture).crop((x, y, min(x + w, width), min(y + h, height)))
    scale = rng.choice((0.5, 1, 1, 2, 3))
    return image.resize((max(28, round(w * scale)), max(28, round(h * scale))))


@torch.no_grad()
def take_looks(
    pictures: Sequence[np.ndarray],
    count: int,
    model: LlavaOnevisionForConditionalGeneration,
    processor: Any,
    seed: int = 0,
) -> list[Look]:
    """Tokens of `count` random parts of the pictures."""
    rng, looks = random.Random(seed), []
    config = model.config
    for _ in tqdm(range(count), desc="looks", unit="picture"):
        image = random_picture(pictures, rng)
        crops = processor(image, return_tensors="pt")["pixel_values"][0]
        states = model.model.vision_tower(crops, output_hidden_states=True).hidden_states
        grid = get_anyres_image_grid_shape(
            (image.height, image.width),
            config.image_grid_pinpoints,
            config.vision_config.image_size,
        )
        looks.append(Look(states[-1].bfloat16(), image.size, grid))
    return looks


def drawn_map(facts: Facts, place: tuple[float, float], side: int, rng: random.Random) -> Tensor:
    """A significance map (side, side) with its lump at `place`, fractions of width and height.

    Normal pictures have faint lumps: the selected tokens then mean nothing in particular.
    """
    y, x = torch.meshgrid(*[(torch.arange(side) + 0.5) / side] * 2, indexing="ij")
    width = rng.uniform(0.06, 0.15)
    lump = torch.exp(-((x - place[0]) ** 2 + (y - place[1]) ** 2) / (2 * width**2))
    height = rng.uniform(0.5, 0.95) if facts.verdict == "anomalous" else rng.uniform(0.02, 0.2)
    ground = rng.uniform(0.01, 0.1)
    return ground + (height - ground) * lump


def crop_maps(look: Look, facts: Facts, side: int, rng: random.Random) -> Tensor:
    """Significance of every crop of a look, (B, side, side), around the place of the facts."""
    centre = _CENTRES[facts.positions[0] if facts.positions else rng.choice(list(PLACES))]
    spot = tuple(part + rng.uniform(-0.13, 0.13) for part in centre)
    rows, columns = look.grid
    canvas = placement(look.size, (columns, rows))
    x = (canvas.left + canvas.width * spot[0]) * columns
    y = (canvas.top + canvas.height * spot[1]) * rows
    state = rng.getstate()
    maps = [drawn_map(facts, (spot[0], spot[1]), side, rng)]
    for row, column in np.ndindex(rows, columns):
        rng.setstate(state)  # the same lump in every crop
        maps.append(drawn_map(facts, (x - column, y - row), side, rng))
    return torch.stack(maps)


@lru_cache(maxsize=4096)
def layout(size: tuple[int, int], grid: tuple[int, int], side: int, pinpoints: str) -> Layout:
    """Order of a picture's embeddings, found by packing indices instead of embeddings.

    Args:
        size: width, height of the picture.
        grid: rows, columns of its crops.
        side: tokens along a crop's side.
        pinpoints: the checkpoint's `image_grid_pinpoints`, as JSON.
    """
    crops = 1 + grid[0] * grid[1]
    tokens = torch.arange(crops * side * side, dtype=torch.float64).view(crops, -1, 1)
    selected = tokens.numel() + torch.arange(crops * 4, dtype=torch.float64).view(crops, 4, 1)
    ends = tokens.numel() + selected.numel()
    global_token = torch.tensor([float(ends)], dtype=torch.float64)
    newline = torch.tensor([ends + 1.0], dtype=torch.float64)
    image = packed(tokens, size, newline, side, json.loads(pinpoints))
    nothing = torch.empty(0, 1, dtype=torch.float64)
    whole = append_prompt(image, nothing, global_token, selected, newline, grid)
    indices = whole.flatten().long()
    return Layout(indices[: len(image)], indices[len(image) :])


def packed(
    tokens: Tensor, size: tuple[int, int], newline: Tensor, side: int, pinpoints: list[list[int]]
) -> Tensor:
    """Transformers' own packing of a picture's crops, without a model around it: (T, C)."""
    crop = pinpoints[0][0]
    vision = SimpleNamespace(image_size=crop, patch_size=crop // side)
    config = SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints)
    (features,), _ = LlavaOnevisionModel.pack_image_features(
        SimpleNamespace(config=config), [tokens], [size[::-1]], newline
    )
    return features
