"""Anomaly expert: multi-level features of an image's crops -> score, map and suspicious tokens.

Anomaly-OV (CVPR 2025), "Anomaly Expert". The parameters carry the names of the authors' released
files (`pretrained_expert_{05b,7b}.pth`), so that those load one to one. It always computes in
float32: in bfloat16 the map moves by more than its levels differ.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from looktwice_adapters.llm_tower import LlmTower
from looktwice_adapters.ltfm import LookTwiceFeatureMatching
from looktwice_adapters.qformer import QFormer
from looktwice_adapters.selector import cell_significance, select_tokens
from looktwice_adapters.threshold import NORMAL, NormalScores
from looktwice_adapters.towers import TimmTower, TowerConfig, fold

PEAK_SHARE = 0.02  # of an image's tokens


def peak_logit(significance: Tensor) -> Tensor:
    """Mean logit () of the most significant 2 % of some tokens (...)."""
    logit = torch.logit(significance.float().flatten(), 1e-6)
    return logit.topk(max(1, round(PEAK_SHARE * len(logit)))).values.mean()


def detail_logit(significance: Tensor) -> Tensor:
    """What an image's map (B, h, w) says of it: the peak () of its grid of crops.

    Its base view, which comes first, shows the same at half the scale or less; what looks unusual
    there alone is seldom a defect (measured in docs/training.md).
    """
    return peak_logit(significance[1:])


@dataclass(frozen=True)
class Calibration:
    """From raw outputs to calibrated ones: sigmoid(scale * logit + bias); 0.5 is the threshold."""

    score_scale: float = 1.0
    score_bias: float = 0.0
    map_scale: float = 1.0
    map_bias: float = 0.0
    peak_scale: float = 0.0  # weight of the map's peak in the score; 0: the head alone
    normal_scores: NormalScores = NORMAL  # of good pictures against references

    @classmethod
    def from_dict(cls, section: dict[str, Any]) -> "Calibration":
        """Read the `calibration` part of a section; unknown keys raise TypeError."""
        values = dict(section)
        if "normal_scores" in values:
            values["normal_scores"] = NormalScores(**values["normal_scores"])
        return cls(**values)

    def score(self, raw: Tensor, significance: Tensor | None = None) -> Tensor:
        """Calibrated score () of one image.

        Args:
            raw: () the head's score in [0, 1].
            significance: (B, h, w) of all its crops, asked for where `peak_scale` is not 0: the
                paper scores with the head alone; a small head follows its own map too loosely.
        """
        logit = self.score_scale * torch.logit(raw, 1e-7) + self.score_bias
        if self.peak_scale:
            if significance is None:
                raise ValueError("this calibration needs the image's significance maps")
            logit = logit + self.peak_scale * detail_logit(significance)
        return torch.sigmoid(logit)

    def map(self, significance: Tensor) -> Tensor:
        """Calibrated map of the significance in [0, 1]."""
        return torch.sigmoid(self.map_scale * torch.logit(significance, 1e-7) + self.map_bias)


@dataclass(frozen=True)
class ExpertConfig:
    """Sizes of an expert; the defaults are those of the released files (SigLIP so400m/14@384)."""

    level_sizes: tuple[int, ...] = (1152, 1152, 1152, 1152)
    hidden_size: int = 1152
    embed_size: int = 512
    key_size: int = 512
    head_size: int = 512
    matchings: int = 1  # how many, trained from other seeds, the map is the mean of
    tower: TowerConfig = field(default_factory=TowerConfig)
    llm_hidden_size: int | None = None  # the LLM tower's channels, where it is not the expert's own
    calibration: Calibration = field(default_factory=Calibration)

    @classmethod
    def from_dict(cls, section: dict[str, Any]) -> "ExpertConfig":
        """Read a checkpoint's `anomaly_expert` section; unknown keys raise TypeError."""
        values = dict(section)
        if "level_sizes" in values:
            values["level_sizes"] = tuple(values["level_sizes"])
        if "tower" in values:
            values["tower"] = TowerConfig.from_dict(values["tower"])
        if "calibration" in values:
            values["calibration"] = Calibration.from_dict(values["calibration"])
        return cls(**values)


class ExpertOutput(NamedTuple):
    """What the expert says about the B crops of some images."""

    significance: Tensor  # (B, h, w) in [0, 1]
    crop_significance: Tensor  # (B,) mean of a crop's map
    selected: Tensor  # (B, 4, C) suspicious tokens
    global_token: Tensor  # (images, C)
    score: Tensor  # (images,) raw score in [0, 1]

    @property
    def logit(self) -> Tensor:
        """The score before the sigmoid (images,)."""
        return torch.logit(self.score, 1e-7)


