"""Image decoder: patch tokens of each level, text features -> zero-shot map (B, h, w) in [0, 1].

AnomalyGPT (AAAI 2024), "Decoder and Prompt Learner": a linear adapter takes each level's patch
tokens to the text features' width; 100 x cosine similarity with the features of the normal and of
the abnormal prompts, softmax, mean over levels. Departs from the released code in one point: maps
are kept on the token grid and resized behind the softmax, because there the crops' maps are
stitched and the references' map joins them.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from looktwice_adapters.ltfm import LOGIT_SCALE

SIDE = 224  # pixels of the published maps


def class_probabilities(stages: list[Tensor], text: Tensor, side: int | None = None) -> Tensor:
    """Each stage's probabilities (L, B, 2, h, w), normal then abnormal.

    Args:
        stages: L tensors (B, N, E), adapted patch tokens, N a square number.
        text: (2, E) or (B, 2, E), text features of unit length.
        side: of the maps, to which logits are resized before the softmax (the released code: 224);
            None: the token grid's.
    """
    grid = round(stages[0].shape[1] ** 0.5)
    logits = torch.stack(
        [
            (LOGIT_SCALE * normalize(stage, dim=-1) @ text.mT).mT.unflatten(2, (grid, grid))
            for stage in stages
        ]
    )
    if side is not None:
        logits = torch.stack([resized(stage, side) for stage in logits])
    return logits.softmax(2)


def resized(maps: Tensor, side: int = SIDE) -> Tensor:
    """Maps (B, K, h, w) at (B, K, side, side), their corners aligned, as in the released code."""
    return interpolate(maps, (side, side), mode="bilinear", align_corners=True)


class ImageDecoder(nn.Module):
    """The linear adapters, and the text features that their output is compared with."""

    text_features: Tensor  # (2, E)

    def __init__(self, level_sizes: tuple[int, ...], text_features: Tensor) -> None:
        """Fresh adapters from C_l channels a level to the width of the text features (2, E)."""
        super().__init__()
        width = text_features.shape[1]
        self.adapters = nn.ModuleList(nn.Linear(size, width) for size in level_sizes)
        self.register_buffer("text_features", text_features.clone())

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Each level's probabilities (L, B, 2, h, w) of L tensors (B, N, C_l), float32."""
        stages = [adapt(level) for level, adapt in zip(levels, self.adapters, strict=True)]
        return class_probabilities(stages, self.text_features)

    def zero_shot_map(self, levels: list[Tensor]) -> Tensor:
        """Mean over levels of the probability "abnormal": (B, h, w)."""
        return self(levels)[:, :, 1].mean(0)
