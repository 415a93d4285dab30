"""Prompt learner: anomaly map (B, h, w) -> prompt embeddings (B, 18, D) of the language model.

AnomalyGPT (AAAI 2024), "Decoder and Prompt Learner": nine learnable base prompts, and nine that a
small convolutional network makes of the map, one for each cell of a 3x3 grid.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from looktwice_adapters.decoder import SIDE, resized

BASE = 9
CELLS = 9  # of the picture, row by row
PROMPTS = BASE + CELLS
CHANNELS = (4, 16, 64, 256, 1024)  # as published
START = 0.02  # deviation of the base prompts, about that of word embeddings; published: 1


class PromptLearner(nn.Module):
    """Five blocks of convolution, ReLU and max pooling (224 -> 7), then a 5x5 convolution (-> 3).

    Args:
        width: D, of the language model's embeddings.
        channels: of the five blocks.
    """

    def __init__(self, width: int, channels: tuple[int, ...] = CHANNELS) -> None:
        """Build the network and draw the base prompts."""
        super().__init__()
        if len(channels) != len(CHANNELS):
            raise ValueError(f"need channels of {len(CHANNELS)} blocks, got {len(channels)}")
        blocks = [
            nn.Sequential(nn.Conv2d(before, behind, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
            for before, behind in pairwise((1, *channels))
        ]
        self.meta_net = nn.Sequential(*blocks, nn.Conv2d(channels[-1], width, 5))
        self.base_prompts = nn.Parameter(START * torch.randn(BASE, width))

    def forward(self, maps: Tensor) -> Tensor:
        """Prompt embeddings (B, 18, D), base prompts first, of maps (B, h, w) in [0, 1]."""
        cells = self.meta_net(resized(maps.unsqueeze(1), SIDE))  # (B, D, 3, 3)
        base = self.base_prompts.expand(len(maps), -1, -1)
        return torch.cat((base, cells.flatten(2).mT), dim=1)
