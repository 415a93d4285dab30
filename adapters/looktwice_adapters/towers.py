"""Image towers of the expert: pixels of crops (B, 3, S, S) -> multi-level and final tokens.

As published the expert looks through the LLM's own SigLIP (name "llm": the server taps its layers).
Any other frozen encoder can stand in its place; here are timm's convolutional networks, their
stages resampled to one token grid.
"""

from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize


@dataclass(frozen=True)
class TowerConfig:
    """Which encoder the expert looks through, and where it is tapped.

    `levels` and `final` count from 1: layers of the LLM's tower, or stages of a timm network.
    """

    name: str = "llm"
    levels: tuple[int, ...] = (7, 13, 19, 25)
    final: int = 26
    grid: int = 27
    neighbours: int = 0  # tokens that each is compared with; 0: no deviations are appended

    @classmethod
    def from_dict(cls, section: dict[str, Any]) -> "TowerConfig":
        """Read the `tower` part of an `anomaly_expert` section; unknown keys raise TypeError."""
        values = dict(section)
        if "levels" in values:
            values["levels"] = tuple(values["levels"])
        return cls(**values)


def with_deviations(tokens: Tensor, neighbours: int) -> Tensor:
    """Append each token's deviation from the crop's mean and from its most similar tokens.

    A defect is what has no likeness in the picture: the deviations say so whatever the material.

    Args:
        tokens: (B, N, C).
        neighbours: how many of the most similar other tokens are averaged.

    Returns:
        (B, N, 3C).
    """
    likeness = normalize(tokens, dim=-1)
    likeness = likeness @ likeness.transpose(1, 2)  # (B, N, N)
    likeness.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    nearest = likeness.topk(neighbours, dim=-1).indices  # (B, N, K)
    batch = torch.arange(len(tokens), device=tokens.device)[:, None, None]
    alike = tokens[batch, nearest].mean(2)  # (B, N, C)
    return torch.cat((tokens, tokens - tokens.mean(1, keepdim=True), tokens - alike), dim=-1)


class TimmTower(nn.Module):
    """A frozen convolutional network from timm, up to its last tapped stage."""

    def __init__(self, config: TowerConfig, *, pretrained: bool = False) -> None:
        """Build the network; weights come from the expert's file unless `pretrained`."""
        super().__init__()
        self.config = config
        self.network = timm.create_model(
            config.name,
            pretrained=pretrained,
            features_only=True,
            out_indices=tuple(level - 1 for level in config.levels),
        )
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "TimmTower":
        """Stay in evaluation mode: the tower is frozen, its batch statistics too."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> tuple[list[Tensor], Tensor]:
        """Tokens of crops normalised as SigLIP's are, (x / 255 - 0.5) / 0.5.

        Returns:
            L levels (B, N, C_l), N = grid * grid, and the deepest level again as final tokens.
        """
        grid = self.config.grid
        levels = []
        for stage in self.network(pixels.float()):
            stage = interpolate(stage, (grid, grid), mode="bilinear", antialias=True)
            tokens = stage.flatten(2).transpose(1, 2)  # (B, N, C_l)
            if self.config.neighbours:
                tokens = with_deviations(tokens, self.config.neighbours)
            levels.append(tokens)
        return levels, levels[-1]