def weighted_mean(selected: Tensor, significance: Tensor, crops_per_image: list[int]) -> Tensor:
    """An image's global token: its selected tokens averaged by cell x crop significance.

    Args:
        selected: (B, 4, C).
        significance: (B, h, w).
        crops_per_image: how many of the B crops belong to each image.

    Returns:
        (images, C).
    """
    crop = significance.mean((1, 2))  # (B,)
    weight = cell_significance(significance) * crop.unsqueeze(-1)  # (B, 4)
    tokens = []
    for chosen, share in zip(
        selected.split(crops_per_image), weight.split(crops_per_image), strict=True
    ):
        share = share.clamp_min(torch.finfo(torch.float32).tiny)
        tokens.append((chosen * share.unsqueeze(-1)).sum((0, 1)) / share.sum())
    return torch.stack(tokens)


class AnomalyExpert(LookTwiceFeatureMatching):
    """Look-twice feature matching, visual token selector and the two-layer score head.

    It extends the matching instead of holding it because the released files name the matching's
    parameters at the top level.
    """

    tower: TimmTower | LlmTower  # the LLM's is given to it where its own process must look

    def __init__(self, config: ExpertConfig) -> None:
        """Build an expert of the given sizes with fresh weights."""
        patches = config.tower.grid**2
        sizes = (config.level_sizes, config.hidden_size, config.embed_size, patches)
        super().__init__(*sizes)
        self.config = config
        # Of made-up defects each run learns something else; their mean holds for others better.
        self.others = nn.ModuleList(
            LookTwiceFeatureMatching(*sizes) for _ in range(config.matchings - 1)
        )
        self.final_predictor = nn.Sequential(
            nn.Linear(config.hidden_size, config.head_size),
            nn.GELU(),
            nn.Linear(config.head_size, 1),
        )
        self.q_former = QFormer(config.hidden_size, config.key_size)
        if config.llm_hidden_size is not None:
            self.llm_q_former = QFormer(config.llm_hidden_size, config.key_size)
        if config.tower.name != "llm":
            self.tower = TimmTower(config.tower)

    def load(self, state: dict[str, Tensor]) -> Self:
        """Take a file's weights, in float32, to judge with; from here on it cannot be trained."""
        self.load_state_dict({name: value.float() for name, value in state.items()})
        if self.config.tower.name != "llm":
            fold(self.own_tower.network)
        return self.eval().requires_grad_(False)

    def significance_map(
        self, levels: list[Tensor], final: Tensor, crops_per_image: list[int]
    ) -> Tensor:
        """Significance (B, h, w) in [0, 1]: the mean of all matchings' maps."""
        maps = [super().significance_map(levels, final, crops_per_image)]
        for other in self.others:
            assert isinstance(other, LookTwiceFeatureMatching)
            maps.append(other.significance_map(levels, final, crops_per_image))
        return torch.stack(maps).mean(0)

    @property
    def own_tower(self) -> TimmTower:
        """The tower whose weights are in the expert's file; an expert on the LLM's has none."""
        assert isinstance(self.tower, TimmTower)
        return self.tower

    def forward(
        self, levels: list[Tensor], final: Tensor, crops_per_image: list[int]
    ) -> ExpertOutput:
        """Judge some images by the tokens of their crops.

        Args:
            levels: L tensors (B, N, C_l), float32.
            final: (B, N, C) float32; an image's first crop is its base view.
            crops_per_image: how many of the B crops belong to each image, in order.
        """
        significance = self.significance_map(levels, final, crops_per_image)
        return self.look_again(final, significance, crops_per_image)

    def look_again(
        self, final: Tensor, significance: Tensor, crops_per_image: list[int]
    ) -> ExpertOutput:
        """Select suspicious tokens by a significance map, the expert's own or a fused one.

        Args:
            final: (B, N, C) float32.
            significance: (B, h, w) in [0, 1].
            crops_per_image: how many of the B crops belong to each image, in order.
        """
        selected = select_tokens(self.q_former, final, significance)
        global_token = weighted_mean(selected, significance, crops_per_image)
        score = torch.sigmoid(self.final_predictor(global_token)).squeeze(-1)
        return ExpertOutput(significance, significance.mean((1, 2)), selected, global_token, score)

    def patch_tokens(self, levels: list[Tensor]) -> list[Tensor]:
        """The tapped levels' own tokens L x (B, N, C_l), without what a tower appends to them."""
        if self.config.tower.name == "llm":
            return levels
        sizes = self.own_tower.stage_sizes
        return [level[..., :size] for level, size in zip(levels, sizes, strict=True)]

    def suspicious_tokens(
        self, output: ExpertOutput, llm_tokens: Tensor, crops_per_image: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Selected tokens (B, 4, C) and global tokens (images, C) in the LLM tower's space.

        Where the expert looks through the LLM's own tower they are its own; else the same map,
        resampled to the LLM tower's grid, selects among `llm_tokens` (B, N', C').
        """
        if self.config.llm_hidden_size is None:
            return output.selected, output.global_token
        selected = select_tokens(self.llm_q_former, llm_tokens, output.significance)
        return selected, weighted_mean(selected, output.significance, crops_per_image)
