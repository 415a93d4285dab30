"""Look-twice feature matching: multi-level patch tokens -> significance map (B, h, w) in [0, 1].

Anomaly-OV (CVPR 2025), "Look-Twice Feature Matching": the base view's tokens describe the class of
the part; the description, joined to a learnable normal and a learnable abnormal embedding, becomes
a pair of prompts a level; each patch token is matched with both.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

# Cosine similarities are multiplied by this before the softmax, as published.
LOGIT_SCALE = 100.0


class LookTwiceFeatureMatching(nn.Module):
    """Match every patch token with a normal and an abnormal prompt (names as in the released file).

    Args:
        level_sizes: channels C_l of each of the L levels.
        hidden_size: channels C of the final tokens, from which the class is described.
        embed_size: width of the space in which tokens and prompts are compared.
        patches: N, patch tokens a crop.
    """

    def __init__(
        self, level_sizes: tuple[int, ...], hidden_size: int, embed_size: int, patches: int
    ) -> None:
        """Build the layers, normal embedding first ("positive")."""
        super().__init__()
        self.positive_embedding = nn.Parameter(torch.randn(1, embed_size) * embed_size**-0.5)
        self.negative_embedding = nn.Parameter(torch.randn(1, embed_size) * embed_size**-0.5)
        self.pooling_layer = nn.Sequential(nn.Linear(patches, 1))
        self.class_predictor = nn.Sequential(
            nn.Linear(hidden_size, embed_size), nn.GELU(), nn.Linear(embed_size, embed_size)
        )
        self.siglip_adaptors = nn.ModuleList(nn.Linear(size, embed_size) for size in level_sizes)
        self.prompt_adaptors = nn.ModuleList(
            nn.Linear(2 * embed_size, embed_size) for _ in level_sizes
        )

    def describe_class(self, final: Tensor, crops_per_image: list[int]) -> Tensor:
        """The class description of each image's base view, repeated for its crops: (B, E)."""
        counts = torch.tensor(crops_per_image, device=final.device)
        base = final[counts.cumsum(0) - counts]  # (images, N, C): an image's first crop
        pooled = self.pooling_layer(base.transpose(1, 2)).squeeze(-1)  # (images, C)
        return self.class_predictor(pooled).repeat_interleave(counts, dim=0)

    def match(self, levels: list[Tensor], final: Tensor, crops_per_image: list[int]) -> Tensor:
        """Each level's logits (L, B, N, 2), normal then abnormal, before the softmax."""
        described = self.describe_class(final, crops_per_image)  # (B, E)
        sides = [
            torch.cat((embedding.expand_as(described), described), dim=-1)
            for embedding in (self.positive_embedding, self.negative_embedding)
        ]
        logits = []
        for level, adapt, prompt in zip(
            levels, self.siglip_adaptors, self.prompt_adaptors, strict=True
        ):
            tokens = normalize(adapt(level), dim=-1)  # (B, N, E)
            prompts = normalize(torch.stack([prompt(side) for side in sides], 1), dim=-1)
            logits.append(LOGIT_SCALE * tokens @ prompts.transpose(1, 2))  # (B, N, 2)
        return torch.stack(logits)

    def significance_map(
        self, levels: list[Tensor], final: Tensor, crops_per_image: list[int]
    ) -> Tensor:
        """Significance of every patch: mean over levels of the probability "abnormal".

        Args:
            levels: L tensors (B, N, C_l), float32, N a square number.
            final: (B, N, C), the tower's last tokens; an image's first crop is its base view.
            crops_per_image: how many of the B crops belong to each image, in order.

        Returns:
            (B, h, w) in [0, 1], h = w = sqrt(N).
        """
        significance = self.match(levels, final, crops_per_image).softmax(-1)[..., 1].mean(0)
        side = round(significance.shape[-1] ** 0.5)
        return significance.unflatten(-1, (side, side))
