"""Visual token selector: tokens (B, N, C), significance (B, h, w) -> suspicious tokens (B, 4, C).

Anomaly-OV, "Visual Token Selector": each crop is divided into 2x2 cells; the tokens of a cell,
averaged with their significance as weight, ask for what is alike anywhere in the crop.
"""

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from looktwice_adapters.qformer import QFormer

CELLS = 2  # cells a side: 4 queries a crop


def cell_significance(significance: Tensor) -> Tensor:
    """Mean significance of the 2x2 cells, row by row: (B, h, w) -> (B, 4).

    An odd grid's cells share its middle row and column (27 rows: two cells of 14), as published.
    """
    return adaptive_avg_pool2d(significance.unsqueeze(1), CELLS).flatten(1)


def resample(significance: Tensor, side: int) -> Tensor:
    """A significance map on another token grid: (B, h, w) -> (B, side, side)."""
    if significance.shape[-1] == side:
        return significance
    return interpolate(
        significance.unsqueeze(1), (side, side), mode="bilinear", antialias=True
    ).squeeze(1)


def select_tokens(q_former: QFormer, tokens: Tensor, significance: Tensor) -> Tensor:
    """The four suspicious tokens of each crop, cells row by row: (B, 4, C).

    Args:
        q_former: the selector's attention, its only parameters.
        tokens: (B, N, C), N = h * w.
        significance: (B, h', w') in [0, 1]; another grid than the tokens' is resampled.
    """
    side = round(tokens.shape[1] ** 0.5)
    significance = resample(significance, side)
    weighted = tokens * significance.flatten(1).unsqueeze(-1)
    grid = weighted.transpose(1, 2).unflatten(-1, (side, side))  # (B, C, h, w)
    pooled = adaptive_avg_pool2d(grid, CELLS).flatten(2).transpose(1, 2)  # (B, 4, C)
    # A map of exact zeros has no significant token; float32's smallest step avoids 0 / 0.
    weight = cell_significance(significance).clamp_min(torch.finfo(torch.float32).tiny)
    return q_former(pooled / weight.unsqueeze(-1), tokens)
