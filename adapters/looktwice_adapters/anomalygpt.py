"""AnomalyGPT's trained parts: an expert tower's levels -> map and score, map -> prompt embeddings.

AnomalyGPT (Gu et al., AAAI 2024): image decoder and prompt learner, in the place of Anomaly-OV's
matching, selector and head, on the levels of the same tower. A file of theirs says its own sizes.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from looktwice_adapters.checkpoint import file_hash
from looktwice_adapters.decoder import ImageDecoder
from looktwice_adapters.expert import Calibration, peak_logit
from looktwice_adapters.prompt_learner import CHANNELS, PromptLearner

# Of the file in a checkpoint's folder, and of its tensors' names: vLLM reads them with the model's.
FILE_NAME = "decoder.safetensors"
PREFIX = "anomalygpt."


class DecoderFileError(ValueError):
    """The file holds no trained decoder and prompt learner, or not ones that fit."""


@dataclass(frozen=True)
class AnomalyGPTConfig:
    """Sizes, and what the parts were trained for."""

    level_sizes: tuple[int, ...]
    text_size: int
    llm_size: int
    text_tower: str  # that made the text features: open_clip's name of it and of its weights
    expert: str  # hash of the expert's file whose tower made the levels
    channels: tuple[int, ...] = CHANNELS  # of the prompt learner's blocks
    calibration: Calibration = field(default_factory=Calibration)

    def check(self, expert: Path, llm_size: int) -> None:
        """Compare with the checkpoint that the parts are to judge for.

        Args:
            expert: its expert's file.
            llm_size: of its language model's embeddings.

        Raises:
            DecoderFileError: they were trained for another.
        """
        found = f"expert {file_hash(expert)} and embeddings of {llm_size}"
        trained = f"expert {self.expert} and embeddings of {self.llm_size}"
        if found != trained:
            raise DecoderFileError(
                f"the decoder was trained for {trained}, this checkpoint has {found}; "
                "train one for it with `looktwice train decoder`"
            )

    @classmethod
    def from_dict(cls, section: dict[str, Any]) -> Self:
        """Read what `asdict` wrote; unknown keys raise TypeError."""
        values = dict(section)
        for name in ("level_sizes", "channels"):
            values[name] = tuple(values[name])
        values["calibration"] = Calibration.from_dict(values["calibration"])
        return cls(**values)


class DecoderOutput(NamedTuple):
    """What the decoder says about the B crops of some images."""

    significance: Tensor  # (B, h, w) in [0, 1]
    score: Tensor  # (images,) raw score in [0, 1]
    prompts: Tensor  # (images, 18, D), of each image's base view


class AnomalyGPT(nn.Module):
    """Image decoder and prompt learner; always float32."""

    def __init__(self, config: AnomalyGPTConfig, text_features: Tensor | None = None) -> None:
        """Build both with fresh weights; without text features (2, E) a file must bring them."""
        super().__init__()
        self.config = config
        if text_features is None:
            text_features = torch.zeros(2, config.text_size)
        self.decoder = ImageDecoder(config.level_sizes, text_features)
        self.prompt_learner = PromptLearner(config.llm_size, config.channels)

    def forward(
        self, levels: list[Tensor], final: Tensor, crops_per_image: list[int]
    ) -> DecoderOutput:
        """Judge some images by the tokens of their crops, called as an AnomalyExpert is.

        Args:
            levels: L tensors (B, N, C_l), float32.
            final: not looked at.
            crops_per_image: how many of the B crops belong to each image, in order.
        """
        significance = self.significance_map(levels, final, crops_per_image)
        return self.look_again(final, significance, crops_per_image)

    def significance_map(
        self, levels: list[Tensor], final: Tensor, crops_per_image: list[int]
    ) -> Tensor:
        """The decoder's zero-shot map (B, h, w) in [0, 1]; of the levels alone."""
        return self.decoder.zero_shot_map(levels)

    def look_again(
        self, final: Tensor, significance: Tensor, crops_per_image: list[int]
    ) -> DecoderOutput:
        """Score and prompt embeddings by a map, the decoder's own or one with the references'.

        Args:
            final: not looked at.
            significance: (B, h, w) in [0, 1].
            crops_per_image: an image's first crop is its base view, the whole picture.
        """
        images = significance.split(crops_per_image)
        score = torch.sigmoid(torch.stack([peak_logit(crops) for crops in images]))
        base = torch.stack([crops[0] for crops in images])
        return DecoderOutput(significance, score, self.prompt_learner(base))

    def save(self, path: Path) -> None:
        """Write weights, and in their header the sizes."""
        state = {PREFIX + name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(state, path, {"anomalygpt": json.dumps(asdict(self.config))})

    @classmethod
    def load(cls, path: Path) -> Self:
        """The parts that `save` wrote, ready to judge.

        Raises:
            DecoderFileError: the file is missing, unreadable or holds something else.
        """
        if not path.is_file():
            raise DecoderFileError(f"no decoder at {path}")
        try:
            with safe_open(path, "pt") as file:
                model = cls(AnomalyGPTConfig.from_dict(json.loads(file.metadata()["anomalygpt"])))
                state = {name.removeprefix(PREFIX): file.get_tensor(name) for name in file.keys()}
            model.float().load_state_dict(state)  # vLLM builds models under another default
        except (OSError, SafetensorError, TypeError, KeyError, ValueError, RuntimeError) as error:
            raise DecoderFileError(
                f"{path} holds no decoder, or not all of one; `looktwice train decoder` writes them"
            ) from error
        return model.eval().requires_grad_(False)
