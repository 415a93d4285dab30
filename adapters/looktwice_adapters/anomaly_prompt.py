"""Anomaly prompt: score and suspicious tokens -> what stands behind an image in the LLM's input.

Anomaly-OV, "Inference": [image tokens][phrase with adverb][global token][base view's 4 selected
tokens][the grid's selected tokens, row by row, a newline after each row].
"""

from typing import Literal

import torch
from torch import Tensor

Adverb = Literal["slightly", "moderately", "highly"]
ADVERBS: tuple[Adverb, ...] = ("slightly", "moderately", "highly")
# Scores at which the adverb changes. Compared in double precision: float32(0.7) is below 0.7, and
# the published code, which compares with Python numbers, says "moderately" there.
BOUNDARIES = (0.3, 0.7)


def adverb_index(scores: Tensor) -> Tensor:
    """Index into ADVERBS of each score (any shape) in [0, 1], without leaving its device."""
    boundaries = torch.tensor(BOUNDARIES, dtype=torch.float64, device=scores.device)
    return torch.bucketize(scores.double(), boundaries, right=True)


def phrase(adverb: str) -> str:
    """The text between an image's tokens and its suspicious tokens."""
    return f" with {adverb} suspicious features: "


def prompt_length(grid: tuple[int, int], phrase_length: int) -> int:
    """How many embeddings the prompt adds to an image with a crop grid of (rows, columns)."""
    rows, columns = grid
    return phrase_length + 1 + 4 + 2 * rows * (2 * columns + 1)


def append_prompt(
    image_tokens: Tensor,
    phrase_tokens: Tensor,
    global_token: Tensor,
    selected: Tensor,
    newline: Tensor,
    grid: tuple[int, int],
) -> Tensor:
    """One image's embeddings in the order of the published layout: (T, D).

    Args:
        image_tokens: (T_image, D), the AnyRes features with their newlines.
        phrase_tokens: (T_phrase, D), the embedded phrase.
        global_token: (D,), projected.
        selected: (1 + rows * columns, 4, D), projected; the base view first, then the grid's crops.
        newline: (D,), the checkpoint's `image_newline`.
        grid: (rows, columns) of the crops.
    """
    rows, columns = grid
    base, crops = selected[0], selected[1:]
    cells = crops.reshape(rows, columns, 2, 2, -1).transpose(1, 2)  # (rows, 2, columns, 2, D)
    lines = cells.reshape(2 * rows, 2 * columns, -1)
    ends = newline.expand(2 * rows, 1, -1)
    return torch.cat(
        (
            image_tokens,
            phrase_tokens,
            global_token.unsqueeze(0),
            base,
            torch.cat((lines, ends), 1).flatten(0, 1),
        )
    )
