"""Losses of a map against a mask: focal (Lin et al., 2017) and dice (AnomalyGPT, "Loss Functions").

Both take probabilities, not logits, as the published code does (values in `golden/`).
"""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

SMOOTH = 1e-5


def focal_loss(probability: Tensor, target: Tensor, gamma: float = 2.0) -> Tensor:
    """Mean of -(1 - p)^gamma log p, p the probability given to the true class.

    Args:
        probability: (B, K, ...) over K classes.
        target: (B, ...) class numbers.
        gamma: how much easy places are ignored.
    """
    truth = one_hot(target.long(), probability.shape[1]).movedim(-1, 1).float()
    given = (truth.clamp(SMOOTH, 1 - SMOOTH) * probability).sum(1) + SMOOTH
    return (-((1 - given) ** gamma) * given.log()).mean()


def soft_focal_loss(probability: Tensor, label: Tensor, gamma: float = 2.0) -> Tensor:
    """Mean of |label - p|^gamma times the cross-entropy: `focal_loss` for labels between 0 and 1.

    The quality focal loss (Li et al., 2020), lowest where p is the label.

    Args:
        probability: (...) of the class that the label is about.
        label: (...) in [0, 1].
        gamma: how much easy places are ignored.
    """
    entropy = torch.nn.functional.binary_cross_entropy(probability, label, reduction="none")
    return ((label - probability).abs() ** gamma * entropy).mean()


def dice_loss(probability: Tensor, mask: Tensor, smooth: float = 1.0) -> Tensor:
    """One minus the mean overlap 2 |p m| / (|p| + |m|) over the batch.

    Args:
        probability: (B, ...) of the class that the mask marks.
        mask: (B, ...) in [0, 1].
        smooth: added to both sides, so that empty masks count.
    """
    p, m = probability.flatten(1), mask.flatten(1)
    overlap = (2 * (p * m).sum(1) + smooth) / (p.sum(1) + m.sum(1) + smooth)
    return 1 - overlap.mean()


def soft_dice_loss(probability: Tensor, label: Tensor, smooth: float = 1.0) -> Tensor:
    """`dice_loss` with squares below, 2 |p y| / (|p|^2 + |y|^2): least where p is the label itself.

    With sums below, as published for masks, a label of 0.6 would be learnt as 1 (V-Net's dice,
    Milletari et al. 2016, eq. 2).

    Args:
        probability: (B, ...) of the class that the label tells.
        label: (B, ...) in [0, 1].
        smooth: added to both sides, so that empty labels count.
    """
    p, y = probability.flatten(1), label.flatten(1)
    squares = p.square().sum(1) + y.square().sum(1)
    return 1 - ((2 * (p * y).sum(1) + smooth) / (squares + smooth)).mean()


def image_loss(logit: Tensor, label: Tensor) -> Tensor:
    """Binary cross-entropy of image logits (images,) and labels (images,)."""
    return torch.nn.functional.binary_cross_entropy_with_logits(logit, label.to(logit.dtype))
