"""Sections of the served config -> the expert's sizes, weights file and phrase; who judges.

The launcher writes `anomaly_expert`, and `anomalygpt` where its decoder takes the expert's place,
into the config that vLLM hands to every process; the checkpoint on disk stays as it is.
"""

import json
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from looktwice_adapters.anomalygpt import AnomalyGPT
from looktwice_adapters.checkpoint import (
    ExpertFileError,
    check_state,
    read_expert,
    released_config,
)
from looktwice_adapters.expert import Calibration, ExpertConfig


@dataclass(frozen=True)
class ExpertSection:
    """What the section says."""

    weights: Path
    config: ExpertConfig
    phrase_token_ids: tuple[tuple[int, ...], ...]  # of the three adverbs, equally long

    @classmethod
    def from_config(cls, hf_config: Any) -> Self:
        """Read the section of a checkpoint's config.

        Raises:
            ExpertFileError: the sizes have to be read off the file, and it is no expert.
        """
        section = dict(hf_config.anomaly_expert)
        weights = Path(section.pop("weights"))
        phrases = tuple(tuple(ids) for ids in section.pop("phrase_token_ids"))
        config = (
            ExpertConfig.from_dict(section) if section else released_config(read_expert(weights))
        )
        return cls(weights, config, phrases)

    def check(self, vision: Any) -> None:
        """Compare the file with the sizes, and the sizes with the LLM's image tower.

        Args:
            vision: the checkpoint's `vision_config`.

        Raises:
            ExpertFileError: it is missing, unreadable or does not fit.
        """
        check_state(read_expert(self.weights), self.config)
        tower, channels = self.config.tower, self.config.llm_hidden_size or self.config.hidden_size
        wanted_and_there = {"channels": (channels, vision.hidden_size)}
        if tower.name == "llm":
            depth = max(*tower.levels, tower.final)
            side = vision.image_size // vision.patch_size
            wanted_and_there |= {
                "tokens a side": (tower.grid, side),
                "layers": (depth, min(depth, vision.num_hidden_layers)),
            }
        for what, (number, there) in wanted_and_there.items():
            if number != there:
                raise ExpertFileError(
                    f"{self.weights} belongs to another checkpoint: it wants an image tower of "
                    f"{number} {what}, this one has {there}"
                )


def decoder_file(hf_config: Any) -> Path | None:
    """The file of AnomalyGPT's trained parts, where they judge pictures."""
    section = getattr(hf_config, "anomalygpt", None)
    return None if section is None else Path(section["weights"])


def judging_file(hf_config: Any) -> tuple[Path, Calibration]:
    """The file whose weights judge pictures, and the calibration that goes with them."""
    decoder = decoder_file(hf_config)
    if decoder is not None:
        return decoder, AnomalyGPT.load(decoder).config.calibration
    section = ExpertSection.from_config(hf_config)
    return section.weights, section.config.calibration


def calibration_hash(hf_config: Any) -> str:
    """The name, 16 hexadecimal digits, of all that the section says beside its weights.

    Evidence against a reference follows it as it follows them. A decoder's own calibration lies in
    its file.
    """
    config = asdict(ExpertSection.from_config(hf_config).config)
    return sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
