"""What does not learn in stage 2: a picture -> its tokens, the expert's selection, its facts.

The image tower and the expert of a checkpoint, used as the server uses them: the same crops, tokens
and calibration.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionImageProcessor
from transformers.models.llava_onevision.modeling_llava_onevision import (
    get_anyres_image_grid_shape,
)

from looktwice_adapters.anomaly_map import find_regions, stitch
from looktwice_adapters.anomaly_prompt import adverb_index
from looktwice_adapters.checkpoint import section_beside
from looktwice_adapters.datasets import read_image
from looktwice_adapters.expert import AnomalyExpert, ExpertConfig, ExpertOutput
from looktwice_adapters.facts import facts_sentence, verdict_of

NOT_THE_EXPERTS = ("weights", "phrase_token_ids")  # of the config's section: the server's


@dataclass(frozen=True)
class Sight:
    """One picture as the frozen parts see it."""

    tokens: Tensor  # (B, N, C) of the LLM's tower, the base view first
    selected: Tensor  # (B, 4, C) suspicious tokens
    global_token: Tensor  # (1, C)
    adverb: int  # index into ADVERBS
    size: tuple[int, int]  # height, width in pixels
    grid: tuple[int, int]  # rows, columns of the crops
    facts: str  # the sentence that the server puts behind the picture

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Sight":
        """The same on a device."""
        return replace(
            self,
            tokens=self.tokens.to(device, non_blocking=non_blocking),
            selected=self.selected.to(device, non_blocking=non_blocking),
            global_token=self.global_token.to(device, non_blocking=non_blocking),
        )


def brings_expert(folder: Path) -> bool:
    """Whether a checkpoint's folder has an expert of its own."""
    return "anomaly_expert" in json.loads((folder / "config.json").read_text())


def read_section(folder: Path, expert: Path | None) -> tuple[Path, ExpertConfig | None]:
    """The expert of a checkpoint's folder, or the given file, and its sizes where they are told.

    Raises:
        ValueError: neither names an expert.
    """
    if expert is not None:
        beside = section_beside(expert)
        return expert, ExpertConfig.from_dict(beside) if beside else None
    section = json.loads((folder / "config.json").read_text()).get("anomaly_expert")
    if section is None:
        raise ValueError(f"{folder} brings no anomaly expert: name its file with --expert")
    sizes = {name: value for name, value in section.items() if name not in NOT_THE_EXPERTS}
    return folder / section["weights"], ExpertConfig.from_dict(sizes)


class FrozenSight:
    """A checkpoint's image tower and its expert."""

    def __init__(
        self,
        model: LlavaOnevisionForConditionalGeneration,
        processor: LlavaOnevisionImageProcessor,
        expert: AnomalyExpert,
        device: torch.device,
    ) -> None:
        """Freeze both on the device."""
        self.config: Any = model.config
        self.tower: nn.Module = model.model.vision_tower.requires_grad_(False).eval().to(device)
        self.processor, self.device = processor, device
        self.expert = expert.requires_grad_(False).eval().to(device)

    def read(self, path: Path) -> Sight:
        """Look at a picture's file."""
        return self.look(read_image(path))

    @torch.no_grad()
    def look(self, picture: np.ndarray) -> Sight:
        """Look at a picture (H, W, 3) uint8."""
        size = (picture.shape[0], picture.shape[1])
        image = Image.fromarray(picture)
        pixels = self.processor(image, return_tensors="pt")["pixel_values"][0].to(self.device)
        rows, columns = get_anyres_image_grid_shape(
            size, self.config.image_grid_pinpoints, self.config.vision_config.image_size
        )
        weight = next(self.tower.parameters())
        states = self.tower(pixels.to(weight.dtype), output_hidden_states=True).hidden_states
        tokens, counts = states[self.config.vision_feature_layer], [len(pixels)]
        output = self._judge(pixels, states, counts)
        selected, global_token = self.expert.suspicious_tokens(output, tokens.float(), counts)
        calibration = self.expert.config.calibration
        score = calibration.score(output.score[0].double(), output.significance)
        return Sight(
            tokens,
            selected,
            global_token,
            int(adverb_index(score)),
            size,
            (int(rows), int(columns)),
            self._facts(float(score), output.significance, size, (int(rows), int(columns))),
        )

    def _judge(self, pixels: Tensor, states: Any, counts: list[int]) -> ExpertOutput:
        tower = self.expert.config.tower
        if tower.name == "llm":
            levels = [states[layer].float() for layer in tower.levels]
            return self.expert(levels, states[tower.final].float(), counts)
        return self.expert(*self.expert.tower(pixels.float()), counts)

    def _facts(
        self, score: float, significance: Tensor, size: tuple[int, int], grid: tuple[int, int]
    ) -> str:
        """The facts sentence of a picture without a reference."""
        if verdict_of(score) == "normal":
            return facts_sentence("normal", [])
        extent, side = (size[1], size[0]), self.config.vision_config.image_size
        calibration = self.expert.config.calibration
        whole = calibration.map(stitch(significance.cpu(), grid, extent, side))
        regions = find_regions(whole.numpy(), extent, at_least_one=True)
        return facts_sentence("anomalous", [region.position for region in regions])
