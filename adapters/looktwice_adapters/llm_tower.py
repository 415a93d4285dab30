"""The LLM's own image tower, tapped for the expert as published: crops -> levels, final tokens.

Anomaly-OV looks through the frozen SigLIP of LLaVA-OneVision, layers 7, 13, 19 and 25 of 26. The
server taps vLLM's copy of it; this one is for training and for judging in process.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from looktwice_adapters.precision import has_bfloat16
from looktwice_adapters.towers import TowerConfig

if TYPE_CHECKING:
    from transformers import SiglipVisionModel

PUBLISHED = TowerConfig()  # of a tower with PUBLISHED.final layers
CROPS_AT_ONCE = 8  # every layer's tokens of so many are in memory, before the tapped ones are kept


def tapped(layers: int, grid: int) -> TowerConfig:
    """Where a tower of so many layers and grid x grid tokens is tapped: at the published depths."""
    levels = tuple(max(1, round(level * layers / PUBLISHED.final)) for level in PUBLISHED.levels)
    return TowerConfig(levels=levels, final=layers, grid=grid)


class LlmTower(nn.Module):
    """A checkpoint's SigLIP, frozen."""

    def __init__(self, config: TowerConfig, vision: "SiglipVisionModel") -> None:
        """Tap `vision` at the layers of `config`."""
        super().__init__()
        self.config = config
        self.vision = vision
        self._channels: int = vision.config.hidden_size
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_checkpoint(cls, model: str | Path, config: TowerConfig | None = None) -> Self:
        """Load the tower of a LLaVA-OneVision checkpoint in Hugging Face format.

        It computes in the checkpoint's type, as the server does, or in float32 on a CPU without
        bfloat16 instructions.

        Args:
            model: its folder, or its name on the hub.
            config: where it is tapped, the published depths by default.

        Raises:
            OSError, ValueError: there is no such checkpoint.
        """
        from transformers import LlavaOnevisionForConditionalGeneration

        whole = LlavaOnevisionForConditionalGeneration.from_pretrained(model, dtype="auto")
        vision, sizes = whole.model.vision_tower, whole.config.vision_config
        if not has_bfloat16("cuda" if torch.cuda.is_available() else "cpu"):
            vision = vision.float()
        grid = sizes.image_size // sizes.patch_size
        return cls(config or tapped(sizes.num_hidden_layers, grid), vision)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: the tower is frozen."""
        return super().train(False)

    @property
    def hidden_size(self) -> int:
        """Channels of the final tokens."""
        return self._channels

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """Channels of the levels."""
        return (self._channels,) * len(self.config.levels)

    def tokens(self, crops: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Levels and final tokens of one tensor of crops (B, 3, S, S) in [0, 255]."""
        levels, final = self(crops[0] / 127.5 - 1)
        return levels, final

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> tuple[list[Tensor], Tensor]:
        """Tokens of crops (B, 3, S, S) normalised as SigLIP's are, (x / 255 - 0.5) / 0.5.

        Returns:
            L levels (B, N, C), N = grid * grid, and the final tokens (B, N, C), float32.
        """
        dtype = next(self.vision.parameters()).dtype
        layers = (*self.config.levels, self.config.final)
        parts = []
        for some in pixels.to(dtype).split(CROPS_AT_ONCE):
            states = self.vision(some, output_hidden_states=True).hidden_states
            parts.append([states[layer].float() for layer in layers])
        *levels, final = [torch.cat(tokens) for tokens in zip(*parts, strict=True)]
        return levels, final
